from udi_trainer import distributed
from udi_trainer.command import main

distributed.exit_process(main(prog="udi_trainer"))
