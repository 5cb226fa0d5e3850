"""Losses of DTensors in several processes: value and gradients are those of one process with all rows."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from udi_kernels import club_mi, duc_loss

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def process(rank, size, file):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    torch.manual_seed(0)
    n, d = 7, 5  # uneven shards
    whole = [torch.randn(n, d, dtype=torch.float64) for _ in range(3)]
    given, dims = torch.tensor([3, 3, -1, 8, 3, 8, 9]), torch.arange(d) != 2
    flat, two = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (size // 2, 2))
    placed = [(flat, [Shard(0)]), (flat, [Replicate()]), (two, [Replicate(), Shard(0)]), (two, [Shard(0), Replicate()])]

    def check(f, plain, tensors, mesh, places):
        leaves = [t.clone().requires_grad_() for t in tensors]
        want = plain(*leaves)
        spread = [distribute_tensor(t.clone(), mesh, p).requires_grad_() for t, p in zip(tensors, places, strict=True)]
        loss = f(*spread)
        assert isinstance(loss, DTensor) and all(p.is_replicate() for p in loss.placements)
        torch.testing.assert_close(loss.full_tensor(), want)
        weight = torch.rand_like(want.detach())
        found = torch.autograd.grad((loss * distribute_tensor(weight, mesh, [Replicate()] * mesh.ndim)).sum(), spread)
        expected = torch.autograd.grad((want * weight).sum(), leaves)
        for x, t, truth in zip(spread, found, expected, strict=True):
            assert t.placements == x.placements
            torch.testing.assert_close(t.full_tensor(), truth)

    for (mesh, places), reduction in itertools.product(placed, ("mean", "sum")):
        for classes in (None, given):
            spread = None if classes is None else distribute_tensor(classes, mesh, places)
            check(
                lambda *x, spread=spread, reduction=reduction: club_mi(*x, given=spread, reduction=reduction),
                lambda *x, classes=classes, reduction=reduction: club_mi(*x, given=classes, reduction=reduction),
                whole, mesh, [places] * 3,
            )  # fmt: skip
        for chosen in (dims, distribute_tensor(dims, mesh, [Replicate()] * mesh.ndim)):
            check(
                lambda *x, on=chosen, reduction=reduction: duc_loss(*x, on, temperature=2.0, reduction=reduction),
                lambda *x, reduction=reduction: duc_loss(*x, dims, temperature=2.0, reduction=reduction),
                whole[:2], mesh, [places] * 2,
            )  # fmt: skip
    # Other placements are redistributed; rows that every rank has may be kept apart.
    check(lambda *x: club_mi(*x), lambda *x: club_mi(*x), whole, flat, [[Shard(0)], [Replicate()], [Shard(1)]])
    rows = lambda *x: club_mi(*x, reduction="none")  # noqa: E731
    check(rows, rows, whole, flat, [[Replicate()]] * 3)
    queue = lambda *x: duc_loss(*x, dims)  # noqa: E731
    check(queue, queue, [whole[0][:4], whole[1]], flat, [[Replicate()]] * 2)

    a, b = (distribute_tensor(t, flat, [Shard(0)]) for t in whole[:2])
    short = distribute_tensor(whole[0][:4], flat, [Shard(0)])
    part = DTensor.from_local(whole[0], flat, [Partial()])
    torch.testing.assert_close(club_mi(part, b, a).full_tensor(), club_mi(size * whole[0], whole[1], whole[0]))
    for words, call in {
        "club_mi: y must be a DTensor as the others are, got Tensor": lambda: club_mi(a, b, whole[2]),
        "club_mi: sharded rows need reduction 'mean' or 'sum'": lambda: club_mi(a, b, a, reduction="none"),
        "club_mi: DTensors bring their own process group": lambda: club_mi(a, b, a, process_group=dist.group.WORLD),
        "duc_loss: teacher must be a DTensor": lambda: duc_loss(a, whole[1], dims),
        "duc_loss: DTensors bring their own": lambda: duc_loss(a, b, dims, process_group=dist.group.WORLD),
        "duc_loss: teacher must have student's shape where rows are sharded": lambda: duc_loss(short, a, dims),
        "duc_loss: teacher must be on": lambda: duc_loss(a, distribute_tensor(whole[1], two, [Replicate()] * 2), dims),
    }.items():
        with pytest.raises((TypeError, ValueError), match=words):
            call()
    if size == 4:
        c = distribute_tensor(whole[0], two, [Shard(0), Shard(0)])
        with pytest.raises(ValueError, match="club_mi: rows must be sharded over one dimension of the mesh, got 2"):
            club_mi(c, c, c)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # DTensor's caches keep gloo's threads, and one that lets go of a tensor while Python ends would abort


@pytest.mark.parametrize("processes", [2, 4])
def test_losses(processes, tmp_path):
    mp.spawn(process, (processes, tmp_path / "meeting"), nprocs=processes)
