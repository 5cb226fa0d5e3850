"""What the files of the ops share: the library `torch.ops.udi_kernels`, and who serves it.

An op's file defines its schemas, fake kernels and derivatives; csrc/ops registers the op itself and CPU kernels, once
`native` has loaded it; launchers of GPU kernels register here. Reductions travel as an int: index into `REDUCTIONS`.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch.library import Library, register_autograd

from . import _build
from .reference import accumulation_dtype

REDUCTIONS = ("none", "sum", "mean")  # enum Reduction in csrc/enums.h

LIBRARY = Library("udi_kernels", "DEF")
ops: Any = torch.ops.udi_kernels


def native() -> bool:
    """Whether csrc serves, which the first call loads, and builds if need be; where it does not, the reference does."""
    return _build.load("cpu") is not None


def load_cuda() -> None:
    """Makes sure that the kernels on pointer tables serve GPUs if they can."""
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
    # Triton's losses compute in float32, so float64 is left to the reference. What makes them differentiable is C++.
    by_triton = family == "statistics" or (family == "losses" and dtype != torch.float64)
    if device_type == "cuda" and by_triton and find_spec("triton") and native():
        return "Triton"
    return "reference"


def launched_by_triton(module: str, names: Sequence[str]) -> None:
    """Registers launchers of udi_kernels.triton, imported at their first call: that is slow, and may be missing."""

    def launcher(name: str) -> Callable:
        @functools.cache
        def load() -> Callable:
            return getattr(importlib.import_module(f"udi_kernels.triton.{module}"), name)

        return lambda *args: load()(*args)

    for name in names if find_spec("triton") else ():
        LIBRARY.impl(name, launcher(name), "CUDA")


def served_by_reference(name: str, function: Callable) -> None:
    """Registers what the op falls back to where no kernel serves."""
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")


def differentiable(name: str, inputs: int, loss: Callable) -> None:
    """Gives a backward op an autograd, by the reference: it serves create_graph, and so all higher derivatives.

    inputs: how many follow the first argument, the loss's gradient; loss: the reference, of the arguments up to the
    flags, which say what inputs need a gradient.
    """

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in inputs))
        ctx.rest = [None if isinstance(x, torch.Tensor) else x for x in inputs]

    def backward(ctx: Any, *grads: Any) -> tuple:
        args = [x if t is None else t for t, x in zip(ctx.saved_tensors, ctx.rest, strict=True)]
        flags, create_graph = args[-inputs:], torch.is_grad_enabled()
        needed = [x for x, need in zip(args[1:], flags, strict=False) if need]
        present = [g for g, need in zip(grads, flags, strict=True) if need]
        with torch.enable_grad():
            first = torch.autograd.grad(loss(*args[1:-inputs]), needed, args[0], create_graph=True)
        wanted = [i for i in range(1 + inputs) if args[i].requires_grad]
        second = torch.autograd.grad(
            first, [args[i] for i in wanted], present, allow_unused=True, create_graph=create_graph
        )
        result = dict(zip(wanted, second, strict=True))
        return tuple(map(result.get, range(len(args))))

    register_autograd(f"udi_kernels::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def loss_like(x: torch.Tensor, reduction: int, rows: int) -> torch.Tensor:
    """The loss that kernels return, for fake kernels."""
    return x.new_empty((rows,) if reduction == 0 else (), dtype=accumulation_dtype(x.dtype))


def grads_like(tensors: Sequence[torch.Tensor], needs: Sequence[bool]) -> tuple[torch.Tensor, ...]:
    """The gradients that kernels return, for fake kernels: one that is not asked for is empty."""
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(tensors, needs, strict=True))
