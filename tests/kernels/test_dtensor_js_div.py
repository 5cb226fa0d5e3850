"""js_div of DTensors in several processes: value and gradients are those of one process with all logits."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from losses import assert_as_good_as_torch

from udi_kernels import _build, js_div, reference

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def process(rank, size, file, check):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    torch.manual_seed(0)
    check(size)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # DTensor's caches keep gloo's threads, and one that lets go of a tensor while Python ends would abort


def spread(tensors, mesh, places):
    from torch.distributed.tensor import distribute_tensor

    return [distribute_tensor(t.detach().clone(), mesh, p) for t, p in zip(tensors, places, strict=True)]


def assert_equal(logits, mesh, places, weight=None, weight_places=None, tolerance=1e-12, **options):
    """Value, placement and gradients are those of `js_div` of the whole logits."""
    from torch.distributed.tensor import DTensor

    close = dict(rtol=tolerance, atol=tolerance, equal_nan=True)
    leaves = [t.clone().requires_grad_() for t in logits]
    want = js_div(*leaves, weight=weight, **options)
    ours = [t.requires_grad_() for t in spread(logits, mesh, places)]
    placed = None if weight is None else spread([weight], mesh, [weight_places])[0]
    loss = js_div(*ours, weight=placed, **options)
    assert isinstance(loss, DTensor) and loss.shape == want.shape and loss.dtype == want.dtype
    torch.testing.assert_close(loss.full_tensor(), want, **close)
    grad = torch.rand_like(want.detach())
    spread_grad = spread([grad], mesh, [loss.placements])[0]
    found = torch.autograd.grad((loss * spread_grad).sum(), ours)
    for t, leaf, truth in zip(found, ours, torch.autograd.grad((want * grad).sum(), leaves), strict=True):
        assert t.placements == leaf.placements and t.dtype == leaf.dtype
        torch.testing.assert_close(t.full_tensor(), truth, **close)
    if options.get("reduction") != "none":
        assert all(p.is_replicate() for p in loss.placements)


def layouts(size):
    """Meshes, the logits' placements there, and the weights'."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    flat, two = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (size // 2, 2))
    copies, rows = Replicate(), Shard(0)
    return [
        (flat, [rows], [rows]),
        (flat, [Shard(1)], [Shard(1)]),
        (flat, [copies], [copies]),
        (flat, [Shard(2)], [copies]),
        (two, [rows, Shard(2)], [rows, copies]),
        (two, [Shard(2), Shard(1)], [copies, Shard(1)]),
        (two, [rows, Shard(1)], [rows, Shard(1)]),
    ]


def values(size):
    # 5 classes over 4 processes: 2, 2, 1 and 0; 3 rows over 2: 2 and 1.
    logits = [3 * torch.randn(3, 2, 5, dtype=torch.float64) for _ in range(2)]
    weight = torch.tensor([[0.0, 2.0], [1.0, 0.5], [3.0, 0.0]], dtype=torch.float64)
    logits[0][0, 0, 3] = torch.nan  # of a masked row
    for mesh, places, of_rows in layouts(size):
        options = itertools.product((0, 0.1, 0.5, 0.9, 1), ("none", "sum", "mean"))
        for (beta, reduction), w in zip(options, itertools.cycle((weight, None, weight != 0, weight))):
            x = logits if w is not None else [t.nan_to_num() for t in logits]
            assert_equal(x, mesh, [places] * 2, w, of_rows, beta=beta, temperature=1.7, reduction=reduction)


