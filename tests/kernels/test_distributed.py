"""club_mi of rows that are spread over processes, against one process with all rows."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from udi_kernels import club_mi

SHARES = (5, 1, 7)  # rows of each process
REDUCTIONS = ("mean", "sum")
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
    finally:
        dist.destroy_process_group()
