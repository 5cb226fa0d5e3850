"""Dimension-decoupled unidirectional contrastive loss on a GPU: what is not a matrix product of it.

Over the chosen dimensions z_ij = <s_i, t_j>, for N students and M >= N teachers, the first N of them positives, and
loss_i = log sum_j e^(z_ij/T) - z_ii/T.  torch multiplies the matrices; kernels turn blocks of rows of z into
probabilities in place, so that at most 16 MB of z exist at a time.
With the mean of the negatives weighted by their probabilities, n_i = sum_{j != i} p_ij t_j / (1 - p_ii),

    d s_i = g_i/T (1 - p_ii) (n_i - t_i)
    d t_j = 1/T [sum_{i != j} g_i p_ij s_i - g_j (1 - p_jj) s_j]

The forward pass keeps the directions n_i - t_i, so that the student's gradient is elementwise.
"""

import math

import torch
import triton
import triton.language as tl

from . import MEAN, NONE, Launch, cached_launch, cdiv, next_power_of_2, total, warps

# Rows of the statistics (3, N), float32: the largest z of the negatives, 1/sum_j e^((z_ij - that)/T), and 1 - p_ii.
MAX, INV_SUM, OTHERS = (tl.constexpr(i) for i in range(3))

LOG2E = tl.constexpr(math.log2(math.e))
ELEMENTS = 1 << 22  # of z at a time


@triton.jit
def _negatives(Z, row, col, M, top, scale):
    """Exponentials of a row's negatives, relative to the largest; 0 at the positive."""
    z = tl.load(Z + col, col < M, other=0.0)
    return tl.where((col < M) & (col != row), tl.exp2((z - top) * scale), 0.0)


@triton.jit
def _log1p(x):
    """log(1 + x), exact where x is small."""
    one_more = 1.0 + x
    rounded = one_more - 1.0
    return tl.where(rounded == 0.0, x, tl.log(one_more) * (x / tl.where(rounded == 0.0, 1.0, rounded)))


@triton.jit(do_not_specialize=["begin"])
def _rows(
    Z,  # (rows, M) float32: some rows of z
    WEIGHTS,  # (rows, M), or None
    LOSSES,  # (N,) float32
    STATS,  # (3, N) float32
    begin,  # the first of these rows
    N,
    M,
    inverse_temperature,
    factor,
    BLOCK: tl.constexpr,
):
    """Loss and statistics of a row from its row of z; to WEIGHTS, the coefficients of n_i - t_i in the t_j."""
    row = begin + tl.program_id(0).to(tl.int64)
    Z += tl.program_id(0).to(tl.int64) * M
    scale = inverse_temperature * LOG2E
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, M, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = tl.load(Z + col, col < M, other=float("-inf"))
        tops = tl.maximum(tops, tl.where(col == row, float("-inf"), z))
    top = tl.max(tops, 0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, M, BLOCK):
        sums += _negatives(Z, row, start + tl.arange(0, BLOCK), M, top, scale)
    others = tl.sum(sums, 0)

    gap = (tl.load(Z + row) - top) * inverse_temperature
    every = others + tl.exp(gap)  # infinite where the negatives are negligible
    loss = tl.where(gap >= 0, _log1p(others * tl.exp(-gap)), tl.log(every) - gap)
    tl.store(LOSSES + row, loss * factor)
    tl.store(STATS + MAX * N + row, top)
    tl.store(STATS + INV_SUM * N + row, 1.0 / every)
    tl.store(STATS + OTHERS * N + row, others / every)
    if WEIGHTS is not None:
        WEIGHTS += tl.program_id(0).to(tl.int64) * M
        share = 1.0 / tl.where(others > 0, others, 1.0)
        for start in range(0, M, BLOCK):
            col = start + tl.arange(0, BLOCK)
            weight = tl.where(col == row, -1.0, share * _negatives(Z, row, col, M, top, scale))
            tl.store(WEIGHTS + col, weight.to(WEIGHTS.dtype.element_ty), col < M)


def _product(a, b, out):
    """out = a b in float32, under autocast too, which does not apply to a product with `out`."""
    torch.mm(a, b, out=out) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32, out=out)


