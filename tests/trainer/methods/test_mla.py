"""MLA against its formula, in float64."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from udi_trainer import UserError, load, train
from udi_trainer.methods.mla import MLA, Entropy
from udi_trainer.registry import datasets

from ..helpers import make_run, training_batch


@pytest.fixture
def complete(double_views, register):
    """The data without the samples that lack a modality."""

    def make(options):
        data = datasets[double_views](options)
        for split in data.splits().values():
            del split.stored["worse present"]
        return data

    register(datasets, "complete", make)
    return "complete"


def test_steps_are_the_plain_formula(complete):
    """Three batches, each with a turn of each modality, by plain gradient descent."""
    options = dict(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
    task = MLA(make_run(complete, **options))
    model = copy.deepcopy(task.model)
    P = torch.eye(model.width)
    for number in range(3):
        batch = training_batch(task, seed=number)
        task.step(batch)
        features = {m: c.encoder(batch[m].double()) for m, c in model.alone.items()}  # before any turn
        for m, x in features.items():
            own = [*model.alone[m].encoder.parameters(), model.head.weight, model.head.bias]
            logits = x @ model.head.weight.T + model.head.bias
            grads = list(torch.autograd.grad(cross_entropy(logits, batch["labels"]), own))
            grads[-2] = grads[-2] @ P
            h = x.detach().mean(0)[:, None]
            strength = 0.1 ** (1 + number / task.run.steps)
            P = P - P @ h @ h.T @ P / (strength + h.T @ P @ h)
            with torch.no_grad():
                for parameter, grad in zip(own, grads, strict=True):
                    parameter -= 0.1 * grad
    for ours, plain in zip(task.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(task.projection.P, P)


def test_the_projection_keeps_what_was_learnt(complete):
    """A gradient along a protected direction is all but gone."""
    projection = MLA(make_run(complete)).projection
    h = torch.randn(projection.P.shape[0])
    projection.add(h)
    assert (h @ projection.P).norm() < 0.01 * h.norm()


def test_entropy_rule():
    logits = 3 * torch.randn(3, 5, 4, dtype=torch.float64)
    p = Entropy()(logits)
    for n in range(5):
        entropy = torch.stack([-(q * q.log()).sum() for q in logits[:, n].softmax(1)])
        weights = (entropy.max() - entropy).exp()
        wanted = (weights / weights.sum()) @ logits[:, n]
        torch.testing.assert_close(p[n], wanted.softmax(0))


def test_whole_run_and_its_predictor(three_views, tmp_path):
    result = train(three_views, "mla", epochs=3, baselines=[], out=tmp_path / "run", progress=False)
    assert result.metrics["fused"]["rule"] == "entropy" and result.metrics["fused"]["test_acc"] > 0.8
    data = datasets[three_views](None)
    torch.testing.assert_close(load(tmp_path / "run").predict(data.test), result.predict(data.test))
    heads = [model.head for model in result.models.values()]
    assert heads[0] is heads[1] is heads[2]


def test_refuses_missing_modalities(double_views):
    with pytest.raises(UserError, match="samples lack worse"):
        MLA(make_run(double_views))
