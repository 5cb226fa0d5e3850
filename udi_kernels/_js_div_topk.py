"""Generalized Jensen-Shannon divergence from a teacher of which the largest probabilities are known."""

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._js_div import row_losses
from ._ops import FLOATING, INTEGERS, MEAN, Argument, Op, dtensors, reduction_code

TAILS = ("renormalize", "bucket", "zero")  # enum Tail in csrc/enums.h


def js_div_topk(
    input: Tensor,
    indices: Tensor,
    logprobs: Tensor,
    *,
    tail: str = "renormalize",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Divergence of :func:`js_div` where the teacher is known by its top K log-probabilities, in nats.

    For offline distillation: the teacher is stored as K pairs per row, and no (..., C) teacher is made. ``tail`` says
    what the other C - K classes hold, given P, the sum of the K probabilities:

    - ``"renormalize"``: nothing; the K probabilities are divided by P.
    - ``"bucket"``: 1 - P together. The divergence is one over K + 1 classes, of which the last is all other classes of
      the teacher and of the student. 1 - P is what the log-probabilities' precision leaves of it; with ``beta=1`` the
      divergence is inf where that is 0.
    - ``"zero"``: nothing, and the teacher's mass stays P. The divergence is that of unnormalized measures: KL(a || b)
      has the additional term ``sum b - sum a``. It is never negative.

    With q the softmax of ``input / T`` and m the mixture, classes outside of the K add ``-(1 - beta) log(1 - beta) q``
    to the first and the last of these. The forward pass reads the student's logits once; the backward pass recomputes
    the gradient from them.

    Args:
        input: logits of the student, shape (..., C), float16, bfloat16, float32 or float64, any strides.
        indices: classes of the teacher's probabilities, shape (..., K), integers in [0, C), different within a row;
            -1 is padding, whatever its log-probability. On a CPU other indices raise a RuntimeError; on a GPU, which
            would have to wait, an index out of range makes its row NaN, and equal ones count as different classes.
        logprobs: the teacher's log-probabilities, shape (..., K), floating-point, already at the wanted temperature;
            -inf is a probability of 0. They get no gradient, nor do the indices. The probabilities of a row add up to
            at most 1; for ``"bucket"``, more counts as 1.
        tail: ``"renormalize"``, ``"bucket"`` or ``"zero"``.
        beta: weight of the teacher in the mixture, a number in [0, 1). 0 is KL(teacher || student). 1, the reverse, is
            for ``"bucket"`` alone; with the others it would be infinite.
        temperature: T, a number in [1e-37, 1e37]; it divides ``input`` alone.
        weight: factor of each row, shape (...), floating-point, integer or bool. A row of weight 0 is as if it were not
            there, whatever it holds.
        reduction: ``"mean"`` over rows (with ``weight`` the weighted mean), ``"sum"`` or ``"none"``.

    Returns:
        float32 (float64 for a float64 input): a scalar, or shape (...) for ``"none"``. The mean of rows that are all
        masked is 0, with gradients of 0; that of no rows is NaN. With ``"renormalize"`` a row of padding is NaN.

    DTensors give the value of all rows as a DTensor, as in :func:`skew_kl`: rows may be sharded, classes may not.

    Raises:
        TypeError: an argument is not a tensor of such a dtype, or ``beta`` or ``temperature`` is not a number.
        ValueError: shapes or devices disagree, C or K is 0, or a number or a name is out of range.
    """
    if tail not in TAILS:
        raise ValueError(f"js_div_topk: tail must be one of {', '.join(map(repr, TAILS))}, got {tail!r}")
    code = reduction_code("js_div_topk", reduction)
    options = TAILS.index(tail), beta, temperature
    tensors = dict(input=input, indices=indices, logprobs=logprobs, weight=weight)
    if type(input) is not Tensor and (module := dtensors(*tensors.values())):
        return module.by_rows(JS_DIV_TOPK, tensors, options, reduction, code)
    return JS_DIV_TOPK(*tensors.values(), *options, code)


def _stats(input: Tensor, weight: Tensor | None, reduction: int, **_: object) -> tuple[int, int]:
    return 5 + (weight is not None and reduction == MEAN), input.shape[:-1].numel()


def _reference(*, tail: int, beta: float, **options: Any) -> Tensor:
    if beta == 1 and TAILS[tail] != "bucket":
        raise ValueError(f"js_div_topk: beta must be below 1 where tail is {TAILS[tail]!r}, got {beta}")
    return reference.js_div_topk(tail=TAILS[tail], beta=beta, **options)


JS_DIV_TOPK = Op(
    "js_div_topk",
    Argument("Tensor input", "* C+", grad=True),
    Argument("Tensor indices", "* K+", INTEGERS),
    Argument("Tensor logprobs", "* K+"),
    Argument("Tensor? weight", "*", (*FLOATING, *INTEGERS, torch.bool)),
    Argument("int tail"),
    Argument("float beta", valid=lambda beta: 0 <= beta <= 1),
    Argument("float temperature", valid=lambda temperature: 1e-37 <= temperature <= 1e37),
    Argument("int reduction"),
    reference=_reference,
    result=row_losses,
    saved={"stats": _stats},
    triton="js_div_topk",
)
