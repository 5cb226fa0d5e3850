from typing import NoReturn

from . import command, distributed


def main() -> NoReturn:
    """``python -m udi_trainer`` and its console script, ``udi-train``."""
    distributed.exit_process(command.main(prog="udi-train"))


if __name__ == "__main__":
    main()
