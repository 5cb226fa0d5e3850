"""Generalized Jensen-Shannon divergence between the softmaxes of two sets of logits."""

import torch
from torch import Tensor
from torch.library import register_fake

from . import _checks, reference
from ._ops import (
    LIBRARY,
    REDUCTIONS,
    differentiable,
    grads_like,
    launched_by_triton,
    loss_like,
    native,
    ops,
    served_by_reference,
)

INTEGRAL = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def js_div(
    input: Tensor,
    target: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Generalized Jensen-Shannon divergence over the last dimension, in nats.

    With ``q = softmax(input / T)``, ``p = softmax(target / T)`` and ``m = beta p + (1 - beta) q``::

        JS = beta KL(p || m) + (1 - beta) KL(q || m)

    (Lin 1991, "Divergence measures based on the Shannon entropy"; ``beta`` as in GKD, arXiv 2306.13649.)
    The gradients are ``(1 - beta)/T q (log(q/m) - KL(q || m))`` and its mirror image; the backward pass recomputes
    them from the logits, so nothing of the size of the input is kept.

    The ends are the two KL divergences, as GKD's users know them: ``beta=0`` is ``KL(p || q)``, forward KL with the
    target as teacher, and ``beta=1`` is ``KL(q || p)``, reverse KL. That is a jump: the formula itself tends to 0
    there. KL is inf where only one side has a logit of -inf.

    Args:
        input: logits of q, shape (..., C), float16, bfloat16, float32 or float64, any strides.
        target: logits of p, same shape and device; differentiable too. Logits made under ``torch.inference_mode()``
            are copied if the backward pass needs them; those made under ``torch.no_grad()`` are not.
        beta: weight of p in the mixture, in [0, 1]. A number: a tensor would get no gradient.
        temperature: T > 0, a number. The result is not multiplied by T². A learnt T: divide both logits by it.
        weight: factor of each row, shape (...), of any floating-point or integer dtype or bool, so ``labels != -100``
            will do; 0 masks a row out of value and gradients unless it holds NaN or inf. It gets no gradient.
        reduction: ``"mean"`` over rows (with ``weight`` the weighted mean), ``"sum"`` or ``"none"``.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or shape (...) for ``"none"``. The mean of no rows, or of rows
        that are all masked, is NaN, as in ``cross_entropy``.

    Raises:
        TypeError: an argument is not a floating-point tensor, or a number is one.
        ValueError: shapes or devices disagree, C is 0, or a number is out of range.
    """
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        _checks.not_tensors("js_div", input=input, target=target)
    if not (weight is None or isinstance(weight, Tensor)):
        _checks.not_tensors("js_div", weight=weight)
    if not type(beta) is type(temperature) is float:
        _checks.number("js_div", "beta", beta)
        _checks.number("js_div", "temperature", temperature)
    code = _checks.reduction("js_div", reduction)
    if native():
        return ops.js_div.default(input, target, weight, beta, temperature, code)
    _check(input, target, weight, beta, temperature)
    input, target = _checks.promote(input, target)
    return reference.js_div(input, target, beta=beta, temperature=temperature, weight=weight, reduction=reduction)


def _check(input: Tensor, target: Tensor, weight: Tensor | None, beta: float, temperature: float) -> None:
    """As csrc/ops/js_div.h does."""
    _checks.tensors("js_div", input=input, target=target)
    _checks.same_shape("js_div", input=input, target=target)
    if not input.dim() or input.shape[-1] == 0:
        shape = tuple(input.shape)
        raise ValueError(f"js_div: input needs a last dimension of at least one class, got {shape}")
    if not 0 <= beta <= 1:
        raise ValueError(f"js_div: beta must lie in [0, 1], got {beta}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"js_div: temperature must be positive and finite, got {temperature}")
    if weight is None:
        return
    _checks.dense("js_div", "weight", weight)
    if weight.dtype not in (*_checks.FLOATING, *INTEGRAL):
        types = "float16, bfloat16, float32, float64, bool or an integer"
        raise TypeError(f"js_div: weight must be {types}, got {weight.dtype}")
    if weight.device != input.device:
        raise ValueError(f"js_div: weight must be on {input.device} as input is, got {weight.device}")
    rows = tuple(input.shape[:-1])
    if weight.shape != rows:
        raise ValueError(f"js_div: weight must have shape {rows}, one per row, got {tuple(weight.shape)}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("js_div: weight gets no gradient: pass weight.detach(), or weight the 'none' reduction")


LIBRARY.define(
    "js_div(Tensor input, Tensor target, Tensor? weight, float beta, float temperature, int reduction) -> Tensor"
)
LIBRARY.define(
    "js_div_reference(Tensor input, Tensor target, Tensor? weight, float beta, float temperature, int reduction)"
    " -> Tensor"
)
# Of kernels: input and target are matrices of one dtype. stats: (6, R), what the backward of the same backend needs.
LIBRARY.define(
    "js_div_fwd(Tensor input, Tensor target, Tensor? weight, float beta, float temperature, int reduction)"
    " -> (Tensor loss, Tensor stats)"
)
LIBRARY.define(
    "js_div_bwd(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor stats, float beta,"
    " float temperature, int reduction, bool need_input, bool need_target) -> (Tensor, Tensor)"
)


@register_fake("udi_kernels::js_div_fwd", lib=LIBRARY)
def _(input, target, weight, beta, temperature, reduction):
    rows = input.shape[0]
    return loss_like(input, reduction, rows), loss_like(input, 0, rows).new_empty((6, rows))


@register_fake("udi_kernels::js_div_bwd", lib=LIBRARY)
def _(grad, input, target, weight, stats, beta, temperature, reduction, need_input, need_target):
    return grads_like((input, target), (need_input, need_target))


def _reference(input, target, weight, beta, temperature, reduction):
    return reference.js_div(
        input, target, beta=beta, temperature=temperature, weight=weight, reduction=REDUCTIONS[reduction]
    )


served_by_reference("js_div_reference", _reference)
differentiable("js_div_bwd", 2, lambda input, target, weight, stats, *rest: _reference(input, target, weight, *rest))
launched_by_triton("js_div", ("js_div_fwd", "js_div_bwd"))
