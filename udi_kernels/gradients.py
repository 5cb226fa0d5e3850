"""Inner products and weighted sums of whole gradients: lists of tensors, one per parameter, never concatenated."""

from collections.abc import Iterable
from itertools import cycle
from operator import attrgetter

import torch

from . import _build, _checks, reference
from ._ops import ops, served

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of DType in csrc/gradients.h


def gramian(grads):
    r"""All inner products of K gradients: ``G[i, j] = sum_p <grads[i][p], grads[j][p]>``.

    Args:
        grads: K sequences of P tensors or None (a zero gradient), the same P parameters in each; or P tensors of
            shape (K, *shape), the K gradients of a parameter stacked. float16, bfloat16, float32 or float64, on one
            device. A parameter's gradients share shape, dtype and memory layout; parameters may differ.

    Returns:
        (K, K), symmetric, float32 (float64 if a gradient is); the terms are accumulated in float64, in an order that
        depends on the shapes alone. Not differentiable.

    Raises:
        TypeError, ValueError: naming the first gradient that does not fit.
    """
    tensors = _unchecked(grads)
    if tensors:
        try:
            return ops.gramian.default(tensors, len(grads), False)
        except RuntimeError:
            pass  # what follows says which gradient does not fit, or copies those that are not dense
    g = _Gradients("gramian", grads)
    return ops.gramian(g.tensors, g.k, g.stacked) if g.native else reference.gramian(g.lists())


def alignment_weights(gram, *, anchor=0, cosine=False):
    r"""Weights of losses by how far their gradients agree with the anchor's: UDI's controller.

    ``w_k = relu(G[anchor, k]) / sum_{j != anchor} relu(G[anchor, j])`` for k != anchor, all 0 where no gradient
    agrees, and ``w_anchor = 1`` (UDI, arXiv 2509.02281).

    Args:
        gram: (K, K) from :func:`gramian`.
        anchor: index of the loss that the others shall help.
        cosine: compare directions only: ``G[anchor, k]`` is divided by both norms first.

    Returns:
        (K,), dtype and device of ``gram``; nothing waits for the device.
    """
    _checks.tensors("alignment_weights", gram=gram)
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"alignment_weights: gram must have shape (K, K), got {tuple(gram.shape)}")
    if not 0 <= anchor < len(gram):
        raise ValueError(f"alignment_weights: anchor must lie in [0, {len(gram)}), got {anchor}")
    row = gram[anchor]
    if cosine:
        norm = gram.diagonal().sqrt()
        row = torch.where((norm > 0) & (norm[anchor] > 0), row / norm / norm[anchor], 0)
    others = torch.arange(len(gram), device=gram.device) != anchor
    gain = torch.where(others, row.relu(), 0)
    total = gain.sum()
    return torch.where(others, gain / torch.where(total == 0, 1, total), 1)


def weighted_sum(grads, weights, *, out=None):
    r"""``sum_k weights[k] * grads[k][p]`` for every parameter p, in one pass over the gradients.

    Args:
        grads: as for :func:`gramian`.
        weights: (K,) tensor on the gradients' device.
        out: P tensors to write to, laid out as the gradients are; may be one of the lists itself.

    Returns:
        list of P tensors in the gradients' dtype (``out`` if given); None where all K gradients are None and no
        ``out`` is given (zeros if it is). Not differentiable.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """
    tensors = _unchecked(grads) if out is None else None
    if tensors and _plain(weights, len(grads)):
        out = [torch.empty_like(t) for t in grads[0]]
        try:
            ops.weighted_sum.default(out, tensors, weights, False)
            return out
        except RuntimeError:
            out = None
    g = _Gradients("weighted_sum", grads)
    weights = g.check_weights(weights)
    out = g.new_outputs() if out is None else g.check_outputs(out)
    if not g.native:
        g.combine(out, weights)
    else:
        live = [t is not None for t in out]
        tensors = [t for t, keep in zip(g.tensors, cycle(live)) if keep]
        written = [t for t in out if t is not None]
        ops.weighted_sum(written, tensors, weights, g.stacked)
        if not torch.compiler.is_compiling():  # compiled code does this by itself
            torch.autograd.graph.increment_version(written)
    return out


