"""CLUB upper bound of mutual information, and the likelihood that fits its q, on a GPU.

With w = exp(-logvar), and per column the mean and the population variance of y, the bound of row i is

    value_i = 1/2 sum_d w [Var(y) + y~ (2 mu~ - y~)]    y~ = y - mean(y), mu~ = mu - mean(y)

because mean_j (y_j - mu_i)^2 = Var(y) + mu~_i^2.  The sum over the rows needs no second reading: it follows from five
column sums, of y, y^2, w, w mu and w y (2 mu - y).  A shift is subtracted from y and mu first, the mean of some rows of
y, which changes no value and keeps the sums small; a single row could be an outlier.  With g_i the gradient of row i's
value:

    d mu     = g w y~
    d logvar = -1/2 g w [Var(y) + y~ (2 mu~ - y~)]
    d y      = g w (mu - y) + y~ mean(g w) - mean(g w mu~)

Column sums are made in two stages, each in a fixed order: programs add up blocks of rows, then one program for a few
columns adds up these parts.  A thread adds up its own rows in float32, all else is float64, because the value is a
small difference of the sums.
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

# Rows of the statistics (5, D), float32; all but the first are of the shifted data.
SHIFT, MEAN_Y, VAR_Y, MEAN_W, MEAN_WMU = (tl.constexpr(i) for i in range(5))
# Rows of a part's column sums (5, D), float64; CROSS is of w y (2 mu - y).
SUM_Y, SUM_YY, SUM_W, SUM_WMU, SUM_CROSS = (tl.constexpr(i) for i in range(5))
SUMS = tl.constexpr(5)

LOG2E = tl.constexpr(1.4426950216293335)  # as a float32
LOG2E_LOW = tl.constexpr(math.log2(math.e) - 1.4426950216293335)
LN2 = tl.constexpr(math.log(2))
MOST = tl.constexpr(1.6516362549940018e38)  # e^88
SCALE = tl.constexpr(256.0)  # w is summed over this: e^88 times some rows overflows

SAMPLES = tl.constexpr(16)  # rows of y whose mean is the shift
PROGRAMS = 1024  # of the first stage: eight for each multiprocessor of an A100 or H100


@triton.jit
def _weight(logvar):
    """exp(-logvar), at most e^88: an infinite weight would make NaN of a residual of 0.

    The hardware's exp2 of logvar times log2(e), corrected for the rounding of that product.  Without the correction a
    digit is lost already at 10.  It lies between -1 and 1, and is NaN for an infinite logvar, then 1: neither matters
    beside 0 or the largest weight.
    """
    exponent = -LOG2E * logvar
    lost = fma(logvar, -LOG2E_LOW, fma(logvar, -LOG2E, -exponent))
    lost = tl.maximum(tl.minimum(lost, 1.0), -1.0)
    return tl.minimum(exp2(exponent) * fma(lost, LN2, 1.0), MOST, tl.PropagateNan.ALL)


@triton.jit
def _load(X, row, stride, V: tl.constexpr, col, mask, other=None):
    """A tile as float32, undefined outside of the mask without `other`; the stride counts V elements."""
    return tl.load(at(X, row, stride, V)[:, None] + col[None, :], mask, other=other).to(tl.float32)


@triton.jit
def _store(X, row, stride, V: tl.constexpr, col, value, mask):
    tl.store(at(X, row, stride, V)[:, None] + col[None, :], value.to(X.dtype.element_ty), mask)


@triton.jit
def _tile(D, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns and mask of this program's tile."""
    row = tile_row(N) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return row, col, (row < N)[:, None] & (col < D)[None, :]


# --- column sums ------------------------------------------------------------------------------------------------


@triton.jit
def _column_sum(tile):
    return tl.sum(tile.to(tl.float64), 0)


@triton.jit
def _shift(Y, col, mask, stride, V: tl.constexpr, N):
    """The mean of evenly spaced rows of y, inside the data in whatever order; exactly y if N is 1."""
    row = tl.arange(0, SAMPLES).to(tl.int64) * N // SAMPLES
    first = tl.load(Y + col, mask, other=0.0).to(tl.float32)
    return first + tl.sum(_load(Y, row, stride, V, col, mask[None, :], 0.0) - first[None, :], 0) / SAMPLES


