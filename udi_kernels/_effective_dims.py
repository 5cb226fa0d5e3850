"""Effective dimensions of labelled features, as DI-MML (Fan et al., arXiv 2407.19514) defines them."""

import torch
from torch import Tensor
from torch.library import register_fake

from . import _checks, reference
from ._ops import LIBRARY, launched_by_triton, native, ops, served_by_reference


def effective_dims(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""Dimensions in which features lie nearest to their own class's mean more often than on average.

    With the class means ``c_k``, the hit rate of a dimension and the dimensions that are effective are::

        rate_d = mean_i [ argmin_k |features_id - c_kd| = labels_i ]        effective_d = rate_d > mean_d rate_d

    Ties go to the lower class, as in ``argmin``. Classes without a sample are left out; the authors' code divides by
    their count of 0, and argmin then finds the NaN, so that one absent class leaves no dimension effective.

    The N x C x D distances of that code are not needed: in one dimension the values nearest to a mean are an interval,
    so each sample takes two comparisons. Means are computed in float64, hits are counted.

    Args:
        features: shape (N, D), float16, bfloat16, float32 or float64, any strides.
        labels: shape (N,), int64 or int32, same device, below ``num_classes``; rows of a negative label (-1:
            unlabelled) play no part. On a GPU nothing waits for the labels to be checked, and rows of a label of
            ``num_classes`` or above play no part either.
        num_classes: C > 0.

    Returns:
        shape (D,), bool; no gradient.

    Raises:
        TypeError: features is not a floating-point tensor, or labels not one of integers.
        ValueError: shapes or devices disagree, ``num_classes`` is not positive, or (on a CPU) a label is too large.
    """
    if not (isinstance(features, Tensor) and isinstance(labels, Tensor)):
        _checks.not_tensors("effective_dims", features=features, labels=labels)
    if native():
        return ops.effective_dims.default(features, labels, num_classes)
    _check(features, labels, num_classes)
    if labels.is_cpu and (labels >= num_classes).any():
        raise ValueError(f"effective_dims: labels must be below num_classes ({num_classes}), got {labels.max().item()}")
    return reference.effective_dims(features, labels, num_classes)


def _check(features: Tensor, labels: Tensor, num_classes: int) -> None:
    """As csrc/ops/effective_dims.h does."""
    _checks.tensors("effective_dims", features=features)
    if features.dim() != 2:
        raise ValueError(f"effective_dims: features must have shape (N, D), got {tuple(features.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"effective_dims: labels must be int64 or int32, got {labels.dtype}")
    shape = tuple(features.shape[:1])
    if labels.shape != shape:
        raise ValueError(f"effective_dims: labels must have shape {shape}, one per row, got {tuple(labels.shape)}")
    if labels.device != features.device:
        raise ValueError(f"effective_dims: labels must be on {features.device} as features is, got {labels.device}")
    if num_classes <= 0:
        raise ValueError(f"effective_dims: num_classes must be positive, got {num_classes}")


LIBRARY.define("effective_dims(Tensor features, Tensor labels, int num_classes) -> Tensor")
LIBRARY.define("effective_dims_reference(Tensor features, Tensor labels, int num_classes) -> Tensor")
# Of kernels: features is a matrix whose rows have their elements side by side, labels are int64.
LIBRARY.define("effective_dims_fwd(Tensor features, Tensor labels, int num_classes) -> Tensor")


@register_fake("udi_kernels::effective_dims", lib=LIBRARY)
@register_fake("udi_kernels::effective_dims_fwd", lib=LIBRARY)
def _(features, labels, num_classes):
    _check(features, labels, num_classes)
    return features.new_empty(features.shape[1:], dtype=torch.bool)


served_by_reference("effective_dims_reference", reference.effective_dims)
launched_by_triton("effective_dims", ("effective_dims_fwd",))
