"""The CLUB bound of a batch whose rows are spread over the processes of a group."""

import torch
import torch.distributed as dist
from torch import Tensor

from .reference import accumulation_dtype


def club_mi(mu: Tensor, logvar: Tensor, y: Tensor, process_group: "dist.ProcessGroup", *, reduction: str) -> Tensor:
    r"""The bound of all rows, the same in every process; each holds some of them, (N_local, D), N may differ.

    The bound is a function of column sums, so these are all that travels: one message of D + 1 numbers for the mean of
    y, by which y and mu are shifted (the bound does not change, its rounding error does), and one of 5 D. With
    ``w = exp(-logvar)`` and means over all N rows::

        value = 1/2 sum_d [mean(w) mean(y²) - 2 mean(y) mean(w mu) + mean(w y (2 mu - y))]

    The gradient in the local rows is the bound's, times the number of processes: averaged over them as DDP does it, the
    parameters' gradients are those of one process.
    """
    dtype = accumulation_dtype(mu.dtype)
    mu, logvar, y = mu.to(dtype), logvar.to(dtype), y.to(dtype)
    first = torch.cat((y.detach().sum(0), y.new_tensor([len(y)])))
    dist.all_reduce(first, group=process_group)
    count = first[-1]
    mean = first[:-1] / count
    mu, y, w = mu - mean, y - mean, (-logvar).exp()
    local = torch.stack((y, y * y, w, w * mu, w * y * (2 * mu - y))).sum(1)
    everywhere = local.detach().clone()
    dist.all_reduce(everywhere, group=process_group)
    # The value is that of all rows; the gradient reaches the local ones, times the number of processes.
    y, yy, w, wmu, wyy = (everywhere + dist.get_world_size(process_group) * (local - local.detach())) / count
    value = (w * yy - 2 * y * wmu + wyy).sum() / 2
    return value * count if reduction == "sum" else value
