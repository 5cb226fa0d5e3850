"""What a study is: the ancestor of all, and what it is made of."""

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
NOISE = {"": "", "noisy training": "--noise 0.2,0.2"}  # conditions: options

SEEDING = """\
Seeds change initial weights and the order of samples, not the samples: the interval says nothing
about other test samples."""
RESPLIT = "Seeds draw the split, too, and which samples have a label."


@dataclass
class Variant:
    """Runs that differ in their seed alone, and the options that make them. Those of one condition share baselines."""

    name: str
    options: str
    condition: str = ""

    def __str__(self):
        return f"{self.condition}: {self.name}" if self.condition else self.name


@dataclass
class Entry:
    """What one run says for one line of a table."""

    section: str
    name: str
    scores: dict[str, float]
    baseline: bool = False
    collapsed: str = ""  # why it counts as collapsed


class Study:
    """Its docstring is the question. ``records``: of its runs, as results.json keeps them."""

    seeds: int | range = 5
    seeding = SEEDING  # what they change
    unit = "seed"  # what a dot of the plots is, and intervals are over
    program = Path(__file__).parents[1] / "train.py"
    variants: Sequence[Variant] = ()
    columns = {"val acc": ("val_acc", 100), "test acc": ("test_acc", 100), "macro F1": ("test_macro_f1", 100)}

    def settle(self, argv: list[str]) -> dict:
        """All options of the program as it would take them; an error for those that it would refuse."""
        options, _ = parse(argv, PROG)
        choose("method", options.method, methods)
        choose("dataset", options.dataset, datasets)
        choose_device(options.device)
        return options.flat()

    def extra(self, argv: list[str], extra: list[str]) -> list[str]:
        """Those of the arguments ``extra``, which are for all variants, that a run with ``argv`` reads."""
        return readable(extra, parse(argv, PROG)[0], PROG)

    def may_differ(self, name: str) -> bool:
        """Whether a finished run need not share this option with the command."""
        return movable(name) or name in ("seed", "out")

    def keep(self, metrics: dict, history: list[dict]) -> dict:
        """What tables and plots need of a run's metrics.json, and here of nothing in the rows of its metrics.jsonl."""
        kept = {name: metrics.get(name) for name in ("anchor", "collapsed", "similarity") if metrics.get(name)}
        for name in ("unimodal", "modalities", "baselines"):
            kept[name] = {key: scores_of(scores) for key, scores in metrics[name].items()}
        return {"metrics": kept | {name: scores_of(metrics[name]) for name in ("ensemble", "fused") if name in metrics}}

    def entries(self, record: dict) -> Iterator[Entry]:
        """Everything that predicts, and below that each follower beside the same modality alone."""
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
        """Further lines of table.md."""
        return []

    def tables(self, records: list[dict]) -> str:
        return tables.tables(self, records)

    def draw(self, records: list[dict], folder: Path) -> list[str]:
        """Writes plots into the folder; returns their names."""
        return [plots.draw(self, records, folder / "accuracy.png")]


def scores_of(metrics: dict) -> dict[str, float]:
    return {name: metrics[name] for name in SCORES}