@triton.jit(do_not_specialize=["N", "g_stride", "rows"])
def _columns(
    G,  # (N,), or None for 1
    MU,  # (N, D)
    LOGVAR,  # (N, D)
    Y,  # (N, D)
    PARTS,  # (parts, 5, D) float64
    STATS,  # (5, D) float32
    DONE,  # () int32: set to 0
    N,
    D,  # in units of V, as the strides are
    mu_stride,
    lv_stride,
    y_stride,
    g_stride,
    rows,  # of a part
    V: tl.constexpr,  # elements per load
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MOMENTS: tl.constexpr,  # whether sums of y and y^2 are wanted
    WEIGHTS: tl.constexpr,  # whether sums of g w and g w mu are
):
    """First stage: the sums of `rows` rows by BLOCK columns, with MOMENTS and WEIGHTS that of w y (2 mu - y) too."""
    part = tl.program_id(1).to(N.dtype)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    shift = _shift(Y, col, col < D * V, y_stride, V, N)
    y0 = shift[None, :]
    sum_y = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_yy = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_w = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_wmu = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_wy = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(part * rows, tl.minimum(part * rows + rows, N), ROWS, num_stages=3):
        row = start + tl.arange(0, ROWS)
        real = row < N
        mask = real[:, None] & (col < D * V)[None, :]
        if MOMENTS:
            y = tl.where(mask, _load(Y, row, y_stride, V, col, mask) - y0, 0.0)
            sum_y += y
            sum_yy += y * y
        if WEIGHTS:
            mu = _load(MU, row, mu_stride, V, col, mask, 0.0) - y0
            w = _weight(_load(LOGVAR, row, lv_stride, V, col, mask, float("inf")))
            if G is not None:
                w *= tl.load(G + row.to(tl.int64) * g_stride, real, other=0.0).to(tl.float32)[:, None]
            w *= 1.0 / SCALE
            sum_w += w
            sum_wmu += w * mu
            if MOMENTS:
                sum_wy += w * (y * (2 * mu - y))
    D *= V
    PARTS += part.to(tl.int64) * (SUMS * D) + col
    if MOMENTS:
        tl.store(PARTS + SUM_Y * D, _column_sum(sum_y), col < D)
        tl.store(PARTS + SUM_YY * D, _column_sum(sum_yy), col < D)
    if WEIGHTS:
        tl.store(PARTS + SUM_W * D, _column_sum(sum_w) * SCALE, col < D)
        tl.store(PARTS + SUM_WMU * D, _column_sum(sum_wmu) * SCALE, col < D)
    if MOMENTS and WEIGHTS:
        tl.store(PARTS + SUM_CROSS * D, _column_sum(sum_wy) * SCALE, col < D)
    if part == 0:
        tl.store(STATS + SHIFT * D + col, shift, col < D)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(DONE, 0)


@triton.jit(do_not_specialize=["N", "D", "parts"])
def _columns_join(
    PARTS,  # (parts, 5, D) float64
    STATS,  # (5, D) float32
    VALUES,  # (tiles,) float64
    DONE,  # () int32: how many programs have ended
    OUT,  # () float32, or None
    N,
    D,
    parts,
    factor,  # of the value
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,  # at least the number of programs
    MOMENTS: tl.constexpr,  # as in `_columns`
    WEIGHTS: tl.constexpr,  # as in `_columns`
):
    """Second stage, BLOCK columns: the statistics; the program that ends last adds up the value over all columns.

    Which one that is does not change the order of the sum.
    """
    tile = tl.program_id(0)
    col = tile * BLOCK + tl.arange(0, BLOCK)
    real = col < D
    sum_y = tl.zeros([STEP, BLOCK], tl.float64)
    sum_yy = tl.zeros([STEP, BLOCK], tl.float64)
    sum_w = tl.zeros([STEP, BLOCK], tl.float64)
    sum_wmu = tl.zeros([STEP, BLOCK], tl.float64)
    sum_wy = tl.zeros([STEP, BLOCK], tl.float64)
    for start in range(0, parts, STEP):
        part = (start + tl.arange(0, STEP)).to(tl.int64)
        mask = (part < parts)[:, None] & real[None, :]
        P = PARTS + part[:, None] * (SUMS * D) + col[None, :]
        if MOMENTS:
            sum_y += tl.load(P + SUM_Y * D, mask, other=0.0)
            sum_yy += tl.load(P + SUM_YY * D, mask, other=0.0)
        if WEIGHTS:
            sum_w += tl.load(P + SUM_W * D, mask, other=0.0)
            sum_wmu += tl.load(P + SUM_WMU * D, mask, other=0.0)
        if MOMENTS and WEIGHTS:
            sum_wy += tl.load(P + SUM_CROSS * D, mask, other=0.0)
    if MOMENTS:
        mean, square = tl.sum(sum_y, 0) / N, tl.sum(sum_yy, 0) / N
        tl.store(STATS + MEAN_Y * D + col, mean.to(tl.float32), real)
        tl.store(STATS + VAR_Y * D + col, (square - mean * mean).to(tl.float32), real)
    if WEIGHTS:
        w, wmu = tl.sum(sum_w, 0), tl.sum(sum_wmu, 0)
        tl.store(STATS + MEAN_W * D + col, (w / N).to(tl.float32), real)
        tl.store(STATS + MEAN_WMU * D + col, (wmu / N).to(tl.float32), real)
    if MOMENTS and WEIGHTS:
        value = 0.5 * (tl.sum(sum_wy, 0) - 2 * mean * wmu + square * w)
        tl.store(VALUES + tile, tl.sum(tl.where(real, value, 0.0), 0))
        tl.debug_barrier()
        if tl.atomic_add(DONE, 1) == tl.num_programs(0) - 1:
            i = tl.arange(0, TILES)
            values = tl.load(VALUES + i, i < tl.num_programs(0), other=0.0, cache_modifier=".cg")
            tl.store(OUT, (tl.sum(values, 0) * factor).to(tl.float32))


