"""Two-phase training of Unidirectional Dynamic Interaction, and of its baselines: ``python python/train.py --help``."""

import sys

try:
    from udi_trainer import distributed
    from udi_trainer.command import main
except ModuleNotFoundError as missing:
    print(f"train.py: {missing}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    distributed.exit_process(main())
