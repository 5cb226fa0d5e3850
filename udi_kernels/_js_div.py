"""Generalized Jensen-Shannon divergence between the softmaxes of two sets of logits."""

import math
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._ops import (
    FLOATING,
    INTEGERS,
    LIBRARY,
    MEAN,
    NONE,
    TEMPERATURE,
    Argument,
    Op,
    define,
    dtensors,
    launched_by_triton,
    native,
    not_a_tensor,
    ops,
    reduction_code,
)


def js_div(
    input: Tensor,
    target: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    dim: int = -1,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Generalized Jensen-Shannon divergence over one dimension, in nats.

    With ``q = softmax(input / T)``, ``p = softmax(target / T)`` and ``m = beta p + (1 - beta) q``::

        JS = beta KL(p || m) + (1 - beta) KL(q || m)

    (Lin 1991, "Divergence measures based on the Shannon entropy"; ``beta`` as in GKD, arXiv 2306.13649.)
    The gradient in the input is ``(1 - beta)/T q (log(q/m) - KL(q || m))``, that in the target its mirror image. The
    backward pass recomputes them from the logits, so nothing of the size of the input is kept, nor are copies of views
    such as ``logits[:, :-1]``. Logits of two dtypes are converted in each pass; so are logits copied whose leading
    dimensions have more than two strides.

    The ends are the two KL divergences, as in GKD: ``beta=0`` is ``KL(p || q)``, forward KL with the target as teacher,
    and ``beta=1`` is ``KL(q || p)``, reverse KL. The value jumps there, because the formula tends to 0. KL is inf where
    only one side has a logit of -inf.

    Args:
        input: logits of q, shape (..., C), or with ``dim`` the C classes in another place; float16, bfloat16, float32
            or float64, any strides.
        target: logits of p, same shape and device; differentiable too. Logits made under ``torch.inference_mode()``
            are copied if the backward pass needs them; those made under ``torch.no_grad()`` are not.
        beta: weight of p in the mixture, a number in [0, 1], not a tensor: it gets no gradient.
        temperature: T, a number in [1e-37, 1e37]. The result is not multiplied by T². To learn T, divide both logits by
            it.
        weight: factor of each row, shape (...), floating-point, integer or bool, such as ``labels != -100``. A row of
            weight 0 is as if it were not there, whatever it holds: it is skipped, and its gradients are 0. The weight
            gets no gradient.
        reduction: ``"mean"`` over rows (with ``weight`` the weighted mean), ``"sum"`` or ``"none"``.
        dim: the dimension of the classes, such as 1 for (N, C, H, W); shapes of rows, (...), are without it. On a GPU,
            more than 1024 classes that are not adjacent in memory are copied in the forward pass.
        inplace_backward: write the gradient in the input over the input, which saves the gradient's memory and, on a
            CPU, much of the time of large calls. After the backward pass ``input`` holds its gradient. Autograd raises
            its own error where another op needs the logits for its backward pass. There is one backward pass, and no
            second derivative. The input must be the result of an op, with memory of its own: no leaf, and no view, such
            as a slice or what ``Linear`` with a bias makes of three dimensions. Without autograd it has no effect.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or shape (...) for ``"none"``. The divergence of a row is never
        negative. The mean of rows that are all masked is 0, with gradients of 0; that of no rows is NaN.

    DTensors give the value of all rows as a DTensor: a replicated scalar, or with ``"none"`` one placed as the rows
    are. Rows may be sharded over any dimensions of the mesh, and classes over one (vocabulary-parallel logits). In the
    latter case the processes exchange two small messages in the forward pass and none in the backward pass, and the
    gradient cannot be differentiated again. Tensors placed otherwise are redistributed, as the first of input and
    target that is sharded.

    Raises:
        TypeError: an argument is not a floating-point tensor, or ``beta`` or ``temperature`` is not a number; or only
            some are DTensors.
        ValueError: shapes, devices or meshes disagree, C is 0, or a number is out of range; or ``inplace_backward`` is
            not possible: the input is a leaf or a view, its elements overlap, it shares memory with another argument,
            or its dtype is not the target's; under ``torch.compile``, function transforms and hooks of saved tensors
            (checkpointing); for DTensors and other subclasses.
    """
    logits = input
    if dim != -1:
        input, target = (classes_last("js_div", name, z, dim) for name, z in (("input", input), ("target", target)))
    code = reduction_code("js_div", reduction)
    if inplace_backward is not False:
        if not isinstance(inplace_backward, bool):
            raise TypeError(f"js_div: inplace_backward must be a bool, got {type(inplace_backward).__name__}")
        if _writes_over(logits, input, target, weight, beta, temperature, code):
            op = ops.js_div_inplace if native() else ops.js_div_inplace_reference
            return op(input, target, weight, beta, temperature, code)
    plain = type(input) is type(target) is Tensor and (weight is None or type(weight) is Tensor)
    if plain and type(beta) is type(temperature) is float and native():
        return JS_DIV.overload(input, target, weight, beta, temperature, code)  # what JS_DIV does, 0.3 us sooner
    if not plain and (module := dtensors(input, target, weight)):
        return module.js_div(JS_DIV, input, target, weight, beta, temperature, reduction, code)
    return JS_DIV(input, target, weight, beta, temperature, code)


def _writes_over(logits: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, *numbers: Any) -> bool:
    """Whether a backward pass will write over the input; raises ValueError where it must not.

    logits: the input as it was given; its classes may have become the last dimension in a view.
    """
    if not torch.is_grad_enabled() or not any(getattr(t, "requires_grad", False) for t in (input, target)):
        return False
    JS_DIV.checked(input, target, weight, *numbers)
    needs = "js_div: inplace_backward needs"
    if torch.compiler.is_compiling():
        raise ValueError(f"{needs} eager mode, got torch.compile, which plans memory itself")
    if torch._C._are_functorch_transforms_active():
        raise ValueError(f"{needs} plain autograd, got a function transform")
    if torch._C._autograd._top_saved_tensors_default_hooks(False):
        raise ValueError(f"{needs} to keep input itself, got hooks of saved tensors, such as a checkpoint's")
    if type(input) is not Tensor:
        raise ValueError(f"{needs} input to be a plain torch.Tensor, got {type(input).__name__}")
    if logits.is_leaf or logits._is_view():
        got = "leaf" if logits.is_leaf else "view"
        raise ValueError(f"{needs} input to be the result of an op and no view, got a {got}")
    if torch._debug_has_internal_overlap(input):
        raise ValueError(f"{needs} input without overlaps, got strides {input.stride()}")
    if target.dtype != input.dtype:
        raise ValueError(f"{needs} target to be {input.dtype} as input is, got {target.dtype}")
    for name, t in (("target", target), ("weight", weight)):
        if t is not None and torch._C._is_alias_of(t, input):
            raise ValueError(f"{needs} {name} to have its own memory, got input's")
    return True


def classes_last(op: str, name: str, logits: Tensor, dim: int) -> Tensor:
    if not isinstance(logits, Tensor):
        not_a_tensor(op, name, logits)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"{op}: dim must be an integer, got {type(dim).__name__}")
    if not -logits.dim() <= dim < logits.dim():
        raise ValueError(f"{op}: dim must be a dimension of {name}, which has {logits.dim()}, got {dim}")
    return logits if dim in (-1, logits.dim() - 1) else logits.movedim(dim, -1)


# Kernels take logits (R, C), or (A, B, C) with A B rows, of any strides; weights and losses are (R,).


def row_losses(input: Tensor, reduction: int, **_: object) -> Tensor:
    shape = (input.shape[:-1].numel(),) if reduction == NONE else ()
    return input.new_empty(shape, dtype=reference.accumulation_dtype(input.dtype))


def row_stats(input: Tensor, weight: Tensor | None, reduction: int, **_: object) -> tuple[int, int]:
    """For a weighted mean, the last statistic is each row's share in the sum of the weights."""
    return 6 + (weight is not None and reduction == MEAN), input.shape[:-1].numel()


def gradient_like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape, dense, its dimensions in the order of x's strides; expanded ones outermost."""
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda d: -strides[d] if strides[d] != 0 else -math.inf)
    return x.new_empty([x.shape[d] for d in order]).permute([order.index(d) for d in range(x.dim())])


