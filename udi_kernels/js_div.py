"""Generalized Jensen-Shannon divergence between the softmaxes of two sets of logits."""

import torch
from torch.compiler import is_dynamo_compiling

from . import _checks, reference
from ._ops import REDUCTIONS, ops, served


def js_div(input, target, *, beta=0.5, temperature=1.0, weight=None, reduction="mean"):
    r"""Generalized Jensen-Shannon divergence over the last dimension, in nats.

    With ``q = softmax(input / T)``, ``p = softmax(target / T)`` and ``m = beta p + (1 - beta) q``::

        JS = beta KL(p || m) + (1 - beta) KL(q || m)

    (Lin 1991, "Divergence measures based on the Shannon entropy"; ``beta`` as in GKD, arXiv 2306.13649.)
    The gradients are ``(1 - beta)/T q (log(q/m) - KL(q || m))`` and its mirror image; the backward pass recomputes
    them from the logits, so nothing of the size of the input is kept.

    Args:
        input: logits of q, shape (..., C), float16, bfloat16, float32 or float64, any strides.
        target: logits of p, same shape and device; differentiable too.
        beta: weight of p in the mixture, ``0 < beta < 1``.
        temperature: T > 0. The result is not multiplied by T².
        weight: factor of each row, shape (...); 0 masks a row out of value and gradients unless it holds NaN.
            It gets no gradient.
        reduction: ``"mean"`` over rows (with ``weight`` the weighted mean), ``"sum"`` or ``"none"``.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or shape (...) for ``"none"``.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices disagree, C is 0, or a number is out of range.
    """
    if not is_dynamo_compiling():
        try:  # the op checks by itself, in a tenth of the time
            return ops.js_div.default(input, target, weight, beta, temperature, REDUCTIONS.index(reduction))
        except Exception:
            pass  # what follows says what does not fit, has the op compiled, takes the reference, or fails again
    _checks.tensors("js_div", input=input, target=target)
    shape = input.shape
    if shape != target.shape:
        raise ValueError(f"js_div: target must have input's shape {tuple(shape)}, got {tuple(target.shape)}")
    if not shape or shape[-1] == 0:
        raise ValueError(f"js_div: input needs a last dimension of at least one class, got {tuple(shape)}")
    if not 0 < beta < 1:
        raise ValueError(f"js_div: beta must lie between 0 and 1, both excluded, got {beta}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"js_div: temperature must be positive and finite, got {temperature}")
    code = _checks.reduction("js_div", reduction)
    if weight is not None:
        _checks.tensors("js_div", input=input, weight=weight)
        if weight.shape != shape[:-1]:
            raise ValueError(
                f"js_div: weight must have shape {tuple(shape[:-1])}, one per row, got {tuple(weight.shape)}"
            )
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("js_div: weight gets no gradient: pass weight.detach(), or weight the 'none' reduction")

    if served("losses", _checks.device_type(input), torch.promote_types(input.dtype, target.dtype)):
        return ops.js_div(input, target, weight, beta, temperature, code)
    input, target = _checks.promote(input, target)
    return reference.js_div(input, target, beta=beta, temperature=temperature, weight=weight, reduction=reduction)
