import sys

from udi_trainer.command import main

sys.exit(main(prog="udi_trainer"))
