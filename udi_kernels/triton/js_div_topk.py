"""Generalized Jensen-Shannon divergence from a teacher's top K probabilities, on a GPU.

It is js_div's divergence over K + 1 classes: the last is what the K leave out, with the student's 1 - sum q and what
the tail gives the teacher there, 0 or 1 - P.  With u = q log(q/m) (at beta = 0: q - p, and at 1: q log(q/p))

    d input = (1 - beta)/T (u - q sum u)    (at beta = 0 and 1: 1/T)

Outside of the K, u/q is that of the last class: the gradient is one factor times the exponentials.  One program reads a
row once; with a bucket twice, for the logarithm of 1 - sum q needs it exactly: of the very exponentials that the sum q
is subtracted from, added up in float64.
"""

import math

import torch
import triton
import triton.language as tl

from . import (
    MEAN,
    NONE,
    Launch,
    at,
    cached_launch,
    cdiv,
    exp2,
    next_power_of_2,
    tile_grid,
    tile_row,
    total,
    vector,
    warps,
)
from .js_div import (
    BETWEEN,
    HALF,
    KL,
    LN2,
    LOG2E,
    LOWEST,
    _begin,
    _joined,
    _kl_term,
    _load,
    _log2,
    _log2_over_mixture,
    _mixture,
    _online,
    _quotient,
    _stat,
    _weighted_mean,
)

# Rows of the statistics (5, R), float32: the student's maximum and 1 / sum of exponentials; log2 of what the teacher's
# probabilities are divided by; the sum of u, and u/q less that sum in the classes left out.  For a weighted mean, one
# more: each row's weight over the sum of the weights.
MAX, INV, LOG_SUM, MEAN_U, SLOPE, SHARE = (tl.constexpr(i) for i in range(6))
RENORMALIZE, BUCKET, ZERO = (tl.constexpr(i) for i in range(3))
# MIX: as in js_div, and
REVERSE = tl.constexpr(4)  # KL(q || p)

INF = tl.constexpr(float("inf"))


@triton.jit
def _log2_of(p):
    return tl.where(p > 0, _log2(p, p - 1.0), -INF)


@triton.jit
def _teacher(INDICES, LOGPROBS, row, C, K, SIZE: tl.constexpr):
    """A row's classes, whether they are real, and log2 of their probabilities; -inf for padding."""
    k = tl.arange(0, SIZE)
    at_k = row * K + k
    index = tl.load(INDICES + at_k, k < K, other=-1)
    log_p = tl.load(LOGPROBS + at_k, k < K, other=-INF)
    real = (index >= 0) & (index < C)
    return index, real, tl.where(real, log_p * LOG2E, -INF)


@triton.jit
def _class_terms(log_q, log_p, beta, gamma, mixture, MIX: tl.constexpr):
    """q, u, u/q and the term of the divergence, all in nats, given log2 of q and p."""
    q, p = exp2(log_q), exp2(log_p)
    d = log_p - tl.maximum(log_q, LOWEST)  # -inf of both gives -inf
    if MIX == KL:
        d = tl.where(log_q == -INF, tl.where(p > 0, INF, -INF), d * LN2)
        return q, q - p, tl.where(q > 0, 1.0 - p / q, 0.0), _kl_term(d, q, p)
    elif MIX == REVERSE:
        over = tl.where(log_p == -INF, tl.where(q > 0, INF, -INF), -d * LN2)
        return q, tl.where(q == 0, 0.0, q * over), over, _kl_term(over, p, q)
    else:
        over_q, over_p = _log2_over_mixture(d, beta, gamma, mixture, MIX)
        return q, q * over_q * LN2, over_q * LN2, (beta * p * over_p + gamma * q * over_q) * LN2