def _blocks(N, M):
    """The rows of z in blocks, as slices."""
    rows = max(1, min(N, ELEMENTS // max(M, 1)))
    return [slice(begin, min(begin + rows, N)) for begin in range(0, N, rows)]


def _block_launches(kernel, N, M, **values):
    """For each block of rows its slice and its launch, one program per row."""
    columns = min(4096, next_power_of_2(M))

    def launch(block):
        options = values | dict(begin=block.start, N=N, M=M, BLOCK=columns)
        return Launch(kernel, (block.stop - block.start,), options, num_warps=min(8, warps(columns, 8)))

    return [(block, launch(block)) for block in _blocks(N, M)]


def duc_loss_fwd(student, teacher, dims, temperature, reduction, need_student):
    run = _forward(
        student.get_device(), student.dtype, student.shape, len(teacher), temperature, reduction, need_student
    )
    with torch.cuda.device_of(student):
        return run(student, teacher, dims)


@cached_launch
def _forward(_device, dtype, size, M, temperature, reduction, need_student):
    N, D = size
    factor = 1.0 / N if reduction == MEAN and N else 1.0
    launches = _block_launches(_rows, N, M, inverse_temperature=1 / temperature, factor=factor) if N else ()

    def run(student, teacher, dims):
        losses, stats = (student.new_empty(shape, dtype=torch.float32) for shape in ((N,), (3, N)))
        direction = losses.new_empty((N, D) if need_student else (0,))
        if N == 0:
            empty = losses if reduction == NONE else losses.new_full((), math.nan if reduction == MEAN else 0.0)
            return empty, stats, direction
        student, teacher = torch.where(dims, student, 0.0), torch.where(dims, teacher, 0.0)
        for block, launch in launches:
            z = losses.new_empty((block.stop - block.start, M))
            _product(student[block], teacher.T, z)
            # In float32 the coefficients take the place of z; a 16-bit product needs them in 16 bits.
            weights = z if dtype == torch.float32 else student.new_empty(z.shape)
            launch(z, weights if need_student else None, losses, stats)
            if need_student:
                _product(weights, teacher, direction[block])
        return losses if reduction == NONE else total(losses), stats, direction

    return run


# --- backward ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "stride_g"])
def _bwd_student(
    G,  # (N,), or () with stride_g 0
    DIRECTION,  # (N, D) float32
    STATS,  # (3, N) float32
    DS,  # (N, D)
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
    g *= tl.load(STATS + OTHERS * N + row, row < N, other=0.0)
    at = row[:, None] * D + col[None, :]
    direction = tl.load(DIRECTION + at, mask, other=0.0)
    tl.store(DS + at, (g[:, None] * direction).to(DS.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["begin", "stride_g"])
def _bwd_weights(
    G,  # (N,), or () with stride_g 0
    Z,  # (rows, M) float32: some rows of z
    STATS,  # (3, N) float32
    begin,  # the first of these rows
    N,
    M,
    stride_g,
    inverse_temperature,
    factor,
    BLOCK: tl.constexpr,
):
    """Turns a row of z into the coefficients of its s_i in the teacher's gradients."""
    row = begin + tl.program_id(0).to(tl.int64)
    Z += tl.program_id(0).to(tl.int64) * M
    g = tl.load(G + row * stride_g).to(tl.float32) * factor
    top, inverse_sum = tl.load(STATS + MAX * N + row), tl.load(STATS + INV_SUM * N + row)
    own = -g * tl.load(STATS + OTHERS * N + row)
    for start in range(0, M, BLOCK):
        col = start + tl.arange(0, BLOCK)
        p = _negatives(Z, row, col, M, top, inverse_temperature * LOG2E) * inverse_sum
        tl.store(Z + col, tl.where(col == row, own, g * p), col < M)


def duc_loss_bwd(grad, student, teacher, dims, stats, direction, temperature, reduction, need_student, need_teacher):
    run = _backward(
        student.get_device(), student.dtype, student.shape, len(teacher), grad.dtype,
        grad.stride(0) if grad.dim() else 0, temperature, reduction, (need_student, need_teacher),
    )  # fmt: skip
    with torch.cuda.device_of(student):
        return run(grad, student, teacher, dims, stats, direction)


@cached_launch
def _backward(_device, _dtype, size, M, _grad_dtype, stride_g, temperature, reduction, needs):
    N, D = size
    sizes = [shape if need else (0,) for shape, need in zip((size, (M, D)), needs, strict=True)]
    if N * D == 0:
        return lambda grad, student, *_: tuple([student.new_zeros(size) for size in sizes])
    need_student, need_teacher = needs
    values = dict(stride_g=stride_g, factor=1 / temperature / (N if reduction == MEAN else 1))
    block = min(256, next_power_of_2(D))
    rows = 1024 // block
    by_direction = Launch(
        _bwd_student, (cdiv(N, rows), cdiv(D, block)), values | dict(N=N, D=D, ROWS=rows, BLOCK=block)
    )
    launches = (
        _block_launches(_bwd_weights, N, M, inverse_temperature=1 / temperature, **values) if need_teacher else ()
    )

    def run(grad, student, teacher, dims, stats, direction):
        grad_student, grad_teacher = (student.new_empty(size) for size in sizes)
        if need_student:
            by_direction(grad, direction, stats, grad_student)
        if need_teacher:
            # Coefficients of a mean over many rows are too small for float16, so these products are in float32.
            student, teacher = (torch.where(dims, x, 0.0).float() for x in (student, teacher))
            sums = torch.zeros_like(teacher)
            for block, launch in launches:
                z = sums.new_empty((block.stop - block.start, M))
                _product(student[block], teacher.T, z)
                launch(grad, z, stats)
                sums.addmm_(z.T, student[block])
            grad_teacher = sums.to(grad_teacher.dtype)
        return grad_student, grad_teacher

    return run