class GradientPlan:
    """:func:`gramian` and :func:`weighted_sum` of gradients that stay where they are, prepared once.

    A call then costs a few microseconds of host time however many tensors there are, where the functions need about
    one per tensor. It reads what the buffers hold when it runs, on the current stream; calls on the same plan must
    not overlap on two streams.

    Args:
        grads: as for :func:`gramian`; the plan keeps references. Fill these buffers in place: a gradient that is
            replaced by another tensor (``zero_grad(set_to_none=True)``) is not seen.
        out: as for :func:`weighted_sum`; by default allocated at the first ``weighted_sum``.

    Raises:
        TypeError, ValueError: as the functions do, and for gradients that are not dense.
    """

    def __init__(self, grads, *, out=None):
        self._grads = _Gradients("GradientPlan", grads, may_copy=False)
        self.out = None if out is None else self._grads.check_outputs(out)
        self._prepare()

    def gramian(self):
        """(K, K), a new tensor; see :func:`gramian`."""
        g = self._grads
        if not g.native:
            return reference.gramian(g.lists())
        gram = torch.empty(g.k, g.k, dtype=g.sum_dtype, device=g.device)
        self._native.gramian(self._scratch.data_ptr(), gram.data_ptr(), g.sum_dtype == torch.float64)
        return gram

    def weighted_sum(self, weights):
        """Writes ``out`` and returns it, the same list at each call; see :func:`weighted_sum`."""
        g = self._grads
        weights = g.check_weights(weights)
        if self.out is None:
            self.out = g.new_outputs()
            self._prepare()
        if g.native:
            self._native.weighted_sum(weights.data_ptr(), g.sum_dtype == torch.float64)
        else:
            g.combine(self.out, weights)
        return self.out

    def _prepare(self):
        g = self._grads
        if not g.native:
            return
        like = g.like if self.out is None else self.out
        params = [(p, t) for p, t in enumerate(like) if t is not None]
        self._native = _build.load(g.device.type).Plan(
            k=g.k,
            device=g.device.index or 0,
            dtypes=[DTYPES.index(t.dtype) for _, t in params],
            sizes=[t.numel() for _, t in params],
            data=[address for p, _ in params for address in g.addresses(p)],
            out=[0 if self.out is None else t.data_ptr() for _, t in params],
        )
        self._scratch = torch.empty(self._native.scratch(), dtype=torch.float64, device=g.device)


