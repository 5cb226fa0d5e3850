"""CLUB upper bound of mutual information, and the likelihood that fits its q, on a GPU.

With w = exp(-logvar), and per column the mean and the population variance of y, the bound of row i is

    value_i = 1/2 sum_d w [Var(y) + y~ (2 mu~ - y~)]    y~ = y - mean(y), mu~ = mu - mean(y)

because mean_j (y_j - mu_i)^2 = Var(y) + mu~_i^2.  Summed over the rows it needs no second reading: five column sums
do, of y, y^2, w, w mu and w y (2 mu - y).  They are of y and mu less a shift, the mean of some rows of y, which
changes no value and keeps the sums small; a single row could be an outlier.  With the upstream gradient g_i of row i:

    d mu     = g w y~
    d logvar = -1/2 g w [Var(y) + y~ (2 mu~ - y~)]
    d y      = g w (mu - y) + y~ mean(g w) - mean(g w mu~)

Column sums go in two stages of fixed order: programs add up blocks of rows, then one program per few columns adds
those parts.  A thread adds up its own rows in float32, everything above that is float64: the value is a small
difference of the sums.

stats: (5, D) float32: shift, mean(y - shift), Var(y), mean(w), mean(w (mu - shift)).
"""

import math

import torch
import triton
import triton.language as tl

from . import (
    Launch,
    at,
    cdiv,
    exp2,
    fma,
    gradients,
    next_power_of_2,
    plan,
    tile_grid,
    tile_row,
    total,
    vector,
    wanted,
    warps,
)

LOG2E = tl.constexpr(1.4426950216293335)  # as a float32
LOG2E_LOW = tl.constexpr(math.log2(math.e) - 1.4426950216293335)
LN2 = tl.constexpr(math.log(2))

SAMPLES = tl.constexpr(16)  # rows of y whose mean is the shift
PROGRAMS = 1024  # of a first stage: eight for each multiprocessor of an A100 or H100


@triton.jit
def _weight(logvar):
    """exp(-logvar), from the hardware's exp2 of the product with log2(e) and from what that product lost: a digit
    already at 10.  An infinite logvar loses NaN, which becomes 1 and does not matter beside 0 or inf.
    """
    exponent = -LOG2E * logvar
    lost = fma(logvar, -LOG2E_LOW, fma(logvar, -LOG2E, -exponent))
    return exp2(exponent) * fma(tl.minimum(lost, 1.0), LN2, 1.0)


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
    """The mean of rows spread over y, near the middle of the data whatever its order; exactly y where N is 1."""
    row = tl.arange(0, SAMPLES).to(tl.int64) * N // SAMPLES
    first = tl.load(Y + col, mask, other=0.0).to(tl.float32)
    return first + tl.sum(_load(Y, row, stride, V, col, mask[None, :], 0.0) - first[None, :], 0) / SAMPLES


