"""Certainty-weighted fusion of M heads' logits on a GPU: one launch for all heads.

With s_m the largest probability of head m in a row, w = softmax(s/T) over the heads and out = sum_m w_m z_m.  With the
row's gradient g and a_m = <g, z_m>:

    d z_m = w_m g + w_m (a_m - sum_k w_k a_k)/T s_m ([z_m is the largest] - p_m)

divided among equal largest logits.  A class is impossible where a head's logit is -inf: its output is -inf whatever
the weights, and nothing has a gradient through it.

A tile holds all heads of some rows; many classes are read in several parts.
"""

import torch
import triton
import triton.language as tl

from . import Launch, cached_launch, cdiv, next_power_of_2, warps


@triton.jit
def _load(ROW, real_row, col, C):
    """A tile of logits, (HEADS, ROWS, BLOCK), -inf beyond the end, and its mask."""
    real = real_row[:, :, None] & (col < C)[None, None, :]
    return tl.load(ROW[:, :, None] + col[None, None, :], real, other=float("-inf")).to(tl.float32), real


@triton.jit
def _load_grad(ROW, real_row, col, C, z, here):
    """A tile of the gradient, (1, ROWS, BLOCK), 0 for an impossible class."""
    mask = real_row[:, None] & (col < C)[None, :]
    impossible = tl.max((here & (z == float("-inf"))).to(tl.int32), 0)
    return tl.load(ROW[:, None] + col[None, :], mask & (impossible == 0), other=0.0).to(tl.float32)[None, :, :]


@triton.jit
def _certainty(ROW, real_row, C, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of each head and row, and its probability."""
    top = tl.full([HEADS, ROWS], float("-inf"), tl.float32)
    sum = tl.zeros([HEADS, ROWS], tl.float32)
    for start in range(0, C, BLOCK):
        z, _ = _load(ROW, real_row, start + tl.arange(0, BLOCK), C)
        new = tl.maximum(top, tl.max(z, 2))
        shift = tl.where(new == float("-inf"), 0.0, new)
        sum = sum * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, :, None]), 2)
        top = new
    return top, 1.0 / sum


@triton.jit
def _weights(certainty, m, M, inverse_temperature):
    """Softmax over the heads, (HEADS, ROWS)."""
    own = tl.where((m < M)[:, None], certainty, float("-inf"))
    e = tl.exp((own - tl.max(own, 0)[None, :]) * inverse_temperature)
    return e / tl.sum(e, 0)[None, :]


@triton.jit(do_not_specialize=["N"])
def _fwd(
    Z,  # (M, N, C)
    OUT,  # (N, C)
    M,
    N,
    C,
    stride_zm,
    stride_zn,
    inverse_temperature,
    HEADS: tl.constexpr,  # at least M
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m, row = tl.arange(0, HEADS), tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = (m < M)[:, None] & (row < N)[None, :]
    Z += m.to(tl.int64)[:, None] * stride_zm + row[None, :] * stride_zn
    _, certainty = _certainty(Z, real, C, HEADS, ROWS, BLOCK)
    w = _weights(certainty, m, M, inverse_temperature)
    for start in range(0, C, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z, here = _load(Z, real, col, C)
        term = tl.where(z == float("-inf"), w[:, :, None] + z, w[:, :, None] * z)  # a weight of 0 too leaves -inf
        out = tl.sum(tl.where(here, term, 0.0), 0)
        mask = (row < N)[:, None] & (col < C)[None, :]
        tl.store(OUT + row[:, None] * C + col[None, :], out.to(OUT.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N"])
def _bwd(
    G,  # (N, C)
    Z,  # (M, N, C)
    DZ,  # (M, N, C)
    M,
    N,
    C,
    stride_gn,
    stride_zm,
    stride_zn,
    inverse_temperature,
    HEADS: tl.constexpr,  # at least M
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m, row = tl.arange(0, HEADS), tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = (m < M)[:, None] & (row < N)[None, :]
    Z += m.to(tl.int64)[:, None] * stride_zm + row[None, :] * stride_zn
    top, certainty = _certainty(Z, real, C, HEADS, ROWS, BLOCK)
    w = _weights(certainty, m, M, inverse_temperature)
    G += row * stride_gn
    DZ += (m.to(tl.int64)[:, None] * N + row[None, :]) * C
    count = tl.zeros([HEADS, ROWS], tl.float32)
    pull = tl.zeros([HEADS, ROWS], tl.float32)
    for start in range(0, C, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z, here = _load(Z, real, col, C)
        count += tl.sum((z == top[:, :, None]).to(tl.float32), 2)
        g = _load_grad(G, row < N, col, C, z, here)
        pull += tl.sum(tl.where(here & (z != float("-inf")), z * g, 0.0), 2)
    mean = tl.sum(w * pull, 0)
    factor = w * (pull - mean[None, :]) * inverse_temperature * certainty
    for start in range(0, C, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z, here = _load(Z, real, col, C)
        p = tl.exp(z - top[:, :, None]) * certainty[:, :, None]
        largest = tl.where(z == top[:, :, None], (1.0 / count)[:, :, None], 0.0)
        dz = w[:, :, None] * _load_grad(G, row < N, col, C, z, here) + factor[:, :, None] * (largest - p)
        tl.store(DZ[:, :, None] + col[None, None, :], dz.to(DZ.dtype.scalar.element_ty), here)


def _launch(kernel, size, **values):
    """In tiles of 1024 logits, or of one row."""
    M, N, C = size
    heads = next_power_of_2(M)
    block = min(next_power_of_2(C), max(16, 4096 // heads))
    rows = max(1, min(1024 // (heads * block), next_power_of_2(N)))
    values |= dict(M=M, N=N, C=C, HEADS=heads, ROWS=rows, BLOCK=block)
    # With no limit, ptxas spills a few bytes where this makes room for one more program.
    return Launch(kernel, (cdiv(N, rows),), values, num_warps=min(8, warps(heads * rows * block, 4)), maxnreg=128)


def certainty_fusion_fwd(logits, temperature):
    run = _forward(logits.get_device(), logits.dtype, logits.shape, logits.stride()[:2], temperature)
    with torch.cuda.device_of(logits):
        return run(logits)


@cached_launch
def _forward(_device, _dtype, size, strides, temperature):
    if size[1] == 0:
        return lambda logits: logits.new_empty(size[1:])
    stride_zm, stride_zn = strides
    launch = _launch(_fwd, size, stride_zm=stride_zm, stride_zn=stride_zn, inverse_temperature=1 / temperature)

    def run(logits):
        out = logits.new_empty(size[1:])
        launch(logits, out)
        return out

    return run


def certainty_fusion_bwd(grad, logits, temperature, need_logits):
    run = _backward(
        logits.get_device(), logits.dtype, logits.shape, logits.stride()[:2], grad.stride(0), temperature, need_logits
    )
    with torch.cuda.device_of(logits):
        return run(grad, logits)


@cached_launch
def _backward(_device, _dtype, size, strides, stride_gn, temperature, need_logits):
    if size[1] == 0 or not need_logits:
        return lambda grad, logits: logits.new_empty(size if need_logits else (0,))
    stride_zm, stride_zn = strides
    values = dict(stride_gn=stride_gn, stride_zm=stride_zm, stride_zn=stride_zn, inverse_temperature=1 / temperature)
    launch = _launch(_bwd, size, **values)

    def run(grad, logits):
        out = logits.new_empty(size)
        launch(grad, logits, out)
        return out

    return run
