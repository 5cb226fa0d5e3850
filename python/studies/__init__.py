"""Studies, by name: each a question, the runs that answer it, and what is shown of them.

A new study is one file here with a class decorated with ``@studies.register(name)``, imported below. Its docstring
is the question; most need no more than ``variants``.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import train
from common import Registry

studies = Registry("study")
NOISE = {"": "", "noisy training": "--noise 0.2,0.2"}  # conditions: options


@dataclass
class Variant:
    """Runs that differ in their seed alone, and the options that make them. Those of one condition share baselines."""

    name: str
    options: str
    condition: str = ""

    def __str__(self):
        return f"{self.condition}: {self.name}" if self.condition else self.name


@dataclass
class Row:
    """What one run says for one line of a table."""

    section: str
    name: str
    figures: dict
    baseline: bool = False
    collapsed: str = ""  # why it counts as collapsed


class Study:
    seeds = 5
    program = Path(train.__file__)
    movable = (*train.MOVABLE, "seed", "out")  # options that a finished run need not share with the command
    variants = ()
    columns = {"val acc": ("val_acc", 100), "test acc": ("test_acc", 100), "macro F1": ("test_macro_f1", 100)}

    def settle(self, argv):
        """All options of the program as it would take them; an error for those that it would refuse."""
        options, _ = train.parse(argv)
        train.find_device(options.device)
        return vars(options)

    def figures(self, metrics, log):
        """What results.json keeps of a run: its metrics.json, and here what else is needed of its metrics.jsonl."""
        return {"metrics": metrics}

    def rows(self, variant, run):
        """Everything that predicts, and below that each follower beside the same modality alone."""
        metrics = run["metrics"]
        unimodal = {f"{m} alone": scores for m, scores in metrics["unimodal"].items()}
        baselines = unimodal | {"ensemble": metrics.get("ensemble")} | metrics["baselines"]
        for name, scores in baselines.items():
            if scores:
                yield Row("prediction", name, scores, baseline=True)
        collapsed = metrics.get("collapsed", {})
        why = "; ".join(f"follower {m}: {reason}" for m, reason in collapsed.items())
        yield Row("prediction", variant.name, metrics["fused"], collapsed=why)
        for m, scores in metrics["modalities"].items():
            if m in metrics["unimodal"]:
                yield Row(f"follower {m}", f"{m} alone", metrics["unimodal"][m], baseline=True)
            if metrics["anchor"] not in (None, m):
                yield Row(f"follower {m}", variant.name, scores, collapsed=collapsed.get(m, ""))

    def notes(self, runs):
        """Further lines of table.md, from the runs' records."""
        return []

    def tables(self, runs):
        return summary.tables(self, runs)

    def draw(self, runs, folder):
        """Writes plots into the folder; returns their names."""
        return [summary.draw(self, runs, folder / "accuracy.png")]

    def variant(self, run):
        """The variant that a record of results.json belongs to, also when this version of the study lacks it."""
        return Variant(run["variant"], shlex.join(run["options"]), run["condition"])


from . import anchor, cgdigits, cgmnist, controller, defaults, estimator, features, q, summary, views  # noqa: E402, F401
