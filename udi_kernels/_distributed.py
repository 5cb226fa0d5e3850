"""Losses of a batch whose rows are distributed over the processes of a group."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._ops import NONE, SUM, ops
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


def js_div(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    beta: float,
    temperature: float,
    process_group: "dist.ProcessGroup",
) -> Tensor:
    """The divergence of each row, (R,), the same in every process; each has the logits (..., C_local) of some classes.

    The processes gather 4 R numbers and add up 3 R in the forward pass, and exchange nothing in the backward pass. A
    process may have no class. Rows of weight 0 are skipped; other weights are not used.
    """
    if beta > 0.5:  # by symmetry
        input, target, beta = target, input, 1 - beta
    return _JSDiv.apply(input, target, weight, beta, temperature, process_group)


class _JSDiv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
        beta, temperature, group = options
        x, y, mask = _logit_rows(input, target, weight)
        sums = part_sums(x, y, mask, temperature)
        parts = sums.new_empty((dist.get_world_size(group), *sums.shape))
        dist.all_gather(list(parts), sums, group=group)
        sums = joined_sums(parts, temperature)
        divergences = part_divergences(x, y, mask, sums, beta, temperature)
        dist.all_reduce(divergences, group=group)
        sums[1::2].reciprocal_()  # as statistics have them
        ctx.save_for_backward(input, target, weight, torch.cat((sums, divergences[:2])))
        ctx.options = beta, temperature
        loss = divergences[2]
        return torch.where(loss < 0, 0, loss)  # rounding may be negative; NaN stays

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("js_div: gradients in logits sharded over classes cannot be differentiated again")
        input, target, weight, stats = ctx.saved_tensors
        x, y, mask = _logit_rows(input, target, weight)
        needs = ctx.needs_input_grad[:2]
        grads = (x, y)
        if x.numel():
            grads = ops.js_div_bwd(grad, x, y, mask, stats, *ctx.options, NONE, *needs)
        likes = zip(grads, (input, target), needs, strict=True)
        return *(g.reshape(z.shape).to(z.dtype) if need else None for g, z, need in likes), *[None] * 4


class Shard(NamedTuple):
    """This process's part of the classes."""

    group: "dist.ProcessGroup"
    first: int
    classes: int  # of all processes


def linear_js_div_rows(
    z: Tensor,
    p: Tensor,
    soft: Tensor,
    hard: Tensor | None,
    labels: Tensor | None,
    beta: float,
    temperature: float,
    need_grad: bool,
    shard: Shard,
) -> Tensor:
    """As the kernel of that name, where each process has the logits of some classes: z of the student, p the teacher's.

    The processes gather 4 R numbers (with labels 6 R) and add up 3 R (4 R).
    """
    mirrored = beta > 0.5
    x, y, beta = (p, z, 1 - beta) if mirrored else (z, p, beta)
    mask = (soft != 0).to(soft.dtype)
    sums = part_sums(x, y, mask, temperature)
    if hard is not None and labels is not None:
        sums = torch.cat((sums, part_sums(z, z, (hard != 0).to(soft.dtype), 1.0)[:2]))
    parts = sums.new_empty((dist.get_world_size(shard.group), *sums.shape))
    dist.all_gather(list(parts), sums, group=shard.group)
    sums = joined_sums(parts[:, :4], temperature)
    found = part_divergences(x, y, mask, sums, beta, temperature)
    if hard is not None and labels is not None:
        row = ((labels >= shard.first) & (labels < shard.first + z.shape[1]) & (hard != 0)).nonzero().flatten()
        column = labels[row] - shard.first
        found = torch.cat((found, sums.new_zeros(1, len(z))))
        found[3, row] = z[row, column].to(found.dtype)
    dist.all_reduce(found, group=shard.group)
    losses = torch.where(soft != 0, soft * torch.where(found[2] < 0, 0, found[2]), 0)
    if hard is not None:
        peak, total = joined_sums(parts[:, 4:], 1.0)
        losses += torch.where(hard != 0, hard * (total.log() - (found[3] - peak)), 0)
    if need_grad and z.numel():
        sums[1::2].reciprocal_()  # as statistics have them
        stats = torch.cat((sums, found[:2]))
        grad = ops.js_div_bwd(soft, x, y, mask, stats, beta, temperature, NONE, not mirrored, mirrored)[mirrored]
        if hard is not None:
            e = (z.to(soft.dtype) - peak[:, None]).exp_() * (hard / total)[:, None]
            e = torch.where((hard != 0)[:, None], e, 0)
            e[row, column] -= hard[row]
            grad = grad + e
        z.copy_(grad)
    return losses


def part_sums(input: Tensor, target: Tensor, weight: Tensor | None, temperature: float) -> Tensor:
    """(4, R): maximum and sum of exponentials of these classes' logits (R, C), of input and target."""
    if input.numel():
        return ops.js_div_part_sums(input, target, weight, temperature)
    dtype = accumulation_dtype(input.dtype)
    return input.new_tensor([torch.finfo(dtype).min, 0] * 2, dtype=dtype)[:, None].repeat(1, len(input))


def joined_sums(parts: Tensor, temperature: float) -> Tensor:
    """(4, R): those of all classes, given the results (W, 4, R) of `part_sums` from W processes."""
    maxima, sums = parts[:, ::2].double(), parts[:, 1::2]
    top = maxima.amax(0)
    total = (sums * ((maxima - top) / temperature).exp()).sum(0)
    total = torch.where(total == 0, torch.nan, total)  # a row with no class above -inf, as in torch
    return torch.stack((top, total), 1).flatten(0, 1).to(parts.dtype)


def part_divergences(
    input: Tensor, target: Tensor, weight: Tensor | None, sums: Tensor, beta: float, temperature: float
) -> Tensor:
    """(3, R), to be added up over the parts: what the backward kernel's statistics end with, and the divergences.

    sums: those of all classes. beta is at most 1/2.
    """
    if input.numel():
        return ops.js_div_part_divergences(input, target, weight, sums, beta, temperature)
    return sums.new_zeros(3, len(input))


def _logit_rows(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As kernels take them: logits (R, C) of one dtype, weights (R,)."""
    rows, dtype = input.shape[:-1].numel(), torch.promote_types(input.dtype, target.dtype)
    x, y = (z.to(dtype).reshape(rows, z.shape[-1]) for z in (input, target))
    return x, y, None if weight is None else weight.to(accumulation_dtype(dtype)).reshape(rows)


class Reduced(torch.autograd.Function):
    """`value`, whose gradient in the rows is `share`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, share: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(share)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


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
