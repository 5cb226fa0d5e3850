"""Generalized Jensen-Shannon divergence of two softmaxes on a GPU, and skew KL.

With q = softmax(input/T), p = softmax(target/T) and m = beta p + (1 - beta) q:

    JS = beta KL(p || m) + (1 - beta) KL(q || m)
    d input = (1 - beta)/T q (log(q/m) - KL(q || m)),    d target = beta/T p (log(p/m) - KL(p || m))

log(q/m) and log(p/m) are functions of d = log2(p/q) only (`_log2_over_mixture`).  d comes from the logits' differences
and the ratio of both sums of exponentials, so that logits of 1e4 and logarithms of large sums lose no digits, and equal
rows give exactly 0.

The ends are defined as divergences, not as limits: beta = 0 is KL(p || q), beta = 1 its mirror image, KL(q || p).

    KL(p || q): d input = (q - p)/T,    d target = p/T (log(p/q) - KL(p || q))

Skew KL is KL(p || m) alone, with alpha instead of beta; its reverse is the same with the sides exchanged.  With
u = (p - m)/m and D = log(p/m) - alpha u:

    KL(p || m): d input = (1 - alpha)/T q (sum q u - u),    d target = p/T (D - sum p D)

Rows up to TILE_CLASSES are read once and stay in registers; a program takes several rows if they are short.  Longer
rows are read twice by one program, the second time backwards, because what was read last is still in the cache.  A few
very long rows are split over programs.
"""

import math

import torch
import triton
import triton.language as tl

from . import (
    MEAN,
    NONE,
    SUM,
    Launch,
    at,
    cached_launch,
    cdiv,
    exp2,
    fma,
    gradients,
    next_power_of_2,
    tile_grid,
    tile_row,
    total,
    vector,
    wanted,
    warps,
)

# Rows of the statistics (6, R), float32: maximum and 1 / sum of exponentials of the input, the same of the target,
# KL(q || m) and KL(p || m) in bits.  At beta = 0 the last two are the sum of q - p, which rounding leaves, and that of
# p log(p/q) in nats; for skew KL, the sums of q u and of p D.  For a weighted mean, one more: each row's weight over
# the sum of the weights.
MAX_Q, INV_Q, MAX_P, INV_P, DIV_Q, DIV_P, SHARE = (tl.constexpr(i) for i in range(7))
# Rows of PARTS (7, R, S), where rows are split: the sums themselves are in INV_Q and INV_P; and for KL and SKEW
DIV = tl.constexpr(6)  # the divergence

FURTHEST = tl.constexpr(1e6)  # bound of |d|: exp2 is exactly 0 there
LOWEST = tl.constexpr(-3.4028234663852886e38)
LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))

# MIX, what a kernel is compiled for: beta = 1/2, which has shorter formulas, other values in between, the ends, and
# skew KL.  The last two divide by the sums of exponentials first, and add up the divergence from terms of its own.
HALF, BETWEEN, KL, SKEW = (tl.constexpr(i) for i in range(4))

TILE_CLASSES = 4096  # longest row held in registers: 16 classes a thread at 8 warps
STRIDED_CLASSES = 1024  # longest row whose classes may have a stride
FEW_ROWS = 64  # fewer rows leave half of an A100 or H100 idle, so very long ones are split
PROGRAMS = 256  # at most, for the parts of few rows
MAX_PROGRAMS = 16384  # for short rows: a single program adds up their results
WARPS = 64  # of a multiprocessor; long rows need all of them to have enough loads in flight ...
MAX_REGISTERS = 32  # ... so a thread gets this many (for SKEW, twice); else Triton's version decides on 32 or 64 warps
L2_BYTES = 50 * 2**20 // 132  # of an H100, for each multiprocessor


# --- elementwise ------------------------------------------------------------------------------------------------


