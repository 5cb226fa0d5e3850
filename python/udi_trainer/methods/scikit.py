"""scikit-learn's classifiers on the flattened inputs: what a method should beat on small data.

Logistic regressions and a random forest learn from standardised inputs: one per modality with averaged probabilities
(``sklearn-late``), or one on all inputs side by side (``sklearn-concat``). Validation chooses among them. The numbers
of iterations and of trees follow from the size of the data, so that both methods together take less than 10 s.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..data.dataset import Dataset, Split
from ..errors import UserError
from ..evaluation.fusion import JUDGES, Mean, accuracy_without_each, combine, mean_log_likelihood
from ..evaluation.scores import accuracy, scores
from ..registry import methods
from ..run import Run
from .outcome import Outcome

SAMPLES, NUMBERS = 5_000, 10_000  # data with more training samples, or numbers in the inputs of a sample, is not small
WORK = 5e9  # of all logistic regressions of a method: samples x columns x classes x iterations
SECONDS = 1.5  # of a forest, estimated
PENALTIES = (1.0, 0.1, 0.01, 10.0)  # C, the inverse of the penalty
WORDS = 8193  # hashes, and 0 for padding


@dataclass
class Inputs:
    """Columns (N, D) by split, and the samples that have them, bool (N,) by split; others have zeros."""

    x: dict[str, torch.Tensor]
    present: dict[str, torch.Tensor]


def too_large(data: Dataset) -> str | None:
    """Why the data is not small, or None."""
    if len(data.train) > SAMPLES:
        return f"{len(data.train)} training samples, more than {SAMPLES}"
    numbers = sum(modality.sample(data.train)[0].numel() for modality in data.modalities.values())
    return f"{numbers} numbers in a sample, more than {NUMBERS}" if numbers > NUMBERS else None


def standardised(run: Run, modality: str) -> Inputs:
    """The modality's inputs, standardised by the labelled training samples."""
    view = run.data.modalities[modality]

    def columns(split: Split) -> torch.Tensor:
        indices = torch.arange(len(split), device=split.labels.device).split(1000)
        return torch.cat([flat(view.input(split.batch(i, view.reads))).cpu() for i in indices])

    def present(split: Split) -> torch.Tensor:
        has = split.present(modality)
        return torch.ones(len(split), dtype=torch.bool) if has is None else has

    x = {name: columns(split) for name, split in run.data.splits().items()}
    has = {name: present(split) for name, split in run.data.splits().items()}
    std, mean = torch.std_mean(x["train"][has["train"] & (run.data.train.labels.cpu() >= 0)], 0, correction=0)
    std[std <= 1e-6 * mean.abs()] = 1  # constants
    return Inputs({name: (t - mean) / std * has[name][:, None] for name, t in x.items()}, has)


def flat(x: torch.Tensor) -> torch.Tensor:
    """Inputs (N, ...) as columns (N, D); integers are hashes of words, which are counted."""
    if x.is_floating_point():
        return x.flatten(1).float()
    counts = torch.zeros(len(x), WORDS, device=x.device)
    return counts.scatter_add_(1, x.flatten(1).long(), torch.ones(x.flatten(1).shape, device=x.device))[:, 1:]


def side_by_side(inputs: dict[str, Inputs]) -> Inputs:
    """The columns of all modalities. Further splits ``without M`` are test with zeros for a modality."""
    splits = next(iter(inputs.values())).x
    x = {name: torch.cat([each.x[name] for each in inputs.values()], dim=1) for name in splits}
    for m in inputs:
        kept = [each.x["test"] * (other != m) for other, each in inputs.items()]
        x[f"without {m}"] = torch.cat(kept, dim=1)
    return Inputs(x, {name: torch.ones(len(t), dtype=torch.bool) for name, t in x.items()})


