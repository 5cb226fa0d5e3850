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

from . import FUSED, total, vector, warps

LOG2E = tl.constexpr(math.log2(math.e))
LN2_HIGH = tl.constexpr(0.693145751953125)  # 14 bits: its product with an exponent is exact
LN2_LOW = tl.constexpr(math.log(2) - 0.693145751953125)

SAMPLES = tl.constexpr(16)  # rows of y whose mean is the shift
PROGRAMS = 1024  # of the first stage: eight for each multiprocessor of an A100 or H100


@triton.jit
def _exp(x):
    """exp(x) = 2^n exp(x - n ln2): the hardware's exp2 of x log2(e) would lose a digit already at x = 10."""
    n = tl.floor(x * LOG2E)
    n = tl.minimum(tl.maximum(n, -150.0), 150.0)
    return tl.exp2(n) * tl.exp2(((x - n * LN2_HIGH) - n * LN2_LOW) * LOG2E)


@triton.jit
def _load(X, row, col, stride, mask, other=0.0):
    return tl.load(X + row[:, None] * stride + col[None, :], mask, other=other).to(tl.float32)


@triton.jit
def _tile(tiles, D, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns and mask of this program's tile, `tiles` tiles to the row."""
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    return row, col, (row < N)[:, None] & (col < D)[None, :]


# --- column sums ------------------------------------------------------------------------------------------------


@triton.jit
def _column_sum(tile):
    return tl.sum(tile.to(tl.float64), 0)


@triton.jit
def _shift(Y, col, mask, stride, N):
    """The mean of rows spread over y, near the middle of the data whatever its order; exactly y where N is 1."""
    row = tl.arange(0, SAMPLES).to(tl.int64) * N // SAMPLES
    first = tl.load(Y + col, mask, other=0.0).to(tl.float32)
    return first + tl.sum(_load(Y, row, col, stride, mask[None, :]) - first[None, :], 0) / SAMPLES


@triton.jit(do_not_specialize=["N", "g_stride", "tiles", "rows"])
def _columns(
    G, MU, LOGVAR, Y, PARTS, STATS, DONE, N, D, mu_stride, lv_stride, y_stride, g_stride, tiles, rows,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """First stage, `rows` rows by BLOCK columns.  PARTS: (parts, 5, D).  D and strides in units of V elements.

    MOMENTS: sums of y and y^2.  WEIGHTS: of g w and g w mu.  Both: also of w y (2 mu - y).
    """
    part = (tl.program_id(0) // tiles).to(tl.int64)
    col = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    shift = _shift(Y, col, col < D * V, y_stride * V, N)
    y0 = shift[None, :]
    sum_y = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_yy = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_w = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_wmu = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_wy = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(part * rows, tl.minimum(part * rows + rows, N), ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < N
        mask = real[:, None] & (col < D * V)[None, :]
        if MOMENTS:
            y = tl.where(mask, _load(Y, row, col, y_stride * V, mask) - y0, 0.0)
            sum_y += y
            sum_yy += y * y
        if WEIGHTS:
            mu = _load(MU, row, col, mu_stride * V, mask) - y0
            w = _exp(-_load(LOGVAR, row, col, lv_stride * V, mask, float("inf")))
            if G is not None:
                w *= tl.load(G + row * g_stride, real, other=0.0).to(tl.float32)[:, None]
            sum_w += w
            sum_wmu += w * mu
            if MOMENTS:
                sum_wy += w * (y * (2 * mu - y))
    D *= V
    PARTS += part * (5 * D) + col
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
    if tl.program_id(0) == 0:
        tl.store(DONE, 0)


@triton.jit
def _sum_parts(PARTS, k, parts, D, col, STEP: tl.constexpr, BLOCK: tl.constexpr):
    acc = tl.zeros([STEP, BLOCK], tl.float64)
    for start in range(0, parts, STEP):
        part = (start + tl.arange(0, STEP)).to(tl.int64)
        mask = (part < parts)[:, None] & (col < D)[None, :]
        acc += tl.load(PARTS + part[:, None] * (5 * D) + (k * D + col)[None, :], mask, other=0.0)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["N", "D", "parts"])
def _columns_join(
    PARTS, STATS, VALUES, DONE, OUT, N, D, parts, factor,
    STEP: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Second stage, BLOCK columns: the stats, and of the value the sum over all columns by the program that ends last.

    DONE counts the programs that have ended; the first stage set it to 0.  The order of the sum does not depend on it.
    """
    tile = tl.program_id(0)
    col = tile * BLOCK + tl.arange(0, BLOCK)
    real = col < D
    if MOMENTS:
        mean = _sum_parts(PARTS, 0, parts, D, col, STEP, BLOCK) / N
        square = _sum_parts(PARTS, 1, parts, D, col, STEP, BLOCK) / N
        tl.store(STATS + D + col, mean.to(tl.float32), real)
        tl.store(STATS + 2 * D + col, (square - mean * mean).to(tl.float32), real)
    if WEIGHTS:
        sum_w = _sum_parts(PARTS, 2, parts, D, col, STEP, BLOCK)
        sum_wmu = _sum_parts(PARTS, 3, parts, D, col, STEP, BLOCK)
        tl.store(STATS + 3 * D + col, (sum_w / N).to(tl.float32), real)
        tl.store(STATS + 4 * D + col, (sum_wmu / N).to(tl.float32), real)
    if MOMENTS and WEIGHTS:
        value = 0.5 * (_sum_parts(PARTS, 4, parts, D, col, STEP, BLOCK) - 2 * mean * sum_wmu + square * sum_w)
        tl.store(VALUES + tile, tl.sum(tl.where(real, value, 0.0), 0))
        tl.debug_barrier()
        if tl.atomic_add(DONE, 1) == tl.num_programs(0) - 1:
            i = tl.arange(0, TILES)
            values = tl.load(VALUES + i, i < tl.num_programs(0), other=0.0, cache_modifier=".cg")
            tl.store(OUT, (tl.sum(values, 0) * factor).to(tl.float32))


@triton.jit(do_not_specialize=["N"])
def _values(
    MU, LOGVAR, Y, STATS, OUT, N, D, mu_stride, lv_stride, y_stride,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bound of each of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    D *= V
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = (row < N)[:, None] & (col < D)[None, :]
        y0 = tl.load(STATS + col, col < D, other=0.0)[None, :]
        mean = tl.load(STATS + D + col, col < D, other=0.0)[None, :]
        var = tl.load(STATS + 2 * D + col, col < D, other=0.0)[None, :]
        y = (_load(Y, row, col, y_stride * V, mask) - y0) - mean
        mu = (_load(MU, row, col, mu_stride * V, mask) - y0) - mean
        acc += _exp(-_load(LOGVAR, row, col, lv_stride * V, mask, float("inf"))) * (var + y * (2 * mu - y))
    tl.store(OUT + row, 0.5 * tl.sum(acc, 1), row < N)


class _Shape:
    """Sizes and strides of (mu, logvar, y) in units of V elements, and the tiles of the kernels over them."""

    def __init__(self, *tensors):
        self.N, self.D = tensors[0].shape
        dtype, strides = tensors[0].dtype, [t.stride(0) for t in tensors]
        self.V = vector(dtype, self.D, *strides)
        self.sizes = [n // self.V for n in (self.D, *strides)]
        # A tile is one 16-byte load for each thread of 4 warps, 256 bytes to the row.
        self.block = min(triton.next_power_of_2(self.D), 256 // dtype.itemsize)
        self.rows = 2048 // dtype.itemsize // self.block
        self.tiles = triton.cdiv(self.D, self.block)
        self.config = dict(V=self.V, ROWS=self.rows, BLOCK=self.block, num_warps=4, **FUSED)

    def parts(self):
        """Parts of the first stage and rows of a part: two tiles at least, so that few parts go through memory."""
        wanted = min(triton.cdiv(PROGRAMS, self.tiles), triton.cdiv(self.N, 2 * self.rows))
        rows = triton.cdiv(triton.cdiv(self.N, wanted), self.rows) * self.rows
        return triton.cdiv(self.N, rows), rows


def _column_stats(shape, g, mu, logvar, y, out, factor, moments, weights):
    """Runs the two stages; returns stats (5, D), and writes factor times the sum of all rows into `out`."""
    parts, rows = shape.parts()
    new = dict(device=y.device)
    buffer = torch.empty((parts, 5, shape.D), dtype=torch.float64, **new)
    stats = torch.empty((5, shape.D), dtype=torch.float32, **new)
    done = torch.empty((), dtype=torch.int32, **new)
    g_stride = g.stride(0) if g is not None and g.dim() else 0
    flags = dict(MOMENTS=moments, WEIGHTS=weights)
    D_v, *strides = shape.sizes
    _columns[(shape.tiles * parts,)](
        g, mu, logvar, y, buffer, stats, done, shape.N, D_v, *strides, g_stride, shape.tiles, rows,
        **flags, **shape.config,
    )  # fmt: skip
    # Tiles of 1024: few columns each, so that there are many programs.
    block = min(16, triton.next_power_of_2(shape.D))
    step = min(1024 // block, triton.next_power_of_2(parts))
    tiles = triton.cdiv(shape.D, block)
    values = torch.empty((tiles,), dtype=torch.float64, **new)
    _columns_join[(tiles,)](
        buffer, stats, values, done, out, shape.N, shape.D, parts, factor,
        STEP=step, BLOCK=block, TILES=triton.next_power_of_2(tiles), num_warps=warps(step * block, 8), **flags, **FUSED,
    )  # fmt: skip
    return stats


def _empty_loss(mu, reduction):
    """The loss over no elements: 0, but NaN as the mean of no rows; None if there are elements."""
    N, D = mu.shape
    if N and D:
        return None
    shape = (N,) if reduction == 0 else ()
    fill = math.nan if reduction == 2 and N == 0 else 0.0
    return torch.full(shape, fill, dtype=torch.float32, device=mu.device)


def _grads_like(tensors, needs):
    return tuple(
        torch.empty(t.shape if need else (0,), dtype=t.dtype, device=t.device)
        for t, need in zip(tensors, needs, strict=True)
    )


def club_mi_fwd(mu, logvar, y, reduction):
    N, D = mu.shape
    loss = _empty_loss(mu, reduction)
    if loss is not None:
        return loss, torch.zeros((5, D), dtype=torch.float32, device=mu.device)
    shape = _Shape(mu, logvar, y)
    factor = 1.0 / N if reduction == 2 else 1.0
    loss = torch.empty((N,) if reduction == 0 else (), dtype=torch.float32, device=mu.device)
    with torch.cuda.device_of(mu):
        stats = _column_stats(shape, None, mu, logvar, y, loss, factor, moments=True, weights=reduction != 0)
        if reduction == 0:
            stats[3:].zero_()
            rows = max(1, 1024 // triton.next_power_of_2(D))
            _values[(triton.cdiv(N, rows),)](
                mu, logvar, y, stats, loss, N, *shape.sizes,
                V=shape.V, ROWS=rows, BLOCK=min(1024, triton.next_power_of_2(D)), num_warps=4, **FUSED,
            )  # fmt: skip
    return loss, stats


# --- elementwise backward ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "g_stride", "tiles"])
def _mi_bwd(
    G, MU, LOGVAR, Y, STATS, WEIGHTED, DMU, DLOGVAR, DY, N, D, mu_stride, lv_stride, y_stride, g_stride, tiles, factor,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """WEIGHTED: stats whose last rows hold mean(g w) and mean(g w (mu - shift)); without PER_ROW, those of g = 1."""
    row, col, mask = _tile(tiles, D * V, N, ROWS, BLOCK)
    real = col < D * V
    D *= V
    g = tl.load(G + row * g_stride, row < N, other=0.0).to(tl.float32)[:, None] * factor
    y0 = tl.load(STATS + col, real, other=0.0)[None, :]
    y = _load(Y, row, col, y_stride * V, mask)
    w = _exp(-_load(LOGVAR, row, col, lv_stride * V, mask))
    at = row[:, None] * D + col[None, :]
    if DMU is not None or DLOGVAR is not None:
        mean = tl.load(STATS + D + col, real, other=0.0)[None, :]
        centred = (y - y0) - mean
    if DMU is not None:
        tl.store(DMU + at, (g * w * centred).to(DMU.dtype.element_ty), mask)
    if DLOGVAR is not None or DY is not None:
        mu = _load(MU, row, col, mu_stride * V, mask)
    if DLOGVAR is not None:
        var = tl.load(STATS + 2 * D + col, real, other=0.0)[None, :]
        value = w * (var + centred * (2 * ((mu - y0) - mean) - centred))
        tl.store(DLOGVAR + at, (-0.5 * g * value).to(DLOGVAR.dtype.element_ty), mask)
    if DY is not None:
        mean_w = tl.load(WEIGHTED + 3 * D + col, real, other=0.0)[None, :]
        mean_wmu = tl.load(WEIGHTED + 4 * D + col, real, other=0.0)[None, :]
        others = (y - y0) * mean_w - mean_wmu
        dy = g * w * (mu - y) + others if PER_ROW else g * (w * (mu - y) + others)
        tl.store(DY + at, dy.to(DY.dtype.element_ty), mask)


def club_mi_bwd(grad, mu, logvar, y, stats, reduction, need_mu, need_logvar, need_y):
    grads = _grads_like((mu, logvar, y), (need_mu, need_logvar, need_y))
    if mu.numel() == 0 or not (need_mu or need_logvar or need_y):
        return grads
    if len(mu) == 1:  # no negative but the positive: 0 by definition, where the formula would leave rounding errors
        return tuple(g.zero_() for g in grads)
    shape = _Shape(mu, logvar, y)
    per_row = reduction == 0
    factor = 1.0 / shape.N if reduction == 2 else 1.0
    with torch.cuda.device_of(mu):
        weighted = stats
        if per_row and need_y:
            weighted = _column_stats(shape, grad, mu, logvar, y, None, 1.0, moments=False, weights=True)
        _elementwise(_mi_bwd, shape, grad, mu, logvar, y, (stats, weighted), grads, factor, PER_ROW=per_row)
    return grads


def _elementwise(kernel, shape, grad, mu, logvar, y, more, grads, factor, **constants):
    config = shape.config | dict(ROWS=2 * shape.rows)
    kernel[(shape.tiles * triton.cdiv(shape.N, config["ROWS"]),)](
        grad, mu, logvar, y, *more, *(g if g.dim() == 2 else None for g in grads),
        shape.N, *shape.sizes, grad.stride(0) if grad.dim() else 0, shape.tiles, factor, **constants, **config,
    )  # fmt: skip


# --- likelihood -------------------------------------------------------------------------------------------------
# loss = mean_i sum_d (y - mu)^2 w + logvar;  d y = -d mu = 2 g/N (y - mu) w,  d logvar = g/N (1 - (y - mu)^2 w)


@triton.jit(do_not_specialize=["N", "tiles", "rows"])
def _nll_fwd(
    MU, LOGVAR, Y, OUT, N, D, mu_stride, lv_stride, y_stride, tiles, rows, factor,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The share of `rows` rows by BLOCK columns."""
    part = (tl.program_id(0) // tiles).to(tl.int64)
    col = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(part * rows, tl.minimum(part * rows + rows, N), ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < N)[:, None] & (col < D * V)[None, :]
        r = _load(Y, row, col, y_stride * V, mask) - _load(MU, row, col, mu_stride * V, mask)
        logvar = _load(LOGVAR, row, col, lv_stride * V, mask)
        acc += r * r * _exp(-logvar) + logvar
    tl.store(OUT + tl.program_id(0), tl.sum(tl.sum(acc, 1), 0) * factor)


def club_nll_fwd(mu, logvar, y):
    loss = _empty_loss(mu, 2)
    if loss is not None:
        return loss
    shape = _Shape(mu, logvar, y)
    parts, rows = shape.parts()
    D_v, *strides = shape.sizes
    with torch.cuda.device_of(mu):
        out = torch.empty((shape.tiles * parts,), dtype=torch.float32, device=mu.device)
        _nll_fwd[(out.numel(),)](
            mu, logvar, y, out, shape.N, D_v, *strides, shape.tiles, rows, 1.0 / shape.N, **shape.config
        )
        return total(out) if out.numel() > 1 else out.view(())


@triton.jit(do_not_specialize=["N", "g_stride", "tiles"])
def _nll_bwd(
    G, MU, LOGVAR, Y, DMU, DLOGVAR, DY, N, D, mu_stride, lv_stride, y_stride, g_stride, tiles, factor,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = _tile(tiles, D * V, N, ROWS, BLOCK)
    g = tl.load(G).to(tl.float32) * factor
    r = _load(Y, row, col, y_stride * V, mask) - _load(MU, row, col, mu_stride * V, mask)
    rw = r * _exp(-_load(LOGVAR, row, col, lv_stride * V, mask))
    at = row[:, None] * (D * V) + col[None, :]
    if DMU is not None:
        tl.store(DMU + at, (-2 * g * rw).to(DMU.dtype.element_ty), mask)
    if DLOGVAR is not None:
        tl.store(DLOGVAR + at, (g * (1 - r * rw)).to(DLOGVAR.dtype.element_ty), mask)
    if DY is not None:
        tl.store(DY + at, (2 * g * rw).to(DY.dtype.element_ty), mask)


def club_nll_bwd(grad, mu, logvar, y, need_mu, need_logvar, need_y):
    grads = _grads_like((mu, logvar, y), (need_mu, need_logvar, need_y))
    if mu.numel() == 0 or not (need_mu or need_logvar or need_y):
        return grads
    shape = _Shape(mu, logvar, y)
    with torch.cuda.device_of(mu):
        _elementwise(_nll_bwd, shape, grad, mu, logvar, y, (), grads, 1.0 / shape.N)
    return grads
