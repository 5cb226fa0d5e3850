from typing import NoReturn

from . import command, distributed


def main() -> NoReturn:
    """``python -m udi_trainer`` and its console script, ``udi-train``."""
    distributed.leave(command.main(prog="udi_trainer"))


if __name__ == "__main__":
    main()
