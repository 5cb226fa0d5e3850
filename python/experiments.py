"""Runs studies of many training runs each: ``python python/experiments.py --help``."""

import signal
import sys

try:
    from studies.command import main
except ModuleNotFoundError as error:
    print(f'experiments.py: {error.name} is not installed: pip install -e ".[train]"', file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # kill or a closed terminal stop a study as Ctrl-C does
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
