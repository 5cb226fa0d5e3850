"""PMR against its formula, in float64."""

import pytest
import torch

from udi_trainer.methods.pmr import PMR

from ..helpers import freeze, make_run, training_batch
from .formulas import check_gradients, gradient, label_probability, loss_of


@pytest.fixture
def task(double_views):
    task = PMR(make_run(double_views, epochs=13))
    task.begin_epoch(0)
    return task


def test_prototypes_are_mean_features(task):
    train = task.run.data.train
    features = task.forward(train.batch(torch.arange(len(train)), list(train.stored)))[0]
    for m, x in features.items():
        kept = train.stored.get(f"{m} present", torch.ones(len(train))).bool()
        means = [x[kept & (train.labels == c)].mean(0) for c in range(4)]
        torch.testing.assert_close(task.prototypes[m].detach(), torch.stack(means).detach())


def test_step_is_the_plain_formula(task):
    task.model.train()
    freeze(task)
    batch, parameters = training_batch(task), list(task.model.parameters())
    scalars = task.step(batch, modulate=True)
    features, logits = task.forward(batch)
    similar = {m: -(x[:, None] - task.prototypes[m]).square().sum(2).sqrt() for m, x in features.items()}
    score = {m: label_probability(z, batch, m) for m, z in similar.items()}
    slowest = min(score, key=lambda m: score[m])
    assert {m: scalars[f"slowest_{m}"].item() for m in score} == {m: float(m == slowest) for m in score}
    loss = loss_of(logits, batch) + 2 * loss_of(similar[slowest], batch, slowest)
    check_gradients(parameters, gradient(loss, parameters))
    task.step(batch, modulate=False)
    check_gradients(parameters, gradient(loss_of(task.forward(batch)[1], batch), parameters))


def test_the_term_ends(task):
    assert [task.flags(n)["modulate"] for n in range(13 * task.run.steps)].count(True) == 7 * task.run.steps
