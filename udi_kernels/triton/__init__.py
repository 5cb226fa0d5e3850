"""Triton kernels: one file per op, and here what their launchers share.  Nothing in this folder imports the library.

No kernel is autotuned: sizes and warps follow from the shape alone, so a call never synchronises, can be captured in
a CUDA graph, and adds up in the same order every time.  There are no floating-point atomics.
"""

import math

import triton
import triton.language as tl

# Triton 3.10 no longer contracts a * b + c on its own; these kernels want it.
FUSED = {"enable_fp_fusion": True}


def vector(dtype, *sizes):
    """Elements per load: as many of 16 bytes as divide every row length and stride.

    Triton itself asks only whether an integer is a multiple of 16, so it would read rows of 1000 one by one.
    """
    return math.gcd(16 // dtype.itemsize, *sizes)


def warps(tile, per_thread):
    """Warps that leave each thread about `per_thread` elements of the tile."""
    return min(32, max(1, tile // (32 * per_thread)))


@triton.jit(do_not_specialize=["n"])
def _total(PARTS, OUT, n, BLOCK: tl.constexpr):
    """The sum of n float32 numbers, in float64 and in a fixed order."""
    i = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        acc += tl.load(PARTS + start + i, start + i < n, other=0.0).to(tl.float64)
    tl.store(OUT, tl.sum(acc, 0).to(tl.float32))


def total(parts):
    """Sum of a float32 vector as a scalar tensor."""
    out = parts.new_empty(())
    block = 256 if parts.numel() <= 1024 else 4096
    _total[(1,)](parts, out, parts.numel(), BLOCK=block, num_warps=warps(block, 8), **FUSED)
    return out
