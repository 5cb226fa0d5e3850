"""Certainty-weighted fusion of logits, as DI-MML (Fan et al., arXiv 2407.19514) predicts."""

from torch import Tensor
from torch.library import register_fake

from . import _checks, reference
from ._ops import LIBRARY, differentiable, grads_like, launched_by_triton, native, ops, served_by_reference


def certainty_fusion(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Logits of M heads, weighted sample by sample by how sure each head is.

    With ``s_mi`` the largest probability that head m gives in row i::

        w_i = softmax_m(s_mi / T)        fused_i = sum_m w_mi logits_mi

    The weights are of probabilities, so at T = 1 the surest of two heads weighs at most e times the other; they are
    differentiated too, the gradient of a largest logit shared out among equal ones.

    Args:
        logits: shape (M, N, C), one (N, C) per head, float16, bfloat16, float32 or float64, any strides.
        temperature: T > 0 of the weights. The authors' code takes 1 or 3, by data set.

    Returns:
        shape (N, C), of the logits' dtype; computed in float32 (float64 for float64).

    Raises:
        TypeError: logits is not a floating-point tensor, or the temperature is a tensor.
        ValueError: logits has another number of dimensions, no head or no class, or the temperature is out of range.
    """
    if not isinstance(logits, Tensor):
        _checks.not_tensors("certainty_fusion", logits=logits)
    if type(temperature) is not float:
        _checks.number("certainty_fusion", "temperature", temperature)
    if native():
        return ops.certainty_fusion.default(logits, temperature)
    _check(logits, temperature)
    return reference.certainty_fusion(logits, temperature=temperature)


def _check(logits: Tensor, temperature: float) -> None:
    """As csrc/ops/certainty.h does."""
    _checks.tensors("certainty_fusion", logits=logits)
    if logits.dim() != 3 or logits.shape[0] == 0 or logits.shape[2] == 0:
        raise ValueError(
            "certainty_fusion: logits must have shape (M, N, C) with at least one head and class,"
            f" got {tuple(logits.shape)}"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"certainty_fusion: temperature must be positive and finite, got {temperature}")


LIBRARY.define("certainty_fusion(Tensor logits, float temperature) -> Tensor")
LIBRARY.define("certainty_fusion_reference(Tensor logits, float temperature) -> Tensor")
# Of kernels: the elements of a row lie side by side.
LIBRARY.define("certainty_fusion_fwd(Tensor logits, float temperature) -> Tensor")
LIBRARY.define("certainty_fusion_bwd(Tensor grad, Tensor logits, float temperature, bool need_logits) -> Tensor")


@register_fake("udi_kernels::certainty_fusion_fwd", lib=LIBRARY)
def _(logits, temperature):
    return logits.new_empty(logits.shape[1:])


@register_fake("udi_kernels::certainty_fusion_bwd", lib=LIBRARY)
def _(grad, logits, temperature, need_logits):
    return grads_like((logits,), (need_logits,))[0]


def _reference(logits, temperature):
    return reference.certainty_fusion(logits, temperature=temperature)


served_by_reference("certainty_fusion_reference", _reference)
differentiable("certainty_fusion_bwd", 1, _reference)
launched_by_triton("certainty", ("certainty_fusion_fwd", "certainty_fusion_bwd"))
