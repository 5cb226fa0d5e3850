"""The method dimml, on data in memory: three modalities of unequal widths."""

import itertools
import math

import pytest
import torch
from torch import nn

from udi_kernels import duc_loss, effective_dims, reference
from udi_trainer import Dataset, Modality, Split, load, train
from udi_trainer.evaluation.fusion import Certainty, fuse
from udi_trainer.methods import dimml

from ..helpers import interrupted

WIDTHS = {"a": 24, "b": 16, "c": 20}
OPTIONS = dict(
    method="dimml", baselines=[], epochs=4, fusion_epochs=3, batch_size=32, contrast_warmup=0.5, progress=False
)


class Encoder(nn.Sequential):
    """Of a modality whose vectors are as long as its features are wide."""

    def __init__(self, shape):
        super().__init__(nn.Linear(*shape, *shape), nn.BatchNorm1d(*shape), nn.ReLU())


def dataset(names="abc"):
    generator = torch.Generator().manual_seed(0)
    means = {m: torch.randn(3, WIDTHS[m], generator=generator) for m in names}

    def split(n):
        labels = torch.randint(3, (n,), generator=generator)
        stored = {m: means[m][labels] + 2 * torch.randn(n, WIDTHS[m], generator=generator) for m in names}
        return Split(labels, stored)

    return Dataset(3, {m: Modality(Encoder, (m,)) for m in names}, split(150), split(70), split(70))


def figures(metrics):
    return {name: value for name, value in metrics.items() if name != "seconds"}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def whole(tmp_path_factory, request):
    """An uninterrupted run, and its data."""
    data = dataset()
    return train(data, out=tmp_path_factory.mktemp("dimml") / "run", device=request.param, **OPTIONS), data


def test_phases_and_metrics(whole):
    result, _ = whole
    assert {name: len(rows) for name, rows in result.history.items()} == {"dimml": 4, "dimml-fusion": 3}
    detached = result.history["dimml"]
    assert [row["contrast"] > 0 for row in detached] == [False, False, True, True]
    for row in detached:
        assert row["val_acc"] == pytest.approx(sum(row[f"val_acc_{m}"] for m in "abc") / 3)
    metrics = result.metrics
    assert list(metrics["modalities"]) == ["a", "b", "c"] and metrics["fused"]["rule"] == "certainty"
    assert metrics["fused"]["test_acc"] > 0.5
    for found in metrics["effective_dims"].values():
        assert found["of"] == 16 and 0 < len(found["dims"]) < 16
    table = result.table()
    assert "dimml: fusion head" in table and "effective dimensions: a" in table
    assert (result.folder / "report.png").exists()


def test_effective_dims_are_those_of_the_training_features(whole, monkeypatch):
    seen = []

    def noted(features, labels, classes):
        seen.append((features, labels))
        return effective_dims(features, labels, classes)

    monkeypatch.setattr(dimml, "effective_dims", noted)
    result = train(dataset(), **OPTIONS)
    assert [tuple(features.shape) for features, _ in seen] == [(150, 16)] * 3
    for (features, labels), found in zip(seen, result.metrics["effective_dims"].values(), strict=True):
        assert reference.effective_dims(features, labels, 3).nonzero().flatten().tolist() == found["dims"]


@pytest.mark.parametrize("contrast", ["duc", "full"])
def test_the_loss_of_a_step(contrast, monkeypatch):
    """That of the definition, over all ordered pairs; with duc nothing flows back to a teacher."""
    steps, ours = [], dimml.Detached.contrast

    def noted(self, features):
        total = ours(self, features)
        grads = torch.autograd.grad(total, features, retain_graph=True)
        steps.append((self, [x.detach() for x in features], total, grads))
        return total

    monkeypatch.setattr(dimml.Detached, "contrast", noted)
    train(dataset(), contrast=contrast, **OPTIONS)
    task, features, total, grads = steps[-1]
    leaves = [x.clone().requires_grad_() for x in features]
    want = 0
    for a, b in itertools.permutations(range(3), 2):
        if contrast == "duc":
            dims = task.dimensions.effective[a] & ~task.dimensions.effective[b]
            want = want + duc_loss(leaves[b], features[a], dims, temperature=10.0)
        else:
            want = want + duc_loss(leaves[b], leaves[a], torch.ones(16, dtype=torch.bool), temperature=10.0)
    assert total.item() == pytest.approx(want.item())
    for grad, expected in zip(grads, torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("stage", "after", "how"),
    [
        ("dimml", 5, "killed"),
        ("dimml", 9, "asked"),
        ("dimml", 11, "killed"),
        ("dimml-fusion", 6, "asked"),
        ("dimml-fusion", 6, "killed"),
    ],
)
def test_ended_and_resumed_it_reaches_the_same_figures(stage, after, how, whole, tmp_path):
    """Killed it goes on after its last epoch, asked to end after its last step; with the same dimensions."""
    device = whole[0].metrics["device"]
    with interrupted(lambda task, number: task.key == stage and number == after, how):
        train(dataset(), out=tmp_path / "run", device=device, **OPTIONS)
    result = train(dataset(), "dimml", resume=tmp_path / "run", progress=False)
    assert figures(result.metrics) == figures(whole[0].metrics)


def test_certainty_where_the_dataset_recommends_another_rule():
    options = dict(baselines=["ensemble"], epochs=2, fusion_epochs=1, progress=False)
    metrics = train("fewdigits", "dimml", **options).metrics
    assert metrics["fused"]["rule"] == "certainty" and metrics["baselines"]["ensemble"]["rule"] == "loglinear"
    assert train("fewdigits", "dimml", fusion="mean", **options).metrics["fused"]["rule"] == "mean"


def test_predicts_in_another_process_as_it_did(whole):
    result, data = whole
    fused = result.predict(data.test)
    accuracy = (fused.argmax(1) == data.test.labels).double().mean().item()
    assert accuracy == result.metrics["fused"]["test_acc"]
    torch.testing.assert_close(load(result.folder, dataset=data).predict(data.test), fused)


def test_without_its_parts():
    """Ablations: no shared classifier, no contrast, another fusion, two modalities."""
    result = train(dataset("ab"), shared_weight=0, contrast_weight=0, fusion="mean", **OPTIONS)
    assert all(row["contrast"] == 0 for row in result.history["dimml"])
    assert result.metrics["fused"]["rule"] == "mean"
    plain = train(dataset("ab"), contrast_warmup=1.0, **{k: v for k, v in OPTIONS.items() if k != "contrast_warmup"})
    assert "effective_dims" not in plain.metrics


def test_certainty_rule_chooses_its_temperature_on_validation():
    logits, labels = 4 * torch.randn(3, 200, 5), torch.randint(5, (200,))
    rule = Certainty.fit(logits, labels)
    assert rule.temperature in (1.0, 3.0)
    torch.testing.assert_close(
        rule(logits), reference.certainty_fusion(logits, temperature=rule.temperature).softmax(-1)
    )
    by_modality = {m: {"val": z, "test": z} for m, z in zip("abc", logits, strict=True)}
    both = {"val": labels, "test": labels}
    assert fuse("certainty", by_modality, both)[0]["rule"] == "certainty"
    assert fuse("auto", by_modality, both)[0]["rule"] != "certainty"
    assert math.isclose(
        fuse("auto", by_modality, both)[0]["by_rule"]["certainty"]["val_acc"],
        (rule(logits).argmax(1) == labels).double().mean().item(),
    )
