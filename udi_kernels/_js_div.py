"""Generalized Jensen-Shannon divergence between the softmaxes of two sets of logits."""

import math

import torch
from torch import Tensor

from . import reference
from ._ops import FLOATING, INTEGERS, MEAN, Argument, Op, reduction_code


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
    The gradient in the input is ``(1 - beta)/T q (log(q/m) - KL(q || m))``, that in the target its mirror image. The
    backward pass recomputes them from the logits, so nothing of the size of the input is kept.

    The ends are the two KL divergences, as in GKD: ``beta=0`` is ``KL(p || q)``, forward KL with the target as teacher,
    and ``beta=1`` is ``KL(q || p)``, reverse KL. The value jumps there, because the formula tends to 0. KL is inf where
    only one side has a logit of -inf.

    Args:
        input: logits of q, shape (..., C), float16, bfloat16, float32 or float64, any strides.
        target: logits of p, same shape and device; differentiable too. Logits made under ``torch.inference_mode()``
            are copied if the backward pass needs them; those made under ``torch.no_grad()`` are not.
        beta: weight of p in the mixture, a number in [0, 1], not a tensor: it gets no gradient.
        temperature: T > 0, a number. The result is not multiplied by T². To learn T, divide both logits by it.
        weight: factor of each row, shape (...), floating-point, integer or bool, such as ``labels != -100``. A row of
            weight 0 is as if it were not there, whatever it holds: it is skipped, and its gradients are 0. The weight
            gets no gradient.
        reduction: ``"mean"`` over rows (with ``weight`` the weighted mean), ``"sum"`` or ``"none"``.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or shape (...) for ``"none"``. The divergence of a row is never
        negative. The mean of rows that are all masked is 0, with gradients of 0; that of no rows is NaN.

    Raises:
        TypeError: an argument is not a floating-point tensor, or ``beta`` or ``temperature`` is not a number.
        ValueError: shapes or devices disagree, C is 0, or a number is out of range.
    """
    return JS_DIV(input, target, weight, beta, temperature, reduction_code("js_div", reduction))


def _is_weighted_mean(weight: Tensor | None, reduction: int) -> bool:
    return weight is not None and reduction == MEAN


JS_DIV = Op(
    "js_div",
    Argument("Tensor input", "* C+", grad=True),
    Argument("Tensor target", "* C+", grad=True),
    Argument("Tensor? weight", "*", (*FLOATING, *INTEGERS, torch.bool)),
    Argument("float beta", valid=lambda beta: 0 <= beta <= 1),
    Argument("float temperature", valid=lambda temperature: 0 < temperature < math.inf),
    Argument("int reduction"),
    reference=reference.js_div,
    # Kernels take (R, C). For a weighted mean, the last row is each row's share in the sum of the weights.
    saved={"stats": lambda input, weight, reduction, **_: (6 + _is_weighted_mean(weight, reduction), input.shape[0])},
    triton="js_div",
)
