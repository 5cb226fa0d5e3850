"""The base class of studies, and its parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from udi_trainer.command import parse, readable
from udi_trainer.errors import choose
from udi_trainer.options import movable
from udi_trainer.registry import datasets, methods
from udi_trainer.run import choose_device

from . import plots, tables

PROG = "experiments.py"
SCORES = ("val_acc", "test_acc", "test_macro_f1")
NOISE = {"": "", "noisy training": "--noise 0.2,0.2"}  # options by condition

SEEDING = """\
Seeds change the initial weights and the order of samples, but not the split, so intervals do not
cover other test samples."""
RESPLIT = "Seeds also draw the split and the samples that have labels."


@dataclass
class Variant:
    """Runs that differ only in their seed, and their options. Variants of one condition share baselines."""

    name: str
    options: str
    condition: str = ""

    def __str__(self):
        return f"{self.condition}: {self.name}" if self.condition else self.name


@dataclass
class Entry:
    """The scores of one run for one line of a table."""

    section: str
    name: str
    scores: dict[str, float]
    baseline: bool = False
    collapsed: str = ""  # the reason, if it collapsed


class Study:
    """A study. Its docstring is the question. ``records``: the records of its runs in results.json."""

    seeds: int | range = 5
    seeding = SEEDING  # describes what seeds change
    unit = "seed"  # of dots in plots and of intervals
    program = Path(__file__).parents[1] / "train.py"
    variants: Sequence[Variant] = ()
    columns = {"val acc": ("val_acc", 100), "test acc": ("test_acc", 100), "macro F1": ("test_macro_f1", 100)}

    def resolve(self, argv: list[str]) -> dict:
        """All options of the program after parsing; raises an error for options that the program would refuse."""
        options, _ = parse(argv, PROG)
        choose("method", options.method, methods)
        choose("dataset", options.dataset, datasets)
        choose_device(options.device)
        return options.flat()

    def prepare(self, extra: list[str]) -> list[str]:
        """Called once with the arguments for all variants, before these are used; returns those that remain."""
        return extra

    def extra(self, argv: list[str], extra: list[str]) -> list[str]:
        """Those of the arguments ``extra``, which are for all variants, that a run with ``argv`` reads."""
        return readable(extra, parse(argv, PROG)[0], PROG)

    def may_differ(self, name: str) -> bool:
        """Whether a finished run need not share this option with the command."""
        return movable(name) or name in ("seed", "out")

    def keep(self, metrics: dict, history: list[dict]) -> dict:
        """The parts of a run's metrics.json, and of the rows in metrics.jsonl, that tables and plots need."""
        kept = {name: metrics.get(name) for name in ("anchor", "collapsed", "similarity") if metrics.get(name)}
        for name in ("unimodal", "modalities", "baselines"):
            kept[name] = {key: scores_of(scores) for key, scores in metrics[name].items()}
        return {"metrics": kept | {name: scores_of(metrics[name]) for name in ("ensemble", "fused") if name in metrics}}

    def entries(self, record: dict) -> Iterator[Entry]:
        """All predictions first, then each follower next to the same modality trained alone."""
        name, metrics = record["variant"], record["metrics"]
        baselines = {f"{m} alone": scores for m, scores in metrics["unimodal"].items()}
        baselines |= {"ensemble": metrics["ensemble"]} if "ensemble" in metrics else {}
        for baseline, scores in (baselines | metrics["baselines"]).items():
            yield Entry("prediction", baseline, scores, baseline=True)
        collapsed = metrics.get("collapsed", {})
        why = "; ".join(f"follower {m}: {reason}" for m, reason in collapsed.items())
        yield Entry("prediction", name, metrics["fused"], collapsed=why)
        for m, scores in metrics["modalities"].items():
            if m in metrics["unimodal"]:
                yield Entry(f"follower {m}", f"{m} alone", metrics["unimodal"][m], baseline=True)
            if metrics.get("anchor") not in (None, m):
                yield Entry(f"follower {m}", name, scores, collapsed=collapsed.get(m, ""))

    def notes(self, records: list[dict]) -> Sequence[str]:
        """Additional lines of table.md."""
        return []

    def tables(self, records: list[dict]) -> str:
        return tables.tables(self, records)

    def draw(self, records: list[dict], folder: Path) -> list[str]:
        """Writes plots to the folder and returns their names."""
        return [plots.draw(self, records, folder / "accuracy.png")]


def scores_of(metrics: dict) -> dict[str, float]:
    return {name: metrics[name] for name in SCORES}
