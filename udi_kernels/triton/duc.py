"""Dimension-decoupled unidirectional contrastive loss on a GPU: what is not a matrix product of it.

Over the chosen dimensions z_ij = <s_i, t_j>, and loss_i = log sum_j e^(z_ij/T) - z_ii/T.  The matrix products are the
library's; kernels turn blocks of rows of z into probabilities in place, so that no more of z exists than is worth
16 MB.  With the mean of the negatives weighted by their probabilities, n_i = sum_{j != i} p_ij t_j / (1 - p_ii),

    d s_i = g_i/T (1 - p_ii) (n_i - t_i)
    d t_j = 1/T [sum_{i != j} g_i p_ij s_i - g_j (1 - p_jj) s_j]

The forward pass leaves n_i - t_i, while it has the block; so the student's gradient is elementwise.

stats: (3, N) float32: the largest z of the negatives, 1/sum_j e^((z_ij - that)/T), and 1 - p_ii.
"""

import math

import torch
import triton
import triton.language as tl

from . import FUSED, total, warps

LOG2E = tl.constexpr(math.log2(math.e))
ELEMENTS = 1 << 22  # of z at a time


@triton.jit
def _negatives(Z, row, col, N, top, scale):
    """Exponentials of a row's negatives, relative to the largest; 0 at the positive."""
    z = tl.load(Z + col, col < N, other=0.0)
    return tl.where((col < N) & (col != row), tl.exp2((z - top) * scale), 0.0)


@triton.jit
def _log1p(x):
    one_more = 1.0 + x
    rounded = one_more - 1.0
    return tl.where(rounded == 0.0, x, tl.log(one_more) * (x / tl.where(rounded == 0.0, 1.0, rounded)))


@triton.jit(do_not_specialize=["begin"])
def _rows(
    Z,
    WEIGHTS,
    LOSSES,
    STATS,
    begin,
    N,
    inverse_temperature,
    factor,
    BLOCK: tl.constexpr,
):
    """Loss and stats of a row from its row of z; in WEIGHTS, unless None, the coefficients of n_i - t_i in the t_j."""
    row = begin + tl.program_id(0).to(tl.int64)
    Z += tl.program_id(0).to(tl.int64) * N
    scale = inverse_temperature * LOG2E
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, N, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = tl.load(Z + col, col < N, other=float("-inf"))
        tops = tl.maximum(tops, tl.where(col == row, float("-inf"), z))
    top = tl.max(tops, 0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        sums += _negatives(Z, row, start + tl.arange(0, BLOCK), N, top, scale)
    others = tl.sum(sums, 0)

    gap = (tl.load(Z + row) - top) * inverse_temperature
    every = others + tl.exp(gap)  # infinite where the negatives are nothing
    loss = tl.where(gap >= 0, _log1p(others * tl.exp(-gap)), tl.log(every) - gap)
    tl.store(LOSSES + row, loss * factor)
    tl.store(STATS + row, top)
    tl.store(STATS + N + row, 1.0 / every)
    tl.store(STATS + 2 * N + row, others / every)
    if WEIGHTS is not None:
        WEIGHTS += tl.program_id(0).to(tl.int64) * N
        share = 1.0 / tl.where(others > 0, others, 1.0)
        for start in range(0, N, BLOCK):
            col = start + tl.arange(0, BLOCK)
            weight = tl.where(col == row, -1.0, share * _negatives(Z, row, col, N, top, scale))
            tl.store(WEIGHTS + col, weight.to(WEIGHTS.dtype.element_ty), col < N)


def _product(a, b, out):
    """out = a b, in float32; with `out` under autocast too."""
    torch.mm(a, b, out=out) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32, out=out)


