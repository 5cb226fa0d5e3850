"""ReconBoost against its formula, in float64."""

import pytest
import torch

from udi_trainer.methods.reconboost import RECTIFY, ReconBoost
from udi_trainer.methods.unimodal import Alone

from ..helpers import freeze, make_run, training_batch
from .formulas import check_gradients, gradient, loss_of


@pytest.fixture
def task(double_views):
    run = make_run(double_views, epochs=8, batch_size=64)
    return run.make(ReconBoost, initial={m: run.make(Alone, modality=m) for m in run.data.modalities})


def test_starts_from_modalities_trained_alone(double_views):
    run = make_run(double_views)
    alone = {m: run.make(Alone, modality=m) for m in run.data.modalities}
    task, batch = run.make(ReconBoost, initial=alone), training_batch(alone["clean"])
    shares = task.model.shares(task.forward(batch)[0])
    torch.testing.assert_close(shares["clean"], alone["clean"].forward(batch)[1])


@pytest.mark.parametrize("boosted", [0, 2])
def test_boosting_is_the_plain_formula(task, boosted):
    freeze(task)
    batch, model = training_batch(task), task.model
    loss = task.step(batch, boosted=boosted)["loss"]
    shares = {m: model.heads[m](x) for m, x in task.forward(batch)[0].items()}
    m = list(shares)[boosted]
    kept = batch.get(f"{m} present", torch.ones_like(batch["labels"])).bool()
    q = sum(z for name, z in shares.items() if name != m).detach().softmax(1)
    target = torch.eye(4)[batch["labels"]]
    log_p = shares[m].log_softmax(1)
    wanted = (-5 * (target * log_p).mean(1) + 1 * (target * q * log_p).mean(1))[kept].mean()
    torch.testing.assert_close(loss, wanted)
    own = {*model.encoders[m].parameters(), *model.heads[m].parameters()}
    check_gradients(own, gradient(wanted, own))
    assert all(p.grad is None for p in model.parameters() if p not in own)


def test_rectification_is_joint_training(task):
    freeze(task)
    batch, parameters = training_batch(task), list(task.model.parameters())
    task.step(batch, boosted=RECTIFY)
    logits = sum(task.model.heads[m](x) for m, x in task.forward(batch)[0].items())
    check_gradients(parameters, gradient(loss_of(logits, batch), parameters))


def test_modalities_take_turns(task):
    """Four rounds of three modalities, each boosted, then all rectified."""
    total = 8 * task.run.steps
    turns = [task.flags(n)["boosted"] for n in range(total)]
    assert total == 48 and turns == [x for m in (0, 1, 2) for x in (m, m, RECTIFY, RECTIFY)] * 4
