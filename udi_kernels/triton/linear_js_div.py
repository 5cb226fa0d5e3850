"""Divergence and cross-entropy of a chunk of rows on a GPU; their gradient replaces the student's logits.

Formulas and arithmetic are those of js_div.py.  A row of up to TILE_CLASSES is read once and stays in registers.  One
program sweeps over a longer row, in alternating directions, because what was read last is still in the L2, and writes
it once.  The first sweep adds up the exponentials, and the last writes the gradient.  That of KL(p || q), q - p, needs
no more.  For other divergences a sweep between them adds up KL(q || m), whose terms depend on those sums.  Those of
KL(q || p) are linear in the logits, so the first sweep could add them up as well, but in peaked rows they would no
longer cancel in the gradient.
"""

import math

import torch
import triton
import triton.language as tl

from . import Launch, at, cached_launch, exp2, next_power_of_2, vector, warps
from .js_div import (
    BETWEEN,
    HALF,
    KL,
    LN2,
    LOG2E,
    LOWEST,
    _compared,
    _divergences,
    _gap,
    _joined,
    _load,
    _log2,
    _log2_over_mixture,
    _log_ratio,
    _mixture,
    _online,
    _quotient,
    _summands,
    row_warps,
)

TILE_CLASSES = 8192  # longest row held in registers: 16 classes a thread at 16 warps; twice as many spill


@triton.jit
def _own(a, b, MIRRORED: tl.constexpr):
    """What belongs to the student: of q, or mirrored of p."""
    if MIRRORED:
        return b
    else:
        return a


@triton.jit
def _loss(kl_q, kl_p, kl, beta, gamma, MIX: tl.constexpr):
    """The divergence in nats, of parts as in js_div.py; rounding may make it negative, NaN stays."""
    loss = kl
    if MIX != KL:
        loss = (beta * kl_p + gamma * kl_q) * LN2
    return tl.where(loss < 0, 0.0, loss)


@triton.jit
def _gradient(
    d, q, p, kl_q, kl_p, share_q, share_p, factor, beta, gamma, mixture, MIRRORED: tl.constexpr, MIX: tl.constexpr
):
    """factor times the divergence's gradient in the student's logits; q and p as of `_compared`."""
    if MIX == KL:
        q, p = q * share_q, p * share_p
        add_q, add_p, _ = _summands(d, q, p, beta, gamma, mixture, MIX)
        return factor * (_own(add_q, add_p, MIRRORED) - _own(q, p, MIRRORED) * _own(kl_q, kl_p, MIRRORED))
    else:
        over_q, over_p = _log2_over_mixture(d, beta, gamma, mixture, MIX)
        return q * (factor * gamma * share_q * LN2) * (over_q - kl_q)


@triton.jit
def _cross_entropy(at_label, label, peak, sum, C):
    """At temperature 1; NaN for a label that is none."""
    loss = _log2(sum, sum - 1) * LN2 - (at_label - peak)
    return tl.where((label >= 0) & (label < C), loss, float("nan"))


@triton.jit
def _label(LABELS, X, row, hard, C):
    """The row's label and its logit; not read where the label does not count."""
    label = tl.load(LABELS + row, hard != 0, other=0)
    return label, tl.load(X + label, (hard != 0) & (label >= 0) & (label < C), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["R"])