def _blocks(N):
    """Blocks of rows of z, as slices."""
    rows = max(1, min(N, ELEMENTS // max(N, 1)))
    return [slice(begin, min(begin + rows, N)) for begin in range(0, N, rows)]


def _row_config(N):
    block = min(4096, triton.next_power_of_2(N))
    return dict(BLOCK=block, num_warps=min(8, warps(block, 8)), **FUSED)


def duc_loss_fwd(student, teacher, dims, temperature, reduction, need_student):
    N, D = student.shape
    new = dict(device=student.device, dtype=torch.float32)
    losses, stats = torch.empty((N,), **new), torch.empty((3, N), **new)
    direction = torch.empty((N, D) if need_student else (0,), **new)
    if N == 0:
        return losses if reduction == 0 else losses.new_full((), math.nan if reduction == 2 else 0.0), stats, direction
    student, teacher = torch.where(dims, student, 0.0), torch.where(dims, teacher, 0.0)
    factor = 1.0 / N if reduction == 2 else 1.0
    with torch.cuda.device_of(student):
        for block in _blocks(N):
            rows = block.stop - block.start
            z = torch.empty((rows, N), **new)
            _product(student[block], teacher.T, z)
            # In float32 the coefficients take the place of z; a 16-bit product needs them in 16 bits.
            weights = z if student.dtype == torch.float32 else student.new_empty((rows, N))
            _rows[(rows,)](
                z,
                weights if need_student else None,
                losses,
                stats,
                block.start,
                N,
                1.0 / temperature,
                factor,
                **_row_config(N),
            )
            if need_student:
                _product(weights, teacher, direction[block])
        return losses if reduction == 0 else total(losses), stats, direction


# --- backward ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "stride_g"])
def _bwd_student(
    G,
    DIRECTION,
    STATS,
    DS,
    N,
    D,
    stride_g,
    factor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < N)[:, None] & (col < D)[None, :]
    g = tl.load(G + row * stride_g, row < N, other=0.0).to(tl.float32) * factor
    g *= tl.load(STATS + 2 * N + row, row < N, other=0.0)
    at = row[:, None] * D + col[None, :]
    direction = tl.load(DIRECTION + at, mask, other=0.0)
    tl.store(DS + at, (g[:, None] * direction).to(DS.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["begin", "stride_g"])
def _bwd_weights(
    G,
    Z,
    STATS,
    begin,
    N,
    stride_g,
    inverse_temperature,
    factor,
    BLOCK: tl.constexpr,
):
    """Turns a row of z into the coefficients of its s_i in the teacher's gradients."""
    row = begin + tl.program_id(0).to(tl.int64)
    Z += tl.program_id(0).to(tl.int64) * N
    g = tl.load(G + row * stride_g).to(tl.float32) * factor
    top, inverse_sum = tl.load(STATS + row), tl.load(STATS + N + row)
    own = -g * tl.load(STATS + 2 * N + row)
    for start in range(0, N, BLOCK):
        col = start + tl.arange(0, BLOCK)
        p = _negatives(Z, row, col, N, top, inverse_temperature * LOG2E) * inverse_sum
        tl.store(Z + col, tl.where(col == row, own, g * p), col < N)


def duc_loss_bwd(grad, student, teacher, dims, stats, direction, temperature, reduction, need_student, need_teacher):
    N, D = student.shape
    like = dict(device=student.device, dtype=student.dtype)
    grad_student = torch.empty((N, D) if need_student else (0,), **like)
    grad_teacher = torch.empty((N, D) if need_teacher else (0,), **like)
    if N == 0 or D == 0:
        return grad_student, grad_teacher
    stride_g = grad.stride(0) if grad.dim() else 0
    factor = 1.0 / (temperature * (N if reduction == 2 else 1))
    with torch.cuda.device_of(student):
        if need_student:
            block = min(256, triton.next_power_of_2(D))
            rows = 1024 // block
            grid = triton.cdiv(N, rows), triton.cdiv(D, block)
            _bwd_student[grid](
                grad, direction, stats, grad_student, N, D, stride_g, factor, ROWS=rows, BLOCK=block, **FUSED
            )
        if need_teacher:
            # Coefficients of a mean over many rows are too small for float16, so these products are of float32.
            student, teacher = (torch.where(dims, x, 0.0).float() for x in (student, teacher))
            sums = torch.zeros_like(student)
            for block in _blocks(N):
                z = sums.new_empty((block.stop - block.start, N))
                _product(student[block], teacher.T, z)
                _bwd_weights[(len(z),)](
                    grad, z, stats, block.start, N, stride_g, 1.0 / temperature, factor, **_row_config(N)
                )
                sums.addmm_(z.T, student[block])
            grad_teacher = sums.to(grad_teacher.dtype)
    return grad_student, grad_teacher
