"""Losses of rows that are spread over processes, against one process with all rows."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from udi_kernels import club_mi, duc_loss

SHARES = (5, 1, 7)  # rows of each process
REDUCTIONS = ("mean", "sum")
QUEUE = torch.randn(len(SHARES), 3, 6, generator=torch.Generator().manual_seed(1))  # of each process
# A class in all processes, one whose two rows are apart, one in a single process, one alone, and rows in none.
CLASSES = torch.tensor([10**12, 4, -1, 10**12, 7, 10**12, 10**12, 5, 5, 5, -3, 4, 10**12])
GIVEN = {"": None, "given": CLASSES, "none": torch.full_like(CLASSES, -1)}


def rows(dtype):
    generator = torch.Generator().manual_seed(0)
    mu, logvar, y = (torch.randn(sum(SHARES), 6, generator=generator, dtype=torch.float64) for _ in range(3))
    return mu, logvar.tanh(), y + 100  # far from 0: rounding shows


def process(rank, file, dtype, folder):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=len(SHARES))
    ours = [t.to(dtype).split(SHARES)[rank].clone().requires_grad_() for t in rows(dtype)]
    kept = {}
    for name, reduction in itertools.product(GIVEN, REDUCTIONS):
        given = GIVEN[name] if GIVEN[name] is None else GIVEN[name].split(SHARES)[rank]
        value = club_mi(*ours, given=given, reduction=reduction, process_group=dist.group.WORLD)
        kept[name, reduction] = value.detach(), torch.autograd.grad(value, ours)
    dims = torch.arange(6) != 2
    for queue, reduction in itertools.product((0, 3), REDUCTIONS):
        teacher = torch.cat((ours[2], QUEUE[rank, :queue].to(dtype))).detach().requires_grad_()
        value = duc_loss(ours[0], teacher, dims, temperature=3.0, reduction=reduction, process_group=dist.group.WORLD)
        kept["duc", queue, reduction] = value.detach(), torch.autograd.grad(value, (ours[0], teacher))
    torch.save(kept, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_bound_of_the_global_batch(tmp_path, dtype, tolerance):
    mp.spawn(process, (tmp_path / "meeting", dtype, tmp_path), nprocs=len(SHARES))
    kept = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SHARES))]
    whole = [t.requires_grad_() for t in rows(dtype)]
    for name, reduction in itertools.product(GIVEN, REDUCTIONS):
        value = club_mi(*whole, given=GIVEN[name], reduction=reduction)
        grads = torch.autograd.grad(value, whole)
        for values, _ in (part[name, reduction] for part in kept):
            assert values.dtype == dtype
            torch.testing.assert_close(values.double(), value.detach(), rtol=tolerance, atol=tolerance)
        for i, grad in enumerate(grads):
            ours = torch.cat([part[name, reduction][1][i] for part in kept]).double()
            torch.testing.assert_close(
                ours, len(SHARES) * grad, rtol=10 * tolerance, atol=10 * tolerance * grad.abs().max()
            )

    student, _, positives = rows(dtype)
    for queue, reduction in itertools.product((0, 3), REDUCTIONS):
        leaves = (
            student.clone().requires_grad_(),
            positives.clone().requires_grad_(),
            QUEUE[:, :queue].double(),
        )
        leaves[2].requires_grad_()
        everyone = torch.cat((leaves[1], leaves[2].flatten(0, 1)))
        value = duc_loss(leaves[0], everyone, torch.arange(6) != 2, temperature=3.0, reduction=reduction)
        whole = torch.autograd.grad(value, leaves)
        for rank, part in enumerate(kept):
            found, (d_student, d_teacher) = part["duc", queue, reduction]
            torch.testing.assert_close(found.double(), value.detach(), rtol=tolerance, atol=tolerance)
            want = whole[0].split(SHARES)[rank], torch.cat((whole[1].split(SHARES)[rank], whole[2][rank]))
            for a, b in zip((d_student, d_teacher), want, strict=True):
                torch.testing.assert_close(a.double(), len(SHARES) * b, rtol=100 * tolerance, atol=100 * tolerance)


def test_no_rows_of_a_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mu, logvar, y = rows(torch.float32)
        with pytest.raises(ValueError, match="process group needs reduction 'mean' or 'sum', got 'none'"):
            club_mi(mu, logvar, y, reduction="none", process_group=dist.group.WORLD)
        with pytest.raises(ValueError, match="logvar must be .* got .*12, 6"):
            club_mi(mu, logvar[1:], y, process_group=dist.group.WORLD)
        with pytest.raises(ValueError, match="given must be .* got .*12,"):
            club_mi(mu, logvar, y, given=CLASSES[1:], process_group=dist.group.WORLD)
        with pytest.raises(ValueError, match="duc_loss: a process group needs reduction 'mean' or 'sum', got 'none'"):
            duc_loss(mu, y, torch.ones(6, dtype=torch.bool), reduction="none", process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
