"""Plain-torch versions of every op: short, readable, differentiable by autograd.

They document the formulas, are the oracle of the tests (in float64), and serve where no kernel does: on other devices,
and on machines where nothing could be compiled.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

Lists = Sequence[Sequence[Tensor | None]]  # K lists of P gradients; None is a zero gradient


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 for float64; narrower dtypes are computed in float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def js_div(
    input: Tensor,
    target: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    log_q, log_p, weight = _log_probabilities(input, target, temperature, weight)
    if beta in (0, 1):
        rows = _kl(log_p, log_q) if beta == 0 else _kl(log_q, log_p)
    else:
        rows = _js(log_p, log_q, beta)
    return _reduced(rows, weight, reduction)


def skew_kl(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    reverse: bool = False,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    log_q, log_p, weight = _log_probabilities(input, target, temperature, weight)
    if reverse:
        log_q, log_p = log_p, log_q
    return _reduced(_skew(log_p, log_q, alpha) if alpha else _kl(log_p, log_q), weight, reduction)


def js_div_topk(
    input: Tensor,
    indices: Tensor,
    logprobs: Tensor,
    *,
    tail: str = "renormalize",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    dtype = accumulation_dtype(input.dtype)
    indices, logprobs = (z.reshape(*input.shape[:-1], z.shape[-1]) for z in (indices, logprobs))
    real = indices >= 0
    if weight is not None:
        weight = weight.reshape(input.shape[:-1])
        kept = (weight != 0)[..., None]
        input, logprobs, real = torch.where(kept, input, 0), torch.where(kept, logprobs, 0), real | ~kept
        indices = torch.where(kept, indices, torch.arange(indices.shape[-1], device=indices.device) % input.shape[-1])
    index, classes = torch.where(real, indices, input.shape[-1]).long(), input.shape[-1]
    log_p = torch.where(real, logprobs.detach().to(dtype), -torch.inf)
    if tail == "renormalize":
        log_p = log_p.log_softmax(-1)
    log_q = _log_softmax(input.to(dtype), temperature)
    others = torch.ones_like(log_q, dtype=torch.bool)
    others = torch.nn.functional.pad(others, (0, 1)).scatter(-1, index, False)[..., :classes]
    rest = torch.where(others, log_q.exp(), 0).sum(-1, keepdim=True)
    log_rest = torch.where(rest == 0, -torch.inf, torch.where(rest == 0, 1, rest).log())
    log_q = torch.cat((torch.where(real, log_q.gather(-1, index.clamp_max(classes - 1)), -torch.inf), log_rest), -1)
    bucket = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(0)
    bucket = torch.where(others.any(-1, keepdim=True), bucket, 0) if tail == "bucket" else torch.zeros_like(bucket)
    log_p = torch.cat((log_p, bucket.log()), -1)
    if beta in (0, 1):
        rows = _kl(log_p, log_q) if beta == 0 else _kl(log_q, log_p)
    else:
        rows = _js(log_p, log_q, beta)
    return _reduced(rows, weight, reduction)


def _log_probabilities(
    input: Tensor, target: Tensor, temperature: float, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = accumulation_dtype(input.dtype)
    if weight is not None:  # a row of weight 0 is as if it were not there, whatever it holds
        weight = weight.reshape(input.shape[:-1])
        kept = weight != 0
        input, target = (torch.where(kept[..., None], z, 0) for z in (input, target))
    log_q, log_p = (_log_softmax(z.to(dtype), temperature) for z in (input, target))
    return log_q, log_p, weight


def linear_js_div(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_weight: Tensor | None,
    target_bias: Tensor | None,
    *,
    soft: Tensor,
    hard: Tensor | None,
    labels: Tensor | None,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Sum over the rows of soft times the divergence plus hard times the cross-entropy; rows (..., H) or (..., V)."""
    kept = soft != 0 if hard is None else (soft != 0) | (hard != 0)
    input = torch.where(kept[:, None], input.flatten(0, -2), 0)
    z, y = linear(input, weight, bias), target.flatten(0, -2)
    if target_weight is not None:
        y = linear(torch.where((soft != 0)[:, None], y, 0), target_weight, target_bias)
    loss = js_div(z, y, beta=beta, temperature=temperature, weight=soft, reduction="sum")
    if hard is None or labels is None:
        return loss
    z = z.to(loss.dtype)
    own = z.gather(1, torch.where(hard != 0, labels, 0)[:, None])[:, 0]
    return loss + torch.where(hard != 0, hard * (z.logsumexp(1) - own), 0).sum()


