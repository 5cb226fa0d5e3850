"""What the parts of a run share: optimizers, seeds, devices."""

import pytest
import torch
from torch import nn

from udi_trainer import Options, UserError, distributed
from udi_trainer.methods.joint import Joint
from udi_trainer.methods.unimodal import Alone
from udi_trainer.run import choose_device
from udi_trainer.seeds import derive_seed, seeded

from .helpers import make_run


def steps_of(optimizer, parameter, grads):
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


def test_sgd_is_its_formula(mixed):
    """v = momentum v + g + decay p; p -= lr v."""
    run = make_run(mixed, optimizer="sgd", lr=0.1, momentum=0.7, weight_decay=0.2)
    start, grads = torch.randn(5), torch.randn(3, 5)
    p, v = start.clone(), torch.zeros(5)
    for g in grads:
        v = 0.7 * v + g + 0.2 * p
        p = p - 0.1 * v
    parameter = nn.Parameter(start.clone())
    torch.testing.assert_close(steps_of(run.optimizer([parameter]), parameter, grads), p)


def test_fusion_rule(mixed):
    """What is asked for, else the method's own, else what the dataset recommends."""
    run = make_run(mixed)
    for name, wanted in ("fewdigits", ["loglinear", "certainty"]), ("splitdigits", ["auto", "certainty"]):
        run.options = Options.make(dataset=name)
        assert [run.fusion(), run.fusion("certainty")] == wanted
        run.options = Options.make(dataset=name, fusion="mean")
        assert [run.fusion(), run.fusion("certainty")] == ["mean", "mean"]


def test_adamw_decays_as_asked(mixed):
    start, grads = torch.randn(5), torch.randn(3, 5)
    for given, decay in ({}, 0.01), ({"weight_decay": 0.3}, 0.3), ({"weight_decay": 0}, 0):
        plain, ours = (nn.Parameter(start.clone()) for _ in range(2))
        wanted = steps_of(torch.optim.AdamW([plain], weight_decay=decay), plain, grads)
        torch.testing.assert_close(steps_of(make_run(mixed, **given).optimizer([ours]), ours, grads), wanted)


def test_the_optimizer_is_that_of_all_methods(mixed):
    run = make_run(mixed, optimizer="sgd")
    for task in (run.make(Alone, modality="audio"), run.make(Joint)):
        assert isinstance(task.optimizer, torch.optim.SGD)


def test_tasks_are_made_from_their_own_seed(mixed):
    """Whatever was drawn before, and without a trace in torch's generator."""
    run, states = make_run(mixed), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        states.append(run.make(Alone, modality="audio").model.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    other = make_run(mixed, seed=1).make(Alone, modality="audio").model.state_dict()
    assert not torch.equal(other["head.weight"], states[0]["head.weight"])


def test_seeds():
    """They name checkpoints' figures: the same for ever."""
    assert derive_seed(0, "anchor-gray", 3) == derive_seed(0, "anchor-gray", 3) != derive_seed(0, "anchor-gray", 4)
    assert derive_seed(0, "anchor-gray") == 5698383144440402870
    with seeded(7):
        drawn = torch.randn(3)
    assert torch.equal(drawn, torch.randn(3, generator=torch.Generator().manual_seed(7)))


def test_full_batches_only(mixed):
    assert (make_run(mixed, batch_size=16).steps, make_run(mixed, batch_size=101).steps) == (6, 1)
    small = make_run(mixed, batch_size=500)
    assert (small.batch_size, small.steps) == (101, 1)


def test_devices():
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for name in ("tpu", "mps", "gpu"):
        with pytest.raises(UserError, match=f"unknown device '{name}': choose from auto, cpu, cuda, cuda:i"):
            choose_device(name)
    with pytest.raises(UserError, match="--device cuda:99: torch .* sees . CUDA devices here: use --device cpu"):
        choose_device("cuda:99")


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert choose_device("cpu") == torch.device("cpu") and not taken
    assert choose_device("cuda") == torch.device("cuda", 1) and taken == [torch.device("cuda", 1)]


def test_one_process_writes_tensorboard_events(mixed, monkeypatch):
    """The others have no folder for them."""
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert make_run(mixed, tensorboard=True).board is None
