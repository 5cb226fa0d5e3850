"""Skew Kullback-Leibler divergence between the softmaxes of two sets of logits."""

import torch
from torch import Tensor

from . import reference
from ._js_div import gradient_like, row_losses, row_stats
from ._ops import FLOATING, INTEGERS, TEMPERATURE, Argument, Op, dtensors, reduction_code


def skew_kl(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    reverse: bool = False,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Skew KL divergence over the last dimension, in nats.

    With ``q = softmax(input / T)`` and ``p = softmax(target / T)``::

        KL(p || alpha p + (1 - alpha) q)        reverse: KL(q || alpha q + (1 - alpha) p)

    (Lee 2001, "On the effectiveness of the skew divergence"; the two losses of DistiLLM, arXiv 2402.03898.) ``alpha=0``
    is the KL divergence itself. With ``alpha > 0`` the divergence is at most ``-log(alpha)``, also where only one side
    has a logit of -inf, and its gradients are bounded.

    With m the mixture, the gradient in the input is ``(1 - alpha)/T q (E_q[p/m] - p/m)``. As in :func:`js_div`, the
    backward pass recomputes it from the logits; nothing of the size of the input is kept.

    Args:
        input: logits of q, shape (..., C), float16, bfloat16, float32 or float64, any strides.
        target: logits of p, same shape and device; differentiable too. Log-probabilities are logits as well: at T = 1
            their softmax is the probabilities. Of two vocabularies that share the first V classes, pass
            ``input[..., :V]`` and ``target[..., :V]``: no copy is made.
        alpha: weight in the mixture of the side whose divergence it is: 0, or a number in [1e-37, 1).
        reverse: exchanges the sides.
        temperature: T, a number in [1e-37, 1e37]. The result is not multiplied by T².
        weight: factor of each row, shape (...), floating-point, integer or bool. A row of weight 0 is as if it were not
            there, whatever it holds: it is skipped, and its gradients are 0. The weight gets no gradient.
        reduction: ``"mean"`` over rows (with ``weight`` the weighted mean), ``"sum"`` or ``"none"``.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or shape (...) for ``"none"``. The divergence of a row is never
        negative. The mean of rows that are all masked is 0, with gradients of 0; that of no rows is NaN.

    DTensors give the value of all rows as a DTensor: a replicated scalar, or with ``"none"`` one placed as the rows
    are. Rows may be sharded over any dimensions of the mesh; sharded classes raise an error.

    Raises:
        TypeError: an argument is not a floating-point tensor, ``alpha`` or ``temperature`` is not a number, or
            ``reverse`` is not a bool.
        ValueError: shapes or devices disagree, C is 0, or a number is out of range.
    """
    code, options = reduction_code("skew_kl", reduction), (alpha, reverse, temperature)
    plain = type(input) is type(target) is Tensor and (weight is None or type(weight) is Tensor)
    if not plain and (module := dtensors(input, target, weight)):
        return module.by_rows(SKEW_KL, dict(input=input, target=target, weight=weight), options, reduction, code)
    return SKEW_KL(input, target, weight, *options, code)


SKEW_KL = Op(
    "skew_kl",
    Argument("Tensor input", "* C+", grad=True),
    Argument("Tensor target", "* C+", grad=True),
    Argument("Tensor? weight", "*", (*FLOATING, *INTEGERS, torch.bool)),
    Argument("float alpha", valid=lambda alpha: alpha == 0 or 1e-37 <= alpha < 1),
    Argument("bool reverse"),
    TEMPERATURE,
    Argument("int reduction"),
    reference=reference.skew_kl,
    result=row_losses,
    saved={"stats": row_stats},
    empty_grad=gradient_like,
    triton="js_div",
)
