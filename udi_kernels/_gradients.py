"""Inner products and weighted sums of gradients, each a list of one tensor per parameter, without concatenation."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from numbers import Integral
from operator import itemgetter
from types import NoneType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import register_fake

from . import reference
from ._ops import FLOATING, LIBRARY, dtensors, load_cuda, native, not_a_tensor, ops

Gradients = Sequence[Sequence[Tensor | None]] | Sequence[Tensor | None]  # the second form: stacked


def gramian(grads: Gradients, *, stacked: bool = False) -> Tensor:
    r"""All inner products of K gradients: ``G[i, j] = sum_p <grads[i][p], grads[j][p]>``.

    Args:
        grads: K sequences of P tensors or None (a zero gradient), the same P parameters in each. float16, bfloat16,
            float32 or float64, on one device. A parameter's gradients share shape and dtype; those that are not dense,
            or have another memory layout than the first dense one, are copied first. Parameters may differ.
        stacked: grads is one sequence of P tensors or None instead, each of shape ``(K, *shape)``: the K gradients of a
            parameter.

    Returns:
        (K, K), symmetric, float32 (float64 if a gradient is); accumulated in float64. Repeated calls give the same
        bits: on a CPU the order of summation depends on the shapes only, on a GPU also on the alignment of the
        addresses and on the GPU model. Not differentiable.

    An entry that its dtype cannot hold is 0 or infinite. On a CPU the products behind it are not limited: those that
    float32 cannot hold are made in float64. On a GPU all products of narrower gradients are made in float32: elements
    above 1e16 can give infinity or NaN, and those below 1e-16 count as less than they are. Scale such gradients, or
    pass them in float64.

    DTensors give the Gram matrix of the whole gradients, on every rank: each rank multiplies its own shards, and one
    all-reduce, in float64, adds up. Other tensor subclasses are supported through dispatch.

    Raises:
        TypeError, ValueError: naming the first gradient that does not fit.
    """
    tensors, k, plain = _flatten("gramian", grads, stacked)
    if not plain and (dtensor := dtensors(*tensors)):
        return dtensor.gramian(_gramian, tensors, k)
    return _gramian(tensors, k)


def alignment_weights(gram: Tensor, *, anchor: int = 0, cosine: bool = False) -> Tensor:
    r"""Weights of losses by how far their gradients agree with the anchor's: UDI's controller.

    ``w_k = relu(G[anchor, k]) / sum_{j != anchor} relu(G[anchor, j])`` for k != anchor, all 0 where no gradient
    agrees, and ``w_anchor = 1`` (UDI, arXiv 2509.02281).

    Args:
        gram: (K, K) from :func:`gramian`.
        anchor: index of the loss that the others are to help.
        cosine: compares directions only: ``G[anchor, k]`` is divided by both norms first.

    Returns:
        (K,), dtype and device of ``gram``; does not synchronise.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """
    if not isinstance(gram, Tensor):
        not_a_tensor("alignment_weights", "gram", gram)
    _check_tensor("alignment_weights", "gram", gram.detach() if gram.requires_grad else gram, gram)
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"alignment_weights: gram must have shape (K, K), got {tuple(gram.shape)}")
    k = len(gram)
    if type(anchor) is not int and (isinstance(anchor, bool) or not isinstance(anchor, Integral)):  # the first is quick
        raise TypeError(f"alignment_weights: anchor must be an int, got {type(anchor).__name__}")
    if not 0 <= anchor < k:
        raise ValueError(f"alignment_weights: anchor must lie in [0, {k}), got {anchor}")
    row = gram.select(0, int(anchor))
    if cosine:
        norm = gram.diagonal().sqrt()
        own = norm.select(0, int(anchor))
        row = torch.where((norm > 0) & (own > 0), row / norm / own, 0)
    is_anchor = torch.arange(k, device=gram.device) == anchor
    # Scaled by a power of two, which changes no digit, so that the sum of K - 1 gains does not overflow.
    gain = (row.relu() * 0.5 ** (k - 2).bit_length()).masked_fill_(is_anchor, 0)
    total = gain.sum()
    return (gain / total.masked_fill_(total == 0, 1)).masked_fill_(is_anchor, 1)


def weighted_sum(
    grads: Gradients,
    weights: Tensor,
    *,
    out: Sequence[Tensor] | None = None,
    like: Iterable[Tensor] | None = None,
    stacked: bool = False,
) -> list[Tensor | None]:
    r"""``sum_k weights[k] * grads[k][p]`` for every parameter p, in one pass over the gradients.

    Args:
        grads, stacked: as for :func:`gramian`.
        weights: (K,) tensor on the gradients' device.
        out: P tensors to write to, each in the memory layout of a dense gradient of its parameter. Each may be one of
            its parameter's gradients; no other memory that is read or written may overlap it.
        like: the P parameters, instead of ``out``: the sums get their memory layouts. Pass it if ``.grad`` is set for
            a fused optimizer (``fused=True``), which reads a gradient's memory in the order of the parameter's.

    Returns:
        list of P tensors in the gradients' dtype (``out`` if given); None where all K gradients are None and no
        ``out`` is given (zeros if it is). DTensors give DTensors, without communication. Not differentiable.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """
    tensors, k, plain = _flatten("weighted_sum", grads, stacked)
    if not isinstance(weights, Tensor):
        not_a_tensor("weighted_sum", "weights", weights)
    if not (out is None or like is None):
        raise ValueError("weighted_sum: like must be None if out is given, whose layouts the sums have")
    written = None if out is None else _output_list("weighted_sum", out)
    parameters = None if like is None else _tensor_list("weighted_sum", "like", like)
    if not plain and (dtensor := dtensors(*tensors)):
        return dtensor.weighted_sum(_weighted_sum, tensors, k, weights, written, parameters)
    return _weighted_sum(tensors, k, weights, written, parameters)


class GradientPlan:
    """:func:`gramian` and :func:`weighted_sum` of gradients in fixed buffers, prepared once.

    A call then costs a few microseconds of host time for any number of tensors, where the functions need about one per
    tensor. It reads the buffers when it runs, on the current stream. Each ``gramian`` has its own scratch memory, so
    calls may overlap on several streams; two of ``weighted_sum`` may not, as they write the same ``out``. A CUDA graph
    with a call in it only holds addresses: keep the plan, which keeps the buffers, as long as the graph.

    Args:
        grads, stacked: as for :func:`gramian`; the plan keeps references. Fill these buffers in place: the plan does
            not see a gradient that is replaced by another tensor (``zero_grad(set_to_none=True)``).
        out: as for :func:`weighted_sum`; by default allocated at the first ``weighted_sum``.

    Raises:
        TypeError, ValueError: as the functions do, and for gradients that are not dense, and for tensor subclasses
            without memory of their own, such as DTensor.
        RuntimeError: at a call, if memory, dtype or layout of a buffer has changed since the plan was made.
    """

    def __init__(self, grads: Gradients, *, out: Sequence[Tensor] | None = None, stacked: bool = False) -> None:
        self._tensors, k, _ = _flatten("GradientPlan", grads, stacked)
        self.out: list[Tensor | None] | None = None if out is None else _output_list("GradientPlan", out)
        for name, t in zip(_names(len(self._tensors), k), self._tensors, strict=True):
            _refuse_subclass(name, t)
        for p, t in enumerate(self.out or ()):
            _refuse_subclass(f"out[{p}]", t)
        plan = torch.classes.udi_kernels.GradientPlan if _served(self._tensors) else _ReferencePlan.for_plan
        self._plan = plan(self._tensors, k, self.out)
        self._gramian, self._weighted_sum = self._plan.gramian, self._plan.weighted_sum  # 2 us to look up

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "GradientPlan: a plan holds addresses of its buffers and cannot be copied or pickled; "
            "make a new plan of the copied gradients"
        )

    def gramian(self) -> Tensor:
        """(K, K), a new tensor; see :func:`gramian`."""
        return self._gramian()

    def weighted_sum(self, weights: Tensor) -> list[Tensor | None]:
        """Writes ``out`` in place and returns it, the same list at each call; see :func:`weighted_sum`."""
        if not isinstance(weights, Tensor):
            not_a_tensor("GradientPlan", "weights", weights)
        if self.out is None:
            self.out = _with_none(self._plan.allocate(), self._tensors)
        self._weighted_sum(weights)
        return self.out


def _gramian(tensors: list[Tensor | None], k: int | None, wide: bool = False) -> Tensor:
    if _served(tensors):
        return ops.gramian.default(tensors, k, wide)
    return _gramian_reference(tensors, k, wide)


def _weighted_sum(
    tensors: list[Tensor | None], k: int | None, weights: Tensor, out: list[Any] | None, like: list[Any] | None = None
) -> list[Tensor | None]:
    if not _served(tensors):
        plan = _ReferencePlan("weighted_sum", tensors, k, out)
        if like is not None:
            plan.out = _allocate_like("weighted_sum", like, plan.grads)
        return plan.weighted_sum(weights)
    if out is None:
        return _with_none(ops.weighted_sum.default(tensors, k, weights, like), tensors)
    ops.weighted_sum_out.default(out, tensors, k, weights)
    return out


def _flatten(op: str, grads: Gradients, stacked: bool) -> tuple[list[Tensor | None], int | None, bool]:
    """The tensors as the ops take them, K, and whether all are plain tensors, of no subclass.

    The tensors are K*P or None, list after list; or, if stacked, P, and K is None.
    """
    if isinstance(grads, Tensor):
        raise TypeError(f"{op}: grads must be a sequence, got a tensor; pass [grads] and stacked=True for K stacked")
    if not isinstance(grads, Iterable):
        raise TypeError(f"{op}: grads must be a sequence of sequences of tensors, got {type(grads).__name__}")
    k: int | None
    tensors: list[Any]
    if stacked:
        tensors, k = list(grads), None
    else:
        rows: list[Any] = [row if type(row) in (list, tuple) else _row(op, i, row) for i, row in enumerate(grads)]
        for i, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise ValueError(f"{op}: grads[{i}] must have length {len(rows[0])} as grads[0] has, got {len(row)}")
        tensors, k = list(chain.from_iterable(rows)), len(rows)
    plain = {*map(type, tensors)} <= {Tensor, torch.nn.Parameter, NoneType}
    if not plain:  # which jagged tensors are not either
        for name, t in zip(_names(len(tensors), k), tensors, strict=True):
            if not (t is None or isinstance(t, Tensor)):
                raise TypeError(f"{op}: {name} must be a tensor or None, got {type(t).__name__}")
            if t is not None and t.is_nested:
                raise ValueError(f"{op}: {name} must be dense, got a nested tensor; call .to_padded_tensor(0)")
    if all(t is None for t in tensors):
        raise ValueError(f"{op}: grads must hold at least one tensor, got none")
    return tensors, k, plain


def _names(count: int, k: int | None) -> Iterable[str]:
    if k is None:
        return (f"grads[{p}]" for p in range(count))
    return (f"grads[{i}][{p}]" for i in range(k) for p in range(count // k))


def _row(op: str, i: int, row: object) -> Sequence[Tensor | None]:
    if isinstance(row, Tensor):
        raise TypeError(
            f"{op}: grads[{i}] must be a sequence of tensors, got a tensor; "
            "pass stacked=True if each tensor holds K gradients, (K, *shape), and [tensor] if it is a whole gradient"
        )
    if not isinstance(row, Iterable):
        raise TypeError(f"{op}: grads[{i}] must be a sequence of tensors, got {type(row).__name__}")
    return list(row)


def _tensor_list(op: str, name: str, value: Iterable[Tensor]) -> list[Any]:
    if isinstance(value, Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"{op}: {name} must be a sequence of tensors, got {type(value).__name__}")
    for p, t in enumerate(tensors := list(value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name}[{p}] must be a tensor, got {'None' if t is None else type(t).__name__}")
    return tensors


def _output_list(op: str, out: Sequence[Tensor]) -> list[Any]:
    tensors = _tensor_list(op, "out", out)
    for p, t in enumerate(tensors):
        if not is_compiling() and t.is_neg():
            raise ValueError(f"{op}: out[{p}] must not be a negative view; call .resolve_neg()")
    return tensors


def _refuse_subclass(name: str, t: Tensor | None) -> None:
    """A plan reads the memory of its tensors; subclasses that override dispatch may have none."""
    if t is not None and type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"GradientPlan: {name} must be a plain tensor, whose memory the plan reads, got a {type(t).__name__}; "
            "call gramian and weighted_sum, or pass what it holds (.to_local() of a DTensor)"
        )


def _served(tensors: list[Tensor | None]) -> bool:
    """Whether csrc serves; loads the kernels for the tensors' device."""
    if next(t for t in tensors if t is not None).is_cuda:
        load_cuda()
    return native()


