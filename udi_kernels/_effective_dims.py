"""Effective dimensions of labelled features, as DI-MML (Fan et al., arXiv 2407.19514) defines them."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from . import reference
from ._ops import INTEGERS, LIBRARY, Argument, Op


def effective_dims(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""Dimensions in which the nearest class mean is the sample's own more often than on average.

    With the class means ``c_k``, the hit rate of a dimension and the dimensions that are effective are::

        rate_d = mean_i [ argmin_k |features_id - c_kd| = labels_i ]        effective_d = rate_d > mean_d rate_d

    Ties go to the lower class, as in ``argmin``. Classes without a sample are left out. (The authors' code divides by
    their count of 0, and argmin finds the NaN, so that one absent class leaves no dimension effective.) NaN and
    infinite features are nearest to no mean; where a class has one, no sample is nearest to its mean in that dimension.

    The N x C x D distances of that code are not needed: in one dimension the values nearest to a mean form an interval,
    so each sample takes two comparisons. Means are computed in float64.

    Args:
        features: shape (N, D), float16, bfloat16, float32 or float64, any strides.
        labels: shape (N,), integers, same device, below ``num_classes``. Rows of a negative label (-1: unlabelled) are
            left out. A GPU does not check the labels, which would have to wait for it; there, rows of a
            label of ``num_classes`` or above are left out too.
        num_classes: C > 0, below 2**63. At most N of the classes take memory.

    Returns:
        shape (D,), bool; no gradient.

    Raises:
        TypeError: features is not a floating-point tensor, labels is not an integer tensor, or ``num_classes`` not an
            integer.
        ValueError: shapes or devices disagree, ``num_classes`` is not positive, or (on a CPU) a label is too large.
    """
    if type(num_classes) is not int or num_classes >= 2**63:
        _check_integer(num_classes)
    return EFFECTIVE_DIMS(features, labels, num_classes)


def _check_integer(num_classes: Any) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, (Integral, torch.SymInt)):
        raise TypeError(f"effective_dims: num_classes must be an integer, got {type(num_classes).__name__}")
    if isinstance(num_classes, Integral) and int(num_classes) >= 2**63:
        raise ValueError("effective_dims: num_classes must be below 2**63")


def _reference(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    labels = labels.long()
    if labels.is_cpu and (labels >= num_classes).any():
        raise ValueError(f"effective_dims: labels must be below {num_classes}, got {labels.max().item()}")
    return reference.effective_dims(features, labels, num_classes)


EFFECTIVE_DIMS = Op(
    "effective_dims",
    Argument("Tensor features", "N D"),
    Argument("Tensor labels", "N", INTEGERS),
    Argument("int num_classes", valid=lambda num_classes: num_classes > 0),
    reference=_reference,
    result=lambda features, **_: features.new_empty(features.shape[1:], dtype=torch.bool),
    triton="effective_dims",
)


@register_fake("udi_kernels::effective_dims", lib=LIBRARY)
def _(*values):
    return EFFECTIVE_DIMS.fake_forward(*EFFECTIVE_DIMS.checked(*values))
