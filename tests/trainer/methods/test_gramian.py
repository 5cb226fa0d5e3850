"""The method gramian against TorchJD."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from udi_trainer import registry
from udi_trainer.command import main
from udi_trainer.methods.gramian import Gramian

from ..helpers import freeze, make_run, needs_torchjd, one_line, training_batch


@needs_torchjd
@pytest.mark.parametrize("dataset", ["cgdigits", "three"])
def test_step_is_torchjd(dataset, three_views):
    """Against TorchJD's own aggregation of the stacked, flattened gradients."""
    from torchjd.aggregation import UPGrad

    task = Gramian(make_run(dataset))
    for _ in range(5):
        task.step(training_batch(task, 64))
    freeze(task)
    batch = training_batch(task)
    scalars = task.step(batch)

    features, logits = task.forward(batch)
    predictions = [logits, *task.model.shares(features).values()]
    losses = [cross_entropy(z, batch["labels"]) for z in predictions]
    assert len(losses) == 1 + len(task.run.data.modalities)
    jacobian = []
    for loss in losses:
        grads = torch.autograd.grad(loss, task.parameters, retain_graph=True, materialize_grads=True)
        jacobian.append(torch.cat([g.flatten() for g in grads]))
    wanted = UPGrad()(torch.stack(jacobian))
    update = torch.cat([p.grad.flatten() for p in task.parameters])
    assert (update - wanted).norm() < 1e-4 * wanted.norm()
    weights = torch.stack([scalars[f"weight_{name}"] for name in ("joint", *features)])
    assert (weights >= 1 / len(losses) - 1e-6).all()


def test_without_torchjd(monkeypatch, capsys):
    """Refused before anything is trained, as a baseline too."""
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "torchjd" else find_spec(name))
    for options in (["--method", "gramian"], ["--baselines", "joint,gramian"]):
        assert main(options) == 2
        message = one_line(capsys.readouterr().err)
        assert "torchjd" in message and 'pip install -e ".[experiments]"' in message
    assert not Path("runs").exists()
