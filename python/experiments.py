"""Studies: many training runs, and what they say together: ``python python/experiments.py --help``."""

import signal
import sys

try:
    from studies.command import main
except ModuleNotFoundError as missing:
    print(f'experiments.py: {missing.name} is not installed: pip install -e ".[train]"', file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):  # kill, or a closed terminal, ends a study as Ctrl-C does
        signal.signal(ending, signal.default_int_handler)
    sys.exit(main())
