"""Schemas and fake kernels of `torch.ops.udi_kernels`, and which backend serves them.

CPU and CUDA C++ register their kernels when `_build` loads them; the Triton launchers register here.
Reductions travel as an int: index into `REDUCTIONS`.
"""

import functools
import importlib
from importlib.util import find_spec

import torch
from torch.library import Library, register_autograd, register_fake

from . import _build, reference
from .reference import accumulation_dtype

REDUCTIONS = ("none", "sum", "mean")

_lib = Library("udi_kernels", "DEF")
# The losses, differentiable and for any arguments that fit; csrc/cpu/autograd.cpp makes them of the kernels below.
_lib.define(
    "js_div(Tensor input, Tensor target, Tensor? weight, float beta, float temperature, int reduction) -> Tensor"
)
_lib.define("club_mi(Tensor mu, Tensor logvar, Tensor y, int reduction) -> Tensor")
_lib.define("club_nll(Tensor mu, Tensor logvar, Tensor y) -> Tensor")
# stats: (6, R), what the backward of the same backend needs. A gradient that is not asked for comes back empty.
_lib.define(
    "js_div_fwd(Tensor input, Tensor target, Tensor? weight, float beta, float temperature, int reduction)"
    " -> (Tensor loss, Tensor stats)"
)
_lib.define(
    "js_div_bwd(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor stats, float beta,"
    " float temperature, int reduction, bool need_input, bool need_target) -> (Tensor, Tensor)"
)
# stats: (5, D) column statistics of the shifted data, the shift first.
_lib.define("club_mi_fwd(Tensor mu, Tensor logvar, Tensor y, int reduction) -> (Tensor loss, Tensor stats)")
_lib.define(
    "club_mi_bwd(Tensor grad, Tensor mu, Tensor logvar, Tensor y, Tensor stats, int reduction,"
    " bool need_mu, bool need_logvar, bool need_y) -> (Tensor, Tensor, Tensor)"
)
_lib.define("club_nll_fwd(Tensor mu, Tensor logvar, Tensor y) -> Tensor")
_lib.define(
    "club_nll_bwd(Tensor grad, Tensor mu, Tensor logvar, Tensor y, bool need_mu, bool need_logvar, bool need_y)"
    " -> (Tensor, Tensor, Tensor)"
)
# grads: K*P tensors, list after list; or, stacked, P tensors of shape (K, *shape).
_lib.define("gramian(Tensor?[] grads, int k, bool stacked) -> Tensor")
_lib.define("weighted_sum(Tensor(a!)[] out, Tensor?[] grads, Tensor weights, bool stacked) -> ()")


def _loss_like(x, reduction, rows):
    return x.new_empty((rows,) if reduction == 0 else (), dtype=accumulation_dtype(x.dtype))


def _grads_like(tensors, needs):
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(tensors, needs, strict=True))


@register_fake("udi_kernels::js_div_fwd", lib=_lib)
def _(input, target, weight, beta, temperature, reduction):
    stats = input.new_empty((6, input.shape[0]), dtype=accumulation_dtype(input.dtype))
    return _loss_like(input, reduction, input.shape[0]), stats


@register_fake("udi_kernels::js_div_bwd", lib=_lib)
def _(grad, input, target, weight, stats, beta, temperature, reduction, need_input, need_target):
    return _grads_like((input, target), (need_input, need_target))


@register_fake("udi_kernels::club_mi_fwd", lib=_lib)
def _(mu, logvar, y, reduction):
    stats = mu.new_empty((5, mu.shape[1]), dtype=accumulation_dtype(mu.dtype))
    return _loss_like(mu, reduction, mu.shape[0]), stats


@register_fake("udi_kernels::club_mi_bwd", lib=_lib)
def _(grad, mu, logvar, y, stats, reduction, need_mu, need_logvar, need_y):
    return _grads_like((mu, logvar, y), (need_mu, need_logvar, need_y))


