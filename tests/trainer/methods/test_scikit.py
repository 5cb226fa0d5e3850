"""scikit-learn's baselines against scikit-learn itself."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from udi_trainer import Dataset, Modality, Split, UserError, train
from udi_trainer.api import Training
from udi_trainer.command import main
from udi_trainer.methods import scikit
from udi_trainer.options import SCIKIT, Options

from ..helpers import make_run, read_metrics


@pytest.fixture
def linear():
    """Two views that a linear classifier separates, on scales that differ by far."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 8, generator=generator)

    def split(size):
        labels = torch.arange(size) % 3
        x = centers[labels] + torch.randn(size, 8, generator=generator)
        return Split(labels, {"a": 1000 * x[:, :4] + 5e4, "b": x[:, 4:].contiguous()})

    return Dataset(3, {m: Modality("mlp", (m,)) for m in "ab"}, split(90), split(300), split(300), "linear")


def columns(data, names):
    """Standardised NumPy columns by split."""
    x = {s: np.concatenate([split.stored[m] for m in names], axis=1) for s, split in data.splits().items()}
    mean, std = x["train"].mean(0), x["train"].std(0)
    return {split: (t - mean) / std for split, t in x.items()}


def test_late_is_the_mean_of_probabilities(linear, monkeypatch):
    monkeypatch.setattr(scikit, "PENALTIES", (0.1,))
    outcome = scikit.late(make_run(linear))
    p, trees = 0, 0
    for m in "ab":
        x = columns(linear, m)
        p = p + LogisticRegression(C=0.1, max_iter=300).fit(x["train"], linear.train.labels).predict_proba(x["test"])
        forest = RandomForestClassifier(100, random_state=make_run(linear).seed("sklearn") % 2**32)
        trees = trees + forest.fit(x["train"], linear.train.labels).predict_proba(x["val"])
    assert (trees.argmax(1) == linear.val.labels.numpy()).mean() < outcome.metrics["fused"]["val_acc"]
    assert outcome.metrics["fused"]["rule"] == "logistic regression, C=0.1"
    assert outcome.metrics["fused"]["test_acc"] == pytest.approx((p.argmax(1) == linear.test.labels.numpy()).mean())


def test_concat_is_one_classifier_and_validation_chooses_it(linear):
    run, x = make_run(linear), columns(linear, "ab")
    accuracies = {}
    for c in scikit.PENALTIES:
        made = LogisticRegression(C=c, max_iter=300).fit(x["train"], linear.train.labels)
        accuracies[f"logistic regression, C={c:g}"] = [
            made.score(x[s], getattr(linear, s).labels) for s in ("val", "test")
        ]
    fused = scikit.concat(run).metrics["fused"]
    assert fused["val_acc"] == pytest.approx(max(val for val, _ in accuracies.values()))
    assert fused["test_acc"] == pytest.approx(accuracies[fused["rule"]][1])
    kept = columns(linear, "ab")["test"] * ([0] * 4 + [1] * 4)
    c = float(fused["rule"].rpartition("=")[2])
    alone = LogisticRegression(C=c, max_iter=300).fit(x["train"], linear.train.labels)
    assert fused["without"]["a"] == pytest.approx(alone.score(kept, linear.test.labels))


def test_a_forest_wins_where_it_is_better(register):
    """The label is whether two numbers have one sign."""
    generator = torch.Generator().manual_seed(0)

    def split(size):
        x = torch.randn(size, 2, generator=generator)
        return Split((x[:, 0] * x[:, 1] > 0).long(), {"x": x, "noise": torch.randn(size, 2, generator=generator)})

    data = Dataset(2, {m: Modality("mlp", (m,)) for m in ("x", "noise")}, split(400), split(200), split(200))
    fused = scikit.concat(make_run(data)).metrics["fused"]
    assert fused["rule"] == "random forest of 100" and fused["test_acc"] > 0.9


