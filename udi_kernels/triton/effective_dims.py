"""Which dimensions of labelled features are effective, on a GPU.

In one dimension the values nearest to a class mean are an interval, from the middle between it and the next smaller
mean to the middle between it and the next larger.  So a sample needs two comparisons, whatever the number of classes.
Means are added up in float64, class by class, in the order of the rows.  Hits are integers, so that atomics give the
same sums in any order.
"""

import torch
import triton
import triton.language as tl

from . import Launch, cached_launch, cdiv, next_power_of_2

NEVER = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(1.7976931348623157e308)  # an infinite value is nearest to no mean


@triton.jit
def _means(
    X,  # (N, D)
    ORDER,  # (N,) int64: the rows sorted by class
    ENDS,  # (C + 1,) int64: where in ORDER each class begins
    MEANS,  # (C, D) float64
    D,
    stride_x,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean of each column over the rows of one class, ORDER[ENDS[k] : ENDS[k + 1]]; NaN where there are none."""
    k = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(ENDS + k), tl.load(ENDS + k + 1)
    sums = tl.zeros([ROWS, BLOCK], tl.float64)
    for start in range(begin, end, ROWS):
        i = start + tl.arange(0, ROWS)
        row = tl.load(ORDER + i, i < end, other=0)
        mask = (i < end)[:, None] & (col < D)[None, :]
        sums += tl.load(X + row[:, None] * stride_x + col[None, :], mask, other=0.0).to(tl.float64)
    tl.store(MEANS + k.to(tl.int64) * D + col, tl.sum(sums, 0) / (end - begin).to(tl.float64), col < D)


@triton.jit
def _finite(x):
    return x - x == 0.0


@triton.jit
def _step(x):
    """About the distance from x to the next float64."""
    return tl.maximum(tl.abs(x) * 2.3e-16, 1e-300)


@triton.jit
def _intervals(
    MEANS,  # (C, D) float64
    LOW,  # (C, D) float64
    HIGH,  # (C, D) float64
    C,
    D,
    BLOCK: tl.constexpr,
):
    """The interval of one class in each column.  Of equal means, and in the middle, the lower class wins."""
    k = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = k.to(tl.int64) * D + col
    mean = tl.load(MEANS + at, col < D, other=0.0)
    below, above = tl.full([BLOCK], -LARGEST, tl.float64), tl.full([BLOCK], LARGEST, tl.float64)
    # Whether those two neighbours are lower classes; of equal means the lower class comes first.
    below_first, above_first = tl.zeros([BLOCK], tl.int1), tl.zeros([BLOCK], tl.int1)
    never = (mean - mean) != 0.0
    for j in range(0, C):
        other = tl.load(MEANS + tl.cast(j, tl.int64) * D + col, col < D, other=0.0)
        present = _finite(other)
        never = never | (present & (other == mean) & (j < k))
        closer = present & (other < mean) & (other > below)
        below, below_first = tl.where(closer, other, below), tl.where(closer, j < k, below_first)
        closer = present & (other > mean) & (other < above)
        above, above_first = tl.where(closer, other, above), tl.where(closer, j < k, above_first)
    low = tl.where(below == -LARGEST, below, below * 0.5 + mean * 0.5)
    high = tl.where(above == LARGEST, above, above * 0.5 + mean * 0.5)
    low = tl.where(below_first, low + _step(low), low)
    high = tl.where(above_first, high - _step(high), high)
    tl.store(LOW + at, tl.where(never, NEVER, low), col < D)
    tl.store(HIGH + at, tl.where(never, -NEVER, high), col < D)


@triton.jit(do_not_specialize=["N", "C"])
def _hits(
    X,  # (N, D)
    LABELS,  # (N,) int64
    LOW,  # (C, D) float64
    HIGH,  # (C, D) float64
    HITS,  # (D,) int64
    N,
    C,
    D,
    stride_x,
    stride_labels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds to HITS, in each column, how many of ROWS rows lie in the interval of their own class."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(LABELS + row * stride_labels, row < N, other=-1).to(tl.int64)
    mask = ((label >= 0) & (label < C))[:, None] & (col < D)[None, :]
    x = tl.load(X + row[:, None] * stride_x + col[None, :], mask, other=0.0).to(tl.float64)
    at = label[:, None] * D + col[None, :]
    low, high = tl.load(LOW + at, mask, other=NEVER), tl.load(HIGH + at, mask, other=-NEVER)
    hits = tl.sum(((x >= low) & (x <= high)).to(tl.int64), 0)
    tl.atomic_add(HITS + col, hits, col < D, sem="relaxed")


def effective_dims_fwd(features, labels, num_classes):
    run = _forward(
        features.get_device(), features.dtype, features.shape, features.stride(0), labels.stride(0), num_classes
    )
    with torch.cuda.device_of(features):
        return run(features, labels)


@cached_launch
def _forward(_device, _dtype, size, stride_x, stride_labels, C):
    N, D = size
    if N * D == 0:
        return lambda features, labels: features.new_zeros((D,), dtype=torch.bool)
    block = min(64, next_power_of_2(D))
    rows, tiles = 1024 // block, cdiv(D, block)
    values = dict(N=N, C=C, D=D, stride_x=stride_x, stride_labels=stride_labels, ROWS=rows, BLOCK=block)
    class_means = Launch(_means, (C, tiles), values)
    class_intervals = Launch(_intervals, (C, tiles), values, num_warps=2)
    count = Launch(_hits, (cdiv(N, rows), tiles), values)

    def run(features, labels):
        sorted_labels, order = torch.sort(labels, stable=True)
        ends = torch.searchsorted(sorted_labels, torch.arange(C + 1, device=features.device))
        means, low, high = torch.empty((3, C, D), dtype=torch.float64, device=features.device)
        hits = torch.zeros((D,), dtype=torch.int64, device=features.device)
        class_means(features, order, ends, means)
        class_intervals(means, low, high)
        count(features, labels, low, high, hits)
        return hits * D > hits.sum()

    return run