@triton.jit(do_not_specialize=["N", "g_stride", "rows"])
def _columns(
    G, MU, LOGVAR, Y, PARTS, STATS, DONE,
    N, D, mu_stride, lv_stride, y_stride, g_stride, rows,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """First stage, `rows` rows by BLOCK columns.  PARTS: (parts, 5, D).  D and strides in units of V elements.

    MOMENTS: sums of y and y^2.  WEIGHTS: of g w and g w mu.  Both: also of w y (2 mu - y).
    """
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
            sum_w += w
            sum_wmu += w * mu
            if MOMENTS:
                sum_wy += w * (y * (2 * mu - y))
    D *= V
    PARTS += part.to(tl.int64) * (5 * D) + col
    if MOMENTS:
        tl.store(PARTS, _column_sum(sum_y), col < D)
        tl.store(PARTS + D, _column_sum(sum_yy), col < D)
    if WEIGHTS:
        tl.store(PARTS + 2 * D, _column_sum(sum_w), col < D)
        tl.store(PARTS + 3 * D, _column_sum(sum_wmu), col < D)
    if MOMENTS and WEIGHTS:
        tl.store(PARTS + 4 * D, _column_sum(sum_wy), col < D)
    if part == 0:
        tl.store(STATS + col, shift, col < D)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(DONE, 0)


@triton.jit(do_not_specialize=["N", "D", "parts"])
def _columns_join(
    PARTS, STATS, VALUES, DONE, OUT,
    N, D, parts, factor,
    STEP: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Second stage, BLOCK columns: the stats, and of the value the sum over all columns by the program that ends last.

    DONE counts the programs that have ended; the first stage set it to 0.  The order of the sum does not depend on it.
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
        P = PARTS + part[:, None] * (5 * D) + col[None, :]
        if MOMENTS:
            sum_y += tl.load(P, mask, other=0.0)
            sum_yy += tl.load(P + D, mask, other=0.0)
        if WEIGHTS:
            sum_w += tl.load(P + 2 * D, mask, other=0.0)
            sum_wmu += tl.load(P + 3 * D, mask, other=0.0)
        if MOMENTS and WEIGHTS:
            sum_wy += tl.load(P + 4 * D, mask, other=0.0)
    if MOMENTS:
        mean, square = tl.sum(sum_y, 0) / N, tl.sum(sum_yy, 0) / N
        tl.store(STATS + D + col, mean.to(tl.float32), real)
        tl.store(STATS + 2 * D + col, (square - mean * mean).to(tl.float32), real)
    if WEIGHTS:
        w, wmu = tl.sum(sum_w, 0), tl.sum(sum_wmu, 0)
        tl.store(STATS + 3 * D + col, (w / N).to(tl.float32), real)
        tl.store(STATS + 4 * D + col, (wmu / N).to(tl.float32), real)
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
    MU, LOGVAR, Y, STATS, OUT,
    N, D, mu_stride, lv_stride, y_stride,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bound of each of ROWS rows."""
    row = tl.program_id(0).to(N.dtype) * ROWS + tl.arange(0, ROWS)
    D *= V
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = (row < N)[:, None] & (col < D)[None, :]
        y0 = tl.load(STATS + col, col < D, other=0.0)[None, :]
        mean = tl.load(STATS + D + col, col < D, other=0.0)[None, :]
        var = tl.load(STATS + 2 * D + col, col < D, other=0.0)[None, :]
        y = (_load(Y, row, y_stride, V, col, mask, 0.0) - y0) - mean
        mu = (_load(MU, row, mu_stride, V, col, mask, 0.0) - y0) - mean
        acc += _weight(_load(LOGVAR, row, lv_stride, V, col, mask, float("inf"))) * (var + y * (2 * mu - y))
    tl.store(OUT + row, 0.5 * tl.sum(acc, 1), row < N)


class _Shape:
    """What the plans of these three inputs share."""

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
        """Parts of a first stage and rows of a part: two tiles at least, so that few parts go through memory."""
        wanted = min(cdiv(PROGRAMS, self.tiles), cdiv(self.N, 2 * tile))
        rows = cdiv(cdiv(self.N, wanted), tile) * tile
        return cdiv(self.N, rows), rows


def _column_stats(shape, moments, weights, g_stride=0, factor=1.0):
    """The two stages as a function: returns stats (5, D), and writes factor times the sum of all rows into `out`."""
    D, tile = shape.D, shape.rows // 2
    parts, rows = shape.parts(tile)
    # A warp on its own adds up columns by shuffles; several need shared memory, and that takes longer than the rows.
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
    """Everything of the inputs that a plan depends on."""
    return mu.get_device(), mu.dtype, mu.shape, (mu.stride(0), logvar.stride(0), y.stride(0))


def _empty_loss(N, reduction):
    """The loss over no elements: 0, but NaN as the mean of no rows."""
    shape, fill = (N,) if reduction == 0 else (), math.nan if reduction == 2 and N == 0 else 0.0
    return lambda like: torch.full(shape, fill, dtype=torch.float32, device=like.device)


def club_mi_fwd(mu, logvar, y, classes, reduction):
    if classes is not None:
        return _given_fwd(mu, logvar, y, classes, reduction)
    with torch.cuda.device_of(mu):
        return _mi_fwd_plan(*_key(mu, logvar, y), reduction)(mu, logvar, y)


@plan
def _mi_fwd_plan(device, dtype, size, strides, reduction):
    N, D = size
    if N == 0 or D == 0:
        empty = _empty_loss(N, reduction)
        return lambda mu, logvar, y: (empty(mu), mu.new_zeros((5, D), dtype=torch.float32))
    shape = _Shape(dtype, N, D, *strides)
    return _values_of_rows(shape) if reduction == 0 else _sum_of_rows(shape, 1.0 / N if reduction == 2 else 1.0)


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
        stats[3:].zero_()
        launch(mu, logvar, y, stats, loss)
        return loss, stats

    return run


# --- elementwise backward ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "g_stride"])
def _mi_bwd(
    G, MU, LOGVAR, Y, STATS, WEIGHTED, DMU, DLOGVAR, DY,
    N, D, mu_stride, lv_stride, y_stride, g_stride, factor,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """WEIGHTED: stats whose last rows hold mean(g w) and mean(g w (mu - shift)); without PER_ROW, those of g = 1."""
    row, col, mask = _tile(D * V, N, ROWS, BLOCK)
    real = col < D * V
    size = D * V
    g = tl.load(G + row.to(tl.int64) * g_stride, row < N).to(tl.float32)[:, None] * factor
    y0 = tl.load(STATS + col, real)[None, :]
    y = _load(Y, row, y_stride, V, col, mask)
    w = _weight(_load(LOGVAR, row, lv_stride, V, col, mask))
    if DMU is not None or DLOGVAR is not None:
        mean = tl.load(STATS + size + col, real)[None, :]
        centred = (y - y0) - mean
    if DMU is not None:
        _store(DMU, row, D, V, col, g * w * centred, mask)
    if DLOGVAR is not None or DY is not None:
        mu = _load(MU, row, mu_stride, V, col, mask)
    if DLOGVAR is not None:
        var = tl.load(STATS + 2 * size + col, real)[None, :]
        value = w * (var + centred * (2 * ((mu - y0) - mean) - centred))
        _store(DLOGVAR, row, D, V, col, -0.5 * g * value, mask)
    if DY is not None:
        mean_w = tl.load(WEIGHTED + 3 * size + col, real)[None, :]
        mean_wmu = tl.load(WEIGHTED + 4 * size + col, real)[None, :]
        others = (y - y0) * mean_w - mean_wmu
        dy = g * w * (mu - y) + others if PER_ROW else g * (w * (mu - y) + others)
        _store(DY, row, D, V, col, dy, mask)


def club_mi_bwd(grad, mu, logvar, y, classes, stats, reduction, need_mu, need_logvar, need_y):
    per_row, needs = reduction == 0, (need_mu, need_logvar, need_y)
    if classes is not None:
        run = _given_bwd_plan(*_key(mu, logvar, y), grad.dtype, grad.stride(0) if per_row else 0, reduction, needs)
        with torch.cuda.device_of(mu):
            return run(grad, mu, logvar, y, classes)
    run = _mi_bwd_plan(*_key(mu, logvar, y), grad.dtype, grad.stride(0) if per_row else 0, reduction, needs)
    with torch.cuda.device_of(mu):
        return run(grad, mu, logvar, y, stats)


@plan
def _mi_bwd_plan(device, dtype, size, strides, grad_dtype, g_stride, reduction, needs):
    N, D = size
    allocate = gradients(size, needs)
    if N * D == 0 or not any(needs):
        return lambda grad, mu, logvar, y, stats: allocate(mu)
    if N == 1:  # no negative but the positive: 0 by definition, where the formula would leave rounding errors
        return lambda grad, mu, logvar, y, stats: tuple(g.zero_() for g in allocate(mu))
    shape = _Shape(dtype, N, D, *strides)
    per_row, factor = reduction == 0, 1.0 / N if reduction == 2 else 1.0
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
# CLASSES: (3, N + 1) int64, `reference.club_classes`: rows sorted by class, their count; class of each row, the count
# of classes; where classes begin.  A program does BLOCK columns of one class after the other, so nothing depends on the
# number of classes, which the host does not know; how many programs share them follows from the shape.  Nothing is
# kept for the backward pass, whose second reading of a class comes from the caches.


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
            sum_w += w
            sum_wmu += w * (_load(MU, row, mu_stride, V, col, mask, 0.0) - shift)
    share = 1.0 / n.to(tl.float64)
    mean = _column_sum(sum_y) * share
    var = _column_sum(sum_yy) * share - mean * mean
    mean_w, mean_wmu = _column_sum(sum_w) * share, _column_sum(sum_wmu) * share
    return (
        shift,
        mean.to(tl.float32)[None, :],
        var.to(tl.float32)[None, :],
        mean_w.to(tl.float32)[None, :],
        mean_wmu.to(tl.float32)[None, :],
    )


@triton.jit(do_not_specialize=["N"])
def _given_values(
    MU, LOGVAR, Y, CLASSES, OUT,
    N, D, mu_stride, lv_stride, y_stride,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """BLOCK columns' share of each row's value, OUT (tiles, N), or of the sum over the classes done here."""
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
def _given_total(PARTS, CLASSES, OUT, N, parts, BLOCK: tl.constexpr, MEAN: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(PARTS + i, i < parts, other=0.0), 0)
    if MEAN:
        total /= tl.maximum(tl.load(CLASSES + N), 1).to(tl.float64)
    tl.store(OUT, total.to(tl.float32))


def _given_shape(dtype, size, strides):
    """Sizes of the tiles, one warp's each as in the first stage, and the grid.

    They are narrow, 128 bytes to the row, so that there are many programs for few classes too.
    """
    shape = _Shape(dtype, *size, *strides)
    block = min(shape.block, 128 // dtype.itemsize)
    shape.values |= dict(ROWS=256 // block, BLOCK=block)
    tiles = cdiv(shape.D, block)
    return shape, (tiles, max(1, min(shape.N // 2, cdiv(2 * PROGRAMS, tiles))))


def _given_fwd(mu, logvar, y, classes, reduction):
    with torch.cuda.device_of(mu):
        loss = _given_fwd_plan(*_key(mu, logvar, y), reduction)(mu, logvar, y, classes)
    return loss, mu.new_empty((0, 5, mu.shape[1]), dtype=torch.float32)


@plan
def _given_fwd_plan(device, dtype, size, strides, reduction):
    N, D = size
    if N * D == 0:
        shape = (N,) if reduction == 0 else ()
        return lambda mu, logvar, y, classes: mu.new_zeros(shape, dtype=torch.float32)
    shape, grid = _given_shape(dtype, size, strides)
    options = shape.values | dict(PER_ROW=reduction == 0)
    launch = Launch(_given_values, grid, options, num_warps=1)
    if reduction == 0:

        def values(mu, logvar, y, classes):
            parts = mu.new_zeros((grid[0], N), dtype=torch.float32)  # rows without negatives stay 0
            launch(mu, logvar, y, classes, parts)
            return parts.sum(0)

        return values
    parts = math.prod(grid)
    block = next_power_of_2(parts)
    join = Launch(
        _given_total, (1,), dict(N=N, parts=parts, BLOCK=block, MEAN=reduction == 2), num_warps=warps(block, 8)
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
    G, MU, LOGVAR, Y, CLASSES, DMU, DLOGVAR, DY,
    N, D, mu_stride, lv_stride, y_stride, g_stride,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of the gradients in the rows that have negatives."""
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


@plan
def _given_bwd_plan(device, dtype, size, strides, grad_dtype, g_stride, reduction, needs):
    allocate = gradients(size, needs)
    if 0 in size or not any(needs):
        return lambda grad, mu, logvar, y, classes: allocate(mu)
    shape, grid = _given_shape(dtype, size, strides)
    launch = Launch(_given_bwd, grid, shape.values | dict(g_stride=g_stride, MEAN=reduction == 2), num_warps=1)

    def run(grad, mu, logvar, y, classes):
        grads = tuple(g.zero_() for g in allocate(mu))  # rows without negatives stay 0
        launch(grad, mu, logvar, y, classes, *wanted(grads, needs))
        return grads

    return run


# --- likelihood -------------------------------------------------------------------------------------------------
# loss = mean_i sum_d (y - mu)^2 w + logvar;  d y = -d mu = 2 g/N (y - mu) w,  d logvar = g/N (1 - (y - mu)^2 w)


@triton.jit(do_not_specialize=["N", "rows"])
def _nll_fwd(
    MU, LOGVAR, Y, OUT,
    N, D, mu_stride, lv_stride, y_stride, rows, factor,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The share of `rows` rows by BLOCK columns."""
    part = tl.program_id(1).to(N.dtype)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(part * rows, tl.minimum(part * rows + rows, N), ROWS, num_stages=3):
        row = start + tl.arange(0, ROWS)
        mask = (row < N)[:, None] & (col < D * V)[None, :]
        r = _load(Y, row, y_stride, V, col, mask, 0.0) - _load(MU, row, mu_stride, V, col, mask, 0.0)
        logvar = _load(LOGVAR, row, lv_stride, V, col, mask, 0.0)
        acc += r * r * _weight(logvar) + logvar
    tl.store(OUT + part * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(acc, 1), 0) * factor)


def club_nll_fwd(mu, logvar, y):
    with torch.cuda.device_of(mu):
        return _nll_fwd_plan(*_key(mu, logvar, y))(mu, logvar, y)


@plan
def _nll_fwd_plan(device, dtype, size, strides):
    N, D = size
    if N == 0 or D == 0:
        empty = _empty_loss(N, reduction=2)
        return lambda mu, logvar, y: empty(mu)
    shape = _Shape(dtype, N, D, *strides)
    parts, rows = shape.parts(shape.rows)
    programs = shape.tiles * parts
    launch = Launch(_nll_fwd, (shape.tiles, parts), shape.values | dict(rows=rows, factor=1.0 / N), num_warps=4)

    def run(mu, logvar, y):
        shares = torch.empty((programs,), dtype=torch.float32, device=mu.device)
        launch(mu, logvar, y, shares)
        return shares.view(()) if programs == 1 else total(shares)

    return run


@triton.jit(do_not_specialize=["N"])
def _nll_bwd(
    G, MU, LOGVAR, Y, DMU, DLOGVAR, DY,
    N, D, mu_stride, lv_stride, y_stride, factor,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = _tile(D * V, N, ROWS, BLOCK)
    g = tl.load(G).to(tl.float32) * factor
    r = _load(Y, row, y_stride, V, col, mask) - _load(MU, row, mu_stride, V, col, mask)
    rw = r * _weight(_load(LOGVAR, row, lv_stride, V, col, mask))
    if DMU is not None:
        _store(DMU, row, D, V, col, -2 * g * rw, mask)
    if DLOGVAR is not None:
        _store(DLOGVAR, row, D, V, col, g * (1 - r * rw), mask)
    if DY is not None:
        _store(DY, row, D, V, col, 2 * g * rw, mask)


def club_nll_bwd(grad, mu, logvar, y, need_mu, need_logvar, need_y):
    run = _nll_bwd_plan(*_key(mu, logvar, y), grad.dtype, (need_mu, need_logvar, need_y))
    with torch.cuda.device_of(mu):
        return run(grad, mu, logvar, y)


@plan
def _nll_bwd_plan(device, dtype, size, strides, grad_dtype, needs):
    allocate = gradients(size, needs)
    if 0 in size or not any(needs):
        return lambda grad, mu, logvar, y: allocate(mu)
    shape = _Shape(dtype, *size, *strides)
    launch = _elementwise(_nll_bwd, shape, factor=1.0 / shape.N)

    def run(grad, mu, logvar, y):
        grads = allocate(mu)
        launch(grad, mu, logvar, y, *wanted(grads, needs))
        return grads

    return run