@triton.jit(do_not_specialize=["R", "w_stride"])
def _fwd(
    X,  # (R, C): the student's logits
    INDICES,  # (R, K) int64
    LOGPROBS,  # (R, K) float32
    W,  # (R,), or None
    STATS,  # (5, R) float32
    OUT,  # (R,) float32
    R,
    C,  # in units of V, as the strides are
    K,
    inner,  # rows [row // inner, row % inner] of (A, inner, C)
    outer_stride,
    x_stride,
    w_stride,
    scale,  # log2(e) / T
    beta,
    gamma,  # 1 - beta
    mixture,  # see `_mixture` in js_div.py
    factor,  # of the losses
    V: tl.constexpr,  # elements per load
    LANES: tl.constexpr,  # times WIDTH, the columns of a tile
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,  # more than K
    TAIL: tl.constexpr,
    WEIGH: tl.constexpr,  # whether the losses are multiplied by W
    MIX: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    if W is not None:
        if tl.load(W + row * w_stride) == 0:
            tl.store(OUT + row, 0.0)
            return
    X = _begin(X, row, inner, outer_stride, x_stride, V)
    peak = tl.full([LANES], LOWEST, tl.float32)
    sum = tl.zeros([LANES], tl.float32)
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    for start in range(0, C * V, LANES * WIDTH):
        col = start + lane
        peak, sum = _online(_load(X + col, col < C * V), peak, sum, scale)
    peak, sum = _joined(peak, sum, scale)
    share = _quotient(1.0, sum)

    index, real, log_p = _teacher(INDICES, LOGPROBS, row, C * V, K, SIZE)
    z = (tl.load(X + index, real, other=-INF).to(tl.float32) - peak) * scale
    chosen = tl.sum(exp2(z).to(tl.float64), 0)
    log_share = tl.where(share > 0, _log2(share, share - 1.0), float("nan"))
    log_q = z + log_share
    left = tl.sum(real.to(tl.int32), 0) < C * V
    exact = sum.to(tl.float64)
    if TAIL == BUCKET:
        parts = tl.zeros([LANES], tl.float64)
        for start in range(0, C * V, LANES * WIDTH):
            col = start + lane
            parts += tl.sum(exp2((_load(X + col, col < C * V) - peak) * scale).to(tl.float64), 1)
        exact = tl.sum(parts, 0)
    others = tl.where(left, ((exact - chosen) / exact).to(tl.float32), 0.0)
    others = tl.where(others < 0, 0.0, others)  # rounding may be negative; NaN stays

    log_sum = 0.0
    rest = 0.0
    mass = tl.sum(exp2(log_p).to(tl.float64), 0)
    if TAIL == RENORMALIZE:
        top = tl.max(log_p, 0)
        relative = tl.sum(tl.where(real, exp2(log_p - top), 0.0), 0)
        log_sum = top + _log2(relative, relative - 1.0)  # NaN where top is infinite or NaN
    elif TAIL == BUCKET:
        rest = tl.where(left, (1.0 - mass).to(tl.float32), 0.0)
    log_p = tl.where(real, log_p - log_sum, log_p)

    k = tl.arange(0, SIZE)
    log_q = tl.where(k == K, _log2_of(others), log_q)
    log_p = tl.where(k == K, _log2_of(rest), log_p)
    q, u, over, term = _class_terms(log_q, log_p, beta, gamma, mixture, MIX)
    wrong = tl.max(((index < -1) | (index >= C * V)).to(tl.int32), 0)
    undefined = 0 * (others + log_sum + mass.to(tl.float32)) + tl.where(wrong != 0, float("nan"), 0.0)  # NaN, or 0
    loss, mean = tl.sum(term, 0) + undefined, tl.sum(u, 0) + undefined
    S = STATS + row
    tl.store(_stat(S, R, MAX), peak)
    tl.store(_stat(S, R, INV), share)
    tl.store(_stat(S, R, LOG_SUM), log_sum)
    tl.store(_stat(S, R, MEAN_U), mean)
    tl.store(_stat(S, R, SLOPE), tl.sum(tl.where((k == K) & (q > 0), over, 0.0), 0) - mean)
    loss = tl.where(loss < 0, 0.0, loss) * factor
    if WEIGH:
        loss *= tl.load(W + row * w_stride)
    tl.store(OUT + row, loss)


@triton.jit(do_not_specialize=["R", "w_stride", "g_stride"])
def _bwd(
    G,  # (R,), or () with g_stride 0
    X,  # (R, C): the student's logits
    W,  # (R,), or None
    STATS,  # (5, R) float32
    DX,  # (R, C)
    R,
    C,  # in units of V, as the strides are
    inner,  # rows [row // inner, row % inner] of (A, inner, C)
    outer_stride,
    x_stride,
    w_stride,
    g_stride,
    scale,  # log2(e) / T
    factor,  # of the gradients
    V: tl.constexpr,  # elements per load
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows by BLOCK columns, as if all columns were outside of the K."""
    row = tile_row(R) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = row < R
    inside = kept[:, None] & (col < C * V)[None, :]
    g = tl.load(G + row.to(tl.int64) * g_stride, kept, other=0.0).to(tl.float32) * factor
    if W is not None:
        w = tl.load(W + row.to(tl.int64) * w_stride, kept, other=0.0)
        kept = kept & (w != 0)
        g *= w
    S = STATS + row
    peak, slope = tl.load(_stat(S, R, MAX), kept), tl.load(_stat(S, R, SLOPE), kept)
    g *= tl.load(_stat(S, R, INV), kept) * slope
    mask = inside & kept[:, None]
    X = _begin(X, row, inner, outer_stride, x_stride, V)[:, None] + col[None, :]
    dx = g[:, None] * exp2((tl.load(X, mask).to(tl.float32) - peak[:, None]) * scale)
    DX = at(DX, row, C, V)[:, None] + col[None, :]
    tl.store(DX, tl.where(mask, dx, 0.0).to(DX.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["R", "w_stride", "g_stride"])
def _bwd_chosen(
    G,  # (R,), or () with g_stride 0
    X,  # (R, C): the student's logits
    INDICES,  # (R, K) int64
    LOGPROBS,  # (R, K) float32
    W,  # (R,), or None
    STATS,  # (5, R) float32
    DX,  # (R, C)
    R,
    C,  # in units of V, as the strides are
    K,
    inner,  # rows [row // inner, row % inner] of (A, inner, C)
    outer_stride,
    x_stride,
    w_stride,
    g_stride,
    scale,  # log2(e) / T
    beta,
    gamma,  # 1 - beta
    mixture,  # see `_mixture` in js_div.py
    factor,  # of the gradients
    V: tl.constexpr,  # elements per load
    SIZE: tl.constexpr,  # more than K
    MIX: tl.constexpr,
):
    """The gradient at the K classes of one row."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.load(G + row * g_stride).to(tl.float32) * factor
    if W is not None:
        w = tl.load(W + row * w_stride)
        if w == 0:
            return
        g *= w
    S = STATS + row
    share = tl.load(_stat(S, R, INV))
    index, real, log_p = _teacher(INDICES, LOGPROBS, row, C * V, K, SIZE)
    X = _begin(X, row, inner, outer_stride, x_stride, V)
    z = (tl.load(X + index, real, other=-INF).to(tl.float32) - tl.load(_stat(S, R, MAX))) * scale
    log_p = tl.where(real, log_p - tl.load(_stat(S, R, LOG_SUM)), log_p)
    q, u, _, _ = _class_terms(z + _log2(share, share - 1.0), log_p, beta, gamma, mixture, MIX)
    dx = g * (u - q * tl.load(_stat(S, R, MEAN_U)))
    tl.store(DX + row * C * V + index, dx.to(DX.dtype.element_ty), real)


def _values(dtype, shape, x_strides, K, tail, weight, beta, temperature):
    """The arguments that the kernels share, by name."""
    R, C = math.prod(shape[:-1]), shape[-1]
    V = vector(dtype, C, *x_strides[:-1])
    return dict(
        R=R,
        C=C // V,
        K=K,
        inner=shape[-2],
        outer_stride=x_strides[0] // V if len(shape) == 3 else 0,
        x_stride=x_strides[-2] // V,
        w_stride=weight[1] if weight else 0,
        scale=math.log2(math.e) / temperature,
        beta=float(beta),
        gamma=1.0 - beta,
        mixture=_mixture(beta),
        V=V,
        SIZE=next_power_of_2(K + 1),
        TAIL=tail,
        MIX={0: KL, 0.5: HALF, 1: REVERSE}.get(beta, BETWEEN).value,
    )


def js_div_topk_fwd(input, indices, logprobs, weight, tail, beta, temperature, reduction):
    run = _forward(
        input.get_device(), input.dtype, input.shape, input.stride(), indices.shape[1], tail,
        weight is not None and (weight.dtype, weight.stride(0)), beta, temperature, reduction,
    )  # fmt: skip
    with torch.cuda.device_of(input):
        return run(input, indices, logprobs, weight)


@cached_launch
def _forward(_device, dtype, shape, x_strides, K, tail, weight, beta, temperature, reduction):
    R, C = math.prod(shape[:-1]), shape[-1]
    weighted_mean = bool(weight) and reduction == MEAN
    rows = 5 + weighted_mean
    if R == 0:
        return _empty(rows, reduction)
    values = _values(dtype, shape, x_strides, K, tail, weight, beta, temperature)
    num_warps = min(16, max(warps(next_power_of_2(C), 32), warps(values["SIZE"], 4)))  # with 32 it would spill
    values |= dict(
        LANES=32 * num_warps,
        WIDTH=min(4, max(2, values["V"])),
        WEIGH=bool(weight) and not weighted_mean,
        factor=1.0 / R if reduction == MEAN and not weight else 1.0,
        ROW=SHARE.value,
    )
    each = Launch(_fwd, (R,), values, num_warps=num_warps)
    block = min(4096, next_power_of_2(R))
    mean = Launch(_weighted_mean, (1,), values | dict(BLOCK=block), num_warps=warps(block, 8))

    def run(input, indices, logprobs, weight):
        stats = torch.empty((rows, R), dtype=torch.float32, device=input.device)
        losses = stats.new_empty(R)
        each(input, indices, logprobs, weight, stats, losses)
        if not weighted_mean:
            return losses if reduction == NONE else total(losses), stats
        loss = stats.new_empty(())
        mean(losses, weight, stats, loss)
        return loss, stats

    return run


def _empty(rows, reduction):
    def run(input, *_):
        stats = torch.empty((rows, 0), dtype=torch.float32, device=input.device)
        return stats.new_full((0,) if reduction == NONE else (), math.nan if reduction == MEAN else 0.0), stats

    return run


def js_div_topk_bwd(
    grad, input, indices, logprobs, weight, stats, tail, beta, temperature, reduction, need_input
):  # fmt: skip
    if not need_input:
        return input.new_empty(0)
    if weight is not None and reduction == MEAN:
        weight, reduction = stats[SHARE.value], NONE
    run = _backward(
        input.get_device(), input.dtype, input.shape, input.stride(), indices.shape[1], tail,
        weight is not None and (weight.dtype, weight.stride(0)), grad.dtype, grad.stride(0) if grad.dim() else 0,
        beta, temperature, reduction,
    )  # fmt: skip
    with torch.cuda.device_of(input):
        return run(grad, input, indices, logprobs, weight, stats)


@cached_launch
def _backward(
    _device, dtype, shape, x_strides, K, tail, weight, _grad_dtype, g_stride, beta, temperature, reduction
):  # fmt: skip
    R, C = math.prod(shape[:-1]), shape[-1]
    if R == 0:
        return lambda grad, input, *_: input.new_empty(shape)
    values = _values(dtype, shape, x_strides, K, tail, weight, beta, temperature)
    block = min(1024, next_power_of_2(C))
    rows = min(max(1, 1024 // block), next_power_of_2(R))
    share = (1.0 if beta in (0, 1) else 1.0 - beta) / (temperature * (R if reduction == MEAN else 1))
    values |= dict(g_stride=g_stride, ROWS=rows, BLOCK=block, factor=share)
    dense = Launch(_bwd, tile_grid(cdiv(R, rows), cdiv(C, block)), values, num_warps=warps(rows * block, 8))
    chosen = Launch(_bwd_chosen, (R,), values, num_warps=warps(values["SIZE"], 4))

    def run(grad, input, indices, logprobs, weight, stats):
        dx = input.new_empty(shape)
        dense(grad, input, weight, stats, dx)
        chosen(grad, input, indices, logprobs, weight, stats, dx)
        return dx

    return run
