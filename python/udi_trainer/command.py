"""The command line, generated from the options."""

import argparse
import contextlib
import functools
import os
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import distributed, predict
from .api import Training, restored
from .console import console, say
from .data import scan
from .errors import UserError, choose
from .options import (
    ExperimentOptions,
    Group,
    MachineOptions,
    Options,
    TrainingOptions,
    all_groups,
    as_text,
    fields_of,
    filled,
    groups_of,
    names,
    own_modules,
    readers,
    recipe_of,
    spelled,
)
from .registry import datasets
from .stop import Stop


def main(argv: list[str] | None = None, prog: str = "train.py") -> int:
    folder, options, stop, argv = None, None, Stop(), sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["manifest"]:
            return scan.main(argv[1:], prog)
        if argv[:1] == ["predict"]:
            see_working_folder()
            return predict.main(argv[1:], prog)
        with stop.on_signals(), distributed.process_group(), console(distributed.first()):
            options, folder = parse(argv, prog)
            training = Training(options)
            folder = folder or training.new_folder()
            result = training.run(folder, stop)
            if distributed.first():
                total = result.metrics["seconds"]["total"]
                say(f"\n{result.table()}\n\n{total:.1f} s; see {folder}/report.png and metrics.json", sys.stdout)
        return 0
    except UserError as error:
        say(f"{prog}: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        number, reason = stop.signal_number or signal.SIGINT, "interrupted"
    except BrokenPipeError:
        number, reason = signal.SIGPIPE, "its output is no longer read"
        with contextlib.suppress(OSError):  # Python would flush the rest of the buffer at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and os.environ["RANK"] != "0":
        return 128 + number
    command = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE')}" if several else "python"
    command += f" {sys.argv[0]}" if prog == "train.py" else " -m udi_trainer"
    resume = f"; continue with: {command} --resume {shlex.quote(str(folder))}" if folder else ""
    if folder and options and (own := own_modules(options.flat())):
        resume += f" --trust {','.join(own)}"
    with contextlib.suppress(OSError):
        print(f"\n{prog}: {reason}{resume}", file=sys.stderr)
    return 128 + number


def parse(argv: list[str], prog: str = "train.py") -> tuple[Options, Path | None]:
    """The options, and the folder of the run to resume, if there is one."""
    first = Parser(add_help=False, allow_abbrev=False)  # what decides which other options there are
    first.add_argument("--method")
    first.add_argument("--recipe")
    first.add_argument("--dataset", default=Options.dataset)
    first.add_argument("--baselines")
    first.add_argument("-h", "--help", nargs="?", const="chosen")
    chosen, _ = first.parse_known_args(argv)
    see_working_folder()
    method = chosen.method or recipe_of(chosen.recipe, None).get("method", Options.method)
    own = groups_of(readers(method, chosen.baselines, chosen.dataset))
    if chosen.help:
        if chosen.help not in ("chosen", "all"):
            raise UserError(f"unknown help {chosen.help!r}: use --help or --help all")
        full_parser(prog, own, hidden=chosen.help != "all").print_help()
        sys.exit(0)
    given = vars(full_parser(prog, own).parse_args(argv))
    folder, trust = given.pop("resume"), given.pop("trust")
    if folder is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        folder = restarted(given)
    if folder is None:
        choose("dataset", given.get("dataset", Options.dataset), datasets)
        return Options.make(**given), None
    folder, options = restored(folder, given, trust=trust)
    return options, folder


def see_working_folder() -> None:
    """Lets the user's own modules be imported from the working folder, as with python -m."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def full_parser(prog: str, own: Sequence[type[Group]], hidden: bool = False) -> "Parser":
    """A parser of all options: those of every run, those of the method and data set, and all others.

    ``hidden``: leave the others out of the help.
    """
    layout = functools.partial(argparse.HelpFormatter, max_help_position=26, width=110)
    text = (
        "Two-phase training of Unidirectional Dynamic Interaction, and of its baselines. To write a manifest of a"
        f" folder's files, see: {prog} manifest --help; to predict new files: {prog} predict --help."
    )
    end = "Options of other methods and data sets: --help all." if hidden else None
    parser = Parser(prog=prog, description=text, epilog=end, formatter_class=layout, add_help=False)
    others = [group for group in all_groups() if group not in own]
    sections: dict[str, Any] = {}
    groups: list[type[Group]] = [ExperimentOptions, *own, TrainingOptions, MachineOptions, *others]
    for group in groups:
        section = sections.setdefault(group.title, None) or parser.add_argument_group(group.title)
        sections[group.title] = section
        for field in fields_of(group).values():
            facts = field.metadata
            default = facts["shown"] or field.default
            shown = "" if default is None or isinstance(default, bool) else f" (default: {as_text(default)})"
            kind: dict[str, Any] = {"help": filled(facts["help"] + shown), "default": argparse.SUPPRESS}
            if hidden and group in others:
                kind["help"] = argparse.SUPPRESS
            if isinstance(field.default, bool):
                kind["action"] = "store_true"
            else:
                number = not {int, float}.isdisjoint((field.type, *typing.get_args(field.type)))
                kind |= {"type": argument(facts["kind"]), "metavar": facts["metavar"] or ("N" if number else "NAME")}
            if field.name == "amp":
                kind |= {"nargs": "?", "const": "bf16"}
            section.add_argument(spelled(field.name), **kind)
    more = parser.add_argument_group("resuming and help")
    more.add_argument("--resume", metavar="DIR", help="continue the run in this folder, with its options")
    more.add_argument(
        "--trust",
        type=argument(names),
        metavar="MODULE,...",
        default=(),
        help="modules of your own that may be imported because the folder to resume names them",
    )
    text = "show this help; with all, the options of all methods and data sets"
    more.add_argument("-h", "--help", nargs="?", metavar="all", default=argparse.SUPPRESS, help=text)
    return parser


def readable(extra: list[str], options: Options, prog: str) -> list[str]:
    """Those of these arguments that a run with such options reads."""
    given = vars(full_parser(prog, []).parse_args(extra))
    read = options.fields()
    tokens = ((spelled(name), as_text(value)) for name, value in given.items() if name in read)
    return [token for flag, text in tokens for token in ((flag,) if text == "True" else (flag, text))]


def restarted(given: dict) -> str | None:
    """The folder of the run that torchrun started before with these options, if any: restarts look like starts."""
    if "out" not in given:
        raise UserError("torchrun --max-restarts needs --out DIR, to find the run again")
    begun = distributed.on_first(lambda: (Path(given["out"]) / "config.json").exists())
    return given.pop("out") if begun else None


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def argument(kind: Callable) -> Callable:
    """A type for argparse, which shows the text of ArgumentTypeError only."""

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
