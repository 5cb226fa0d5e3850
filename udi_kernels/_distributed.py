"""The CLUB bound of a batch whose rows are distributed over the processes of a group."""

import torch
import torch.distributed as dist
from torch import Tensor

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
) -> Tensor:
    r"""The bound of all rows, the same in every process. Each holds (N_local, D) of them; N_local may differ.

    The bound is a function of column sums, so the processes only exchange these: D + 1 numbers for the mean of y, which
    is subtracted from y and mu (the bound does not change, its rounding error does), and then 5 D. With
    ``w = exp(-logvar)`` and means over all N rows::

        value = 1/2 sum_d [mean(w) mean(y²) - 2 mean(y) mean(w mu) + mean(w y (2 mu - y))]

    The gradient in the local rows is the bound's, times the number of processes: after DDP's average over them the
    parameters' gradients are those of one process.

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
    # The value is that of all rows; the gradient is in the local rows, times the number of processes.
    y, yy, w, wmu, wyy = (everywhere + dist.get_world_size(process_group) * (local - local.detach())) / count
    values = (count * (w * yy - 2 * y * wmu + wyy)).sum(1, keepdim=True) * (SCALE / 2)
    if given is None:
        return values.sum() if reduction == "sum" else (values / count).sum()
    value = (values * count / (count - 1).clamp_min(1)).sum()  # a row is not among its own negatives
    return value if reduction == "sum" else value / count.sum().clamp_min(1)


def _classes_everywhere(given: Tensor, group: "dist.ProcessGroup") -> tuple[int, Tensor]:
    """The number of classes, and each local row's class, numbered alike in all processes; without one, that number."""
    processes, rank = dist.get_world_size(group), dist.get_rank(group)
    counts = [given.new_empty(1, dtype=torch.int64) for _ in range(processes)]
    dist.all_gather(counts, torch.full_like(counts[0], len(given)), group=group)
    rows = torch.cat(counts).tolist()
    parts = given.new_full((processes, max(rows)), -1, dtype=torch.int64)
    padded = parts[rank].clone()
    padded[: len(given)] = given
    dist.all_gather(list(parts), padded, group=group)
    ids = parts.unique()
    ids = ids[ids >= 0]
    return len(ids), torch.where(given < 0, len(ids), torch.searchsorted(ids, given.long()))