class _Gradients:
    """K gradients over P parameters, checked.

    `tensors` is what the ops take: K*P tensors or None, list after list, or P stacked ones. `like` has one
    gradient of each parameter, or None where all are.
    """

    def __init__(self, op, grads, may_copy=True):
        if isinstance(grads, torch.Tensor):
            raise TypeError(f"{op}: grads must be a sequence, got a tensor; [grads] if it is one parameter's, stacked")
        grads = list(grads)
        self.op, self.may_copy, self.device = op, may_copy, None
        self.stacked = any(isinstance(g, torch.Tensor) for g in grads)
        self.tensors, self.like = self._from_stacked(grads) if self.stacked else self._from_lists(grads)
        if self.device is None:
            raise ValueError(f"{op}: grads must hold at least one tensor, got none")
        wide = any(t is not None and t.dtype == torch.float64 for t in self.like)
        self.sum_dtype = torch.float64 if wide else torch.float32
        self.native = served("gradients", self.device.type, self.sum_dtype)

    def _from_lists(self, grads):
        for i, row in enumerate(grads):
            if not isinstance(row, Iterable):
                raise TypeError(f"{self.op}: grads[{i}] must be a sequence of tensors, got {type(row).__name__}")
        rows = [list(row) for row in grads]
        for i, row in enumerate(rows):
            self._expect(f"grads[{i}]", "length", len(rows[0]), len(row), "grads[0]")
        self.k, likes = len(rows), []
        for p, column in enumerate(zip(*rows, strict=True)):
            like = layout = None
            alike = True
            for i, g in enumerate(column):
                if g is not None:
                    self._admit(g, "grads", i, p)
                    its = g.dtype, g.shape, g.stride()
                    if like is None:
                        like, layout, alike = g, its, g.is_contiguous() or _dense(g.shape, g.stride())
                    alike = alike and its == layout
            if not alike:
                column = self._align(p, column)
                like = next(g for g in column if g is not None)
                for row, g in zip(rows, column, strict=True):
                    row[p] = g
            likes.append(like)
        return [g for row in rows for g in row], likes

    def _align(self, p, column):
        """The K gradients of a parameter; those that are not dense are copied to the layout of those that are."""
        names = [f"grads[{i}][{p}]" for i in range(self.k)]
        present = [(name, g) for name, g in zip(names, column, strict=True) if g is not None]
        first, like = present[0]
        for name, g in present:
            self._expect(name, "dtype", like.dtype, g.dtype, first)
            self._expect(name, "shape", tuple(like.shape), tuple(g.shape), first)
        dense = [(name, g) for name, g in present if _dense(g.shape, g.stride())]
        first, like = dense[0] if dense else (None, like.contiguous())
        for name, g in dense:
            self._expect_layout(name, g, like, first)
        loose = {name: self._copy(name, g, like) for name, g in present if not _same_layout(g, like)}
        return [loose.get(name, g) for name, g in zip(names, column, strict=True)]

    def _from_stacked(self, grads):
        grads = list(grads)
        self.k = None
        for p, g in enumerate(grads):
            if g is None:
                continue
            self._admit(g, "grads", p)
            if g.dim() == 0:
                raise ValueError(f"{self.op}: grads[{p}] must have shape (K, *shape), got ()")
            if self.k is None:
                first, self.k = f"grads[{p}]", len(g)
            self._expect(f"grads[{p}]", "size K of the first dimension", self.k, len(g), first)
            if not g.is_contiguous() and not _dense(g.shape[1:], g.stride()[1:]):
                grads[p] = self._copy(f"grads[{p}]", g, torch.empty_like(g, memory_format=torch.contiguous_format))
        if self.k == 0:
            raise ValueError(f"{self.op}: {first} must hold at least one gradient, got shape {tuple(grads[0].shape)}")
        return grads, [None if g is None else g[0] for g in grads]

    def _admit(self, t, *where):
        """What a tensor must be by itself. The name is put together for an error only: this runs for every tensor."""
        problem, kind = None, ValueError
        if not isinstance(t, torch.Tensor):
            problem, kind = f"be a tensor or None, got {type(t).__name__}", TypeError
        elif t.layout is not torch.strided:
            problem = f"be dense, got {t.layout}; call .to_dense()"
        elif t.dtype not in DTYPES:
            problem, kind = f"be float16, bfloat16, float32 or float64, got {t.dtype}", TypeError
        elif t.requires_grad and torch.is_grad_enabled():
            problem = "not require grad (this op is not differentiable); detach it, or call under torch.no_grad()"
        elif self.device is None:
            self.device = t.device
        elif t.device != self.device:
            problem = f"be on {self.device} as the others are, got {t.device}"
        if problem:
            name = where[0] + "".join(f"[{i}]" for i in where[1:])
            raise kind(f"{self.op}: {name} must {problem}")

    def _expect(self, name, what, want, got, other):
        if got != want:
            raise ValueError(f"{self.op}: {name} must have {what} {want} as {other} has, got {got}")

    def _expect_layout(self, name, got, want, other):
        if not _same_layout(got, want):
            raise ValueError(
                f"{self.op}: {name} must have strides {want.stride()} as {other} has, got {got.stride()}; "
                "call .contiguous() on both"
            )

    def _copy(self, name, t, like):
        if not self.may_copy:
            raise ValueError(f"{self.op}: {name} must be dense, got shape {tuple(t.shape)} with strides {t.stride()}")
        return torch.empty_like(like).copy_(t)

    def check_weights(self, weights):
        _checks.tensors(self.op, weights=weights)
        self._admit(weights, "weights")
        if weights.shape != (self.k,):
            raise ValueError(f"{self.op}: weights must have shape ({self.k},), got {tuple(weights.shape)}")
        return weights.to(self.sum_dtype).contiguous()

    def new_outputs(self):
        return [None if t is None else torch.empty_like(t) for t in self.like]

    def check_outputs(self, out):
        out = list(out)
        if len(out) != len(self.like):
            raise ValueError(f"{self.op}: out must have length {len(self.like)}, one per parameter, got {len(out)}")
        for p, (t, like) in enumerate(zip(out, self.like, strict=True)):
            name, other = f"out[{p}]", f"parameter {p}'s gradient"
            if t is None:
                raise TypeError(f"{self.op}: {name} must be a tensor, got None")
            self._admit(t, "out", p)
            like = t.contiguous() if like is None else like
            self._expect(name, "dtype", like.dtype, t.dtype, other)
            self._expect(name, "shape", tuple(like.shape), tuple(t.shape), other)
            self._expect_layout(name, t, like, other)
        return out

    def addresses(self, p):
        """Of the K gradients of a parameter; 0 for None."""
        if self.stacked:
            t = self.tensors[p]
            return [0 if t is None else t[i].data_ptr() for i in range(self.k)]
        return [0 if t is None else t.data_ptr() for t in self.tensors[p :: len(self.like)]]

    def lists(self):
        """K lists of P tensors or None, as the reference takes them."""
        if self.stacked:
            return [[None if t is None else t[i] for t in self.tensors] for i in range(self.k)]
        params = len(self.like)
        return [self.tensors[i * params : (i + 1) * params] for i in range(self.k)]

    def combine(self, out, weights):
        """The reference's weighted sum, written to out."""
        for t, value in zip(out, reference.weighted_sum(self.lists(), weights), strict=True):
            if t is not None:
                t.zero_() if value is None else t.copy_(value)


def _unchecked(grads):
    """K lists of tensors as the ops take them, or None if they need a closer look.

    The ops compare the gradients of a parameter by themselves, before they compute anything, in a fifth of the time
    that it takes here (30 and 170 us for 3 x 62 tensors); only, their errors name no gradient.
    """
    if torch.compiler.is_compiling() or type(grads) not in (list, tuple) or not {*map(type, grads)} <= {list, tuple}:
        return None
    tensors = [g for row in grads for g in row]
    if {*map(type, tensors)} != {torch.Tensor} or len({*map(len, grads)}) > 1:
        return None
    refused = ("is_meta", "requires_grad") if torch.is_grad_enabled() else ("is_meta",)
    if any(any(map(attrgetter(name), tensors)) for name in refused):
        return None
    return tensors if served("gradients", tensors[0].device.type, tensors[0].dtype) else None


def _plain(weights, k):
    """Whether the op takes these weights as they are."""
    return (
        type(weights) is torch.Tensor
        and weights.dtype == torch.float32
        and weights.shape == (k,)
        and weights.is_contiguous()
        and not weights.is_meta
        and not weights.requires_grad
    )


def _dense(shape, stride):
    """Whether the elements fill one block of memory, in whatever order."""
    if 0 in shape:
        return True
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def _same_layout(a, b):
    return all(size < 2 or s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))