@triton.jit(do_not_specialize=["N"])
def _values(
    MU,  # (N, D)
    LOGVAR,  # (N, D)
    Y,  # (N, D)
    STATS,  # (5, D) float32
    OUT,  # (N,) float32
    N,
    D,  # in units of V, as the strides are
    mu_stride,
    lv_stride,
    y_stride,
    V: tl.constexpr,  # elements per load
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The bound of each of ROWS rows."""
    row = tl.program_id(0).to(N.dtype) * ROWS + tl.arange(0, ROWS)
    D *= V
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = (row < N)[:, None] & (col < D)[None, :]
        y0 = tl.load(STATS + SHIFT * D + col, col < D, other=0.0)[None, :]
        mean = tl.load(STATS + MEAN_Y * D + col, col < D, other=0.0)[None, :]
        var = tl.load(STATS + VAR_Y * D + col, col < D, other=0.0)[None, :]
        y = (_load(Y, row, y_stride, V, col, mask, 0.0) - y0) - mean
        mu = (_load(MU, row, mu_stride, V, col, mask, 0.0) - y0) - mean
        acc += _weight(_load(LOGVAR, row, lv_stride, V, col, mask, float("inf"))) * (var + y * (2 * mu - y))
    tl.store(OUT + row, 0.5 * tl.sum(acc, 1), row < N)


class _Shape:
    """Tiles and arguments that the kernels on these three inputs share."""

    def __init__(self, dtype, N, D, mu_stride, lv_stride, y_stride):
        self.N, self.D = N, D
        V = vector(dtype, D, mu_stride, lv_stride, y_stride)
        # A tile is one 16-byte load for each thread of 4 warps, 256 bytes to the row.
        self.block = min(next_power_of_2(D), 256 // dtype.itemsize)
        self.rows = 2048 // dtype.itemsize // self.block
        self.tiles = cdiv(D, self.block)
        self.values = dict(
            N=N,
            D=D // V,
            mu_stride=mu_stride // V,
            lv_stride=lv_stride // V,
            y_stride=y_stride // V,
            V=V,
            ROWS=self.rows,
            BLOCK=self.block,
        )

    def parts(self, tile):
        """Parts of the first stage, and rows of a part: two tiles at least, so that few parts go through memory."""
        wanted = min(cdiv(PROGRAMS, self.tiles), cdiv(self.N, 2 * tile))
        rows = cdiv(cdiv(self.N, wanted), tile) * tile
        return cdiv(self.N, rows), rows


def _column_stats(shape, moments, weights, g_stride=0, factor=1.0):
    """The two stages as a function: it returns the statistics, and writes factor times the sum of all rows to `out`."""
    D, tile = shape.D, shape.rows // 2
    parts, rows = shape.parts(tile)
    # A single warp adds up columns by shuffles; several need shared memory, which takes longer than reading the rows.
    values = shape.values | dict(ROWS=tile, g_stride=g_stride, rows=rows, MOMENTS=moments, WEIGHTS=weights)
    first = Launch(_columns, (shape.tiles, parts), values, num_warps=1)
    # Tiles of 1024: few columns each, so that there are many programs.
    block = min(8, next_power_of_2(D))
    step = min(1024 // block, next_power_of_2(parts))
    tiles = cdiv(D, block)
    values |= dict(D=D, parts=parts, factor=factor, STEP=step, BLOCK=block, TILES=next_power_of_2(tiles))
    second = Launch(_columns_join, (tiles,), values, num_warps=warps(step * block, 4))

    def run(g, mu, logvar, y, out):
        buffer = torch.empty((parts, 5, D), dtype=torch.float64, device=y.device)
        sums = buffer.new_empty(tiles)
        stats = torch.empty((5, D), dtype=torch.float32, device=y.device)
        done = torch.empty((), dtype=torch.int32, device=y.device)
        first(g, mu, logvar, y, buffer, stats, done)
        second(buffer, stats, sums, done, out)
        return stats

    return run


def _key(mu, logvar, y):
    """What a launch depends on in the inputs."""
    return mu.get_device(), mu.dtype, mu.shape, (mu.stride(0), logvar.stride(0), y.stride(0))


def _empty_loss(N, reduction):
    """The loss over no elements: 0, but NaN as the mean of no rows."""
    shape, fill = (N,) if reduction == NONE else (), math.nan if reduction == MEAN and N == 0 else 0.0
    return lambda like: torch.full(shape, fill, dtype=torch.float32, device=like.device)


def club_mi_fwd(mu, logvar, y, classes, reduction):
    if classes is not None:
        return _given_fwd(mu, logvar, y, classes, reduction)
    with torch.cuda.device_of(mu):
        return _mi_forward(*_key(mu, logvar, y), reduction)(mu, logvar, y)


@cached_launch
def _mi_forward(_device, dtype, size, strides, reduction):
    N, D = size
    if N == 0 or D == 0:
        empty = _empty_loss(N, reduction)
        return lambda mu, logvar, y: (empty(mu), mu.new_zeros((5, D), dtype=torch.float32))
    shape = _Shape(dtype, N, D, *strides)
    return _values_of_rows(shape) if reduction == NONE else _sum_of_rows(shape, 1.0 / N if reduction == MEAN else 1.0)


def _sum_of_rows(shape, factor):
    column_stats = _column_stats(shape, moments=True, weights=True, factor=factor)

    def run(mu, logvar, y):
        loss = torch.empty((), dtype=torch.float32, device=mu.device)
        return loss, column_stats(None, mu, logvar, y, loss)

    return run


def _values_of_rows(shape):
    column_stats = _column_stats(shape, moments=True, weights=False)
    width = next_power_of_2(shape.D)
    rows = max(1, 1024 // width)
    values = shape.values | dict(ROWS=rows, BLOCK=min(1024, width))
    launch = Launch(_values, (cdiv(shape.N, rows),), values, num_warps=4)

    def run(mu, logvar, y):
        stats = column_stats(None, mu, logvar, y, None)
        loss = stats.new_empty(shape.N)
        stats[MEAN_W.value :].zero_()
        launch(mu, logvar, y, stats, loss)
        return loss, stats

    return run


# --- elementwise backward ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "g_stride"])
def _mi_bwd(
    G,  # (N,), or () with g_stride 0
    MU,  # (N, D)
    LOGVAR,  # (N, D)
    Y,  # (N, D)
    STATS,  # (5, D) float32
    WEIGHTED,  # (5, D) float32, of which MEAN_W and MEAN_WMU are read: with PER_ROW those of g w
    DMU,  # (N, D), or None
    DLOGVAR,  # (N, D), or None
    DY,  # (N, D), or None
    N,
    D,  # in units of V, as the strides are
    mu_stride,
    lv_stride,
    y_stride,
    g_stride,
    factor,
    V: tl.constexpr,  # elements per load
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_ROW: tl.constexpr,  # whether G has a gradient for each row
):
    """ROWS rows by BLOCK columns."""
    row, col, mask = _tile(D * V, N, ROWS, BLOCK)
    real = col < D * V
    size = D * V
    g = tl.load(G + row.to(tl.int64) * g_stride, row < N).to(tl.float32)[:, None] * factor
    y0 = tl.load(STATS + SHIFT * size + col, real)[None, :]
    y = _load(Y, row, y_stride, V, col, mask)
    w = _weight(_load(LOGVAR, row, lv_stride, V, col, mask))
    if DMU is not None or DLOGVAR is not None:
        mean = tl.load(STATS + MEAN_Y * size + col, real)[None, :]
        centred = (y - y0) - mean
    if DMU is not None:
        _store(DMU, row, D, V, col, g * w * centred, mask)
    if DLOGVAR is not None or DY is not None:
        mu = _load(MU, row, mu_stride, V, col, mask)
    if DLOGVAR is not None:
        var = tl.load(STATS + VAR_Y * size + col, real)[None, :]
        value = w * (var + centred * (2 * ((mu - y0) - mean) - centred))
        _store(DLOGVAR, row, D, V, col, -0.5 * g * value, mask)
    if DY is not None:
        mean_w = tl.load(WEIGHTED + MEAN_W * size + col, real)[None, :]
        mean_wmu = tl.load(WEIGHTED + MEAN_WMU * size + col, real)[None, :]
        others = (y - y0) * mean_w - mean_wmu
        dy = g * w * (mu - y) + others if PER_ROW else g * (w * (mu - y) + others)
        _store(DY, row, D, V, col, dy, mask)


def club_mi_bwd(grad, mu, logvar, y, classes, stats, reduction, need_mu, need_logvar, need_y):
    per_row, needs = reduction == NONE, (need_mu, need_logvar, need_y)
    if classes is not None:
        run = _given_backward(*_key(mu, logvar, y), grad.dtype, grad.stride(0) if per_row else 0, reduction, needs)
        with torch.cuda.device_of(mu):
            return run(grad, mu, logvar, y, classes)
    run = _mi_backward(*_key(mu, logvar, y), grad.dtype, grad.stride(0) if per_row else 0, reduction, needs)
    with torch.cuda.device_of(mu):
        return run(grad, mu, logvar, y, stats)


@cached_launch
def _mi_backward(_device, dtype, size, strides, _grad_dtype, g_stride, reduction, needs):
    N, D = size
    allocate = gradients(size, needs)
    if N * D == 0 or not any(needs):
        return lambda grad, mu, logvar, y, stats: allocate(mu)
    if N == 1:  # its only negative is itself: 0 by definition, where the formula leaves rounding errors
        return lambda grad, mu, logvar, y, stats: tuple(g.zero_() for g in allocate(mu))
    shape = _Shape(dtype, N, D, *strides)
    per_row, factor = reduction == NONE, 1.0 / N if reduction == MEAN else 1.0
    launch = _elementwise(_mi_bwd, shape, g_stride=g_stride, factor=factor, PER_ROW=per_row)
    column_stats = (
        _column_stats(shape, moments=False, weights=True, g_stride=g_stride) if per_row and needs[2] else None
    )

    def run(grad, mu, logvar, y, stats):
        grads = allocate(mu)
        weighted = column_stats(grad, mu, logvar, y, None) if per_row and needs[2] else stats
        launch(grad, mu, logvar, y, stats, weighted, *wanted(grads, needs))
        return grads

    return run


def _elementwise(kernel, shape, **values):
    rows = 2 * shape.rows  # two 16-byte loads of each input a thread
    grid = tile_grid(cdiv(shape.N, rows), shape.tiles)
    return Launch(kernel, grid, shape.values | values | dict(ROWS=rows), num_warps=4)


# --- given classes ----------------------------------------------------------------------------------------------
# value_i and the gradients as above over the rows of each class, times n/(n - 1), since a row is not its own negative.
#
# CLASSES, `reference.club_classes`: rows sorted by class, and their count; class of each row, and the count of classes;
# where classes begin.  A program does BLOCK columns of one class after the other, so nothing depends on the number of
# classes, which the host does not know; the shape decides how many programs share them.  The backward pass makes its
# statistics itself: its second reading of a class comes from the caches.


@triton.jit
def _rows_of_class(CLASSES, start, end, col, D, ROWS: tl.constexpr):
    """The next ROWS rows of a class that ends at `end`, and their mask."""
    i = start + tl.arange(0, ROWS)
    return tl.load(CLASSES + i, i < end, other=0), (i < end)[:, None] & (col < D)[None, :]


@triton.jit
def _class_stats(
    G, MU, LOGVAR, Y, CLASSES, begin, end, col, D, mu_stride, lv_stride, y_stride, g_stride,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The shift, the mean and variance of y, and with WEIGHTS the means of g w and g w mu, of one class: (1, BLOCK)."""
    n = end - begin
    sample = tl.load(CLASSES + begin + tl.arange(0, SAMPLES) * n // SAMPLES)
    shift = tl.sum(_load(Y, sample, y_stride, V, col, (col < D)[None, :], 0.0), 0)[None, :] / SAMPLES
    sum_y = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_yy = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_w = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_wmu = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(begin, end, ROWS, num_stages=3):
        row, mask = _rows_of_class(CLASSES, start, end, col, D, ROWS)
        y = tl.where(mask, _load(Y, row, y_stride, V, col, mask) - shift, 0.0)
        sum_y += y
        sum_yy += y * y
        if WEIGHTS:
            w = _weight(_load(LOGVAR, row, lv_stride, V, col, mask, float("inf")))
            w *= tl.load(G + row * g_stride).to(tl.float32)[:, None]
            w *= 1.0 / SCALE
            sum_w += w
            sum_wmu += w * (_load(MU, row, mu_stride, V, col, mask, 0.0) - shift)
    share = 1.0 / n.to(tl.float64)
    mean = _column_sum(sum_y) * share
    var = _column_sum(sum_yy) * share - mean * mean
    mean_w, mean_wmu = _column_sum(sum_w) * (SCALE * share), _column_sum(sum_wmu) * (SCALE * share)
    return (
        shift,
        mean.to(tl.float32)[None, :],
        var.to(tl.float32)[None, :],
        mean_w.to(tl.float32)[None, :],
        mean_wmu.to(tl.float32)[None, :],
    )


@triton.jit(do_not_specialize=["N"])
def _given_values(
    MU,  # (N, D)
    LOGVAR,  # (N, D)
    Y,  # (N, D)
    CLASSES,  # (3, N + 1) int64
    OUT,  # (tiles, N) float32 with PER_ROW, else (programs,) float64
    N,
    D,  # in units of V, as the strides are
    mu_stride,
    lv_stride,
    y_stride,
    V: tl.constexpr,  # elements per load
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_ROW: tl.constexpr,  # whether values of rows are wanted, or their sum
):
    """BLOCK columns' share of each row's value, or of the sum over the classes of this program."""
    D *= V
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(0).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    BEGIN = CLASSES + 2 * (N.to(tl.int64) + 1)
    for k in range(tl.program_id(1).to(tl.int64), tl.load(BEGIN - 1), tl.num_programs(1)):
        begin, end = tl.load(BEGIN + k), tl.load(BEGIN + k + 1)
        n = end - begin
        if n > 1:
            shift, mean, var, _, _ = _class_stats(
                None, MU, LOGVAR, Y, CLASSES, begin, end, col, D, mu_stride, lv_stride, y_stride, 0,
                V, ROWS, BLOCK, WEIGHTS=False,
            )  # fmt: skip
            half = 0.5 * n.to(tl.float32) / (n - 1).to(tl.float32)
            for start in tl.range(begin, end, ROWS, num_stages=3):
                row, mask = _rows_of_class(CLASSES, start, end, col, D, ROWS)
                y = (_load(Y, row, y_stride, V, col, mask, 0.0) - shift) - mean
                mu = (_load(MU, row, mu_stride, V, col, mask, 0.0) - shift) - mean
                w = _weight(_load(LOGVAR, row, lv_stride, V, col, mask, float("inf")))
                value = half * (w * (var + y * (2 * mu - y)))
                if PER_ROW:
                    tl.store(OUT + part * N + row, tl.sum(value, 1), start + tl.arange(0, ROWS) < end)
                else:
                    total += value
    if not PER_ROW:
        tl.store(OUT + part * tl.num_programs(1) + tl.program_id(1), tl.sum(_column_sum(total), 0))


@triton.jit(do_not_specialize=["N", "parts"])
def _given_total(
    PARTS,  # (parts,) float64
    CLASSES,  # (3, N + 1) int64
    OUT,  # () float32
    N,
    parts,
    BLOCK: tl.constexpr,  # at least `parts`
    MEAN: tl.constexpr,  # whether the sum is divided by the rows in a class
):
    """The sum over the programs of `_given_values`, or the mean."""
    i = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(PARTS + i, i < parts, other=0.0), 0)
    if MEAN:
        total /= tl.maximum(tl.load(CLASSES + N), 1).to(tl.float64)
    tl.store(OUT, total.to(tl.float32))


def _given_shape(dtype, size, strides):
    """The shape with tiles for one warp each, as in the first stage, and the grid.

    The tiles are narrow, 128 bytes to the row, so that few classes too make many programs.
    """
    shape = _Shape(dtype, *size, *strides)
    block = min(shape.block, 128 // dtype.itemsize)
    shape.values |= dict(ROWS=256 // block, BLOCK=block)
    tiles = cdiv(shape.D, block)
    return shape, (tiles, max(1, min(shape.N // 2, cdiv(2 * PROGRAMS, tiles))))


def _given_fwd(mu, logvar, y, classes, reduction):
    with torch.cuda.device_of(mu):
        loss = _given_forward(*_key(mu, logvar, y), reduction)(mu, logvar, y, classes)
    return loss, mu.new_empty((0, 5, mu.shape[1]), dtype=torch.float32)


@cached_launch
def _given_forward(_device, dtype, size, strides, reduction):
    N, D = size
    if N * D == 0:
        shape = (N,) if reduction == NONE else ()
        return lambda mu, logvar, y, classes: mu.new_zeros(shape, dtype=torch.float32)
    shape, grid = _given_shape(dtype, size, strides)
    options = shape.values | dict(PER_ROW=reduction == NONE)
    launch = Launch(_given_values, grid, options, num_warps=1)
    if reduction == NONE:

        def values(mu, logvar, y, classes):
            parts = mu.new_zeros((grid[0], N), dtype=torch.float32)  # rows without negatives stay 0
            launch(mu, logvar, y, classes, parts)
            return parts.sum(0)

        return values
    parts = math.prod(grid)
    block = next_power_of_2(parts)
    join = Launch(
        _given_total, (1,), dict(N=N, parts=parts, BLOCK=block, MEAN=reduction == MEAN), num_warps=warps(block, 8)
    )

    def run(mu, logvar, y, classes):
        sums = torch.empty((parts,), dtype=torch.float64, device=mu.device)
        loss = torch.empty((), dtype=torch.float32, device=mu.device)
        launch(mu, logvar, y, classes, sums)
        join(sums, classes, loss)
        return loss

    return run


@triton.jit(do_not_specialize=["N", "g_stride"])
def _given_bwd(
    G,  # (N,), or () with g_stride 0
    MU,  # (N, D)
    LOGVAR,  # (N, D)
    Y,  # (N, D)
    CLASSES,  # (3, N + 1) int64
    DMU,  # (N, D), or None
    DLOGVAR,  # (N, D), or None
    DY,  # (N, D), or None
    N,
    D,  # in units of V, as the strides are
    mu_stride,
    lv_stride,
    y_stride,
    g_stride,
    V: tl.constexpr,  # elements per load
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MEAN: tl.constexpr,  # as in `_given_total`
):
    """BLOCK columns of the gradients, in the rows that have negatives."""
    size = D * V
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    BEGIN = CLASSES + 2 * (N.to(tl.int64) + 1)
    for k in range(tl.program_id(1).to(tl.int64), tl.load(BEGIN - 1), tl.num_programs(1)):
        begin, end = tl.load(BEGIN + k), tl.load(BEGIN + k + 1)
        n = end - begin
        if n > 1:
            shift, mean, var, mean_w, mean_wmu = _class_stats(
                G, MU, LOGVAR, Y, CLASSES, begin, end, col, size, mu_stride, lv_stride, y_stride, g_stride,
                V, ROWS, BLOCK, WEIGHTS=DY is not None,
            )  # fmt: skip
            factor = n.to(tl.float32) / (n - 1).to(tl.float32)
            if MEAN:
                factor /= tl.load(CLASSES + N).to(tl.float32)
            for start in tl.range(begin, end, ROWS, num_stages=3):
                row, mask = _rows_of_class(CLASSES, start, end, col, size, ROWS)
                y = _load(Y, row, y_stride, V, col, mask) - shift
                gw = tl.load(G + row * g_stride).to(tl.float32)[:, None] * factor
                gw *= _weight(_load(LOGVAR, row, lv_stride, V, col, mask))
                if DMU is not None:
                    _store(DMU, row, D, V, col, gw * (y - mean), mask)
                if DLOGVAR is not None or DY is not None:
                    mu = _load(MU, row, mu_stride, V, col, mask) - shift
                if DLOGVAR is not None:
                    value = var + (y - mean) * (2 * (mu - mean) - (y - mean))
                    _store(DLOGVAR, row, D, V, col, -0.5 * gw * value, mask)
                if DY is not None:
                    _store(DY, row, D, V, col, gw * (mu - y) + factor * (y * mean_w - mean_wmu), mask)


@cached_launch
def _given_backward(_device, dtype, size, strides, _grad_dtype, g_stride, reduction, needs):
    allocate = gradients(size, needs)
    if 0 in size or not any(needs):
        return lambda grad, mu, logvar, y, classes: allocate(mu)
    shape, grid = _given_shape(dtype, size, strides)
    values = shape.values | dict(g_stride=g_stride, MEAN=reduction == MEAN)
    # With no limit, ptxas spills a few bytes where this makes room for one more program.
    launch = Launch(_given_bwd, grid, values, num_warps=1, maxnreg=255)

    def run(grad, mu, logvar, y, classes):
        grads = tuple(g.zero_() for g in allocate(mu))  # rows without negatives stay 0
        launch(grad, mu, logvar, y, classes, *wanted(grads, needs))
        return grads

    return run


# --- likelihood -------------------------------------------------------------------------------------------------
# loss = mean_i sum_d (y - mu)^2 w + logvar;  d y = -d mu = 2 g/N (y - mu) w,  d logvar = g/N (1 - (y - mu)^2 w)


@triton.jit(do_not_specialize=["N", "rows"])
def _nll_fwd(
    MU,  # (N, D)
    LOGVAR,  # (N, D)
    Y,  # (N, D)
    WEIGHT,  # (N,) float32, or None
    OUT,  # (programs,) float32
    N,
    D,  # in units of V, as the strides are
    mu_stride,
    lv_stride,
    y_stride,
    rows,  # of a part
    factor,  # 1 / N, or 1 with WEIGHT
    V: tl.constexpr,  # elements per load
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The part of the loss in `rows` rows by BLOCK columns."""
    part = tl.program_id(1).to(N.dtype)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(part * rows, tl.minimum(part * rows + rows, N), ROWS, num_stages=3):
        row = start + tl.arange(0, ROWS)
        real = row < N
        if WEIGHT is not None:
            weight = tl.load(WEIGHT + row, real, other=0.0)
            real = weight != 0  # others are not read
        mask = real[:, None] & (col < D * V)[None, :]
        r = _load(Y, row, y_stride, V, col, mask, 0.0) - _load(MU, row, mu_stride, V, col, mask, 0.0)
        logvar = _load(LOGVAR, row, lv_stride, V, col, mask, 0.0)
        if WEIGHT is not None:
            acc += weight[:, None] * (r * r * _weight(logvar) + logvar)
        else:
            acc += r * r * _weight(logvar) + logvar
    tl.store(OUT + part * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(acc, 1), 0) * factor)


def club_nll_fwd(mu, logvar, y, weight):
    with torch.cuda.device_of(mu):
        return _nll_forward(*_key(mu, logvar, y), weight is not None)(mu, logvar, y, weight)


@cached_launch
def _nll_forward(_device, dtype, size, strides, weighted):
    N, D = size
    if N == 0 or D == 0:
        empty = _empty_loss(N, reduction=MEAN)
        return lambda mu, logvar, y, weight: empty(mu)
    shape = _Shape(dtype, N, D, *strides)
    parts, rows = shape.parts(shape.rows)
    programs = shape.tiles * parts
    values = shape.values | dict(rows=rows, factor=1.0 if weighted else 1.0 / N)
    launch = Launch(_nll_fwd, (shape.tiles, parts), values, num_warps=4)

    def run(mu, logvar, y, weight):
        shares = torch.empty((programs,), dtype=torch.float32, device=mu.device)
        launch(mu, logvar, y, weight, shares)
        return shares.view(()) if programs == 1 else total(shares)

    return run


@triton.jit(do_not_specialize=["N"])
def _nll_bwd(
    G,  # ()
    MU,  # (N, D)
    LOGVAR,  # (N, D)
    Y,  # (N, D)
    WEIGHT,  # (N,) float32, or None
    DMU,  # (N, D), or None
    DLOGVAR,  # (N, D), or None
    DY,  # (N, D), or None
    N,
    D,  # in units of V, as the strides are
    mu_stride,
    lv_stride,
    y_stride,
    factor,  # 1 / N, or 1 with WEIGHT
    V: tl.constexpr,  # elements per load
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows by BLOCK columns."""
    row, col, mask = _tile(D * V, N, ROWS, BLOCK)
    g = tl.load(G).to(tl.float32) * factor
    read = mask
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + row, row < N, other=0.0)
        read = (weight != 0)[:, None] & mask  # others are not read, and have gradient 0
        g *= weight[:, None]
    r = _load(Y, row, y_stride, V, col, read, 0.0) - _load(MU, row, mu_stride, V, col, read, 0.0)
    rw = r * _weight(_load(LOGVAR, row, lv_stride, V, col, read, 0.0))
    if DMU is not None:
        _store(DMU, row, D, V, col, -2 * g * rw, mask)
    if DLOGVAR is not None:
        _store(DLOGVAR, row, D, V, col, g * (1 - r * rw), mask)
    if DY is not None:
        _store(DY, row, D, V, col, 2 * g * rw, mask)


def club_nll_bwd(grad, mu, logvar, y, weight, need_mu, need_logvar, need_y):
    needs = need_mu, need_logvar, need_y
    run = _nll_backward(*_key(mu, logvar, y), grad.dtype, weight is not None, needs)
    with torch.cuda.device_of(mu):
        return run(grad, mu, logvar, y, weight)


@cached_launch
def _nll_backward(_device, dtype, size, strides, _grad_dtype, weighted, needs):
    allocate = gradients(size, needs)
    if 0 in size or not any(needs):
        return lambda grad, mu, logvar, y, weight: allocate(mu)
    shape = _Shape(dtype, *size, *strides)
    launch = _elementwise(_nll_bwd, shape, factor=1.0 if weighted else 1.0 / shape.N)

    def run(grad, mu, logvar, y, weight):
        grads = allocate(mu)
        launch(grad, mu, logvar, y, weight, *wanted(grads, needs))
        return grads

    return run