def candidates(run: Run, width: int) -> dict[str, Callable[[], Any]]:
    """What is tried, by name: functions that make a classifier for this number of columns."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    count, classes = int((run.data.train.labels >= 0).sum()), run.data.classes
    work = count * width * classes
    penalties = PENALTIES if work <= 1e8 else PENALTIES[:1]
    iterations = int(min(300, max(5, WORK / (len(penalties) * work))))
    seconds = 1e-9 * (20 + 4 * classes) * count * math.log2(max(2, count)) * math.sqrt(width)  # of a tree, as measured
    trees, seed = int(min(100, max(5, SECONDS / seconds))), run.seed("sklearn") % 2**32
    weight = None if run.class_weights is None else "balanced"
    linear = partial(LogisticRegression, max_iter=iterations, class_weight=weight)
    made: dict[str, Callable[[], Any]] = {f"logistic regression, C={c:g}": partial(linear, C=c) for c in penalties}
    forest = partial(RandomForestClassifier, trees, random_state=seed, class_weight=weight)
    return made | {f"random forest of {trees}": forest}


def log_probabilities(run: Run, make: Callable[[], Any], inputs: Inputs) -> dict[str, torch.Tensor]:
    """Log-probabilities (N, C) of each split but training; NaN for samples without these inputs."""
    from sklearn.dummy import DummyClassifier

    labels = run.data.train.labels.cpu()
    rows = inputs.present["train"] & (labels >= 0)
    classifier = make() if len(labels[rows].unique()) > 1 else DummyClassifier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # iterations are limited
        classifier.fit(inputs.x["train"][rows].numpy(), labels[rows].numpy())

    def predict(name: str) -> torch.Tensor:
        p = torch.zeros(len(inputs.x[name]), run.data.classes, dtype=torch.float64)
        p[:, classifier.classes_] = torch.from_numpy(classifier.predict_proba(inputs.x[name].numpy())).double()
        return p.clamp_min(1e-6).log().masked_fill(~inputs.present[name][:, None], torch.nan)

    return {name: predict(name) for name in inputs.x if name != "train"}


def train_scikit(run: Run, parts: dict[str, Inputs]) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """Metrics of the candidate that is best on validation, and its logits by part and split."""
    tried: dict[str, dict[str, dict[str, torch.Tensor]]] = {}

    def train(name: str, make: Callable[[], Any]) -> None:
        tried[name] = {key: log_probabilities(run, make, part) for key, part in parts.items()}

    def fused(name: str, split: str) -> torch.Tensor:
        return combine(Mean(), torch.stack([logits[split] for logits in tried[name].values()]))

    def quality(name: str) -> tuple[float, float]:
        p, labels = fused(name, "val"), run.labels["val"]
        return JUDGES[run.options.select or "acc"](p, labels), mean_log_likelihood(p, labels)

    def choose() -> tuple[str, Callable[[], Any]]:
        made = candidates(run, sum(part.x["train"].shape[1] for part in parts.values()))
        for name, make in made.items():
            train(name, make)
        best = max(tried, key=quality)
        return best, made[best]

    best, make = run.decide("classifier", choose)
    if run.first:
        train(best, make)
    metrics = {"rule": best, **scores({split: fused(best, split) for split in run.labels}, run.labels)}
    if run.data.shifted:
        metrics["shifted_acc"] = accuracy(fused(best, "shifted"), run.data.shifted.labels.cpu())
    return metrics, tried[best]


def inputs_of(run: Run) -> dict[str, Inputs]:
    if reason := too_large(run.data):
        raise UserError(f"scikit-learn's baselines are for small data, and this has {reason}")
    return {m: standardised(run, m) for m in run.data.modalities}


@methods.register("sklearn-late", needs=("sklearn",), extra="train")
def late(run: Run) -> Outcome:
    """scikit-learn's classifiers, one per modality; the mean of their probabilities."""
    fused, logits = train_scikit(run, inputs_of(run))
    fused["without"] = accuracy_without_each(Mean(), {m: z["test"] for m, z in logits.items()}, run.labels["test"])
    return Outcome({"modalities": {m: scores(z, run.labels) for m, z in logits.items()}, "fused": fused}, {})


@methods.register("sklearn-concat", needs=("sklearn",), extra="train")
def concat(run: Run) -> Outcome:
    """scikit-learn's classifiers on the inputs of all modalities side by side."""
    fused, logits = train_scikit(run, {"all": side_by_side(inputs_of(run))})
    test = run.labels["test"]
    fused["without"] = {m: accuracy(logits["all"][f"without {m}"], test) for m in run.data.modalities}
    return Outcome({"fused": fused}, {})
