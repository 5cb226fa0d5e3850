"""G2D against its formula, in float64."""

import pytest
import torch
from torch.nn.functional import log_softmax, softmax

from udi_trainer.methods.frozen import Frozen
from udi_trainer.methods.g2d import G2D
from udi_trainer.methods.unimodal import Alone

from ..helpers import freeze, make_run, training_batch
from .formulas import check_gradients, gradient, label_probability, loss_of


@pytest.fixture
def task(double_views):
    run = make_run(double_views, epochs=4)
    teachers = {m: run.make(Alone, modality=m) for m in run.data.modalities}
    return run.make(G2D, teachers={m: Frozen(run, m, t.model, t.width) for m, t in teachers.items()})


@pytest.mark.parametrize("learning", [1, 2, 3])
def test_step_is_the_plain_formula(task, learning):
    freeze(task)
    batch, model = training_batch(task), task.model
    scalars = task.step(batch, learning=learning)
    features = task.forward(batch)[0]
    logits = sum(model.heads[m](x) for m, x in features.items()) / 3
    loss, score = loss_of(logits, batch), {}
    for m, teacher in task.teachers.items():
        kept = batch.get(f"{m} present", torch.ones_like(batch["labels"])).bool()
        x, z = (t[batch["index"]] for t in teacher.cache)
        p, log_q = softmax(z, 1), log_softmax(logits, 1)
        loss = loss + (p * (p.log() - log_q)).sum(1)[kept].mean() + (features[m] - x).square().mean(1)[kept].mean()
        score[m] = label_probability(z, batch, m)
    weakest = sorted(score, key=lambda m: score[m])[:learning]
    parameters = dict(model.named_parameters())
    wanted = gradient(loss, parameters.values())
    for i, (name, parameter) in enumerate(parameters.items()):
        place, m = name.split(".")[:2]
        if place == "encoders" and parameter.dim() > 1 and m not in weakest:
            wanted[i] = torch.zeros_like(parameter)
    check_gradients(parameters.values(), wanted)
    assert [m for m in features if scalars[f"k_{m}"]] == [m for m in features if m in weakest]
    torch.testing.assert_close(scalars["loss"], loss)


def test_encoders_join_one_by_one(task):
    total = 4 * task.run.steps
    assert [task.flags(n)["learning"] for n in range(total)] == [1] * (total // 4) + [2] * (total // 4) + [3] * (
        total // 2
    )
