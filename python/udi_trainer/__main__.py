from udi_trainer import distributed
from udi_trainer.command import main

distributed.leave(main(prog="udi_trainer"))
