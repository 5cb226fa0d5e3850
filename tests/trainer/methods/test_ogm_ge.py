"""OGM-GE against its formula."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from udi_trainer.command import main
from udi_trainer.methods import ogm_ge
from udi_trainer.models.encoders import FEATURES

from ..helpers import freeze, make_run, read_log, training_batch


@pytest.mark.parametrize("dataset", ["cgdigits", "three"])
def test_step_is_the_plain_formula(dataset, three_views):
    task = ogm_ge.OGMGE(make_run(dataset))
    batch, names = training_batch(task), list(task.run.data.modalities)
    with torch.no_grad():  # one modality ahead of the others
        task.model.head.weight[:, :FEATURES] *= 3
    freeze(task)
    torch.manual_seed(1)
    scalars = task.step(batch, modulate=True)

    features, logits = task.forward(batch)
    shares = task.model.shares(features)
    score = {m: sum(z.softmax(0)[y] for z, y in zip(shares[m], batch["labels"], strict=True)) for m in names}
    k = {}
    for m in names:
        others = [score[n] for n in names if n != m]
        ratio = score[m] / (sum(others) / len(others))
        k[m] = 1 - torch.tanh(ogm_ge.OGMGEOptions().ogm_alpha * ratio) if ratio > 1 else torch.tensor(1.0)
        torch.testing.assert_close(scalars[f"k_{m}"], k[m].detach())
    assert min(k.values()) < 0.5 and max(k.values()) == 1
    parameters = dict(task.model.named_parameters())
    grads = torch.autograd.grad(cross_entropy(logits, batch["labels"]), list(parameters.values()))
    torch.manual_seed(1)
    modulated = 0
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        place, modality = name.split(".")[:2]
        if place == "encoders" and parameter.dim() > 1:
            grad = k[modality] * grad + grad.std() * torch.randn_like(grad)
            modulated += 1
        torch.testing.assert_close(parameter.grad, grad)
    assert modulated == sum(p.dim() > 1 for p in task.model.encoders.parameters())

    scalars = task.step(batch, modulate=False)
    assert all(scalars[f"k_{m}"] == 1 for m in names)
    for parameter, grad in zip(parameters.values(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_first_half_is_modulated(monkeypatch):
    calls, step = [], ogm_ge.OGMGE.step
    monkeypatch.setattr(ogm_ge.OGMGE, "step", lambda *args, modulate: calls.append(modulate) or step(*args, modulate))
    assert main(["--method", "ogm-ge", "--epochs", "4", "--out", "run"]) == 0
    assert calls == [True] * 2 * 16 + [False] * 2 * 16
    rows = read_log("run")
    assert all(min(row["k_left"], row["k_right"]) < 1 for row in rows[:2])
    assert all(row["k_left"] == row["k_right"] == 1 for row in rows[2:])
