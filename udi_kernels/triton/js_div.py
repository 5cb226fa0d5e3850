"""Generalized Jensen-Shannon divergence of two softmaxes on a GPU.

With q = softmax(input/T), p = softmax(target/T) and m = beta p + (1 - beta) q:

    JS = beta KL(p || m) + (1 - beta) KL(q || m)
    d input = (1 - beta)/T q (log(q/m) - KL(q || m)),    d target = beta/T p (log(p/m) - KL(p || m))

In base 2: lq = log2 q = (input - max) log2(e)/T - lse2, lp likewise; log(q/m) and log(p/m) are functions of
d = lp - lq alone (`_log2_over_mixture`).  d comes from the logits, not from log(p) and log(q): logits of 1e4 lose
nothing, and equal rows give exactly 0.  lq and lp are held above FLOOR, where exp2 is exactly 0, so that a class of
probability 0 adds 0 * finite = 0.

Rows up to TILE_CLASSES are read once and stay in registers, several rows to a program where they are short.  Longer
rows are read twice by one program, the second time backwards: what was read last is still in cache.  A few very long
rows are split over programs.

stats: (6, R) float32: max input, lse2 of the input, max target, lse2 of the target, KL(q || m), KL(p || m);
lse2 in bits, the divergences in nats.  They are private to this file: the same backend runs forward and backward.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda.libdevice import fast_log2f

from . import FUSED, total, vector, warps

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FLOOR = tl.constexpr(-1e6)
LOWEST = tl.constexpr(-3.4028234663852886e38)
LN2 = tl.constexpr(math.log(2))
ALL = tl.constexpr(tl.PropagateNan.ALL)

TILE_CLASSES = 4096  # longest row held in registers: 16 classes a thread at 8 warps
FEW_ROWS = 64  # fewer leave half of an A100 or H100 idle, so that very long rows are split
PROGRAMS = 256  # wanted before programs get larger


# --- elementwise ------------------------------------------------------------------------------------------------


@triton.jit
def _log2_unit(x, v):
    """log2 of x = 1 + v in (0, 1], relative error 5e-8: x = 2^e (1 + f), |f| <= 1/3, and a minimax polynomial f P(f).

    v itself is f where e = 0: it knows more digits than x.
    """
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F2AAAAB) & -0x800000
    f = tl.where(e == 0, v, (bits - e).to(tl.float32, bitcast=True) - 1.0)
    P = 0.2027866393327713
    P = P * f - 0.22222118079662323
    P = P * f + 0.2017991840839386
    P = P * f - 0.23678652942180634
    P = P * f + 0.2887113392353058
    P = P * f - 0.36078956723213196
    P = P * f + 0.4808959662914276
    P = P * f - 0.7213465571403503
    P = P * f + 1.4426950216293335
    return f * P + e.to(tl.float32) * 1.1920928955078125e-07


@triton.jit
def _fast_log2(x):
    return tl.log2(x) if INTERPRETED else fast_log2f(x)  # the interpreter has no libdevice


@triton.jit
def _log2_over_mixture(d, beta, gamma, taylor, FAST: tl.constexpr):
    """log2(q/m) and log2(p/m), where d = log2(p/q).

    L = log2(m / max(p, q)) = log2(t + c (1 - t)) with t = min(p, q) / max(p, q) = 2^-|d|, which cannot overflow, and
    c = beta or gamma = 1 - beta, the share of the larger.  Near d = 0 that loses all relative accuracy, and the
    divergence is of second order in d: there the Taylor polynomial, truncation error below 4e-7 of the divergence.
    FAST (16-bit inputs): the hardware's logarithm, absolute error 2^-22.  It is one instruction instead of 20, and
    with two bytes a logit the forward pass would be limited by instructions.
    """
    t = tl.exp2(-tl.abs(d))
    mix = t + tl.where(d > 0, beta, gamma) * (1 - t)
    L = _fast_log2(mix) if FAST else _log2_unit(mix, tl.where(d > 0, gamma, beta) * (t - 1))
    k2, k3, k4, k5, k6, k7 = taylor
    r = d * (k2 + d * (k3 + d * (k4 + d * (k5 + d * (k6 + d * k7)))))
    near = tl.abs(d) < 0.5
    over_q = tl.where(near, -d * (beta + r), -tl.maximum(d, 0.0, propagate_nan=ALL) - L)
    over_p = tl.where(near, d * (gamma - r), tl.minimum(d, 0.0, propagate_nan=ALL) - L)
    return over_q, over_p


@triton.jit
def _shifted(x, peak, lse, scale):
    """log2 of a softmax, not below FLOOR; NaN stays, also that of a row of nothing but -inf, as in torch."""
    return tl.maximum((x - peak) * scale - lse, FLOOR, propagate_nan=ALL)


# --- forward ----------------------------------------------------------------------------------------------------


@triton.jit
def _load(X, mask):
    return tl.load(X, mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _store_stats(STATS, row, R, mask, peak_q, lse_q, peak_p, lse_p):
    tl.store(STATS + row, peak_q, mask)
    tl.store(STATS + R + row, lse_q, mask)
    tl.store(STATS + 2 * R + row, peak_p, mask)
    tl.store(STATS + 3 * R + row, lse_p, mask)


@triton.jit
def _finish(W, STATS, OUT, row, R, mask, kl_q, kl_p, w_stride, beta, gamma, factor, out, REDUCE: tl.constexpr):
    """Stores the divergences of some rows, and their losses: each, or their sum as OUT[out]."""
    tl.store(STATS + 4 * R + row, kl_q, mask)
    tl.store(STATS + 5 * R + row, kl_p, mask)
    loss = (beta * kl_p + gamma * kl_q) * factor
    if W is not None:
        loss *= tl.load(W + row * w_stride, mask, other=0.0)
    if REDUCE:
        tl.store(OUT + out, tl.sum(tl.where(mask, loss, 0.0), 0))
    else:
        tl.store(OUT + row, loss, mask)


@triton.jit(do_not_specialize=["R", "w_stride"])
def _fwd_tile(
    X, Y, W, STATS, OUT, R, C, x_stride, y_stride, w_stride, scale, beta, gamma, taylor, factor,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REDUCE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows, read once.  C and the row strides come in units of V elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    real = row < R
    mask = real[:, None] & (col < C * V)[None, :]
    x = _load(X + row[:, None] * (x_stride * V) + col[None, :], mask)
    y = _load(Y + row[:, None] * (y_stride * V) + col[None, :], mask)
    peak_q, peak_p = tl.max(x, 1), tl.max(y, 1)
    lq = _shifted(x, peak_q[:, None], 0.0, scale)
    lp = _shifted(y, peak_p[:, None], 0.0, scale)
    q, p = tl.exp2(lq), tl.exp2(lp)
    sum_q, sum_p = tl.sum(q, 1), tl.sum(p, 1)
    lse_q, lse_p = tl.log2(sum_q), tl.log2(sum_p)
    _store_stats(STATS, row, R, real, peak_q, lse_q, peak_p, lse_p)

    d = (lp - lq) - (lse_p - lse_q)[:, None]
    over_q, over_p = _log2_over_mixture(d, beta, gamma, taylor, FAST)
    kl_q = tl.sum(q * over_q, 1) / sum_q * LN2
    kl_p = tl.sum(p * over_p, 1) / sum_p * LN2
    _finish(W, STATS, OUT, row, R, real, kl_q, kl_p, w_stride, beta, gamma, factor, tl.program_id(0), REDUCE)


@triton.jit
def _online(x, peak, sum, scale):
    """Adds a tile (LANES, WIDTH) to the running maximum and sum of exponentials of each lane."""
    new = tl.maximum(peak, tl.max(x, 1))
    return new, sum * tl.exp2((peak - new) * scale) + tl.sum(tl.exp2((x - new[:, None]) * scale), 1)


@triton.jit
def _joined(peak, sum, scale):
    """One maximum and sum of exponentials from many."""
    top = tl.max(peak, 0)
    return top, tl.sum(sum * tl.exp2((peak - top) * scale), 0)


@triton.jit
def _log2_sum(sum):
    """The sum is 0 where not a single class is above -inf: NaN, as in torch."""
    return tl.log2(tl.where(sum > 0, sum, float("nan")))


@triton.jit
def _peaks_and_sums(X, Y, begin, end, scale, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Maximum and sum of exponentials of both rows over columns [begin, end), by the online softmax."""
    peak_q = tl.full([LANES], LOWEST, tl.float32)
    peak_p = tl.full([LANES], LOWEST, tl.float32)
    sum_q = tl.zeros([LANES], tl.float32)
    sum_p = tl.zeros([LANES], tl.float32)
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    for start in range(begin, end, LANES * WIDTH):
        col = start + lane
        x, y = _load(X + col, col < end), _load(Y + col, col < end)
        peak_q, sum_q = _online(x, peak_q, sum_q, scale)
        peak_p, sum_p = _online(y, peak_p, sum_p, scale)
    peak_q, sum_q = _joined(peak_q, sum_q, scale)
    peak_p, sum_p = _joined(peak_p, sum_p, scale)
    return peak_q, sum_q, peak_p, sum_p