def _tile(
    X,  # (R, C): the student's logits
    Y,  # (R, C): the teacher's
    SOFT,  # (R,): factors of the divergences
    HARD,  # (R,): factors of the cross-entropies, or None
    LABELS,  # (R,) int64, or None
    OUT,  # (R,): losses
    R,
    C,  # in units of V, as the strides are
    x_stride,
    y_stride,
    scale,  # log2(e) / T
    factor,  # of the gradient of the divergence: 1 / T
    beta,
    gamma,  # 1 - beta
    mixture,  # see js_div.py
    V: tl.constexpr,  # elements per load
    BLOCK: tl.constexpr,
    GRAD: tl.constexpr,
    MIRRORED: tl.constexpr,
    MIX: tl.constexpr,
):
    """One row, read once."""
    row = tl.program_id(0)
    X, Y, col = at(X, row, x_stride, V), at(Y, row, y_stride, V), tl.arange(0, BLOCK)
    mask = col < C * V
    soft, hard = tl.load(SOFT + row), 0.0
    x, y = _load(X + col, mask), _load(Y + col, col < tl.where(soft != 0, C * V, 0))
    peak_x = tl.max(x, 0)
    loss, grad = 0.0, tl.zeros([BLOCK], tl.float32)
    if HARD is not None:
        hard = tl.load(HARD + row)
        label, at_label = _label(LABELS, X, row, hard, C * V)
        e = exp2((x - peak_x) * LOG2E)
        sum = tl.sum(e, 0)
        loss = tl.where(hard != 0, hard * _cross_entropy(at_label, label, peak_x, sum, C * V), 0.0)
        grad = tl.where(hard != 0, hard * (e * _quotient(1.0, sum) - tl.where(col == label, 1.0, 0.0)), 0.0)
    peak_y = tl.max(y, 0)
    a, b = _own(x, y, MIRRORED), _own(y, x, MIRRORED)
    a, b = a - _own(peak_x, peak_y, MIRRORED), b - _own(peak_y, peak_x, MIRRORED)
    q, p = exp2(a * scale), exp2(b * scale)
    share_q, share_p = _quotient(1.0, tl.sum(q, 0)), _quotient(1.0, tl.sum(p, 0))
    d = _log_ratio(a, b, _gap(share_q, share_p), scale, MIX)
    if MIX == KL:
        add_q, add_p, add = _summands(d, q * share_q, p * share_p, beta, gamma, mixture, MIX)
        kl_q, kl_p, kl = tl.sum(add_q, 0), tl.sum(add_p, 0), tl.sum(add, 0)
    else:
        add_q, add_p, _ = _summands(d, q, p, beta, gamma, mixture, MIX)
        kl_q, kl_p, kl = tl.sum(add_q, 0) * share_q, tl.sum(add_p, 0) * share_p, 0.0
    loss += tl.where(soft != 0, soft * _loss(kl_q, kl_p, kl, beta, gamma, MIX), 0.0)
    tl.store(OUT + row, loss)
    if GRAD:
        g = _gradient(d, q, p, kl_q, kl_p, share_q, share_p, soft * factor, beta, gamma, mixture, MIRRORED, MIX)
        tl.store(X + col, (grad + tl.where(soft != 0, g, 0.0)).to(X.dtype.element_ty), mask)


@triton.jit
def _sums(X, Y, n, n_y, scale, LANES: tl.constexpr, WIDTH: tl.constexpr, HARD: tl.constexpr):
    """Maxima and sums of exponentials of n student's and n_y teacher's logits, by the online softmax.

    Last, for HARD, the sum of the student's at temperature 1.
    """
    peak_x = tl.full([LANES], LOWEST, tl.float32)
    peak_y = tl.full([LANES], LOWEST, tl.float32)
    sum_x = tl.zeros([LANES], tl.float32)
    sum_y = tl.zeros([LANES], tl.float32)
    sum_1 = tl.zeros([LANES], tl.float32)
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    for start in range(0, n, LANES * WIDTH):
        col = start + lane
        x, y = _load(X + col, col < n), _load(Y + col, col < n_y)
        if HARD:
            _, sum_1 = _online(x, peak_x, sum_1, LOG2E)
        peak_x, sum_x = _online(x, peak_x, sum_x, scale)
        peak_y, sum_y = _online(y, peak_y, sum_y, scale)
    _, sum_1 = _joined(peak_x, sum_1, LOG2E)
    peak_x, sum_x = _joined(peak_x, sum_x, scale)
    peak_y, sum_y = _joined(peak_y, sum_y, scale)
    return peak_x, sum_x, peak_y, sum_y, sum_1