JS_DIV = Op(
    "js_div",
    Argument("Tensor input", "* C+", grad=True),
    Argument("Tensor target", "* C+", grad=True),
    Argument("Tensor? weight", "*", (*FLOATING, *INTEGERS, torch.bool)),
    Argument("float beta", valid=lambda beta: 0 <= beta <= 1),
    TEMPERATURE,
    Argument("int reduction"),
    reference=reference.js_div,
    result=row_losses,
    saved={"stats": row_stats},
    empty_grad=gradient_like,
    triton="js_div",
)

define("js_div_inplace", [a.schema for a in JS_DIV.arguments])
define("js_div_inplace_reference", [a.schema for a in JS_DIV.arguments])
# The input becomes its gradient; the gradient in the target is returned.
define(
    "js_div_bwd_inplace",
    [
        "Tensor grad", "Tensor(a!) input", "Tensor target", "Tensor? weight", "Tensor stats", "float beta",
        "float temperature", "int reduction", "bool need_target",
    ],
)  # fmt: skip
launched_by_triton("js_div", "js_div_bwd_inplace")


class _InplaceReference(torch.autograd.Function):
    """The node of csrc/ops/js_div.h of that name, by the reference."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, *numbers: Any) -> Tensor:
        ctx.save_for_backward(input, target, weight)
        ctx.numbers, ctx.written = numbers, False
        return ops.js_div_reference(input, target, weight, *numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        if ctx.written:
            raise RuntimeError(
                "js_div: inplace_backward allows one backward pass, which has written the gradient over input"
            )
        if torch.is_grad_enabled():
            raise RuntimeError("js_div: inplace_backward has no second derivative (create_graph=True)")
        input, target, weight = ctx.saved_tensors
        with torch.enable_grad():
            needs = torch._C._will_engine_execute_node(input.grad_fn), ctx.needs_input_grad[1]
            leaves = [t.detach().requires_grad_(need) for t, need in zip((input, target), needs, strict=True)]
            loss = ops.js_div_reference(*leaves, weight, *ctx.numbers)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = dict(zip(wanted, torch.autograd.grad(loss, wanted, grad), strict=True))
        grad_input, grad_target = map(grads.get, leaves)
        if grad_input is not None:
            grad_input, ctx.written = input.copy_(grad_input).detach(), True
        return grad_input, grad_target, None, None, None, None


LIBRARY.impl("js_div_inplace_reference", _InplaceReference.apply, "CompositeImplicitAutograd")

# Where processes have parts of the classes; beta is at most 1/2, and results of rows of weight 0 are 0. The first gives
# (4, R): maximum and sum of exponentials of the input, the same of the target. The second takes those of all classes
# and gives (3, R): the part of what the statistics end with, and of the divergence.
define("js_div_part_sums", ["Tensor input", "Tensor target", "Tensor? weight", "float temperature"])
define(
    "js_div_part_divergences",
    ["Tensor input", "Tensor target", "Tensor? weight", "Tensor sums", "float beta", "float temperature"],
)
launched_by_triton("js_div", "js_div_part_sums")
launched_by_triton("js_div", "js_div_part_divergences")