def _reduced(rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    rows = torch.where(rows < 0, rows - rows.detach(), rows)  # 0, with the gradient of the rounding error
    if weight is None or (reduction == "mean" and weight.numel() == 0):
        return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()
    weight = weight.to(rows.dtype)
    if reduction == "mean":  # their sum may overflow
        largest = weight.abs().amax()
        weight = weight / torch.where(largest == 0, 1, largest)
    weighted = torch.where(weight == 0, 0, rows * weight)
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    return weighted.sum() / torch.where((weight == 0).all(), 1, weight.sum())


def _finite_difference(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both, with -inf made finite and still the smallest, and min(d, 0) and max(d, 0) of d = log p - log q."""
    log_p, log_q = (z.clamp_min(torch.finfo(z.dtype).min / 4) for z in (log_p, log_q))
    d = log_p - log_q
    return log_p, log_q, torch.where(d > 0, 0, d), torch.where(d > 0, d, 0)


def _js(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    # log(p/m) = min(d, 0) - L and log(q/m) = -max(d, 0) - L, finite, and exactly 0 at d = 0.
    log_p, log_q, below, above = _finite_difference(log_p, log_q)
    L = torch.log1p(beta * torch.expm1(below)) + torch.log1p((1 - beta) * torch.expm1(-above))
    return (beta * log_p.exp() * (below - L) - (1 - beta) * log_q.exp() * (above + L)).sum(-1)


def _skew(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    log_p, log_q, below, above = _finite_difference(log_p, log_q)
    log_p_over_m = below - torch.log1p(alpha * torch.expm1(below)) - _log_rest(above, alpha)
    p, q = log_p.exp(), log_q.exp()
    return (p * log_p_over_m + (1 - alpha) * (q - p)).sum(-1)  # the last, whose sum is 0, as in _kl


def _log_rest(d: Tensor, alpha: float) -> Tensor:
    """log(alpha + (1 - alpha) e^-d) of d >= 0: log(m/p), for any alpha, and exactly 0 at d = 0."""
    far = torch.logaddexp(torch.full_like(d, math.log(alpha)), math.log1p(-alpha) - d)
    near = torch.log1p((1 - alpha) * torch.expm1(-torch.where(d > 1, 0, d)))
    return torch.where(d > 1, far, near)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    d = torch.where(p == 0, 0, log_p) - torch.where(p == 0, 0, log_q)  # inf where only q has a logit of -inf
    return (p * d + q - p).sum(-1)  # q - p, whose sum is 0, makes the terms of second order


def _log_softmax(z: Tensor, temperature: float) -> Tensor:
    # The maximum is subtracted before the division by T, so that large logits lose no digits.
    return ((z - z.amax(-1, keepdim=True).detach()) / temperature).log_softmax(-1)


def inverse_variance(logvar: Tensor) -> Tensor:
    """exp(-logvar), at most e^88 (float64: e^680): an infinite one would make NaN of a residual of 0.

    The gradient is that of the exponential there too.
    """
    least = -88 if logvar.dtype == torch.float32 else -680
    finite = logvar.clamp_min(torch.finfo(logvar.dtype).min)
    return (-torch.where(finite < least, finite - finite.detach() + least, finite)).exp()


def club_mi(mu: Tensor, logvar: Tensor, y: Tensor, given: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
    dtype = accumulation_dtype(mu.dtype)
    mu, logvar, y = mu.to(dtype), logvar.to(dtype), y.to(dtype)
    if given is not None:
        return _club_mi_given(mu, logvar, y, given, reduction)
    if len(y):
        shift = y[0].detach()  # shifting y and mu together does not change the bound, but its rounding error
        mu, y = mu - shift, y - shift
    mean = y.mean(0)
    negative = (y - mean).square().mean(0) + (mean - mu).square()  # the mean of (y_j - mu_i)^2 over all j
    rows = 0.5 * ((negative - (y - mu).square()) * inverse_variance(logvar)).sum(-1)
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()


def _club_mi_given(mu: Tensor, logvar: Tensor, y: Tensor, given: Tensor, reduction: str) -> Tensor:
    n = len(given)
    _, index = _sorted_classes(given)
    labelled, index = index >= 0, torch.where(index < 0, n, index)
    size = take_rows(add_rows(y.new_ones(n, 1), index, n + 1), index)
    real = labelled[:, None] & (size > 1)
    mu, logvar, y = (torch.where(real, x, 0) for x in (mu, logvar, y))

    def mean(x: Tensor) -> Tensor:
        return take_rows(add_rows(x, index, n + 1), index) / size

    shift = mean(y).detach()
    mu, y = mu - shift, y - shift
    centre = mean(y)
    negative = mean((y - centre).square()) + (centre - mu).square()
    others = size / (size - 1).clamp_min(1)  # a row is not among its own negatives
    rows = 0.5 * (others * (negative - (y - mu).square()) * inverse_variance(logvar)).sum(-1)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / labelled.sum().clamp_min(1)


def _sorted_classes(given: Tensor) -> tuple[Tensor, Tensor]:
    """The rows sorted by class, those without one (negative) first, and each row's class, numbered from 0; -1: none."""
    ids, order = given.long().clamp_min(-1).sort(stable=True)
    classes = torch.cat((ids[:1] >= 0, ids[1:] != ids[:-1])).cumsum(0) - 1
    return order, torch.empty_like(classes).scatter(0, order, classes)


def club_classes(given: Tensor) -> Tensor:
    """(3, N + 1): rows sorted by class, and how many have one; each row's class, and the number of classes; where each
    class begins in the sorted rows, N beyond the last.
    """
    order, index = _sorted_classes(given)
    numbers = torch.arange(len(given) + 1, device=given.device)
    begin = torch.searchsorted(index[order], numbers)
    order = torch.cat((order, len(given) - begin[:1]))
    return torch.stack((order, torch.cat((index, (begin < len(given)).sum(0, keepdim=True))), begin))


# Torch has two ways to add up rows, and on each device one of them adds in a random order.


def add_rows(x: Tensor, index: Tensor, n: int) -> Tensor:
    """(n, D): the sums of the rows of each index."""
    zeros = x.new_zeros(n, x.shape[1])
    return zeros.index_put((index,), x, accumulate=True) if x.is_cuda else zeros.index_add(0, index, x)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], whose gradient is added up as in `add_rows`."""
    return x[index] if x.is_cuda else x.index_select(0, index)


def club_nll(mu: Tensor, logvar: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    dtype = accumulation_dtype(mu.dtype)
    mu, logvar, y = mu.to(dtype), logvar.to(dtype), y.to(dtype)
    if weight is not None:
        mu, logvar, y = (torch.where((weight != 0)[:, None], x, 0) for x in (mu, logvar, y))
    rows = ((y - mu).square() * inverse_variance(logvar) + logvar).sum(-1)
    return rows.mean() if weight is None or len(rows) == 0 else (shares(weight, dtype) * rows).sum()


def shares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights divided by their sum; all 0 if they are."""
    wide = weight.double()
    return (wide / wide.sum()).masked_fill(weight == 0, 0).to(dtype)


def duc_loss(
    student: Tensor, teacher: Tensor, dims: Tensor, *, temperature: float = 1.0, reduction: str = "mean"
) -> Tensor:
    dtype = accumulation_dtype(student.dtype, teacher.dtype)
    student, teacher = (torch.where(dims, x.to(dtype), 0) for x in (student, teacher))
    z = student @ teacher.T
    # Less each row's own, so that small losses and gradients keep their digits. Padded, since a row may have no other.
    z = (z - z.diagonal()[:, None]) * (1 / temperature)
    top = torch.nn.functional.pad(z.detach(), (1, 0)).amax(1)
    own = torch.eye(*z.shape, dtype=torch.bool, device=z.device)
    others = (z.masked_fill(own, -torch.inf) - top[:, None]).exp().sum(1)
    rows = top + (others + (-top).expm1()).log1p()
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()


def effective_dims(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    features, labels = features.double(), labels.long()
    if num_classes > len(labels):  # those without a sample change nothing
        _, labels = _sorted_classes(torch.where(labels < num_classes, labels, -1))
        num_classes = len(labels)
    sums = features.new_zeros(num_classes + 1, features.shape[1])
    rows = torch.where((labels < 0) | (labels >= num_classes), num_classes, labels)  # in a class of their own
    counts = features.new_zeros(num_classes + 1).index_add_(0, rows, torch.ones_like(rows, dtype=torch.float64))
    centroids = sums.index_add_(0, rows, features) / counts[:, None]
    nearest = torch.full_like(features, -1, dtype=torch.int64)
    distance = torch.full_like(features, torch.inf)
    for label, centroid in enumerate(centroids[:num_classes]):  # that of an absent class is NaN, and nearest to nothing
        to_this = (features - centroid).abs()
        nearest = torch.where(to_this < distance, label, nearest)
        distance = torch.where(to_this < distance, to_this, distance)
    hits = ((nearest == labels[:, None]) & (nearest >= 0)).sum(0)
    return hits * len(hits) > hits.sum()


def certainty_fusion(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    z = logits.to(accumulation_dtype(logits.dtype))
    certainty = z.softmax(-1).amax(-1, keepdim=True)
    # The largest is subtracted first, for 1/T may be large.
    weights = ((certainty - certainty.detach().amax(0)) * (1 / temperature)).softmax(0)
    impossible = (z == -torch.inf).any(0)  # whatever the weights, and so without a gradient
    fused = (weights * z.masked_fill(impossible, 0)).sum(0)
    return torch.where(impossible, fused - torch.inf, fused).to(logits.dtype)


def gramian(grads: Lists, dtype: torch.dtype | None = None) -> Tensor:
    tensors = [g for row in grads for g in row if g is not None]
    dtype = dtype or accumulation_dtype(*(g.dtype for g in tensors))
    gram = torch.zeros(len(grads), len(grads), dtype=torch.float64, device=tensors[0].device)
    for column in zip(*grads, strict=True):  # the K gradients of one parameter
        like = next((g for g in column if g is not None), None)
        if like is not None:
            rows = torch.stack([(torch.zeros_like(like) if g is None else g).flatten() for g in column]).double()
            gram += rows @ rows.T
    return gram.to(dtype)


def weighted_sum(grads: Lists, weights: Tensor) -> list[Tensor | None]:
    out: list[Tensor | None] = []
    for column in zip(*grads, strict=True):
        dtypes = [g.dtype for g in column if g is not None]
        wide = accumulation_dtype(*dtypes)
        terms = [w.to(wide) * g.to(wide) for w, g in zip(weights, column, strict=True) if g is not None]
        out.append(sum(terms[1:], terms[0]).to(dtypes[0]) if terms else None)
    return out