@register_fake("udi_kernels::club_nll_fwd", lib=_lib)
def _(mu, logvar, y):
    return _loss_like(mu, 1, None)


@register_fake("udi_kernels::club_nll_bwd", lib=_lib)
def _(grad, mu, logvar, y, need_mu, need_logvar, need_y):
    return _grads_like((mu, logvar, y), (need_mu, need_logvar, need_y))


@register_fake("udi_kernels::gramian", lib=_lib)
def _(grads, k, stacked):
    tensors = [g for g in grads if g is not None]
    return tensors[0].new_empty((k, k), dtype=accumulation_dtype(*(g.dtype for g in tensors)))


@register_fake("udi_kernels::weighted_sum", lib=_lib)
def _(out, grads, weights, stacked):
    return None


def _differentiable(name, inputs, loss):
    """Gives a backward op an autograd, by the reference: it serves create_graph, and so all higher derivatives.

    inputs: how many follow the first argument, the loss's gradient; loss: the reference, of the arguments up to the
    flags, which say what inputs need a gradient.
    """

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in inputs))
        ctx.rest = [None if isinstance(x, torch.Tensor) else x for x in inputs]

    def backward(ctx, *grads):
        args = [x if t is None else t for t, x in zip(ctx.saved_tensors, ctx.rest, strict=True)]
        flags, create_graph = args[-inputs:], torch.is_grad_enabled()
        needed = [x for x, need in zip(args[1:], flags, strict=False) if need]
        grads = [g for g, need in zip(grads, flags, strict=True) if need]
        with torch.enable_grad():
            first = torch.autograd.grad(loss(*args[1:-inputs]), needed, args[0], create_graph=True)
        wanted = [i for i in range(1 + inputs) if args[i].requires_grad]
        second = torch.autograd.grad(
            first, [args[i] for i in wanted], grads, allow_unused=True, create_graph=create_graph
        )
        result = dict(zip(wanted, second, strict=True))
        return tuple(map(result.get, range(len(args))))

    register_autograd(f"udi_kernels::{name}", backward, setup_context=setup_context, lib=_lib)


_differentiable(
    "js_div_bwd",
    2,
    lambda input, target, weight, stats, beta, temperature, reduction: reference.js_div(
        input, target, beta=beta, temperature=temperature, weight=weight, reduction=REDUCTIONS[reduction]
    ),
)
_differentiable(
    "club_mi_bwd",
    3,
    lambda mu, logvar, y, stats, reduction: reference.club_mi(mu, logvar, y, reduction=REDUCTIONS[reduction]),
)
_differentiable("club_nll_bwd", 3, reference.club_nll)


def _launcher(module, name):
    """A Triton launcher, imported at its first call: Triton is slow to import, and may be missing."""

    def call(*args):
        return getattr(importlib.import_module(f"udi_kernels.triton.{module}"), name)(*args)

    return call


for _module, _names in {"js_div": ("js_div",), "club": ("club_mi", "club_nll")}.items():
    for _name in (f"{n}_{way}" for n in _names for way in ("fwd", "bwd")):
        _lib.impl(_name, _launcher(_module, _name), "CUDA")

ops = torch.ops.udi_kernels


def served(family, device_type, dtype):
    """Whether a kernel serves this family of ops ("losses" or "gradients") there; if not, the reference does.

    The first question loads the native library, and builds it if need be.
    """
    return backend(family, device_type, dtype) != "reference"


# What torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo, 1.3 s.
served._dynamo_marked_constant = True


@functools.cache
def backend(family, device_type, dtype):
    if device_type == "cpu" and _build.load("cpu"):
        return "C++"
    if device_type == "cuda" and family == "gradients" and _build.load("cuda"):
        return "CUDA"
    # Triton kernels compute in float32, so float64 is left to the reference. What makes them differentiable is C++.
    losses = family == "losses" and dtype != torch.float64 and find_spec("triton")
    if device_type == "cuda" and losses and _build.load("cpu"):
        return "Triton"
    return "reference"
