"""Certainty-weighted fusion of logits, the prediction of DI-MML (Fan et al., arXiv 2407.19514)."""

from torch import Tensor

from . import reference
from ._ops import TEMPERATURE, Argument, Op


def certainty_fusion(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Weighted sum of the logits of M heads, each weighted by its certainty about the sample.

    With ``s_mi`` the largest probability that head m gives in row i::

        w_i = softmax_m(s_mi / T)        fused_i = sum_m w_mi logits_mi

    A certainty lies between 0 and 1, so at T = 1 no head weighs more than e times another. The weights are
    differentiated too; equal largest logits share the gradient. A class is impossible where a head's logit is -inf: its
    fused logit is -inf, and no gradient flows through it.

    Args:
        logits: shape (M, N, C), one (N, C) per head, float16, bfloat16, float32 or float64, any strides.
        temperature: T of the weights, a number in [1e-37, 1e37]; the smaller, the more the surest heads count. The
            authors' code uses 1 or 3, depending on the data set.

    Returns:
        shape (N, C), the logits' dtype; computed in float32 (float64 for float64).

    Raises:
        TypeError: logits is not a floating-point tensor, or the temperature is not a number.
        ValueError: logits has another number of dimensions, no head or no class, or the temperature is out of range.
    """
    return CERTAINTY_FUSION(logits, temperature)


CERTAINTY_FUSION = Op(
    "certainty_fusion",
    Argument("Tensor logits", "M+ N C+", grad=True),
    TEMPERATURE,
    reference=reference.certainty_fusion,
    result=lambda logits, **_: logits.new_empty(logits.shape[1:]),
    triton="certainty",
)