@triton.jit
def _log2(x, v):
    """log2 of x = 1 + v > 0, relative error 5e-8: x = 2^e (1 + f), |f| <= 1/3, and a minimax polynomial f P(f).

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
def _half_log2_larger(n):
    """log2 of the larger of p and q over m = (p + q)/2, relative error 3e-8, where n = -|log2(p/q)|.

    It is 1 - log2(1 + 2^n), and -n/2 - log2(cosh(n ln2/2)): with an even series near 0, where the first form loses its
    relative accuracy and the divergence is of second order.  Both are minimax polynomials: the hardware's logarithm,
    absolute error 2^-22, is no faster on an H100, and for 16-bit logits less exact than torch.
    """
    s = n * n
    P = -1.8765568938761135e-06
    P = P * s + 5.546498505282216e-05
    P = P * s - 0.001734485267661512
    P = P * s + 0.08664339780807495
    near = -n * (0.5 + n * P)

    t = exp2(n)
    P = 0.045720115303993225
    P = P * t - 0.14709943532943726
    P = P * t + 0.25512680411338806
    P = P * t - 0.35357341170310974
    P = P * t + 0.4800563156604767
    P = P * t - 0.7212988138198853
    P = P * t + 1.442694067955017
    return tl.where(n > -1.0, near, 1 - t * P)


@triton.jit
def _log2_1p(t):
    """log2(1 + t) where t is in [0, 1]: a minimax polynomial, relative error 5e-9 before rounding."""
    P = -0.00468013621866703
    P = P * t + 0.028639594092965126
    P = P * t - 0.08217521756887436
    P = P * t + 0.15297837555408478
    P = P * t - 0.22081300616264343
    P = P * t + 0.28386378288269043
    P = P * t - 0.3600120544433594
    P = P * t + 0.4808497130870819
    P = P * t - 0.7213461399078369
    P = P * t + 1.4426950216293335
    return t * P


@triton.jit
def _log2_over_mixture(d, beta, gamma, mixture, MIX: tl.constexpr):
    """log2(q/m) and log2(p/m), where d = log2(p/q); finite also where p or q or both are 0, and d is infinite or NaN.

    Let a be the larger of beta p and gamma q, and t = 2^n the ratio of the other one to it.  In m = a (1 + t) nothing
    cancels.  Near d = 0 both logarithms are differences of nearly equal numbers, and a series is used: one in n where
    beta is a half, else the Taylor polynomial, with a truncation error below 4e-7 of the divergence.
    """
    if MIX == HALF:
        n = tl.maximum(-tl.abs(d), -FURTHEST)  # NaN becomes -FURTHEST
        larger = _half_log2_larger(n)
        smaller = larger + n
        return tl.where(d > 0, smaller, larger), tl.where(d > 0, larger, smaller)
    bits_beta, bits_gamma, k2, k3, k4, k5, k6, k7 = mixture
    e = d - (bits_beta - bits_gamma)
    n = tl.maximum(-tl.abs(e), -FURTHEST)
    near = tl.abs(d) < 0.5
    series = d * (d * (k2 + d * (k3 + d * (k4 + d * (k5 + d * (k6 + d * k7))))))
    less = tl.where(near, series, _log2_1p(exp2(n)))
    over_q = tl.where(near, -beta * d, bits_gamma + tl.where(e > 0, n, 0.0)) - less
    over_p = tl.where(near, gamma * d, bits_beta + tl.where(e > 0, 0.0, n)) - less
    return over_q, over_p


@triton.jit
def _kl_term(d, q, p):
    """p log(p/q) + q - p, a term of KL(p || q): never negative, of second order in d = log(p/q).

    The second part has the sum 0 but for the rounding errors of both rows' sums of exponentials, which cancel this way.
    """
    far = tl.where(p == 0, 0.0, p * d) + (q - p)
    return tl.where(tl.abs(d) < LN2, p * _exp_rest(d), far)


@triton.jit
def _exp_rest(d):
    """e^-d - 1 + d, of second order, for |d| < ln 2."""
    P = -2.7557319223985893e-06
    P = P * d + 2.48015873015873e-05
    P = P * d - 0.0001984126984126984
    P = P * d + 0.001388888888888889
    P = P * d - 0.008333333333333333
    P = P * d + 0.04166666666666667
    P = P * d - 0.16666666666666666
    P = P * d + 0.5
    return d * d * P


@triton.jit
def _log_rest(v):
    """v - log(1 + v), of second order, for |v| < 1/3: with t = v/(2 + v), log(1 + v) is 2 artanh(t)."""
    t = v / (2.0 + v)
    s = t * t
    P = 0.09090909090909091
    P = P * s + 0.1111111111111111
    P = P * s + 0.14285714285714285
    P = P * s + 0.2
    P = P * s + 0.3333333333333333
    return t * (v - 2.0 * s * P)


@triton.jit
def _skew(d, q, p, alpha, gamma):
    """Of KL(p || m), m = alpha p + gamma q: u, D, and a term p log(p/m) + m - p, of second order in v = m/p - 1.

    d: log2(p/q), infinite or NaN where p or q or both are 0.
    """
    d = tl.maximum(d, -FURTHEST)  # NaN too
    near = d * LN2
    rest = exp2(-d)  # q/p
    v = gamma * tl.where(tl.abs(near) < LN2, _exp_rest(near) - near, rest - 1.0)
    x = alpha + gamma * rest  # 1 + v, in which nothing cancels
    inverse = 1.0 / x
    log = _log2(x, v) * LN2
    small = tl.abs(v) < 1 / 3
    h = _log_rest(v)
    u = tl.where(small, -v * inverse, inverse - 1.0)
    slope = tl.where(small, h + (gamma + v) * u, -log - alpha * u)
    return u, slope, tl.where(small, p * h, gamma * (q - p) - p * log)


@triton.jit
def _summands(d, q, p, beta, gamma, mixture, MIX: tl.constexpr):
    """A class's part of the last two statistics and, for KL and SKEW, of the divergence."""
    if MIX == KL:
        return q - p, tl.where(p == 0, 0.0, p * d), _kl_term(d, q, p)
    elif MIX == SKEW:
        u, slope, term = _skew(d, q, p, beta, gamma)
        return q * u, p * slope, term
    else:
        over_q, over_p = _log2_over_mixture(d, beta, gamma, mixture, MIX)
        return q * over_q, p * over_p, 0.0


@triton.jit
def _quotient(a, b):
    """a / b, correctly rounded but for rare cases, and NaN if b is 0.

    A true division has a slow path that takes registers.
    """
    inverse = 1.0 / b
    r = a * inverse
    return fma(fma(-r, b, a), inverse, r)


@triton.jit
def _gap(share_q, share_p):
    """log2(share_q / share_p); NaN for a row with no class above -inf, as in torch."""
    ratio = _quotient(share_q, share_p)
    log = tl.where(ratio > 0, _log2(ratio, ratio - 1), float("nan"))
    return tl.where(share_q == share_p, 0.0, log)


@triton.jit
def _log_ratio(x, y, gap, scale, MIX: tl.constexpr):
    """log2(p/q), given logits less their maxima; for KL log(p/q), which in bits overflows where a logit is -3e38."""
    if MIX == KL:
        return (y - x) * (scale * LN2) - gap * LN2
    else:
        return (y - x) * scale - gap


@triton.jit
def _compared(x, y, peak_q, peak_p, gap, scale, MIX: tl.constexpr):
    """`_log_ratio`, and q and p, each times the sum of its row's exponentials."""
    x, y = x - peak_q, y - peak_p
    return _log_ratio(x, y, gap, scale, MIX), exp2(x * scale), exp2(y * scale)


# --- layouts ----------------------------------------------------------------------------------------------------