def _with_none(out: list[Tensor], tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Replaces by None what the ops return for a parameter without gradient, a tensor without elements."""
    if all(t is not None for t in tensors):
        return out  # type: ignore[return-value]
    return [None if all(t is None for t in tensors[p :: len(out)]) else value for p, value in enumerate(out)]


# --- where csrc does not serve, and for fake kernels: what csrc/ops/gradients.h checks, in simpler words -----------


@dataclass(frozen=True)
class _Lists:
    """K lists of P tensors or None, and for each parameter a gradient in the layout of results, or None if all are."""

    lists: list[list[Tensor | None]]
    like: list[Tensor | None]
    sum_dtype: torch.dtype


def _checked(
    op: str,
    tensors: Sequence[Tensor | None],
    k: int | None,
    may_copy: bool = True,
    preferred: Sequence[Tensor] | None = None,
) -> _Lists:
    """preferred: a tensor for each parameter, whose layout results have if a dense gradient has it."""
    first = next(t for t in tensors if t is not None)
    for name, t in zip(_names(len(tensors), k), tensors, strict=True):
        if t is None:
            continue
        _check_tensor(op, name, t, first)
        if k is None and not (t.dim() and len(t) == len(first) > 0):
            raise ValueError(f"{op}: {name} must hold K > 0 gradients, as many as the others, got {tuple(t.shape)}")
        if not (may_copy or _dense(t if k is not None else t[0])):
            raise ValueError(f"{op}: {name} must be dense; call .clone() and keep that")
    if k is None:
        lists = [[None if t is None else t[i] for t in tensors] for i in range(len(first))]
    else:
        params = len(tensors) // k
        lists = [list(tensors[i * params : (i + 1) * params]) for i in range(k)]
    like: list[Tensor | None] = []
    for p, column in enumerate(zip(*lists, strict=True)):
        present = {f"grads[{i}][{p}]": t for i, t in enumerate(column) if t is not None}
        if not present:
            like.append(None)
            continue
        dense = list(filter(_dense, present.values())) or [next(iter(present.values())).contiguous()]
        if preferred is not None and p < len(preferred):
            dense.sort(key=lambda t: _strides(t) != _strides(preferred[p]))
        for name, t in present.items():
            _check_alike(op, name, t, dense[0], strides=not may_copy)
        like.append(dense[0])
    return _Lists(lists, like, reference.accumulation_dtype(*(t.dtype for t in tensors if t is not None)))


def _check_tensor(op: str, name: str, t: Tensor, other: Tensor) -> None:
    if t.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be of a floating-point dtype, got {t.dtype}")
    if t.is_nested:
        raise ValueError(f"{op}: {name} must be dense, got a nested tensor")
    if t.layout != torch.strided or t.device != other.device:
        raise ValueError(f"{op}: {name} must be dense and on {other.device}, got {t.layout} on {t.device}")
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} must not require grad")


def _check_alike(op: str, name: str, t: Tensor, like: Tensor, strides: bool = True) -> None:
    if t.dtype != like.dtype or t.shape != like.shape or (strides and _strides(t) != _strides(like)):
        wanted, got = (f"shape {tuple(x.shape)}, strides {x.stride()} and {x.dtype}" for x in (like, t))
        raise ValueError(f"{op}: {name} must have {wanted}, got {got}")


def _strides(t: Tensor) -> list[int]:
    """The strides of dimensions of more than one element."""
    return [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1] if t.numel() else []


def _dense(t: Tensor) -> bool:
    """Whether memory holds the elements themselves, in any order and without gaps."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(t.stride(), t.shape, strict=True) if size != 1):
        if step != expected and t.numel():
            return False
        expected *= size
    return not t.is_neg()


def _check_weights(op: str, weights: Tensor, g: _Lists) -> Tensor:
    _check_tensor(op, "weights", weights, next(t for t in g.like if t is not None))
    if weights.shape != (len(g.lists),):
        raise ValueError(f"{op}: weights must have shape ({len(g.lists)},), got {tuple(weights.shape)}")
    return weights.to(g.sum_dtype)


def _check_out(op: str, out: Sequence[Tensor], g: _Lists) -> None:
    if len(out) != len(g.like):
        raise ValueError(f"{op}: out must have length {len(g.like)}, got {len(out)}")
    for p, (t, like) in enumerate(zip(out, g.like, strict=True)):
        _check_tensor(op, f"out[{p}]", t, next(t for t in g.like if t is not None))
        _check_alike(op, f"out[{p}]", t, t.contiguous() if like is None else like)


def _check_overlap(op: str, out: Sequence[Tensor], g: _Lists) -> None:
    """No output shares memory with another output, or with a gradient that it is not itself."""
    plain = all(type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ for t in out)
    if is_compiling() or not plain or any(t.device.type not in ("cpu", "cuda") for t in out):
        return
    written = sorted((*_memory(t), p) for p, t in enumerate(out) if t.numel())
    for (_, end, q), (begin, _, p) in pairwise(written):
        if begin < end:
            raise ValueError(f"{op}: out[{p}] must not overlap out[{q}]; call .clone() on one of them")
    for i, row in enumerate(g.lists):
        for p, t in enumerate(row):
            if t is None or not t.numel() or not _dense(t) or _strides(t) != _strides(out[p]):  # csrc copies those
                continue
            begin, end = _memory(t)
            n = bisect_right(written, begin, key=itemgetter(1))  # the first output that ends beyond
            if n < len(written) and written[n][0] < end and written[n] != (begin, end, p):
                raise ValueError(f"{op}: out[{written[n][2]}] must not overlap grads[{i}][{p}]; call .clone() on one")


def _memory(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.data_ptr() + t.nbytes


def _allocate_like(op: str, like: Sequence[Tensor], g: _Lists) -> list[Tensor | None]:
    """A tensor in the layout of each parameter that has a gradient."""
    if len(like) != len(g.like):
        raise ValueError(f"{op}: like must have length {len(g.like)}, got {len(like)}")
    out: list[Tensor | None] = []
    for p, (t, grad) in enumerate(zip(like, g.like, strict=True)):
        if grad is not None and (t.layout != torch.strided or t.is_nested or t.shape != grad.shape):
            got = "a nested tensor" if t.is_nested else f"{t.layout}, {tuple(t.shape)}"
            raise ValueError(f"{op}: like[{p}] must be dense, of shape {tuple(grad.shape)}, got {got}")
        out.append(None if grad is None else torch.empty_like(t, dtype=grad.dtype, device=grad.device))
    return out


class _ReferencePlan:
    """What csrc's GradientPlan does, in plain torch."""

    def __init__(self, op: str, tensors: list, k: int | None, out: list | None, may_copy: bool = True) -> None:
        self.op, self.grads = op, _checked(op, tensors, k, may_copy, out)
        if out is not None:
            _check_out(op, out, self.grads)
            _check_overlap(op, out, self.grads)
        self.out = out

    @classmethod
    def for_plan(cls, tensors: list, k: int | None, out: list | None) -> "_ReferencePlan":
        return cls("GradientPlan", tensors, k, out, may_copy=False)

    def allocate(self) -> list:
        self.out = [None if t is None else torch.empty_like(t) for t in self.grads.like]
        return self.out

    def gramian(self) -> Tensor:
        return reference.gramian(self.grads.lists)

    def weighted_sum(self, weights: Tensor) -> list:
        sums = reference.weighted_sum(self.grads.lists, _check_weights(self.op, weights, self.grads))
        out = self.allocate() if self.out is None else self.out
        for t, value in zip(out, sums, strict=True):
            if t is not None:
                t.zero_() if value is None else t.copy_(value)
        return out


# --- the ops: k lists, one after the other; or, without k, P tensors of shape (K, *shape) ------------------------

# wide: a float64 result in any case. Where a parameter has no gradient, its sum is a tensor without elements.
LIBRARY.define("gramian(Tensor?[] grads, int? k, bool wide) -> Tensor")
LIBRARY.define("gramian_reference(Tensor?[] grads, int? k, bool wide) -> Tensor")
LIBRARY.define("weighted_sum(Tensor?[] grads, int? k, Tensor weights, Tensor[]? like=None) -> Tensor[]")
LIBRARY.define("weighted_sum_reference(Tensor?[] grads, int? k, Tensor weights) -> Tensor[]")
LIBRARY.define("weighted_sum_out(Tensor(a!)[] out, Tensor?[] grads, int? k, Tensor weights) -> ()")


@register_fake("udi_kernels::gramian", lib=LIBRARY)
def _(grads, k, wide):
    g = _checked("gramian", grads, k)
    like = next(t for t in g.like if t is not None)
    return like.new_empty((len(g.lists),) * 2, dtype=torch.float64 if wide else g.sum_dtype)


@register_fake("udi_kernels::weighted_sum", lib=LIBRARY)
def _(grads, k, weights, like=None):
    g = _checked("weighted_sum", grads, k)
    _check_weights("weighted_sum", weights, g)
    out = g.like if like is None else _allocate_like("weighted_sum", like, g)
    return [weights.new_empty(0) if t is None else torch.empty_like(t) for t in out]


@register_fake("udi_kernels::weighted_sum_out", lib=LIBRARY)
def _(out, grads, k, weights):
    g = _checked("weighted_sum", grads, k, preferred=out)
    _check_weights("weighted_sum", weights, g)
    _check_out("weighted_sum", out, g)


def _gramian_reference(grads, k, wide):
    lists = _checked("gramian", grads, k).lists
    return reference.gramian(lists, torch.float64 if wide else None)


def _weighted_sum_reference(grads, k, weights):
    sums = reference.weighted_sum(_checked("weighted_sum", grads, k).lists, weights)
    return [weights.new_empty(0) if t is None else t for t in sums]


LIBRARY.impl("gramian_reference", _gramian_reference, "CompositeImplicitAutograd")
LIBRARY.impl("weighted_sum_reference", _weighted_sum_reference, "CompositeImplicitAutograd")
