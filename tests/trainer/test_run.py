"""What the parts of a run share: optimizers, seeds, devices."""

import numpy
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from udi_trainer import Options, UserError, distributed, optimizers
from udi_trainer.methods.joint import Joint
from udi_trainer.methods.unimodal import Alone
from udi_trainer.registry import datasets
from udi_trainer.run import choose_device
from udi_trainer.seeds import derive_seed, seeded

from .helpers import make_run, run_python


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


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_gradients_are_clipped_by_group(mixed, optimizer):
    """As torch clips each group by itself, but not in place: two parameters may share a gradient."""
    options = {"optimizer": optimizer, "lr": 0.1, "weight_decay": 0.01}
    start, grads = [torch.randn(3, 4), torch.randn(5), torch.randn(6)], [torch.randn(3, 4), torch.randn(5)]
    for norm in (0.3, 100.0):
        (a, b, c), (x, y, z) = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
        ours = make_run(mixed, clip_grad=norm, **options).optimizer([{"params": [a, b]}, {"params": [c]}])
        plain = make_run(mixed, **options).optimizer([{"params": [x, y]}, {"params": [z]}])
        for _ in range(3):
            for p, grad in zip((a, b, x, y), grads * 2, strict=True):
                p.grad = grad.clone()
            nn.utils.clip_grad_norm_([x, y], norm)
            ours.step()
            plain.step()
        assert torch.equal(a, x) and torch.equal(b, y) and torch.equal(c, z)
    shared = torch.ones(4)
    p, q = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    p.grad = q.grad = shared
    make_run(mixed, clip_grad=1.0, **options).optimizer([p, q]).step()
    torch.testing.assert_close(p.grad, torch.full((4,), 8**-0.5))
    torch.testing.assert_close(q.grad, p.grad)
    assert torch.equal(shared, torch.ones(4))


def test_balanced_class_weights(mixed):
    """scikit-learn's, over the labelled training samples: their mean there is 1."""
    mixed.train.labels = torch.tensor([0, 1, 1, 0, 1, -1, 1, 1, 1, -1] * 10 + [1])
    assert make_run(mixed).class_weights is None
    weights, labels = make_run(mixed, class_weights="balanced").class_weights, mixed.train.labels
    known = labels[labels >= 0]
    wanted = compute_class_weight("balanced", classes=numpy.arange(2), y=known.numpy())
    torch.testing.assert_close(weights.double(), torch.from_numpy(wanted))
    torch.testing.assert_close(weights[known].mean(), torch.tensor(1.0))


def test_fusion_rule(mixed, monkeypatch):
    """What is asked for, else the method's own, else what the dataset recommends."""
    run = make_run(mixed)
    monkeypatch.setitem(datasets.recommended, "fewdigits", {"fusion": "loglinear"})
    for name, wanted in ("fewdigits", ["loglinear", "certainty"]), ("splitdigits", ["auto", "certainty"]):
        run.options = Options.make(dataset=name)
        assert [run.fusion(), run.fusion("certainty")] == wanted
        run.options = Options.make(dataset=name, fusion="mean")
        assert [run.fusion(), run.fusion("certainty")] == ["mean", "mean"]


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_optimizers_without_decorators_are_torchs(name):
    """Their steps, states and groups; each is resumed from the other's state."""
    options = {"lr": 0.1, "weight_decay": 0.1, "fused": True} | ({"momentum": 0.9} if name == "SGD" else {})
    start, grads = torch.randn(5), torch.randn(4, 5)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    mine, torchs = getattr(optimizers, name)([ours], **options), getattr(torch.optim, name)([theirs], **options)
    for grad in grads:
        for p, optimizer in (ours, mine), (theirs, torchs):
            p.grad = grad.clone()
            optimizer.step()
        state, other = mine.state_dict(), torchs.state_dict()
        mine.load_state_dict(other)
        torchs.load_state_dict(state)
        assert torch.equal(ours, theirs) and state["param_groups"] == other["param_groups"]
    assert isinstance(mine, getattr(torch.optim, name)) and repr(mine) == repr(torchs)
    mine.zero_grad()
    assert ours.grad is None


def test_start_imports_only_what_it_needs():
    """Up to the first steps, and to the end of a run without a folder; each of these takes up to a second."""
    code = """import sys
from udi_trainer import train
train("cgdigits", epochs=1, baselines=[], progress=False, device="cpu")
slow = ("matplotlib", "PIL", "soundfile", "sklearn", "scipy", "sympy", "torch._dynamo", "torch.distributed.fsdp")
print([name for name in slow if name in sys.modules])"""
    assert run_python(code).strip() == "[]"


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
