"""The command: runs a study, saves its records, and publishes tables and plots."""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from udi_trainer.command import Parser, argument
from udi_trainer.errors import UserError
from udi_trainer.options import number

from . import questions  # noqa: F401  the import registers them
from .machine import find_slots, git_version, hardware
from .records import load, save
from .registry import studies
from .runner import Job, run_all
from .study import Study


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command = f"python python/experiments.py {shlex.join(argv)}"
    try:
        options, extra = parse(argv)
        study = studies.find(options.study)()
        folder = options.out or Path("results") / options.study
        if options.report:
            results = load(folder / "results.json")
        else:
            commit, extra = git_version(), study.prepare(extra)
            seeds = options.seeds or list(range(study.seeds) if isinstance(study.seeds, int) else study.seeds)
            jobs = [Job(study, v, seed, extra, folder / "runs") for v in study.variants for seed in seeds]
            for flag in (token for token in extra if token.startswith("--")):
                if not any(token.startswith(flag.partition("=")[0]) for job in jobs for token in job.extra):
                    raise UserError(f"{flag}: no variant of {options.study} reads it")
            slots = find_slots(jobs[0].resolved.get("device"), options.jobs)
            failed = run_all([job for job in jobs if not job.finished()], slots, commit)
            results = {"study": options.study, "command": command, "options": extra, "seeds": seeds}
            results |= {"commit": commit, "hardware": hardware(), "torch": torch.__version__}
            results |= {"runs": [job.record() for job in jobs if job.finished()], "failed": failed}
            save(folder / "results.json", results)
        publish(study, results, folder)
        return 1 if results["failed"] else 0
    except UserError as error:
        print(f"experiments.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nexperiments.py: interrupted; continue with the same command: {command}", file=sys.stderr)
        return 130


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the study, and the remaining ones, which belong to the trainer."""
    epilog = "studies:\n" + "".join(f"  {name:<12} {study.__doc__}\n" for name, study in studies.items())
    parser = Parser(
        prog="experiments.py",
        description="Runs a study: trains its variants with several seeds, and writes results.json, table.md and plots."
        "\nAfter an interruption, the same command continues. All other options are passed to every run, such as"
        "\n--data-root DIR, --epochs N, --device D; python python/train.py --help explains them.",
        epilog=epilog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("study", metavar="NAME", help="study to run, one of the list below")
    parser.add_argument("--seeds", type=argument(seeds), metavar="N", help="0 to N-1, or a list such as 0,3,7 (default:"
        " 5, or what the study sets)")  # fmt: skip
    parser.add_argument("--jobs", type=argument(number(int, 1)), metavar="N", help="parallel runs (default: one per GPU"
        " or core)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: results/NAME)")
    parser.add_argument("--report", action="store_true", help="only rewrite the table and plots from results.json")
    options, extra = parser.parse_known_args(argv)
    for flag in ("--seed", "--resume"):
        if any(x == flag or x.startswith(f"{flag}=") for x in extra):
            raise UserError(f"{flag} is for a single run: a study takes --seeds and resumes automatically")
    if options.report and (extra or options.seeds):
        raise UserError(f"--report only reads results.json: leave out {' '.join(extra) or '--seeds'}")
    return options, extra


def seeds(text: str) -> list[int]:
    """``5``: seeds 0 to 4; ``0,3,7``: these seeds; ``3,``: only seed 3."""
    if "," not in text:
        return list(range(number(int, 1)(text)))
    return list(dict.fromkeys(number(int, 0)(part) for part in text.split(",") if part))


def publish(study: Study, results: dict, folder: Path):
    """Prints the table, and writes it and the plots to the folder."""
    failed = [f"Failed: {f['variant']}, seed {f['seed']}: {f['error'].splitlines()[-1]}" for f in results["failed"]]
    if not results["runs"]:
        raise UserError(f"all runs of {results['study']} failed. " + " ".join(failed[:1]))
    text = "\n\n".join([study.tables(results["runs"]), *study.notes(results["runs"]), *failed])
    plots = "\n\n".join(f"![]({name})" for name in study.draw(results["runs"], folder))
    machine = results["hardware"]
    commits = ", ".join(sorted({commit for run in results["runs"] for commit in run["commits"]})) or "unknown"
    on = f"{machine['cpu']}, {machine['cores']} cores" + "".join(f", {gpu}" for gpu in machine["gpus"])
    head = f"# {results['study']}\n\n{study.__doc__}\n\n```\n{results['command']}\n```\n\n"
    head += f"Commit {commits}; torch {results['torch']}; {on}.\n\n"
    (folder / "table.md").write_text(f"{head}{text}\n\n{plots}\n")
    print(f"{text}\n\nsee {folder}: table.md, results.json, plots")
