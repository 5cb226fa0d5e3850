"""The dimension-decoupled unidirectional contrastive (DUC) loss of DI-MML (Fan et al., arXiv 2407.19514)."""

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


def duc_loss(
    student: Tensor,
    teacher: Tensor,
    dims: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""InfoNCE of the student's rows against the teacher's over some of the dimensions, in nats.

    Row i of both is the same sample. With the dot products over the chosen dimensions S, not normalised::

        loss_i = -log( exp(<student_i, teacher_i>_S / T) / sum_j exp(<student_i, teacher_j>_S / T) )

    In DI-MML S is what the teacher's modality is effective in and the student's is not (:func:`effective_dims`), and
    the teacher is detached: only the student learns. The authors' code computes this sample by sample with
    exponentials of the raw dot products, which overflow; the values are the same where those do not. It adds up the
    losses of both directions, as do two calls with the roles exchanged.

    Nothing of size N x N is kept, and no more than 16 MB of the dot products exist at a time on a GPU, a tile for each
    thread on a CPU. The forward pass prepares the student's gradient, (N, D) in float32, if it needs one; the
    teacher's makes the dot products anew.

    Args:
        student: shape (N, D), float16, bfloat16, float32 or float64, any strides.
        teacher: same shape and device; gets a gradient too if it requires one: detach it to teach one way.
        dims: shape (D,), bool: the dimensions that count; what the others hold, NaN too, plays no part. With none all
            dot products are 0, and the loss is log N.
        temperature: T > 0.
        reduction: ``"mean"`` over rows, ``"sum"`` or ``"none"``.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or shape (N,) for ``"none"``.

    Raises:
        TypeError: an argument is not a floating-point tensor, dims is not of bool, or the temperature is a tensor.
        ValueError: shapes or devices disagree, or the temperature or the reduction is out of range.
    """
    if not (isinstance(student, Tensor) and isinstance(teacher, Tensor) and isinstance(dims, Tensor)):
        _checks.not_tensors("duc_loss", student=student, teacher=teacher, dims=dims)
    if type(temperature) is not float:
        _checks.number("duc_loss", "temperature", temperature)
    code = _checks.reduction("duc_loss", reduction)
    if native():
        return ops.duc_loss.default(student, teacher, dims, temperature, code)
    _check(student, teacher, dims, temperature)
    student, teacher = _checks.promote(student, teacher)
    return reference.duc_loss(student, teacher, dims, temperature=temperature, reduction=reduction)


def _check(student: Tensor, teacher: Tensor, dims: Tensor, temperature: float) -> None:
    """As csrc/ops/duc.h does."""
    _checks.tensors("duc_loss", student=student, teacher=teacher)
    if student.dim() != 2:
        raise ValueError(f"duc_loss: student must have shape (N, D), got {tuple(student.shape)}")
    _checks.same_shape("duc_loss", student=student, teacher=teacher)
    if dims.dtype != torch.bool:
        raise TypeError(f"duc_loss: dims must be torch.bool, got {dims.dtype}")
    shape = tuple(student.shape[1:])
    if dims.shape != shape:
        raise ValueError(f"duc_loss: dims must have shape {shape}, one per dimension, got {tuple(dims.shape)}")
    if dims.device != student.device:
        raise ValueError(f"duc_loss: dims must be on {student.device} as student is, got {dims.device}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"duc_loss: temperature must be positive and finite, got {temperature}")


LIBRARY.define("duc_loss(Tensor student, Tensor teacher, Tensor dims, float temperature, int reduction) -> Tensor")
LIBRARY.define(
    "duc_loss_reference(Tensor student, Tensor teacher, Tensor dims, float temperature, int reduction) -> Tensor"
)
# Of kernels: student and teacher are matrices of one dtype. stats: (3, N); direction: (N, D), what the student's
# gradient is a factor a row of, empty unless that is needed.
LIBRARY.define(
    "duc_loss_fwd(Tensor student, Tensor teacher, Tensor dims, float temperature, int reduction, bool need_student)"
    " -> (Tensor loss, Tensor stats, Tensor direction)"
)
LIBRARY.define(
    "duc_loss_bwd(Tensor grad, Tensor student, Tensor teacher, Tensor dims, Tensor stats, Tensor direction,"
    " float temperature, int reduction, bool need_student, bool need_teacher) -> (Tensor, Tensor)"
)


@register_fake("udi_kernels::duc_loss_fwd", lib=LIBRARY)
def _(student, teacher, dims, temperature, reduction, need_student):
    rows = student.shape[0]
    wide = loss_like(student, 0, rows)
    direction = wide.new_empty(student.shape if need_student else (0,))
    return loss_like(student, reduction, rows), wide.new_empty((3, rows)), direction


@register_fake("udi_kernels::duc_loss_bwd", lib=LIBRARY)
def _(grad, student, teacher, dims, stats, direction, temperature, reduction, need_student, need_teacher):
    return grads_like((student, teacher), (need_student, need_teacher))


def _reference(student, teacher, dims, temperature, reduction):
    return reference.duc_loss(student, teacher, dims, temperature=temperature, reduction=REDUCTIONS[reduction])


served_by_reference("duc_loss_reference", _reference)
differentiable(
    "duc_loss_bwd", 2, lambda student, teacher, dims, stats, direction, *rest: _reference(student, teacher, dims, *rest)
)
launched_by_triton("duc", ("duc_loss_fwd", "duc_loss_bwd"))
