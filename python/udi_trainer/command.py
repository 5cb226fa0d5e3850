"""The command line, made from the options."""

import argparse
import contextlib
import dataclasses
import functools
import os
import shlex
import signal
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from . import distributed
from .api import Plan, restored
from .console import console
from .data import scan
from .errors import UserError
from .options import Options, as_text, filled, spelled
from .stop import Stop


def main(argv: list[str] | None = None, prog: str = "train.py") -> int:
    folder, stop, argv = None, Stop(), sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["manifest"]:
            return scan.main(argv[1:], prog)
        with stop.on_signals(), distributed.process_group(), console(distributed.first()):
            options, folder = parse(argv, prog)
            plan = Plan(options)
            folder = folder or plan.new_folder()
            result = plan.run(folder, stop)
            if distributed.first():
                total = result.metrics["seconds"]["total"]
                print(f"\n{result.table()}\n\n{total:.1f} s; see {folder}/report.png and metrics.json", flush=True)
        return 0
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        number, reason = stop.signal_number or signal.SIGINT, "interrupted"
    except BrokenPipeError:
        number, reason = signal.SIGPIPE, "nobody reads its output"
        with contextlib.suppress(OSError):  # what is still in the buffer would be tried again at the end of the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and os.environ["RANK"] != "0":
        return 128 + number
    command = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE')}" if several else "python"
    command += f" {sys.argv[0]}" if prog == "train.py" else " -m udi_trainer"
    resume = f"; go on with: {command} --resume {shlex.quote(str(folder))}" if folder else ""
    with contextlib.suppress(OSError):
        print(f"\n{prog}: {reason}{resume}", file=sys.stderr)
    return 128 + number


def parse(argv: list[str], prog: str = "train.py") -> tuple[Options, Path | None]:
    """The options, and the folder of the run to resume, if that is asked for."""
    layout = functools.partial(argparse.HelpFormatter, max_help_position=26, width=110)
    text = (
        "Two-phase training of Unidirectional Dynamic Interaction, and of its baselines. The word manifest in the place"
        " of options writes a manifest of a folder's files: manifest --help."
    )
    parser = Parser(prog=prog, description=text, formatter_class=layout)
    groups = {}
    for field in dataclasses.fields(Options):
        facts = field.metadata
        if facts["group"] not in groups:
            groups[facts["group"]] = parser.add_argument_group(facts["group"])
        default = facts["shown"] or field.default
        shown = "" if default is None or isinstance(default, bool) else f" (default: {as_text(default)})"
        kind: dict[str, Any] = {"help": filled(facts["help"]) + shown, "default": argparse.SUPPRESS}
        if isinstance(field.default, bool):
            kind["action"] = "store_true"
        else:
            number = not {int, float}.isdisjoint((field.type, *typing.get_args(field.type)))
            kind |= {"type": argument(facts["kind"]), "metavar": facts["metavar"] or ("N" if number else "NAME")}
        if field.name == "amp":
            kind |= {"nargs": "?", "const": "bf16"}
        groups[facts["group"]].add_argument(spelled(field.name), **kind)
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, with its options")
    given = vars(parser.parse_args(argv))
    folder = given.pop("resume")
    if folder is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        folder = restarted(given)
    if folder is None:
        return Options.make(**given), None
    folder, options = restored(folder, given)
    return options, folder


def restarted(given: dict) -> str | None:
    """The folder of the run that torchrun has begun with these options, if it has; it starts all processes alike."""
    if "out" not in given:
        raise UserError("torchrun --max-restarts needs --out DIR, to find the run again")
    begun = distributed.on_first(lambda: (Path(given["out"]) / "config.json").exists())
    return given.pop("out") if begun else None


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def argument(kind: Callable) -> Callable:
    """As argparse takes it, which hides the words of any other error."""

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