def test_few_labels_and_lacking_modalities(linear):
    """Samples without a label or without the modality teach nothing, and the other modality answers alone."""
    labels, present = linear.train.labels.clone(), torch.arange(90) % 2 == 0
    labels[60:] = -1
    wild = {"a": linear.train.stored["a"].where(present[:, None], 1e6), "a present": present}
    wild["a"][60:] = -1e6
    data = replace(linear, train=Split(labels, linear.train.stored | wild))
    lacking = torch.arange(300) % 3 == 0
    data.test = Split(linear.test.labels, linear.test.stored | {"a present": ~lacking})
    few = Split(labels[:60], {m: t[:60] for m, t in linear.train.stored.items()} | {"a present": present[:60]})
    for method in (scikit.late, scikit.concat):
        metrics = method(make_run(data)).metrics
        assert metrics == method(make_run(replace(data, train=few))).metrics
        assert metrics["fused"]["test_acc"] > 0.6
    standardised = scikit.standardised(make_run(data), "a").x
    assert (standardised["test"][lacking] == 0).all() and (standardised["train"][~present] == 0).all()
    own = standardised["train"][:60][present[:60]]
    torch.testing.assert_close(own.mean(0), torch.zeros(4), atol=1e-3, rtol=0)


def test_words_are_counted():
    words = torch.tensor([[3, 3, 8191], [5, 0, 0]], dtype=torch.int32)
    counts = scikit.flat(words)
    assert counts.shape == (2, 8192) and counts.sum(1).tolist() == [3, 1]
    assert (counts[0, 2], counts[0, 8190], counts[1, 4]) == (2, 1, 1)


def test_they_come_with_the_baselines_of_small_data(linear, capsys):
    assert Training(Options.make(dataset=linear), linear).baseline_names() == ["joint", *SCIKIT]
    assert Training(Options.make(dataset=linear, method="ensemble"), linear).baseline_names() == [*SCIKIT]
    assert Training(Options.make(dataset=linear, baselines="ensemble"), linear).baseline_names() == [
        "ensemble",
        *SCIKIT,
    ]
    assert Training(Options.make(dataset=linear, baselines="none"), linear).baseline_names() == []
    result = train(linear, method="ensemble", epochs=1)
    assert [*result.metrics["baselines"]] == [*SCIKIT] and "sklearn-late  " in result.table()
    wide = replace(linear, **{s: replace(split, stored=split.stored | {"b": torch.zeros(len(split), 9997)})
                              for s, split in linear.splits().items()})  # fmt: skip
    assert Training(Options.make(dataset=wide), wide).baseline_names() == ["joint"]
    train(wide, method="ensemble", epochs=1)
    assert "sklearn-late and sklearn-concat are left out: the data has 10001 numbers" in capsys.readouterr().out
    with pytest.raises(UserError, match="small data, and this has 10001 numbers in a sample, more than 10000"):
        train(wide, method="sklearn-late")
    many = replace(linear, train=linear.train.take(torch.arange(5001) % 90))
    assert scikit.too_large(many) == "5001 training samples, more than 5000" and scikit.too_large(linear) is None


@pytest.mark.parametrize("name", SCIKIT)
def test_as_the_method_of_a_run(name, capsys):
    assert main(["--method", name, "--baselines", "none", "--out", "run"]) == 0
    assert read_metrics("run")["fused"]["test_acc"] > 0.6
    assert not Path("run/checkpoints").exists()
    with pytest.raises(UserError, match="keeps no models"):
        train("fewdigits", method=name, baselines=[]).predict({})


@pytest.mark.slow
def test_the_largest_small_data_takes_seconds():
    """Columns without information are the worst for both kinds of classifiers."""
    generator = torch.Generator().manual_seed(0)

    def split(size):
        x = {m: torch.randn(size, 5000, generator=generator) for m in "ab"}
        return Split(torch.randint(5, (size,), generator=generator), x)

    data = Dataset(5, {m: Modality("mlp", (m,)) for m in "ab"}, split(5000), split(50), split(50))
    run, began = make_run(data), time.process_time()
    scikit.late(run), scikit.concat(run)
    assert time.process_time() - began < 20  # 10 s on an idle core