def corners(size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    flat = init_device_mesh("cpu", (size,))
    classes, rows = [Shard(1)], [Shard(0)]
    logits = [torch.randn(6, 9, dtype=torch.float64) for _ in range(2)]
    both = [classes] * 2
    weight = torch.tensor([0, 1, 0, 2, 3, 1])
    for beta in (0, 0.3, 1):
        for i, j, sentinel in ((0, 4, torch.nan), (0, 4, -torch.inf), (1, 0, torch.inf), (1, 8, -3e38)):
            x = [t.clone() for t in logits]
            x[i][1, j] = sentinel
            assert_equal(x, flat, both, beta=beta, reduction="none")
            x[i][2], x[1 - i][2, 3] = sentinel, torch.nan  # weight 0
            assert_equal(x, flat, both, weight, [Replicate()], beta=beta)
        none = [logits[0].clone(), logits[1]]
        none[0][3] = -torch.inf  # no class above it
        assert_equal(none, flat, both, beta=beta, reduction="none")
        none[0][3, :5] = 0.0  # none above it in some processes
        assert_equal(none, flat, both, beta=beta, reduction="none")
        assert_equal([logits[0] * 1e30, logits[1]], flat, both, beta=beta, temperature=1e-3)
    for reduction in ("mean", "sum"):
        assert_equal(logits, flat, both, torch.zeros(6), [Replicate()], reduction=reduction)
        assert_equal(logits, flat, [rows] * 2, torch.zeros(6), rows, reduction=reduction)
        assert_equal([t[:0] for t in logits], flat, both, reduction=reduction)
        assert_equal([t[:0] for t in logits], flat, [rows] * 2, reduction=reduction)
    huge = torch.full((6,), 1e38)
    for places, of_rows in ((classes, [Replicate()]), (rows, rows)):
        assert_equal(logits, flat, [places] * 2, huge, of_rows)
        equal = spread([logits[0], logits[0]], flat, [places] * 2)
        assert js_div(*equal, reduction="none").full_tensor().eq(0).all()  # exactly
    mixed = [logits[0].bfloat16(), logits[1].float()]
    assert_equal(mixed, flat, both, tolerance=1e-6)
    nchw = [torch.randn(2, 7, 3, 2, dtype=torch.float64) for _ in range(2)]
    for places in ([Shard(1)], [Shard(0)], [Shard(2)]):
        assert_equal(nchw, flat, [places] * 2, dim=1, reduction="none")
    # Redistributed: to the first of both that is sharded.
    assert_equal(logits, flat, [[Replicate()], classes], weight, rows)
    assert_equal(logits, flat, [rows, classes])
    part = DTensor.from_local(logits[0], flat, [Partial()])
    replicated = DTensor.from_local(logits[1], flat, [Replicate()])
    torch.testing.assert_close(js_div(part, replicated).full_tensor(), js_div(size * logits[0], logits[1]))

    x, y = (t.requires_grad_() for t in spread(logits, flat, both))
    with CommDebugMode() as forward:
        loss = js_div(x, y)
    with CommDebugMode() as backward:
        torch.autograd.grad(loss, (x, y), retain_graph=True)
    assert sorted(str(op) for op in forward.get_comm_counts()) == ["c10d.allgather_", "c10d.allreduce_"]
    assert forward.get_total_counts() == 2 and backward.get_total_counts() == 0
    with pytest.raises(RuntimeError, match="js_div: gradients in logits sharded over classes cannot be"):
        torch.autograd.grad(loss, x, create_graph=True)
    a, b = (t.requires_grad_() for t in spread(logits, flat, [rows] * 2))
    torch.autograd.grad(js_div(a, b), a, create_graph=True)[0].square().sum().backward()
    leaves = [t.clone().requires_grad_() for t in logits]
    torch.autograd.grad(js_div(*leaves), leaves[0], create_graph=True)[0].square().sum().backward()
    torch.testing.assert_close(a.grad.full_tensor(), leaves[0].grad)
    torch.testing.assert_close(b.grad.full_tensor(), leaves[1].grad)

    with pytest.MonkeyPatch.context() as patch:  # without csrc the classes are gathered
        patch.setattr(_build, "load", lambda kind: None)
        for places, of_rows in ((classes, [Replicate()]), (rows, rows)):
            assert_equal(logits, flat, [places] * 2, weight, of_rows, beta=0.3)

    two = init_device_mesh("cpu", (size // 2, 2))
    (c,) = spread([logits[0]], two, [[Shard(1), Shard(1)]])
    (elsewhere,) = spread([logits[0]], two, [[Replicate()] * 2])
    (w,) = spread([weight], flat, [rows])
    for words, call in {
        "js_div: target must be a DTensor as the others are, got Tensor": lambda: js_div(x, logits[1]),
        "js_div: input must be a DTensor as the others are, got Tensor": lambda: js_div(logits[0], y),
        "js_div: weight must be a DTensor as the others are, got Tensor": lambda: js_div(x, y, weight=weight),
        "js_div: input must be a DTensor as the others are": lambda: js_div(*logits, weight=w),
        "js_div: target must be on": lambda: js_div(x, elsewhere),
        "js_div: classes must be sharded over one dimension of the mesh, got 2": lambda: js_div(c, c),
        "js_div: target must be dense, .* got .*\\(6, 8\\)": lambda: js_div(x, y[:, :8]),
        "js_div: beta is out of range": lambda: js_div(x, y, beta=1.5),
        "js_div: temperature is out of range": lambda: js_div(x, y, temperature=0.0),
        "js_div: temperature must be a number": lambda: js_div(x, y, temperature=True),
        "js_div: reduction must be one of": lambda: js_div(x, y, reduction="avg"),
        "js_div: weight gets no gradient": lambda: js_div(x, y, weight=w.double().requires_grad_()),
    }.items():
        with pytest.raises((TypeError, ValueError), match=words):
            call()


def accuracy(size):
    """The criterion of the whole op, in float32 and bfloat16, also of nearly equal rows and short shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    flat = init_device_mesh("cpu", (size,))

    def placed(x):
        return DTensor.from_local(x, flat, [Replicate()]).redistribute(placements=[Shard(1)])

    for dtype, classes, noise, beta in itertools.product(
        (torch.float32, torch.bfloat16), (6, 1000), (1e-3, 1.0), (0, 0.3, 1)
    ):  # fmt: skip

        def draw(noise=noise, dtype=dtype, classes=classes):
            x = 2 * torch.randn(33, classes)
            return x.to(dtype), (x + noise * torch.randn_like(x)).to(dtype)

        def ours(x, y, beta=beta):
            return js_div(*map(placed, (x, y)), beta=beta).full_tensor()

        assert_as_good_as_torch(ours, lambda x, y, beta=beta: reference.js_div(x, y, beta=beta), draw)


@pytest.mark.parametrize(("check", "processes"), [(values, 2), (values, 4), (corners, 2), (corners, 4), (accuracy, 4)])
def test_js_div(check, processes, tmp_path):
    mp.spawn(process, (processes, tmp_path / "meeting", check), nprocs=processes)
