"""G-Blending against its formula, in float64."""

import math

import pytest

from udi_trainer import train
from udi_trainer.methods.g_blending import GBlending, blending_weights

from ..helpers import freeze, make_run, training_batch
from .formulas import check_gradients, gradient, loss_of


def history(val_loss, loss):
    return [{"val_acc": 0.5, "val_loss": 9.0, "loss": 9.0}, {"val_acc": 0.9, "val_loss": val_loss, "loss": loss}]


def test_weights():
    histories = {"joint": history(0.4, 0.1), "a": history(0.6, 0.5), "b": history(9.0, 0.2), "c": history(0.3, 0.4)}
    gain = {"joint": math.log(3) - 0.4, "a": math.log(3) - 0.6, "b": 0.01, "c": math.log(3) - 0.3}
    over = {"joint": 0.3, "a": 0.1, "b": 8.8, "c": 0.01}
    ratio = {name: gain[name] / over[name] ** 2 for name in gain}
    wanted = {name: x / sum(ratio.values()) for name, x in ratio.items()}
    assert blending_weights(histories, 3) == pytest.approx(wanted)


def test_step_is_the_plain_formula(double_views):
    weights = {"joint": 0.5, "clean": 0.2, "noisy": 0.1, "worse": 0.2}
    task = make_run(double_views).make(GBlending, weights=weights)
    freeze(task)
    batch, parameters = training_batch(task), list(task.model.parameters())
    task.step(batch)
    features, logits = task.forward(batch)
    alone = {m: loss_of(task.model.heads[m](x), batch, m) for m, x in features.items()}
    loss = weights["joint"] * loss_of(logits, batch) + sum(weights[m] * x for m, x in alone.items())
    check_gradients(parameters, gradient(loss, parameters))


def test_whole_run(three_views):
    metrics = train(three_views, "g-blending", epochs=2, baselines=[], progress=False).metrics
    assert list(metrics["blending_weights"]) == ["joint", "clean", "noisy", "worse"]
    assert sum(metrics["blending_weights"].values()) == pytest.approx(1)
    assert metrics["fused"]["test_acc"] > 0.8
