"""Triton kernels: one file per op, and here what their launchers share.  Nothing in this folder imports the library.

No kernel is autotuned: sizes and warps follow from the shape alone, so a call never synchronises, can be captured in
a CUDA graph, and adds up in the same order every time.  There are no floating-point atomics.

A launcher, such as `js_div_fwd`, looks up a function made for its arguments' shapes, strides, dtypes, device and
options (`cached_launch`; a parameter that starts with an underscore is there as a key of the cache only).  That
function allocates the results and calls one `Launch` per kernel, so that a repeated call computes no grid or option.

In a kernel's list of arguments a comment gives the shape of a tensor; strides count elements, or V elements where the
kernel has a V.
"""

import functools
import math

import triton
import triton.language as tl

# Triton 3.10 no longer contracts a * b + c on its own; these kernels want it.
FUSED = {"enable_fp_fusion": True}
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
MAX_GRID_Y = 65535

NONE, SUM, MEAN = range(3)  # enum Reduction in csrc/enums.h

# Bounded, since the number of shapes is not; the least recently used are dropped.
cached_launch = functools.lru_cache(maxsize=1024)


class Launch:
    """A kernel with its grid and all arguments but the tensors, which come first in each kernel's signature.

    Triton's own launch binds and specialises all arguments at each call, 20 us.  A Launch does it once and then calls
    the compiled kernel, which still reads the current stream and Triton's launch hooks.  That kernel is specialised for
    the device and the dtypes, which the key of `cached_launch` must have for this reason, and for addresses that are
    multiples of 16 bytes; other addresses are left to Triton's own launch.

    values: arguments by name; those that the kernel does not have are ignored.  options: num_warps, maxnreg.
    """

    __slots__ = "compiled", "grid", "kernel", "options", "rest"

    def __init__(self, kernel, grid, values, **options):
        self.kernel, self.grid, self.options = kernel, (*grid, 1, 1)[:3], options | FUSED
        self.rest = tuple(values[name] for name in kernel.arg_names if name in values)
        self.compiled = None

    def __call__(self, *tensors):
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        if any(p & 15 for p in pointers if p):
            self._by_triton(tensors)
        elif self.compiled:
            self.compiled(*pointers, *self.rest)
        else:
            kernel = self._by_triton(tensors)
            self.compiled = kernel and kernel[self.grid]  # the interpreter returns None

    def _by_triton(self, tensors):
        return self.kernel[self.grid](*tensors, *self.rest, **self.options)


def gradients(shape, needs):
    """A function that allocates the gradients, in its argument's dtype; one that is not needed is empty."""
    sizes = [shape if need else (0,) for need in needs]
    return lambda x: tuple([x.new_empty(size) for size in sizes])


def wanted(grads, needs):
    """The gradients for kernels, which write none where they get None."""
    return [g if need else None for g, need in zip(grads, needs, strict=True)]


def cdiv(a, b):
    return -(-a // b)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()


def vector(dtype, *sizes):
    """Elements per load: as many of those in 16 bytes as divide every row length and stride.

    Triton only asks whether an integer is a multiple of 16, so it would read rows of 1000 one element at a time.
    """
    return math.gcd(16 // dtype.itemsize, *sizes)


def warps(tile, per_thread):
    """Warps that leave each thread about `per_thread` elements of the tile."""
    return min(32, max(1, tile // (32 * per_thread)))


def tile_grid(rows, columns):
    """The grid of a matrix of tiles, row after row; a program finds its place by `tile_row` and program_id(0)."""
    return columns, cdiv(rows, cdiv(rows, MAX_GRID_Y)), cdiv(rows, MAX_GRID_Y)


@triton.jit
def tile_row(rows):
    """The row of this program's tile, as wide as `rows`, the number of rows: 64 bits cost instructions."""
    return tl.program_id(2).to(rows.dtype) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def at(X, row, stride, V: tl.constexpr):
    """Where the rows begin, given their stride in units of V elements; the product needs 64 bits."""
    return X + row.to(tl.int64) * stride * V


@triton.jit
def exp2(x):
    """2^x by one instruction, relative error 2^-22; results below 2^-126 are 0."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def fma(a, b, c):
    """a b + c with one rounding."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit(do_not_specialize=["n"])
def _total(
    PARTS,  # (n,) float32
    OUT,  # () float32
    n,
    BLOCK: tl.constexpr,
):
    """The sum of n float32 numbers, in float64 and in a fixed order."""
    i = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        acc += tl.load(PARTS + start + i, start + i < n, other=0.0).to(tl.float64)
    tl.store(OUT, tl.sum(acc, 0).to(tl.float32))


@cached_launch
def _total_of(_device, n):
    block = 256 if n <= 1024 else 4096
    return Launch(_total, (1,), dict(n=n, BLOCK=block), num_warps=warps(block, 8))


def total(parts):
    """Sum of a float32 vector as a scalar tensor."""
    out = parts.new_empty(())
    _total_of(parts.get_device(), len(parts))(parts, out)
    return out