@triton.jit(do_not_specialize=["R"])
def _row(
    X,  # (R, C): the student's logits
    Y,  # (R, C): the teacher's
    SOFT,  # (R,): factors of the divergences
    HARD,  # (R,): factors of the cross-entropies, or None
    LABELS,  # (R,) int64, or None
    OUT,  # (R,): losses
    R,
    C,  # in units of V, as the strides are
    x_stride,
    y_stride,
    scale,  # log2(e) / T
    factor,  # of the gradient of the divergence: 1 / T
    beta,
    gamma,  # 1 - beta
    mixture,  # see js_div.py
    V: tl.constexpr,  # elements per load
    LANES: tl.constexpr,  # times WIDTH, the columns of a tile
    WIDTH: tl.constexpr,
    GRAD: tl.constexpr,
    MIRRORED: tl.constexpr,
    MIX: tl.constexpr,
):
    """One long row."""
    row = tl.program_id(0)
    X, Y, n = at(X, row, x_stride, V), at(Y, row, y_stride, V), C * V
    soft, hard, loss, label = tl.load(SOFT + row), 0.0, 0.0, -1
    n_y = tl.where(soft != 0, n, 0)
    peak_x, sum_x, peak_y, sum_y, sum_1 = _sums(X, Y, n, n_y, scale, LANES, WIDTH, HARD is not None)
    share_1 = _quotient(1.0, sum_1)
    if HARD is not None:
        hard = tl.load(HARD + row)
        label_1, at_label = _label(LABELS, X, row, hard, n)
        loss = tl.where(hard != 0, hard * _cross_entropy(at_label, label_1, peak_x, sum_1, n), 0.0)
        label = label_1.to(tl.int32)
    A, B = _own(X, Y, MIRRORED), _own(Y, X, MIRRORED)
    peak_q, peak_p = _own(peak_x, peak_y, MIRRORED), _own(peak_y, peak_x, MIRRORED)
    share_q = _quotient(1.0, _own(sum_x, sum_y, MIRRORED))
    share_p = _quotient(1.0, _own(sum_y, sum_x, MIRRORED))
    gap = _gap(share_q, share_p)
    TWICE: tl.constexpr = MIX == KL and not MIRRORED
    kl_q, kl_p, kl = 0.0, 0.0, 0.0
    if not TWICE:
        if soft != 0:
            kl_q, kl_p, kl = _divergences(
                A, B, 0, n, peak_q, share_q, peak_p, share_p, scale, beta, gamma, mixture, LANES, WIDTH, MIX
            )
    if GRAD or TWICE:
        each = tl.zeros([LANES], tl.float32)
        lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tiles = tl.cdiv(n, LANES * WIDTH)
        for i in range(0, tiles):
            if TWICE:  # against the sweep before
                col = (tiles - 1 - i) * (LANES * WIDTH) + lane
            else:
                col = i * (LANES * WIDTH) + lane
            x, y = _load(X + col, col < n), _load(Y + col, col < n_y)
            a, b = _own(x, y, MIRRORED), _own(y, x, MIRRORED)
            d, q, p = _compared(a, b, peak_q, peak_p, gap, scale, MIX)
            if TWICE:
                _, _, add = _summands(d, q * share_q, p * share_p, beta, gamma, mixture, MIX)
                each += tl.sum(add, 1)
            if GRAD:
                grad = tl.zeros([LANES, WIDTH], tl.float32)
                if HARD is not None:
                    e = exp2((x - peak_x) * LOG2E) * share_1
                    grad = tl.where(hard != 0, hard * (e - tl.where(col == label, 1.0, 0.0)), 0.0)
                g = _gradient(d, q, p, kl_q, kl_p, share_q, share_p, soft * factor, beta, gamma, mixture, MIRRORED, MIX)
                tl.store(X + col, (grad + tl.where(soft != 0, g, 0.0)).to(X.dtype.element_ty), col < n)
        kl += tl.sum(each, 0)
    loss += tl.where(soft != 0, soft * _loss(kl_q, kl_p, kl, beta, gamma, MIX), 0.0)
    tl.store(OUT + row, loss)


def linear_js_div_rows(input, target, soft, hard, labels, beta, temperature, need_grad):
    run = _launch(
        input.get_device(), input.dtype, tuple(input.shape), input.stride(0), target.stride(0), hard is not None,
        beta, temperature, need_grad,
    )  # fmt: skip
    with torch.cuda.device_of(input):
        return run(input, target, soft, hard, labels)


@cached_launch
def _launch(_device, dtype, shape, x_stride, y_stride, _hard, beta, temperature, need_grad):
    R, C = shape
    mirrored = beta == 1  # KL(q || p) is KL(p || q) mirrored
    beta = 0.0 if mirrored else float(beta)
    V = vector(dtype, C, x_stride, y_stride)
    values = dict(
        R=R,
        C=C // V,
        x_stride=x_stride // V,
        y_stride=y_stride // V,
        scale=math.log2(math.e) / temperature,
        factor=1.0 / temperature,
        beta=beta,
        gamma=1.0 - beta,
        mixture=_mixture(beta),
        V=V,
        GRAD=need_grad,
        MIRRORED=mirrored,
        MIX={0: KL, 0.5: HALF}.get(beta, BETWEEN).value,
    )
    if C <= TILE_CLASSES:
        block = next_power_of_2(C)
        num_warps = warps(block, 16)
        # All registers that there are: ptxas on its own may spill to leave some (Triton 3.8).
        options = dict(maxnreg=128) if num_warps == 16 and beta == 0 and not mirrored else {}
        launch = Launch(_tile, (R,), values | dict(BLOCK=block), num_warps=num_warps, **options)
    else:
        num_warps = row_warps(C, dtype)
        values |= dict(LANES=32 * num_warps, WIDTH=min(4, max(2, V)))
        # All registers that there are: where fewer would fit a second program, ptxas on its own spills to do so.
        options = dict(maxnreg=64) if num_warps == 32 else {}
        launch = Launch(_row, (R,), values, num_warps=num_warps, **options)

    def run(input, target, soft, hard, labels):
        losses = torch.empty(R, dtype=torch.float32, device=input.device)
        if R:
            launch(input, target, soft, hard, labels, losses)
        return losses

    return run
