"""Losses of a batch whose rows are distributed over the processes of a group."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._ops import SUM
from .reference import accumulation_dtype, add_rows, inverse_variance, take_rows

SCALE = 2.0**16  # w is summed over this, so that no sum of weights overflows


def club_mi(
    mu: Tensor,
    logvar: Tensor,
    y: Tensor,
    given: Tensor | None,
    process_group: "dist.ProcessGroup",
    *,
    reduction: str,
    times: int | None = None,
) -> Tensor:
    r"""The bound of all rows, the same in every process. Each holds (N_local, D) of them; N_local may differ.

    The bound is a function of column sums, so the processes only exchange these: D + 1 numbers for the mean of y, which
    is subtracted from y and mu (the bound does not change, its rounding error does), and then 5 D. With
    ``w = exp(-logvar)`` and means over all N rows::

        value = 1/2 sum_d [mean(w) mean(y²) - 2 mean(y) mean(w mu) + mean(w y (2 mu - y))]

    The gradient in the local rows is the bound's, times the number of processes: after DDP's average over them the
    parameters' gradients are those of one process. ``times`` is another factor.

    With ``given``, these are the sums of each class. To number the classes alike, every process first gets the classes
    of all rows, and waits for its device to do so.
    """
    dtype = accumulation_dtype(mu.dtype)
    mu, logvar, y = mu.to(dtype), logvar.to(dtype), y.to(dtype)
    if given is not None:
        classes, index = _classes_everywhere(given, process_group)

    def sums(x: Tensor) -> Tensor:
        """The sums over the rows of each class."""
        return x.sum(0, keepdim=True) if given is None else add_rows(x, index, classes + 1)[:classes]

    def of_rows(x: Tensor) -> Tensor:
        """For each row the value of its class; 0 for a row without one."""
        return x if given is None else take_rows(torch.cat((x, x.new_zeros(1, x.shape[1]))), index)

    first = sums(torch.cat((y.detach(), y.new_ones(len(y), 1)), 1))
    dist.all_reduce(first, group=process_group)
    count = first[:, -1:]
    mean = of_rows(first[:, :-1] / count)
    mu, y = mu - mean, y - mean
    if given is not None:
        real = of_rows(count) > 1
        mu, logvar, y = (torch.where(real, x, 0) for x in (mu, logvar, y))
    w = inverse_variance(logvar) / SCALE
    local = torch.stack([sums(x) for x in (y, y * y, w, w * mu, w * y * (2 * mu - y))])
    everywhere = local.detach().clone()
    dist.all_reduce(everywhere, group=process_group)
    # The value is that of all rows, the gradient in the local rows.
    times = dist.get_world_size(process_group) if times is None else times
    y, yy, w, wmu, wyy = (everywhere + times * (local - local.detach())) / count
    values = (count * (w * yy - 2 * y * wmu + wyy)).sum(1, keepdim=True) * (SCALE / 2)
    if given is None:
        return values.sum() if reduction == "sum" else (values / count).sum()
    value = (values * count / (count - 1).clamp_min(1)).sum()  # a row is not among its own negatives
    return value if reduction == "sum" else value / count.sum().clamp_min(1)


def duc_loss(
    loss: Callable,
    student: Tensor,
    teacher: Tensor,
    dims: Tensor,
    temperature: float,
    process_group: "dist.ProcessGroup",
    *,
    reduction: str,
    times: int | None = None,
) -> Tensor:
    """The loss of all rows, the same in every process, by ``loss``, the op. Numbers of rows may differ.

    The teacher's rows are gathered, the local ones first: their first N are the positives, all others negatives. Its
    gradient, if it needs one, is summed over the processes. Gradients are multiplied as in `club_mi`.
    """
    everyone, begin = _Gather.apply(teacher, process_group)
    local = loss(student, torch.cat((everyone[begin:], everyone[:begin])), dims, temperature, SUM)
    total = torch.stack((local.detach(), torch.full_like(local, len(student))))
    dist.all_reduce(total, group=process_group)
    times = dist.get_world_size(process_group) if times is None else times
    value = total[0] + times * (local - local.detach())
    return value if reduction == "sum" else value / total[1]


class _Gather(torch.autograd.Function):
    """The rows of all processes, and where the local ones begin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "dist.ProcessGroup") -> tuple[Tensor, int]:
        parts = _gather_rows(x, group)
        rank = dist.get_rank(group)
        ctx.group, ctx.begin, ctx.rows = group, sum(map(len, parts[:rank])), len(x)
        return torch.cat(parts), ctx.begin

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.begin : ctx.begin + ctx.rows], None


def _gather_rows(x: Tensor, group: "dist.ProcessGroup") -> list[Tensor]:
    """The rows of each process; waits for the device, since their numbers may differ."""
    processes, rank = dist.get_world_size(group), dist.get_rank(group)
    counts = [x.new_empty(1, dtype=torch.int64) for _ in range(processes)]
    dist.all_gather(counts, torch.full_like(counts[0], len(x)), group=group)
    rows = torch.cat(counts).tolist()
    parts = x.new_zeros((processes, max(rows), *x.shape[1:]))
    padded = parts[rank].clone()
    padded[: len(x)] = x
    dist.all_gather(list(parts), padded, group=group)
    return [part[:count] for part, count in zip(parts, rows, strict=True)]


def _classes_everywhere(given: Tensor, group: "dist.ProcessGroup") -> tuple[int, Tensor]:
    """The number of classes, and each local row's class, numbered alike in all processes; without one, that number."""
    ids = torch.cat(_gather_rows(given.long(), group)).unique()
    ids = ids[ids >= 0]
    return len(ids), torch.where(given < 0, len(ids), torch.searchsorted(ids, given.long()))