@triton.jit
def _divergences(
    X, Y, begin, end, peak_q, lse_q, peak_p, lse_p, scale, beta, gamma, taylor,
    LANES: tl.constexpr, WIDTH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The part of KL(q || m) and KL(p || m) that columns [begin, end) add, last column first."""
    sum_q = tl.zeros([LANES], tl.float32)
    sum_p = tl.zeros([LANES], tl.float32)
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tiles = tl.cdiv(end - begin, LANES * WIDTH)
    for i in range(0, tiles):
        col = begin + (tiles - 1 - i) * (LANES * WIDTH) + lane
        lq = _shifted(_load(X + col, col < end), peak_q, lse_q, scale)
        lp = _shifted(_load(Y + col, col < end), peak_p, lse_p, scale)
        over_q, over_p = _log2_over_mixture(lp - lq, beta, gamma, taylor, FAST)
        sum_q += tl.sum(tl.exp2(lq) * over_q, 1)
        sum_p += tl.sum(tl.exp2(lp) * over_p, 1)
    return tl.sum(sum_q, 0) * LN2, tl.sum(sum_p, 0) * LN2


@triton.jit(do_not_specialize=["R", "w_stride"])
def _fwd_row(
    X, Y, W, STATS, OUT, R, C, x_stride, y_stride, w_stride, scale, beta, gamma, taylor, factor,
    V: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One long row, read twice."""
    row = tl.program_id(0).to(tl.int64)
    X += row * (x_stride * V)
    Y += row * (y_stride * V)
    peak_q, sum_q, peak_p, sum_p = _peaks_and_sums(X, Y, 0, C * V, scale, LANES, WIDTH)
    lse_q, lse_p = _log2_sum(sum_q), _log2_sum(sum_p)
    _store_stats(STATS, row, R, True, peak_q, lse_q, peak_p, lse_p)
    kl_q, kl_p = _divergences(
        X, Y, 0, C * V, peak_q, lse_q, peak_p, lse_p, scale, beta, gamma, taylor, LANES, WIDTH, FAST
    )
    _finish(W, STATS, OUT, row, R, row < R, kl_q, kl_p, w_stride, beta, gamma, factor, 0, False)


@triton.jit(do_not_specialize=["R", "S", "span"])
def _fwd_split_lse(
    X, Y, PARTS, R, C, S, x_stride, y_stride, span, scale, V: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr
):
    """A part of one very long row, S parts of `span` tiles to the row.  PARTS: (6, R, S)."""
    row, part = (tl.program_id(0) // S).to(tl.int64), tl.program_id(0) % S
    begin = part * (span * LANES * WIDTH)
    end = tl.minimum(begin + span * (LANES * WIDTH), C * V)
    peak_q, sum_q, peak_p, sum_p = _peaks_and_sums(
        X + row * (x_stride * V), Y + row * (y_stride * V), begin, end, scale, LANES, WIDTH
    )
    PARTS += tl.program_id(0)
    tl.store(PARTS, peak_q)
    tl.store(PARTS + R * S, sum_q)
    tl.store(PARTS + 2 * R * S, peak_p)
    tl.store(PARTS + 3 * R * S, sum_p)


@triton.jit(do_not_specialize=["R", "S", "span"])
def _fwd_split_div(
    X, Y, PARTS, STATS, R, C, S, x_stride, y_stride, span, scale, beta, gamma, taylor,
    V: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, MAX_S: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The second reading of that part, with the log-sum-exp of the whole row."""
    row, part = (tl.program_id(0) // S).to(tl.int64), tl.program_id(0) % S
    begin = part * (span * LANES * WIDTH)
    end = tl.minimum(begin + span * (LANES * WIDTH), C * V)
    i = tl.arange(0, MAX_S)
    P, n = PARTS + row * S + i, R * S
    peak_q, sum_q = _joined(tl.load(P, i < S, other=LOWEST), tl.load(P + n, i < S, other=0.0), scale)
    peak_p, sum_p = _joined(tl.load(P + 2 * n, i < S, other=LOWEST), tl.load(P + 3 * n, i < S, other=0.0), scale)
    lse_q, lse_p = _log2_sum(sum_q), _log2_sum(sum_p)
    _store_stats(STATS, row, R, part == 0, peak_q, lse_q, peak_p, lse_p)
    kl_q, kl_p = _divergences(
        X + row * (x_stride * V), Y + row * (y_stride * V), begin, end,
        peak_q, lse_q, peak_p, lse_p, scale, beta, gamma, taylor, LANES, WIDTH, FAST,
    )  # fmt: skip
    tl.store(PARTS + 4 * n + tl.program_id(0), kl_q)
    tl.store(PARTS + 5 * n + tl.program_id(0), kl_p)


@triton.jit(do_not_specialize=["R", "S", "w_stride"])
def _fwd_split_join(
    PARTS, W, STATS, OUT, R, S, w_stride, beta, gamma, factor,
    ROWS: tl.constexpr, MAX_S: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    row, i = tl.arange(0, ROWS), tl.arange(0, MAX_S)
    mask = (row < R)[:, None] & (i < S)[None, :]
    P = PARTS + 4 * R * S + row[:, None] * S + i[None, :]
    kl_q, kl_p = tl.sum(tl.load(P, mask, other=0.0), 1), tl.sum(tl.load(P + R * S, mask, other=0.0), 1)
    _finish(W, STATS, OUT, row, R, row < R, kl_q, kl_p, w_stride, beta, gamma, factor, 0, REDUCE)


def _numbers(beta, temperature):
    """log2(e)/T, beta, gamma, and the Taylor coefficients 2 to 7 of log2(m/q) in d: a coin's cumulants."""
    v, u, ln2 = beta * (1 - beta), 1 - 2 * beta, math.log(2)
    even = v, v * (1 - 6 * v), v * (1 - 30 * v + 120 * v * v)
    odd = v * u, v * u * (1 - 12 * v), v * u * (1 - 60 * v + 360 * v * v)
    cumulants = (c for pair in zip(even, odd, strict=True) for c in pair)
    taylor = tuple(c * ln2 ** (n - 1) / math.factorial(n) for n, c in enumerate(cumulants, 2))
    return math.log2(math.e) / temperature, beta, 1 - beta, taylor


def _fwd_rows_per_program(R, block):
    """Rows of `block` classes: all of a small batch, so that one launch does; else 256 to 2048 elements."""
    rows = triton.next_power_of_2(R)
    if rows * block <= 2048:
        return rows
    return max(1, 256 // block, min(2048 // block, rows // PROGRAMS))


def _split(R, C, tile):
    """Parts of a row, and tiles of a part: at least 16K classes a part."""
    tiles = triton.cdiv(C, tile)
    parts = min(PROGRAMS // R, C // 16384) if R < FEW_ROWS else 1
    span = triton.cdiv(tiles, max(1, parts))
    return triton.cdiv(tiles, span), span


def js_div_fwd(input, target, weight, beta, temperature, reduction):
    R, C = input.shape
    stats = torch.empty((6, R), dtype=torch.float32, device=input.device)
    factor = 1.0 / max(R, 1) if reduction == 2 else 1.0
    if R == 0:
        return stats.new_full((0,) if reduction == 0 else (), math.nan if reduction == 2 else 0.0), stats

    strides = input.stride(0), target.stride(0)
    V = vector(input.dtype, C, *strides)
    C_v, *strides = (n // V for n in (C, *strides))
    w_stride = 0 if weight is None else weight.stride(0)
    numbers, reduce, fast = _numbers(beta, temperature), reduction != 0, input.dtype.itemsize == 2
    with torch.cuda.device_of(input):
        if C <= TILE_CLASSES:
            block = triton.next_power_of_2(C)
            rows = _fwd_rows_per_program(R, block)
            programs = triton.cdiv(R, rows)
            out = stats.new_empty((programs if reduce else R,))
            num_warps = warps(rows * block, 4) if programs == 1 else min(8, warps(rows * block, 8))
            _fwd_tile[(programs,)](
                input, target, weight, stats, out, R, C_v, *strides, w_stride, *numbers, factor,
                V=V, ROWS=rows, BLOCK=block, REDUCE=reduce, FAST=fast, num_warps=num_warps, **FUSED,
            )  # fmt: skip
            if reduce:
                return out.view(()) if programs == 1 else total(out), stats
            return out, stats

        # Larger programs for longer rows: the rows that all multiprocessors work on should fit into 50 MB of L2.
        num_warps = 8 if 2 * C * input.dtype.itemsize <= 2**15 else 16 if 2 * C * input.dtype.itemsize <= 2**17 else 32
        width = 16 // input.dtype.itemsize
        config = dict(V=V, LANES=32 * num_warps, WIDTH=width, num_warps=num_warps, **FUSED)
        S, span = _split(R, C, config["LANES"] * width)
        if S == 1:
            out = stats.new_empty((R,))
            _fwd_row[(R,)](
                input, target, weight, stats, out, R, C_v, *strides, w_stride, *numbers, factor, FAST=fast, **config
            )
            return total(out) if reduce else out, stats

        parts = stats.new_empty((6, R, S))
        max_s = triton.next_power_of_2(S)
        out = stats.new_empty(() if reduce else (R,))
        _fwd_split_lse[(R * S,)](input, target, parts, R, C_v, S, *strides, span, numbers[0], **config)
        _fwd_split_div[(R * S,)](
            input, target, parts, stats, R, C_v, S, *strides, span, *numbers, MAX_S=max_s, FAST=fast, **config
        )
        _fwd_split_join[(1,)](
            parts, weight, stats, out, R, S, w_stride, beta, 1 - beta, factor,
            ROWS=triton.next_power_of_2(R), MAX_S=max_s, REDUCE=reduce, num_warps=1, **FUSED,
        )  # fmt: skip
        return out, stats


# --- backward ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R", "w_stride", "g_stride", "tiles"])
def _bwd(
    G, X, Y, W, STATS, DX, DY, R, C, x_stride, y_stride, w_stride, g_stride, tiles, scale, beta, gamma, taylor, factor,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """ROWS rows by BLOCK columns, `tiles` such to the row; DX or DY None is not wanted."""
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    real = row < R
    mask = real[:, None] & (col < C * V)[None, :]
    x = _load(X + row[:, None] * (x_stride * V) + col[None, :], mask)
    y = _load(Y + row[:, None] * (y_stride * V) + col[None, :], mask)
    g = tl.load(G + row * g_stride, real, other=0.0).to(tl.float32) * factor
    if W is not None:
        g *= tl.load(W + row * w_stride, real, other=0.0)
    S = STATS + row
    lq = _shifted(x, tl.load(S, real)[:, None], tl.load(S + R, real)[:, None], scale)
    lp = _shifted(y, tl.load(S + 2 * R, real)[:, None], tl.load(S + 3 * R, real)[:, None], scale)
    over_q, over_p = _log2_over_mixture(lp - lq, beta, gamma, taylor, FAST)
    at = row[:, None] * (C * V) + col[None, :]
    if DX is not None:
        kl_q = tl.load(S + 4 * R, real)
        dx = (gamma * g)[:, None] * tl.exp2(lq) * (over_q * LN2 - kl_q[:, None])
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask)
    if DY is not None:
        kl_p = tl.load(S + 5 * R, real)
        dy = (beta * g)[:, None] * tl.exp2(lp) * (over_p * LN2 - kl_p[:, None])
        tl.store(DY + at, dy.to(DY.dtype.element_ty), mask)


def js_div_bwd(grad, input, target, weight, stats, beta, temperature, reduction, need_input, need_target):
    R, C = input.shape
    grads = tuple(
        torch.empty((R, C) if need else (0,), dtype=t.dtype, device=t.device)
        for t, need in ((input, need_input), (target, need_target))
    )
    if R == 0 or not (need_input or need_target):
        return grads

    strides = input.stride(0), target.stride(0)
    V = vector(input.dtype, C, *strides)
    C_v, *strides = (n // V for n in (C, *strides))
    # Tiles of 1024: 8 elements a thread, and at most 511 idle columns at the end of a row.
    block = min(triton.next_power_of_2(C), 512)
    rows = min(1024 // block, triton.next_power_of_2(R))
    tiles = triton.cdiv(C, block)
    factor = 1.0 / (temperature * (R if reduction == 2 else 1))
    with torch.cuda.device_of(input):
        _bwd[(triton.cdiv(R, rows) * tiles,)](
            grad, input, target, weight, stats, *(g if g.dim() == 2 else None for g in grads), R, C_v, *strides,
            0 if weight is None else weight.stride(0), grad.stride(0) if grad.dim() else 0, tiles,
            *_numbers(beta, temperature), factor,
            V=V, ROWS=rows, BLOCK=block, FAST=input.dtype.itemsize == 2,
            num_warps=min(4, warps(rows * block, 4)), **FUSED,
        )  # fmt: skip
    return grads
