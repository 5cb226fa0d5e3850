"""Certainty-weighted fusion of M heads' logits on a GPU: one launch for all heads.

With s_m the largest probability of head m in a row, w = softmax(s/T) over the heads and out = sum_m w_m z_m.  With the
row's gradient g and a_m = <g, z_m>:

    d z_m = w_m g + w_m (a_m - sum_k w_k a_k)/T s_m ([z_m is the largest] - p_m)

shared out among equally large ones.  A tile holds all heads of some rows; of many classes, part after part.
"""

import torch
import triton
import triton.language as tl

from . import FUSED, warps


@triton.jit
def _load(ROW, real_row, col, C):
    """Logits (HEADS, ROWS, BLOCK), -inf beyond the end, and which of them are real."""
    real = real_row[:, :, None] & (col < C)[None, None, :]
    return tl.load(ROW[:, :, None] + col[None, None, :], real, other=float("-inf")).to(tl.float32), real


@triton.jit
def _load_grad(ROW, real_row, col, C):
    mask = real_row[:, None] & (col < C)[None, :]
    return tl.load(ROW[:, None] + col[None, :], mask, other=0.0).to(tl.float32)[None, :, :]


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
    scaled = tl.where((m < M)[:, None], certainty * inverse_temperature, float("-inf"))
    e = tl.exp(scaled - tl.max(scaled, 0)[None, :])
    return e / tl.sum(e, 0)[None, :]


@triton.jit(do_not_specialize=["N"])
def _fwd(
    Z,
    OUT,
    M,
    N,
    C,
    stride_zm,
    stride_zn,
    inverse_temperature,
    HEADS: tl.constexpr,
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
        out = tl.sum(tl.where(here, w[:, :, None] * z, 0.0), 0)
        mask = (row < N)[:, None] & (col < C)[None, :]
        tl.store(OUT + row[:, None] * C + col[None, :], out.to(OUT.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N"])
def _bwd(
    G,
    Z,
    DZ,
    M,
    N,
    C,
    stride_gn,
    stride_zm,
    stride_zn,
    inverse_temperature,
    HEADS: tl.constexpr,
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
        pull += tl.sum(tl.where(here, z * _load_grad(G, row < N, col, C), 0.0), 2)
    mean = tl.sum(w * pull, 0)
    factor = w * (pull - mean[None, :]) * inverse_temperature * certainty
    for start in range(0, C, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z, here = _load(Z, real, col, C)
        p = tl.exp(z - top[:, :, None]) * certainty[:, :, None]
        largest = tl.where(z == top[:, :, None], (1.0 / count)[:, :, None], 0.0)
        dz = w[:, :, None] * _load_grad(G, row < N, col, C) + factor[:, :, None] * (largest - p)
        tl.store(DZ[:, :, None] + col[None, None, :], dz.to(DZ.dtype.scalar.element_ty), here)


def _config(M, N, C):
    """Tiles of 1024 logits, or of one row."""
    heads = triton.next_power_of_2(M)
    block = min(triton.next_power_of_2(C), max(16, 4096 // heads))
    rows = max(1, min(1024 // (heads * block), triton.next_power_of_2(N)))
    return rows, dict(HEADS=heads, ROWS=rows, BLOCK=block, num_warps=min(8, warps(heads * rows * block, 4)), **FUSED)


def certainty_fusion_fwd(logits, temperature):
    M, N, C = logits.shape
    out = torch.empty((N, C), dtype=logits.dtype, device=logits.device)
    if N:
        rows, config = _config(M, N, C)
        with torch.cuda.device_of(logits):
            _fwd[(triton.cdiv(N, rows),)](
                logits, out, M, N, C, logits.stride(0), logits.stride(1), 1.0 / temperature, **config
            )
    return out


def certainty_fusion_bwd(grad, logits, temperature, need_logits):
    M, N, C = logits.shape
    out = torch.empty((M, N, C) if need_logits else (0,), dtype=logits.dtype, device=logits.device)
    if N and need_logits:
        rows, config = _config(M, N, C)
        with torch.cuda.device_of(logits):
            _bwd[(triton.cdiv(N, rows),)](
                grad,
                logits,
                out,
                M,
                N,
                C,
                grad.stride(0),
                logits.stride(0),
                logits.stride(1),
                1.0 / temperature,
                **config,
            )
    return out
