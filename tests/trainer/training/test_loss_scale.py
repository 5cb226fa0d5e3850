"""Loss scaling for float16: GradScaler's arithmetic, and trainings in which gradients overflow."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from udi_trainer import Options, Run
from udi_trainer.methods.dimml import dimml
from udi_trainer.methods.gramian import gramian_weighted
from udi_trainer.methods.joint import joint
from udi_trainer.methods.ogm_ge import ogm_ge
from udi_trainer.methods.udi import udi
from udi_trainer.methods.unimodal import Alone, train_alone
from udi_trainer.run_folder import RunFolder
from udi_trainer.training import loss_scale
from udi_trainer.training.loop import fit
from udi_trainer.training.loss_scale import LossScale
from udi_trainer.training.task import update

from ..helpers import make_run, needs_torchjd, training_batch


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.0, fused=True),
])  # fmt: skip
def test_is_grad_scaler(make, monkeypatch):
    """The same scale and parameters, over steps of which some overflow."""
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    ours, theirs = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    optimizers, scale = [make([p]) for p in (ours, theirs)], LossScale()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    scale.attach(optimizers[0])
    for step in range(12):
        factor = math.inf if step in (0, 4, 5) else 1.0 + step
        loss = (ours**2).sum() * factor
        grads = torch.autograd.grad([loss], [ours], scale.weights([loss]))
        update(optimizers[0], [ours], scale.unscaled(grads))
        theirs.grad = None
        scaler.scale((theirs**2).sum() * factor).backward()
        scaler.step(optimizers[1])
        scaler.update()
        assert torch.equal(ours, theirs) and scale.scale.item() == scaler.get_scale(), step


def test_gradients_are_those_without_scaling(mixed):
    """And float16 keeps small ones that it would lose."""
    grads = []
    for amp in ("none", "fp16"):
        run = make_run(mixed, amp=amp)
        task = run.make(Alone, modality="picture")
        with run.autocast():
            logits = task.forward(training_batch(task), training=True)[1]
            loss = 1e-6 * task.cross_entropy(logits, training_batch(task)["labels"])
        grads.append(task.gradients(loss, task.parameters))
    for exact, half in zip(*grads, strict=True):
        assert half.dtype == torch.float32 and half.stride() == exact.stride()
        assert (half - exact).norm() < 0.03 * exact.norm()


METHODS = {"udi": udi, "joint": joint, "ogm-ge": ogm_ge, "dimml": dimml}


@pytest.mark.parametrize("name", [*METHODS, pytest.param("gramian", marks=needs_torchjd)])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_that_overflow_are_skipped(name, optimizer, mixed, monkeypatch):
    """The scale falls until gradients are finite; until then nothing changes, and nothing is lost for good."""
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**30)
    given = {"controller": "dynamic", "align_every": 1, "q_warmup": 0} if name == "udi" else {}
    run = make_run(mixed, method=name, amp="fp16", epochs=8, batch_size=16, optimizer=optimizer, **given)
    outcome = {**METHODS, "gramian": gramian_weighted}[name](run)
    for stage, rows in run.history.items():
        states = run.folder.checkpoint(stage)
        assert 2.0**4 < states["parts"]["loss_scale"]["scale"] < 2.0**26, stage
        assert all(math.isfinite(x) for row in rows for x in row.values() if isinstance(x, float)), stage
        assert all(t.isfinite().all() for t in states["parts"]["model"].values())
    assert outcome.metrics["fused"]["val_acc"] > 0.7


def test_resumes_with_its_scale(mixed, monkeypatch):
    monkeypatch.setattr(loss_scale, "INTERVAL", 5)
    options, states = Options(amp="fp16", epochs=4, batch_size=16, schedule="constant"), []
    for folder, parts in ("whole", (4,)), ("cut", (2, 4)):
        Path(folder).mkdir()
        for epochs in parts:
            run = Run(options, mixed, torch.device("cpu"), RunFolder(Path(folder)))
            train_alone(run, ["picture"], epochs)
        states.append(run.folder.checkpoint("anchor-picture")["parts"])
    assert states[0]["loss_scale"]["scale"] == states[1]["loss_scale"]["scale"] != 2.0**16
    assert all(torch.equal(t, states[1]["model"][name]) for name, t in states[0]["model"].items())


def test_a_task_that_is_trained_on_adapts_its_scale_once_a_step(mixed, monkeypatch):
    monkeypatch.setattr(loss_scale, "INTERVAL", 1)
    run = make_run(mixed, amp="fp16", epochs=2, batch_size=101)
    task = run.make(Alone, modality="sensor")
    for epochs in (1, 2):
        fit([task], run, epochs)
    assert task.loss_scale.scale == 2.0**18
