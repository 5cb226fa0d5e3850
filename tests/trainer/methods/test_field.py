"""What all methods of the field promise: they resume, predict as they did, and take any number of modalities."""

import pytest
import torch

from udi_trainer import Dataset, load, train
from udi_trainer.data.dataset import presence

from ..helpers import interrupted, without_times

METHODS = ["mmpareto", "dgl", "g2d", "mla", "reconboost", "pdmp", "pmr", "g-blending"]
OPTIONS = {"epochs": 4, "batch_size": 64, "baselines": [], "progress": False}


@pytest.mark.parametrize("how", ["killed", "asked"])
@pytest.mark.parametrize("method", METHODS)
def test_ended_and_resumed_it_reaches_the_same_figures(method, how, three_views, tmp_path):
    """Killed it goes on after its last epoch, asked to end after its last step."""
    whole = train(three_views, method, out=tmp_path / "whole", **OPTIONS)

    def at(task, number):
        return task.key == method and number == 15  # in the third of four epochs of six steps

    with interrupted(at, how):
        train(three_views, method, out=tmp_path / "cut", **OPTIONS)
    resumed = train(three_views, method, resume=tmp_path / "cut", progress=False)
    assert without_times(resumed.metrics) == without_times(whole.metrics)


@pytest.mark.parametrize("method", METHODS)
def test_predicts_in_another_process_as_it_did(method, mixed, tmp_path):
    result = train(mixed, method, out=tmp_path / "run", **OPTIONS)
    fused = result.predict(mixed.test)
    assert (fused.argmax(1) == mixed.test.labels).double().mean().item() == result.metrics["fused"]["test_acc"] > 0.5
    torch.testing.assert_close(load(tmp_path / "run", dataset=mixed).predict(mixed.test), fused)
    assert set(result.metrics["fused"]["without"]) == set(mixed.modalities)


@pytest.mark.parametrize("method", METHODS)
def test_two_modalities(method, mixed):
    views = {m: mixed.modalities[m] for m in ("audio", "sensor")}
    data = Dataset(2, views, mixed.train, mixed.val, mixed.test)
    assert train(data, method, **OPTIONS).metrics["fused"]["test_acc"] > 0.7


@pytest.mark.parametrize("method", [m for m in METHODS if m != "mla"])
def test_missing_modalities(method, mixed):
    """What stands in the place of a missing modality changes nothing."""
    figures = []
    for filler in (0.0, 5.0):
        for split in mixed.splits().values():
            split.stored[presence("sensor")] = has = torch.arange(len(split)) % 3 > 0
            split.stored["vector"] = torch.where(has[:, None], split.stored["vector"], filler)
        result = train(mixed, method, **OPTIONS)
        figures.append((without_times(result.metrics), result.predict(mixed.test)))
    assert figures[0][0] == figures[1][0]
    torch.testing.assert_close(figures[0][1], figures[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_encoders(method, three_views):
    """One that is always frozen, one that is in the first epoch."""
    result = train(three_views, method, freeze={"clean": "all", "noisy": 1}, **OPTIONS)
    assert result.metrics["fused"]["test_acc"] > 0.5
