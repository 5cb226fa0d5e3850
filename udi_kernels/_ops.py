"""Declares the ops of `torch.ops.udi_kernels`: schemas, fake kernels, reference, launchers and double backward.

csrc/ops registers the ops' graph nodes, which check their arguments, and csrc/cpu the CPU kernels, once `native` has
loaded them. A reduction travels as an int, its index in `REDUCTIONS`.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Number
from types import NoneType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from . import _build
from .reference import accumulation_dtype

REDUCTIONS = ("none", "sum", "mean")
NONE, SUM, MEAN = range(3)  # enum Reduction in csrc/enums.h
CODES = {name: code for code, name in enumerate(REDUCTIONS)}

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

LIBRARY = Library("udi_kernels", "DEF")
ops: Any = torch.ops.udi_kernels


def native() -> bool:
    """Whether csrc serves; if not, the reference does. The first call loads csrc, and builds it if necessary."""
    return _build.load("cpu") is not None


def load_cuda() -> None:
    """Loads the CUDA kernels of `gramian` and `weighted_sum`, where that is possible."""
    _load_cuda()


# What torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo, 1.3 s.
native._dynamo_marked_constant = load_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _load_cuda() -> bool:
    cuda = native() and _build.load("cuda")
    if cuda:
        torch.classes.udi_kernels.GradientPlan.use_cuda(cuda.make_plan)
    return bool(cuda)


def backend(family: str, device_type: str, dtype: torch.dtype) -> str:
    """What serves this family of ops ("losses", "statistics" or "gradients") there."""
    if device_type == "cpu" and native():
        return "C++"
    if device_type == "cuda" and family == "gradients" and _load_cuda():
        return "CUDA"
    # Triton's losses compute in float32, so the reference serves float64. Their graph nodes are in C++.
    by_triton = family == "statistics" or (family == "losses" and dtype != torch.float64)
    if device_type == "cuda" and by_triton and find_spec("triton") and native():
        return "Triton"
    return "reference"


def reduction_code(op: str, reduction: str) -> int:
    """The reduction as ops take it."""
    code = CODES.get(reduction)
    if code is None:
        raise ValueError(f"{op}: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    return code


def check_number(op: str, name: str, value: object) -> None:
    """Raises TypeError unless `value` is a real number, and ValueError if no float is as large."""
    if isinstance(value, (float, torch.SymFloat, torch.SymInt)):
        return
    got, hint = type(value).__name__, ""
    if isinstance(value, Tensor):  # reading it would wait for its device
        got, hint = "a tensor", f", which would get no gradient; pass {name}.item()"
    elif isinstance(value, Number) and not isinstance(value, (bool, complex)):
        try:
            float(value)  # type: ignore[arg-type]
            return
        except OverflowError:
            raise ValueError(f"{op}: {name} is out of range, got a number beyond 1.8e308") from None
        except TypeError:  # another complex number
            pass
    raise TypeError(f"{op}: {name} must be a number, got {got}{hint}")


def dtensors(*tensors: object) -> Any:
    """The module for DTensors if one of these is one; then its slow import has been made already."""
    loaded = sys.modules.get("torch.distributed.tensor")
    if loaded and any(isinstance(t, loaded.DTensor) for t in tensors):
        return importlib.import_module("._dtensor", __package__)
    return None


def not_a_tensor(op: str, name: str, value: object) -> NoReturn:
    raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


ACCEPTED: dict[str, Any] = {
    "Tensor": Tensor,
    "Tensor?": (NoneType, Tensor),
    "float": float,  # and what `_number` takes
    "bool": bool,
    "int": object,  # the dispatcher checks it
}


@dataclass(frozen=True)
class Argument:
    """An argument of an op.

    schema: type and name, such as "Tensor? weight". grad: whether it gets a gradient; such arguments are promoted to
    their common dtype. The rest is for `Op.checked`:

    shape: names of the dimensions, such as "N D". A name stands for the same size in all arguments, "C+" for one that
    is not 0, a leading "*" for any number of dimensions. dtypes: those of a tensor. valid: the check of a number.
    """

    schema: str
    shape: str = ""
    dtypes: Sequence[torch.dtype] = FLOATING
    grad: bool = False
    valid: Callable[[Any], bool] = lambda number: True

    @property
    def type(self) -> str:
        return self.schema.split()[0]

    @property
    def name(self) -> str:
        return self.schema.split()[1]

    def fits(self, shape: Sequence[Any], sizes: dict[str, Any]) -> bool:
        """Whether the shape is right, given `sizes`, those of earlier arguments; adds its own."""
        names = self.shape.split()
        if "*" in names and len(shape) >= len(names) - 1:
            leading = len(shape) - len(names) + 1
            shape = [shape[:leading], *shape[leading:]]
        return len(shape) == len(names) and all(
            sizes.setdefault(name.strip("+"), size) == size and (size != 0 or "+" not in name)
            for name, size in zip(names, shape, strict=True)
        )


def _loss(reduction: int = SUM, **arguments: Any) -> Tensor:
    """The loss that kernels return, for fake kernels."""
    first = next(iter(arguments.values()))
    return first.new_empty(first.shape[:1] if reduction == NONE else (), dtype=accumulation_dtype(first.dtype))


# Kernels multiply by 1/T, which must be a normal number in float32; check_temperature in csrc/ops/checks.h.
TEMPERATURE = Argument("float temperature", valid=lambda temperature: 1e-37 <= temperature <= 1e37)


class Op:
    """The declaration of an op. A call checks the arguments' types, then calls csrc or, without it, the reference.

    Registers ``name`` and ``name_reference``, the kernels' ``name_fwd`` and, if an argument gets a gradient, their
    ``name_bwd``. Kernels get those arguments in one dtype. ``name_bwd`` takes the gradient of the result, the tensors,
    what the forward kernel saved, the numbers, and for each gradient whether it is needed. The reference makes
    ``name_bwd`` differentiable, for create_graph and all higher derivatives.

    Args:
        arguments: in the order of the schema; kernels get them in this order too.
        reference: called with the arguments by name, the reduction as a string.
        triton: the module of udi_kernels/triton with the launchers ``name_fwd`` and ``name_bwd``.
        result: what the forward kernel returns, as a fake tensor; called with the arguments by name. By default a loss.
        saved: shapes of what the forward kernel saves for the backward kernel, in float32 (float64 for float64);
            called with the arguments by name.
        prepared: arguments whose gradients the forward kernel prepares; it takes a flag ``need_...`` for each.
        original: for an argument that kernels take in another form, the function that undoes it.
        empty_grad: makes the memory of an argument's gradient; by default contiguous.
    """

    def __init__(
        self,
        name: str,
        *arguments: Argument,
        reference: Callable[..., Tensor],
        triton: str,
        result: Callable[..., Tensor] = _loss,
        saved: Mapping[str, Callable[..., Sequence[int]]] | None = None,
        prepared: Sequence[str] = (),
        original: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        empty_grad: Callable[[Tensor], Tensor] = lambda x: x.new_empty(x.shape),
    ) -> None:
        self.name, self.arguments, self.result, self.saved = name, arguments, result, saved or {}
        self.formula, self.original, self.empty_grad = reference, original or {}, empty_grad
        self.names = [a.name for a in arguments]
        self.grads = [a.name for a in arguments if a.grad]
        self.accepted = tuple(ACCEPTED[a.type] for a in arguments)

        schemas = [a.schema for a in arguments]
        tensors = [schema for schema in schemas if schema.startswith("Tensor")]
        forward = [*schemas, *(f"bool need_{name}" for name in prepared)]
        backward = ["Tensor grad", *tensors, *(f"Tensor {name}" for name in self.saved)]
        backward += [*(schema for schema in schemas if schema not in tensors), *(f"bool need_{x}" for x in self.grads)]
        self.forward_names, self.backward_names = ([x.split()[1] for x in way] for way in (forward, backward))

        define(name, schemas)
        self.overload = getattr(ops, name).default
        define(f"{name}_reference", schemas)
        LIBRARY.impl(f"{name}_reference", self._reference, "CompositeImplicitAutograd")
        define(f"{name}_fwd", forward, 1 + len(self.saved))
        register_fake(f"udi_kernels::{name}_fwd", self.fake_forward, lib=LIBRARY)
        launched_by_triton(triton, f"{name}_fwd")
        if self.grads:
            define(f"{name}_bwd", backward, len(self.grads))
            register_fake(f"udi_kernels::{name}_bwd", self._fake_backward, lib=LIBRARY)
            launched_by_triton(triton, f"{name}_bwd")
            second = self._double_backward
            register_autograd(f"udi_kernels::{name}_bwd", second, setup_context=_keep_inputs, lib=LIBRARY)

    def __call__(self, *values: Any) -> Tensor:
        if not all(map(isinstance, values, self.accepted)):  # in a loop it takes 0.4 us
            self._check_types(values)
        return self.overload(*values) if native() else self._reference(*self.checked(*values))

    def _check_types(self, values: Sequence[Any]) -> None:
        for argument, value in zip(self.arguments, values, strict=True):
            if argument.type == "float":
                check_number(self.name, argument.name, value)
            elif argument.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"{self.name}: {argument.name} must be a bool, got {type(value).__name__}")
            elif not isinstance(value, ACCEPTED[argument.type]):
                not_a_tensor(self.name, argument.name, value)
            elif isinstance(value, Tensor) and value.is_nested:
                raise ValueError(f"{self.name}: {argument.name} must be dense, got a nested tensor")

    def checked(self, *values: Any) -> list[Any]:
        """The arguments as the reference takes them, after the checks that csrc makes where it serves."""
        self._check_types(values)
        sizes: dict[str, Any] = {}
        device, dtype = values[0].device, values[0].dtype
        for argument, value in zip(self.arguments, values, strict=True):
            where = f"{self.name}: {argument.name}"
            if isinstance(value, Tensor):
                if value.dtype not in argument.dtypes:
                    raise TypeError(f"{where} must not be of {value.dtype}")
                if value.layout != torch.strided or value.device != device or not argument.fits(value.shape, sizes):
                    got = f"got {value.layout}, {value.device}, {tuple(value.shape)}"
                    raise ValueError(f"{where} must be dense, on {device} and of shape ({argument.shape}), {got}")
                if argument.grad:
                    dtype = torch.promote_types(dtype, value.dtype)
                elif self.grads and value.requires_grad and torch.is_grad_enabled():
                    raise ValueError(f"{where} gets no gradient, but requires one")
            elif value is not None and not argument.valid(value):
                raise ValueError(f"{where} is out of range, got {value}")
        return [x.to(dtype) if argument.grad else x for argument, x in zip(self.arguments, values, strict=True)]

    def _reference(self, *values: Any) -> Tensor:
        named = dict(zip(self.names, values, strict=True))
        if "reduction" in named:
            named["reduction"] = REDUCTIONS[named["reduction"]]
        return self.formula(**named)

    def fake_forward(self, *values: Any) -> Any:
        named = dict(zip(self.forward_names, values, strict=True))
        wide = values[0].new_empty(0, dtype=accumulation_dtype(values[0].dtype))
        saved = [wide.new_empty(shape(**named)) for shape in self.saved.values()]
        return (self.result(**named), *saved) if saved else self.result(**named)

    def _fake_backward(self, *values: Any) -> Any:
        named = dict(zip(self.backward_names, values, strict=True))
        grads = [self.empty_grad(named[x]) if named[f"need_{x}"] else named[x].new_empty(0) for x in self.grads]
        return tuple(grads) if len(grads) > 1 else grads[0]

    def _double_backward(self, ctx: Any, *grads: Any) -> tuple:
        values = [x if t is None else t for t, x in zip(ctx.saved_tensors, ctx.rest, strict=True)]
        named, create_graph = dict(zip(self.backward_names, values, strict=True)), torch.is_grad_enabled()
        needs = [named[f"need_{x}"] for x in self.grads]
        needed = [named[x] for x, need in zip(self.grads, needs, strict=True) if need]
        present = [g for g, need in zip(grads, needs, strict=True) if need]
        for name, original in self.original.items():
            named[name] = None if named[name] is None else original(named[name])
        with torch.enable_grad():
            result = self._reference(*map(named.get, self.names))
            first = torch.autograd.grad(result, needed, named["grad"].reshape(result.shape), create_graph=True)
        wanted = [x for x in ("grad", *self.grads) if named[x].requires_grad]
        inputs = [named[x] for x in wanted]
        second = torch.autograd.grad(first, inputs, present, allow_unused=True, create_graph=create_graph)
        return tuple(map(dict(zip(wanted, second, strict=True)).get, self.backward_names))


def _keep_inputs(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
    ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]


def define(name: str, arguments: Sequence[str], results: int = 1) -> None:
    """Defines an op that returns so many tensors."""
    returned = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    LIBRARY.define(f"{name}({', '.join(arguments)}) -> {returned}")


def launched_by_triton(module: str, name: str) -> None:
    """Registers a launcher of udi_kernels.triton; it is imported at the first call, which is slow."""

    @functools.cache
    def load() -> Callable:
        return getattr(importlib.import_module(f"udi_kernels.triton.{module}"), name)

    if find_spec("triton"):
        LIBRARY.impl(name, lambda *args: load()(*args), "CUDA")