@triton.jit
def _begin(X, row, inner, outer_stride, stride, V: tl.constexpr):
    """Where rows [row // inner, row % inner] of (A, inner, C) begin."""
    return at(at(X, row // inner, outer_stride, V), row % inner, stride, V)


@triton.jit
def _begins(X, Y, row, x_stride, y_stride, layout, V: tl.constexpr):
    if layout is None:
        return at(X, row, x_stride, V), at(Y, row, y_stride, V)
    else:
        X = _begin(X, row, layout[0], layout[1], x_stride, V)
        return X, _begin(Y, row, layout[0], layout[2], y_stride, V)


@triton.jit
def _places(X, Y, row, col, x_stride, y_stride, layout, V: tl.constexpr):
    """Tiles (rows, columns) of pointers."""
    X, Y = _begins(X, Y, row, x_stride, y_stride, layout, V)
    if layout is None:
        return X[:, None] + col[None, :], Y[:, None] + col[None, :]
    else:
        col = col.to(tl.int64)[None, :]
        return X[:, None] + col * layout[3], Y[:, None] + col * layout[4]


def _layout(shape, x_strides, y_strides):
    """What x_stride and y_stride do not say of the logits (A, B, C) or (R, C); None if they say all.

    The size B, or R; the outer strides of input and target; their strides from class to class.
    """
    steps = tuple(strides[-1] if shape[-1] > 1 else 1 for strides in (x_strides, y_strides))
    if len(shape) == 2:
        return None if steps == (1, 1) else (shape[0], 0, 0, *steps)
    return shape[1], x_strides[0], y_strides[0], *steps


def _dense(shape, strides):
    """Strides of a gradient, dense, in the order of the logits' strides, as `gradient_like` in _js_div.py makes it."""
    order = sorted(range(len(shape)), key=lambda d: -strides[d] if strides[d] else -math.inf)
    sizes = [max(1, shape[d]) for d in order]
    return tuple(math.prod(sizes[order.index(d) + 1 :]) for d in range(len(shape)))


# --- forward ----------------------------------------------------------------------------------------------------


@triton.jit
def _load(X, mask):
    return tl.load(X, mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _stat(STATS, R, statistic: tl.constexpr):
    """Where a row of the statistics (6, R) begins; as a sum, since the product may need 64 bits."""
    for _ in tl.static_range(statistic):
        STATS += R
    return STATS


@triton.jit
def _store_stats(STATS, row, R, mask, peak_q, share_q, peak_p, share_p):
    S = STATS + row
    tl.store(_stat(S, R, MAX_Q), peak_q, mask)
    tl.store(_stat(S, R, INV_Q), share_q, mask)
    tl.store(_stat(S, R, MAX_P), peak_p, mask)
    tl.store(_stat(S, R, INV_P), share_p, mask)


@triton.jit
def _losses(
    W, STATS, row, R, mask, kl_q, kl_p, kl, w_stride, beta, gamma, factor, WEIGH: tl.constexpr, MIX: tl.constexpr
):
    """Stores the last statistics of some rows; returns their losses in nats, 0 outside of the mask.

    kl: the divergence in nats, for KL and SKEW.
    """
    if MIX != KL:  # a NaN in either row is one in both gradients, as in torch
        kl_q, kl_p = kl_q + 0 * kl_p, kl_p + 0 * kl_q
    if MIX >= KL:
        loss = kl
    else:
        loss = (beta * kl_p + gamma * kl_q) * LN2
    loss = tl.where(loss < 0, 0.0, loss) * factor  # rounding may be negative; NaN stays
    S = _stat(STATS, R, DIV_Q) + row
    tl.store(S, kl_q, mask)
    tl.store(S + R, kl_p, mask)
    if WEIGH:
        loss *= tl.load(W + row.to(tl.int64) * w_stride, mask, other=0.0)
    return tl.where(mask, loss, 0.0)


@triton.jit
def _kept(W, row, w_stride, real):
    """Which rows have a weight that is not 0: the others are neither read nor computed."""
    return real & (tl.load(W + row.to(tl.int64) * w_stride, real, other=0.0) != 0)


@triton.jit(do_not_specialize=["R", "w_stride"])
def _fwd_tile(
    X,  # (R, C): logits of q
    Y,  # (R, C): logits of p
    W,  # (R,), or None
    STATS,  # (6, R) float32
    OUT,  # (R,), or with REDUCE (programs,) float32
    R,
    C,  # in units of V, as the strides are
    x_stride,
    y_stride,
    layout,  # see `_layout`
    w_stride,
    scale,  # log2(e) / T
    beta,
    gamma,  # 1 - beta
    mixture,  # see `_mixture`
    factor,  # of the losses
    V: tl.constexpr,  # elements per load
    STEPS: tl.constexpr,  # times ROWS rows to a program
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REDUCE: tl.constexpr,  # whether OUT gets sums
    WEIGH: tl.constexpr,  # whether the losses are multiplied by W
    MIX: tl.constexpr,  # HALF, BETWEEN, KL or SKEW
):
    """STEPS times ROWS whole rows, read once."""
    sum = tl.zeros([ROWS], tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0).to(R.dtype) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        real = row < R
        if W is None:
            loss = _tile_losses(
                X, Y, W, STATS, row, real, R, C, x_stride, y_stride, layout, w_stride, scale, beta, gamma, mixture,
                factor, V, ROWS, BLOCK, WEIGH, MIX,
            )  # fmt: skip
        else:
            kept = _kept(W, row, w_stride, real)
            loss = tl.zeros([ROWS], tl.float32)
            if tl.max(kept.to(tl.int32), 0) > 0:
                loss = _tile_losses(
                    X, Y, W, STATS, row, kept, R, C, x_stride, y_stride, layout, w_stride, scale, beta, gamma, mixture,
                    factor, V, ROWS, BLOCK, WEIGH, MIX,
                )  # fmt: skip
        if REDUCE:
            sum += loss
        else:
            tl.store(OUT + row, loss, real)
    if REDUCE:
        tl.store(OUT + tl.program_id(0), tl.sum(sum, 0))


@triton.jit
def _tile_losses(
    X, Y, W, STATS, row, kept, R, C, x_stride, y_stride, layout, w_stride, scale, beta, gamma, mixture, factor,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WEIGH: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK)
    mask = kept[:, None] & (col < C * V)[None, :]
    X, Y = _places(X, Y, row, col, x_stride, y_stride, layout, V)
    x, y = _load(X, mask), _load(Y, mask)
    peak_q, peak_p = tl.max(x, 1), tl.max(y, 1)
    x, y = x - peak_q[:, None], y - peak_p[:, None]
    q, p = exp2(x * scale), exp2(y * scale)
    sum_q, sum_p = tl.sum(q, 1), tl.sum(p, 1)
    share_q, share_p = _quotient(1.0, sum_q), _quotient(1.0, sum_p)
    _store_stats(STATS, row, R, kept, peak_q, share_q, peak_p, share_p)

    d = _log_ratio(x, y, _gap(share_q, share_p)[:, None], scale, MIX)
    if MIX >= KL:
        q, p = q * share_q[:, None], p * share_p[:, None]
    add_q, add_p, add = _summands(d, q, p, beta, gamma, mixture, MIX)
    kl_q, kl_p = tl.sum(add_q, 1), tl.sum(add_p, 1)
    if MIX >= KL:
        kl = tl.sum(add, 1)
    else:
        kl_q, kl_p, kl = _quotient(kl_q, sum_q), _quotient(kl_p, sum_p), None
    return _losses(W, STATS, row, R, kept, kl_q, kl_p, kl, w_stride, beta, gamma, factor, WEIGH, MIX)


@triton.jit
def _online(x, peak, sum, scale):
    """Adds a tile (LANES, WIDTH) to the running maximum and sum of exponentials of each lane."""
    new = tl.maximum(peak, tl.max(x, 1))
    return new, sum * exp2((peak - new) * scale) + tl.sum(exp2((x - new[:, None]) * scale), 1)


@triton.jit
def _joined(peak, sum, scale):
    """The maximum and sum of exponentials of all lanes."""
    top = tl.max(peak, 0)
    return top, tl.sum(sum * exp2((peak - top) * scale), 0)


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
    X, Y, begin, end, peak_q, share_q, peak_p, share_p, scale, beta, gamma, mixture,
    LANES: tl.constexpr, WIDTH: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    """The sums of `_summands` over columns [begin, end), last column first."""
    sum_q = tl.zeros([LANES], tl.float32)
    sum_p = tl.zeros([LANES], tl.float32)
    sum = tl.zeros([LANES], tl.float32)
    gap = _gap(share_q, share_p)
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tiles = tl.cdiv(end - begin, LANES * WIDTH)
    for i in range(0, tiles):
        col = begin + (tiles - 1 - i) * (LANES * WIDTH) + lane
        d, q, p = _compared(_load(X + col, col < end), _load(Y + col, col < end), peak_q, peak_p, gap, scale, MIX)
        if MIX >= KL:
            q, p = q * share_q, p * share_p
        add_q, add_p, add = _summands(d, q, p, beta, gamma, mixture, MIX)
        sum_p += tl.sum(add_p, 1)
        if MIX >= KL:
            # Not a sum of q - p: at that the LLVM of Triton 3.8 and 3.9 crashes where classes are read one by one.
            sum_q -= tl.sum(-add_q, 1)
            sum += tl.sum(add, 1)
        else:
            sum_q += tl.sum(add_q, 1)
    if MIX >= KL:
        return tl.sum(sum_q, 0), tl.sum(sum_p, 0), tl.sum(sum, 0)
    else:
        return tl.sum(sum_q, 0) * share_q, tl.sum(sum_p, 0) * share_p, 0.0


@triton.jit(do_not_specialize=["R", "w_stride"])
def _fwd_row(
    X,  # (R, C): logits of q
    Y,  # (R, C): logits of p
    W,  # (R,), or None
    STATS,  # (6, R) float32
    OUT,  # (R,) float32
    R,
    C,  # in units of V, as the strides are
    x_stride,
    y_stride,
    layout,  # see `_layout`
    w_stride,
    scale,  # log2(e) / T
    beta,
    gamma,  # 1 - beta
    mixture,  # see `_mixture`
    factor,  # of the losses
    V: tl.constexpr,  # elements per load
    LANES: tl.constexpr,  # times WIDTH, the columns of a tile
    WIDTH: tl.constexpr,
    WEIGH: tl.constexpr,  # whether the losses are multiplied by W
    MIX: tl.constexpr,  # HALF, BETWEEN, KL or SKEW
):
    """One long row, read twice."""
    row = tl.program_id(0).to(tl.int64)
    if W is not None:
        if tl.load(W + row * w_stride) == 0:
            tl.store(OUT + row, 0.0)
            return
    X, Y = _begins(X, Y, row, x_stride, y_stride, layout, V)
    peak_q, sum_q, peak_p, sum_p = _peaks_and_sums(X, Y, 0, C * V, scale, LANES, WIDTH)
    share_q, share_p = _quotient(1.0, sum_q), _quotient(1.0, sum_p)
    _store_stats(STATS, row, R, True, peak_q, share_q, peak_p, share_p)
    kl_q, kl_p, kl = _divergences(
        X, Y, 0, C * V, peak_q, share_q, peak_p, share_p, scale, beta, gamma, mixture, LANES, WIDTH, MIX
    )
    tl.store(OUT + row, _losses(W, STATS, row, R, row < R, kl_q, kl_p, kl, w_stride, beta, gamma, factor, WEIGH, MIX))


@triton.jit(do_not_specialize=["R", "S", "w_stride", "span"])
def _fwd_split_sums(
    X,  # (R, C): logits of q
    Y,  # (R, C): logits of p
    W,  # (R,), or None
    PARTS,  # (7, R, S) float32
    R,
    C,  # in units of V, as the strides are
    S,  # parts of a row
    x_stride,
    y_stride,
    layout,  # see `_layout`
    w_stride,
    span,  # tiles of a part
    scale,  # log2(e) / T
    V: tl.constexpr,  # elements per load
    LANES: tl.constexpr,  # times WIDTH, the columns of a tile
    WIDTH: tl.constexpr,
):
    """Maxima and sums of exponentials of a part of one very long row."""
    row, part = (tl.program_id(0) // S).to(tl.int64), tl.program_id(0) % S
    if W is not None:
        if tl.load(W + row * w_stride) == 0:
            return
    begin = part * (span * LANES * WIDTH)
    end = tl.minimum(begin + span * (LANES * WIDTH), C * V)
    X, Y = _begins(X, Y, row, x_stride, y_stride, layout, V)
    peak_q, sum_q, peak_p, sum_p = _peaks_and_sums(X, Y, begin, end, scale, LANES, WIDTH)
    PARTS += tl.program_id(0)
    tl.store(PARTS + MAX_Q * R * S, peak_q)
    tl.store(PARTS + INV_Q * R * S, sum_q)
    tl.store(PARTS + MAX_P * R * S, peak_p)
    tl.store(PARTS + INV_P * R * S, sum_p)


@triton.jit(do_not_specialize=["R", "S", "w_stride", "span"])
def _fwd_split_div(
    X,  # (R, C): logits of q
    Y,  # (R, C): logits of p
    W,  # (R,), or None
    PARTS,  # (7, R, S) float32
    STATS,  # (6, R) float32
    R,
    C,  # in units of V, as the strides are
    S,  # parts of a row
    x_stride,
    y_stride,
    layout,  # see `_layout`
    w_stride,
    span,  # tiles of a part
    scale,  # log2(e) / T
    beta,
    gamma,  # 1 - beta
    mixture,  # see `_mixture`
    V: tl.constexpr,  # elements per load
    LANES: tl.constexpr,  # times WIDTH, the columns of a tile
    WIDTH: tl.constexpr,
    MAX_S: tl.constexpr,  # at least S
    MIX: tl.constexpr,  # HALF, BETWEEN, KL or SKEW
):
    """The divergences of that part, read again, with the sums of the whole row."""
    row, part = (tl.program_id(0) // S).to(tl.int64), tl.program_id(0) % S
    if W is not None:
        if tl.load(W + row * w_stride) == 0:
            return
    begin = part * (span * LANES * WIDTH)
    end = tl.minimum(begin + span * (LANES * WIDTH), C * V)
    i = tl.arange(0, MAX_S)
    P, n = PARTS + row * S + i, R * S
    peak_q, sum_q = tl.load(P + MAX_Q * n, i < S, other=LOWEST), tl.load(P + INV_Q * n, i < S, other=0.0)
    peak_q, sum_q = _joined(peak_q, sum_q, scale)
    peak_p, sum_p = tl.load(P + MAX_P * n, i < S, other=LOWEST), tl.load(P + INV_P * n, i < S, other=0.0)
    peak_p, sum_p = _joined(peak_p, sum_p, scale)
    share_q, share_p = _quotient(1.0, sum_q), _quotient(1.0, sum_p)
    _store_stats(STATS, row, R, part == 0, peak_q, share_q, peak_p, share_p)
    X, Y = _begins(X, Y, row, x_stride, y_stride, layout, V)
    kl_q, kl_p, kl = _divergences(
        X, Y, begin, end, peak_q, share_q, peak_p, share_p, scale, beta, gamma, mixture, LANES, WIDTH, MIX,
    )  # fmt: skip
    tl.store(PARTS + DIV_Q * n + tl.program_id(0), kl_q)
    tl.store(PARTS + DIV_P * n + tl.program_id(0), kl_p)
    tl.store(PARTS + DIV * n + tl.program_id(0), kl)


@triton.jit(do_not_specialize=["R", "S", "w_stride"])
def _fwd_split_join(
    PARTS,  # (7, R, S) float32
    W,  # (R,), or None
    STATS,  # (6, R) float32
    OUT,  # (R,), or with REDUCE () float32
    R,
    S,  # parts of a row
    w_stride,
    beta,
    gamma,  # 1 - beta
    factor,  # of the losses
    ROWS: tl.constexpr,  # at least R
    MAX_S: tl.constexpr,  # at least S
    REDUCE: tl.constexpr,  # whether OUT gets sums
    WEIGH: tl.constexpr,  # whether the losses are multiplied by W
    MIX: tl.constexpr,  # HALF, BETWEEN, KL or SKEW
):
    """Adds up the divergences of the parts."""
    row, i = tl.arange(0, ROWS), tl.arange(0, MAX_S)
    kept = row < R
    if W is not None:
        kept = _kept(W, row, w_stride, kept)
    mask = kept[:, None] & (i < S)[None, :]
    P = PARTS + DIV_Q * R * S + row[:, None] * S + i[None, :]
    kl_q, kl_p = tl.sum(tl.load(P, mask, other=0.0), 1), tl.sum(tl.load(P + R * S, mask, other=0.0), 1)
    kl = tl.sum(tl.load(P + 2 * R * S, mask, other=0.0), 1)
    loss = _losses(W, STATS, row, R, kept, kl_q, kl_p, kl, w_stride, beta, gamma, factor, WEIGH, MIX)
    if REDUCE:
        tl.store(OUT, tl.sum(loss, 0))
    else:
        tl.store(OUT + row, loss, row < R)


@triton.jit(do_not_specialize=["R", "w_stride"])
def _weighted_mean(
    LOSSES,  # (R,) float32
    W,  # (R,)
    STATS,  # (7, R) float32
    OUT,  # () float32
    R,
    w_stride,
    BLOCK: tl.constexpr,
    ROW: tl.constexpr,  # of the statistics, for the shares
):
    """The weighted mean, and each row's share, in float64: sums of weights may overflow.  0 if all weights are."""
    total = tl.zeros([BLOCK], tl.float64)
    mass = tl.zeros([BLOCK], tl.float64)
    kept = tl.zeros([BLOCK], tl.int32)
    for start in range(0, R, BLOCK):
        row = start + tl.arange(0, BLOCK)
        w = tl.load(W + row.to(tl.int64) * w_stride, row < R, other=0.0)
        loss = tl.load(LOSSES + row, row < R, other=0.0)
        total += w.to(tl.float64) * loss.to(tl.float64)
        mass += w.to(tl.float64)
        kept |= (w != 0).to(tl.int32)
    inverse = tl.where(tl.max(kept, 0) == 0, 1.0, 1 / tl.sum(mass, 0))
    tl.store(OUT, (tl.sum(total, 0) * inverse).to(tl.float32))
    SHARES = _stat(STATS, R, ROW)
    for start in range(0, R, BLOCK):
        row = start + tl.arange(0, BLOCK)
        w = tl.load(W + row.to(tl.int64) * w_stride, row < R, other=0.0)
        tl.store(SHARES + row, tl.where(w == 0, 0.0, w.to(tl.float64) * inverse).to(tl.float32), row < R)


def js_div_fwd(input, target, weight, beta, temperature, reduction):
    if beta == 1:  # KL(q || p) is KL(p || q) mirrored
        input, target, beta = target, input, 0.0
    return _launch_forward(input, target, weight, beta, temperature, reduction)


def skew_kl_fwd(input, target, weight, alpha, reverse, temperature, reduction):
    if reverse:
        input, target = target, input
    return _launch_forward(input, target, weight, alpha, temperature, reduction, skew=alpha > 0)


def _launch_forward(input, target, weight, beta, temperature, reduction, skew=False):
    if input.shape[-1] > STRIDED_CLASSES:
        input, target = _adjacent(input), _adjacent(target)
    run = _forward(
        input.get_device(), input.dtype, input.shape, input.stride(), target.stride(),
        weight is not None and (weight.dtype, weight.stride(0)), beta, temperature, reduction, skew,
    )  # fmt: skip
    with torch.cuda.device_of(input):
        return run(input, target, weight)


def _adjacent(x):
    """Tiles of 8 adjacent rows would spill if they were longer."""
    return x if x.stride(-1) == 1 else x.contiguous()


@cached_launch
def _forward(_device, dtype, shape, x_strides, y_strides, weight, beta, temperature, reduction, skew):
    R, C = math.prod(shape[:-1]), shape[-1]
    if R == 0:
        return _fwd_empty(reduction)
    values = _values(dtype, shape, x_strides, y_strides, weight, beta, temperature, skew)
    if weight and reduction == MEAN:
        return _fwd_weighted_mean(R, C, dtype, values)
    values |= dict(WEIGH=bool(weight))
    return _fwd_reduced(R, C, dtype, reduction, values)


def _fwd_weighted_mean(R, C, dtype, values):
    each = _fwd_reduced(R, C, dtype, NONE, values | dict(WEIGH=False), stats=7)
    block = min(4096, next_power_of_2(R))
    mean = Launch(_weighted_mean, (1,), values | dict(BLOCK=block, ROW=SHARE.value), num_warps=warps(block, 8))

    def run(input, target, weight):
        losses, stats = each(input, target, weight)
        loss = losses.new_empty(())
        mean(losses, weight, stats, loss)
        return loss, stats

    return run


def _fwd_reduced(R, C, dtype, reduction, values, stats=6):
    values |= dict(factor=1.0 / R if reduction == MEAN else 1.0, REDUCE=reduction != NONE, stats=stats)
    if C <= TILE_CLASSES:
        return _fwd_by_tiles(R, C, reduction, values)
    options = _long_rows(C, dtype, values)
    parts, span = _split(R, C, values["LANES"] * values["WIDTH"])
    if parts == 1:
        return _fwd_by_programs(Launch(_fwd_row, (R,), values, **options), R, R, reduction, values)
    return _fwd_by_parts(R, parts, reduction, values | dict(S=parts, span=span), options)


def row_warps(C, dtype):
    """Larger programs for longer rows, so that the rows in work on all multiprocessors fit into the L2."""
    row_bytes = 2 * C * dtype.itemsize
    return next((w for w in (8, 16) if WARPS // w * row_bytes <= L2_BYTES), 32)


def _long_rows(C, dtype, values):
    """The options of a launch; the sizes of tiles are added to the values."""
    num_warps = row_warps(C, dtype)
    # More values at a time leave too few registers; each narrow load needs an address and a mask.
    width = min(4, max(2, values["V"]))
    values |= dict(LANES=32 * num_warps, WIDTH=width)
    return dict(num_warps=num_warps, maxnreg=MAX_REGISTERS * (2 if values["MIX"] == SKEW.value else 1))


def _mixture(beta):
    """-log2 of beta and of 1 - beta, and coefficients 2 to 7 of log2(m/q) in d: Bernoulli cumulants."""
    v, u, ln2 = beta * (1 - beta), 1 - 2 * beta, math.log(2)
    if v == 0:
        return ()
    even = v, v * (1 - 6 * v), v * (1 - 30 * v + 120 * v * v)
    odd = v * u, v * u * (1 - 12 * v), v * u * (1 - 60 * v + 360 * v * v)
    cumulants = (c for pair in zip(even, odd, strict=True) for c in pair)
    taylor = (c * ln2 ** (n - 1) / math.factorial(n) for n, c in enumerate(cumulants, 2))
    return -math.log2(beta), -math.log2(1 - beta), *taylor


def _values(dtype, shape, x_strides, y_strides, weight, beta, temperature, skew=False):
    """The arguments that forward and backward kernels share, by name."""
    R, C = math.prod(shape[:-1]), shape[-1]
    layout = _layout(shape, x_strides, y_strides)
    adjacent = not layout or layout[3:] == (1, 1)
    V = vector(dtype, C, *x_strides[:-1], *y_strides[:-1]) if adjacent else 1
    if layout:
        layout = (layout[0], layout[1] // V, layout[2] // V, *layout[3:])
    return dict(
        R=R,
        C=C // V,
        x_stride=x_strides[-2] // V,
        y_stride=y_strides[-2] // V,
        layout=layout,
        adjacent=adjacent,
        w_stride=weight[1] if weight else 0,
        scale=math.log2(math.e) / temperature,
        beta=float(beta),
        gamma=1.0 - beta,
        mixture=() if skew else _mixture(beta),
        V=V,
        MIX=(SKEW if skew else {0: KL, 0.5: HALF}.get(beta, BETWEEN)).value,
    )


def _fwd_empty(reduction):
    def run(input, target, weight):
        loss = input.new_full(
            (0,) if reduction == NONE else (), math.nan if reduction == MEAN else 0.0, dtype=torch.float32
        )
        return loss, loss.new_empty((7 if weight is not None and reduction == MEAN else 6, 0))

    return run


def _fwd_by_tiles(R, C, reduction, values):
    block = next_power_of_2(C)
    rows, steps, num_warps = _tile_of_rows(R, block, values["adjacent"], 4096 if values["MIX"] == SKEW.value else 8192)
    programs = cdiv(R, rows * steps)
    values |= dict(STEPS=steps, ROWS=rows, BLOCK=block)
    launch = Launch(_fwd_tile, (programs,), values, num_warps=num_warps)

    return _fwd_by_programs(launch, R, programs, reduction, values)


def _tile_of_rows(R, block, adjacent, most):
    """Rows of `block` classes that a program takes at a time, how often, and with how many warps.

    A small batch is one tile, so that one launch is enough.  Otherwise a thread has 16 classes, and only long rows are
    distributed over several warps, whose sums need shared memory.  A tile of strided rows has `most` classes in all.
    """
    rows = next_power_of_2(R)
    if rows * block <= 1024:
        return rows, 1, warps(rows * block, 4)
    if not adjacent:  # the rows are what is adjacent: 32 bytes of them, or 128
        rows = min(next_power_of_2(R), 32, most // block)
        return rows, next_power_of_2(cdiv(R, rows * MAX_PROGRAMS)), warps(rows * block, 16)
    rows = max(1, 256 // block)
    return rows, next_power_of_2(cdiv(R, rows * MAX_PROGRAMS)), warps(rows * block, 16)


def _fwd_by_programs(launch, R, programs, reduction, values):
    """By one kernel, which stores the losses of the rows, or a sum for each program."""
    shape = (R,) if reduction == NONE else () if programs == 1 else (programs,)
    done = reduction == NONE or programs == 1

    def run(input, target, weight):
        stats = _stats(input, values["stats"], R)
        losses = stats.new_empty(shape)
        launch(input, target, weight, stats, losses)
        return losses if done else total(losses), stats

    return run


def _split(R, C, tile):
    """Parts of a row, and tiles of a part: at least 16K classes a part."""
    tiles = cdiv(C, tile)
    parts = min(PROGRAMS // R, C // 16384) if R < FEW_ROWS else 1
    span = cdiv(tiles, max(1, parts))
    return cdiv(tiles, span), span


def _fwd_by_parts(R, S, reduction, values, options):
    values |= dict(MAX_S=next_power_of_2(S), ROWS=next_power_of_2(R))
    sums = Launch(_fwd_split_sums, (R * S,), values, **options)
    div = Launch(_fwd_split_div, (R * S,), values, **options)
    join = Launch(_fwd_split_join, (1,), values, num_warps=1)

    def run(input, target, weight):
        stats = _stats(input, values["stats"], R)
        parts, loss = stats.new_empty(7, R, S), stats.new_empty(R if reduction == NONE else ())
        sums(input, target, weight, parts)
        div(input, target, weight, parts, stats)
        join(parts, weight, stats, loss)
        return loss, stats

    return run


# Where processes have parts of the classes, a row is split over them.


def js_div_part_sums(input, target, weight, temperature):
    return _of_part("sums", input, target, weight, None, 0.5, temperature)[:4]


def js_div_part_divergences(input, target, weight, sums, beta, temperature):
    return _of_part("divergences", input, target, weight, sums, beta, temperature)[4:]


def _of_part(step, input, target, weight, sums, beta, temperature):
    input, target = _adjacent(input), _adjacent(target)
    run = _part(
        step, input.get_device(), input.dtype, input.shape, input.stride(), target.stride(),
        weight is not None and (weight.dtype, weight.stride(0)), beta, temperature,
    )  # fmt: skip
    with torch.cuda.device_of(input):
        return run(input, target, weight, sums)


@cached_launch
def _part(step, _device, dtype, shape, x_strides, y_strides, weight, beta, temperature):
    R, C = shape
    values = _values(dtype, shape, x_strides, y_strides, weight, beta, temperature)
    options = _long_rows(C, dtype, values)
    values |= dict(S=1, MAX_S=1, span=cdiv(C, values["LANES"] * values["WIDTH"]))
    kernel = _fwd_split_sums if step == "sums" else _fwd_split_div
    launch = Launch(kernel, (R,), values, **options)

    def run(input, target, weight, sums):
        parts = torch.zeros((7, R), dtype=torch.float32, device=input.device)
        if sums is None:
            launch(input, target, weight, parts)
            return parts
        parts[:4] = sums
        launch(input, target, weight, parts, torch.empty_like(parts))
        kl_q, kl_p, kl = parts[4:]
        if beta != 0:  # a NaN in either row is one in both gradients, and divergences are in bits
            kl_q += 0 * kl_p
            kl_p += 0 * kl_q
            torch.add(beta * kl_p, kl_q, alpha=1 - beta, out=kl).mul_(math.log(2))
        return parts

    return run


def _stats(input, rows, R):
    """The statistics.  Other results are made from them: new_empty without dtype and device takes half as long."""
    return torch.empty((rows, R), dtype=torch.float32, device=input.device)


# --- backward ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R", "w_stride", "g_stride"])
def _bwd(
    G,  # (R,), or () with g_stride 0
    X,  # (R, C): logits of q
    Y,  # (R, C): logits of p
    W,  # (R,), or None
    STATS,  # (6, R) float32
    DX,  # (R, C), or None
    DY,  # (R, C), or None
    R,
    C,  # in units of V, as the strides are
    x_stride,
    y_stride,
    layout,  # see `_layout`
    grad_layout,  # None if the gradients are (R, C); their outer strides, strides and steps, and B
    w_stride,
    g_stride,
    scale,  # log2(e) / T
    beta,
    gamma,  # 1 - beta
    mixture,  # see `_mixture`
    factor,  # of the gradients
    V: tl.constexpr,  # elements per load
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MIX: tl.constexpr,  # HALF, BETWEEN, KL or SKEW
):
    """ROWS rows by BLOCK columns."""
    row = tile_row(R) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = row < R
    inside = real[:, None] & (col < C * V)[None, :]
    mask = inside
    if W is not None:
        kept = _kept(W, row, w_stride, real)
        mask = inside & kept[:, None]
        if tl.max(kept.to(tl.int32), 0) == 0:
            zero = tl.zeros([ROWS, BLOCK], tl.float32)
            _store_gradients(DX, DY, row, col, C, grad_layout, zero, zero, inside, V)
            return
    X, Y = _places(X, Y, row, col, x_stride, y_stride, layout, V)
    x, y = tl.load(X, mask).to(tl.float32), tl.load(Y, mask).to(tl.float32)
    g = tl.load(G + row.to(tl.int64) * g_stride, real).to(tl.float32) * factor
    if W is not None:
        g *= tl.load(W + row.to(tl.int64) * w_stride, real)
    S = STATS + row
    peak_q, share_q = tl.load(_stat(S, R, MAX_Q), real), tl.load(_stat(S, R, INV_Q), real)
    peak_p, share_p = tl.load(_stat(S, R, MAX_P), real), tl.load(_stat(S, R, INV_P), real)
    DIVS = _stat(S, R, DIV_Q)  # and of the next row of the statistics, DIV_P
    gap = _gap(share_q, share_p)
    d, q, p = _compared(x, y, peak_q[:, None], peak_p[:, None], gap[:, None], scale, MIX)
    if MIX == SKEW:
        u, slope, _ = _skew(d, q, p, beta, gamma)
        dx = (g * gamma * share_q)[:, None] * q * (tl.load(DIVS, real)[:, None] - u)
        dy = (g * share_p)[:, None] * p * (slope - tl.load(DIVS + R, real)[:, None])
    elif MIX == KL:  # less the rounding errors of the sums of these terms
        q, p = q * share_q[:, None], p * share_p[:, None]
        add_q, add_p, _ = _summands(d, q, p, beta, gamma, mixture, MIX)
        dx = g[:, None] * (add_q - q * tl.load(DIVS, real)[:, None])
        dy = g[:, None] * (add_p - p * tl.load(DIVS + R, real)[:, None])
    else:
        over_q, over_p = _log2_over_mixture(d, beta, gamma, mixture, MIX)
        dx = _gradient(q, over_q, gamma * g * share_q, tl.load(DIVS, real))
        dy = _gradient(p, over_p, beta * g * share_p, tl.load(DIVS + R, real))
    if W is not None:
        dx, dy = tl.where(mask, dx, 0.0), tl.where(mask, dy, 0.0)
    _store_gradients(DX, DY, row, col, C, grad_layout, dx, dy, inside, V)


@triton.jit
def _store_gradients(DX, DY, row, col, C, layout, dx, dy, mask, V: tl.constexpr):
    if DX is not None:
        tl.store(_grad_places(DX, row, col, C, layout, 0, V), dx.to(DX.dtype.element_ty), mask)
    if DY is not None:
        tl.store(_grad_places(DY, row, col, C, layout, 3, V), dy.to(DY.dtype.element_ty), mask)


@triton.jit
def _grad_places(D, row, col, C, layout, first: tl.constexpr, V: tl.constexpr):
    if layout is None:
        return at(D, row, C, V)[:, None] + col[None, :]
    else:
        begin = _begin(D, row, layout[6], layout[first], layout[first + 1], V)
        return begin[:, None] + col.to(tl.int64)[None, :] * layout[first + 2]


def _gradients(shape, x_strides, y_strides, needs, over):
    """A function that allocates the gradients but that of `over`, a side whose gradient takes the logits' memory.

    And None if the gradients are contiguous, or what `_bwd` must know of them.
    """
    both = [s if side == over else _dense(shape, s) for side, s in enumerate((x_strides, y_strides))]
    fresh = [need and side != over for side, need in enumerate(needs)]
    contiguous = _dense(shape, sorted(range(1, len(shape) + 1), reverse=True))
    if all(strides == contiguous for strides, need in zip(both, needs, strict=True) if need):
        return gradients(shape, fresh), None
    triples = [(strides[0] if len(shape) == 3 else 0, *strides[-2:]) for strides in both]

    def allocate(x):
        return tuple(
            [x.new_empty_strided(shape, s) if need else x.new_empty(0) for s, need in zip(both, fresh, strict=True)]
        )

    return allocate, (*triples[0], *triples[1], shape[-2])


@triton.jit
def _gradient(q, over, g, kl):
    """g q (log(q/m) - KL(q || m)), given both in bits: their difference is exact where it is small."""
    return q * (g * LN2)[:, None] * (over - kl[:, None])


def js_div_bwd(grad, input, target, weight, stats, beta, temperature, reduction, need_input, need_target):
    if beta == 1:
        grads = js_div_bwd(grad, target, input, weight, stats, 0.0, temperature, reduction, need_target, need_input)
        return grads[::-1]
    return _launch_backward(grad, input, target, weight, stats, beta, temperature, reduction, (need_input, need_target))


def js_div_bwd_inplace(grad, input, target, weight, stats, beta, temperature, reduction, need_target):
    """The input becomes its gradient; returns the target's."""
    sides, needs = (input, target), (True, need_target)
    if beta == 1:
        options = stats, 0.0, temperature, reduction, needs[::-1]
        return _launch_backward(grad, *sides[::-1], weight, *options, over=1)[0]
    return _launch_backward(grad, *sides, weight, stats, beta, temperature, reduction, needs, over=0)[1]


def skew_kl_bwd(
    grad, input, target, weight, stats, alpha, reverse, temperature, reduction, need_input, need_target
):  # fmt: skip
    sides, needs = (input, target), (need_input, need_target)
    if reverse:
        sides, needs = sides[::-1], needs[::-1]
    grads = _launch_backward(grad, *sides, weight, stats, alpha, temperature, reduction, needs, skew=alpha > 0)
    return grads[::-1] if reverse else grads


def _launch_backward(grad, input, target, weight, stats, beta, temperature, reduction, needs, skew=False, over=None):
    if weight is not None and reduction == MEAN:
        weight, reduction = stats[SHARE.value], SUM
    run = _backward(
        input.get_device(), input.dtype, input.shape, input.stride(), target.stride(),
        weight is not None and (weight.dtype, weight.stride(0)),
        grad.dtype, grad.stride(0) if grad.dim() else 0,
        beta, temperature, reduction, needs, skew, over,
    )  # fmt: skip
    with torch.cuda.device_of(input):
        return run(grad, input, target, weight, stats)


@cached_launch
def _backward(
    _device, dtype, shape, x_strides, y_strides, weight, _grad_dtype, g_stride, beta, temperature, reduction, needs,
    skew, over,
):  # fmt: skip
    R, C = math.prod(shape[:-1]), shape[-1]
    allocate, grad_layout = _gradients(shape, x_strides, y_strides, needs, over)
    if R == 0 or not any(needs):
        return lambda grad, input, target, weight, stats: allocate(input)
    values = _values(dtype, shape, x_strides, y_strides, weight, beta, temperature, skew)
    if grad_layout:
        values |= dict(V=1, C=C, **{k: values[k] * values["V"] for k in ("x_stride", "y_stride")}) | dict(
            layout=_layout(shape, x_strides, y_strides) or (R, 0, 0, 1, 1)
        )
    values |= dict(grad_layout=grad_layout)
    if not values["adjacent"]:
        block = min(next_power_of_2(C), 64)
        rows, each = min(32, next_power_of_2(R)), 16
    elif C <= 512:  # one load of each input per thread, of 16 bytes where rows allow it
        block, each = next_power_of_2(C), max(4, values["V"])
        rows = min(max(1, 64 * each // block), next_power_of_2(R))
    else:  # two loads, of a single row; narrower tiles where over an eighth of the columns would be idle
        block, each = 1024 if -C % 1024 <= C // 8 else 512, 32 // dtype.itemsize
        rows = 1
    values |= dict(g_stride=g_stride, ROWS=rows, BLOCK=block)
    values |= dict(factor=1.0 / (temperature * (R if reduction == MEAN else 1)))
    grid = tile_grid(cdiv(R, rows), cdiv(C, block))
    launch = Launch(_bwd, grid, values, num_warps=warps(rows * block, each))

    def run(grad, input, target, weight, stats):
        grads = allocate(input)
        written = wanted(grads, needs)
        if over is not None:
            written[over] = (input, target)[over]
        launch(grad, input, target, weight, stats, *written)
        return grads

    return run
