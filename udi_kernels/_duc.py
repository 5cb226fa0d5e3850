"""The dimension-decoupled unidirectional contrastive (DUC) loss of DI-MML (Fan et al., arXiv 2407.19514)."""

from typing import Any

import torch
from torch import Tensor

from . import _distributed, reference
from ._ops import TEMPERATURE, Argument, Op, dtensors, reduction_code


def duc_loss(
    student: Tensor,
    teacher: Tensor,
    dims: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    r"""InfoNCE of the student's rows against the teacher's over a subset of the dimensions, in nats.

    Row i of both is the same sample; further rows of the teacher, such as a queue of earlier batches, are negatives for
    all. With plain dot products over the chosen dimensions S, without normalisation::

        loss_i = -log( exp(<student_i, teacher_i>_S / T) / sum_j exp(<student_i, teacher_j>_S / T) )

    In DI-MML, S holds the dimensions that are effective in the teacher's modality and not in the student's
    (:func:`effective_dims`), and the teacher is detached, so that only the student learns. The authors' code takes
    exponentials of the raw dot products, sample by sample; where these do not overflow, the values are the same. It
    adds the losses of both directions, which here are two calls with the roles exchanged.

    Nothing of size N x M is kept. At a time, at most 16 MB of dot products exist on a GPU, and one tile per thread on a
    CPU. The forward pass prepares the student's gradient, (N, D) in float32, if it is needed; for the teacher's the dot
    products are computed again.

    Args:
        student: shape (N, D), float16, bfloat16, float32 or float64, any strides.
        teacher: shape (M, D) with M >= N, same device. It gets a gradient too if it requires one; detach it to train
            the student alone.
        dims: shape (D,), bool: the chosen dimensions. The others are not read into the result, even if they hold NaN.
            If none is chosen, all dot products are 0 and the loss is log M.
        temperature: T, a number in [1e-37, 1e37].
        reduction: ``"mean"`` over rows, ``"sum"`` or ``"none"``.
        process_group: treats the rows of all its processes as one batch: the teachers of all of them are gathered,
            so that the others' are negatives too. The value is the loss of the whole batch. As in :func:`club_mi`, the
            gradient is the whole batch's in the local rows, times the number of processes. The teacher requires a
            gradient in all processes or in none.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or shape (N,) for ``"none"``.

    DTensors give the loss of the whole batch as a replicated DTensor, and its exact gradient, not multiplied. Rows may
    be sharded over one dimension of the mesh; then the teacher has as many as the student, and the reduction is not
    ``"none"``.

    Raises:
        TypeError: student or teacher is not a floating-point tensor, dims is not bool, or the temperature not a number.
        ValueError: shapes or devices disagree, or the temperature or the reduction is out of range, or the reduction is
            ``"none"`` with a process group.
    """
    code = reduction_code("duc_loss", reduction)
    if not (type(student) is type(teacher) is Tensor) and (module := dtensors(student, teacher, dims)):
        if process_group is not None:
            raise ValueError("duc_loss: DTensors bring their own process group; pass process_group=None")
        return module.duc_loss(DUC_LOSS, student, teacher, dims, temperature, reduction, code)
    if process_group is None:
        return DUC_LOSS(student, teacher, dims, temperature, code)
    if reduction == "none":
        raise ValueError("duc_loss: a process group needs reduction 'mean' or 'sum', got 'none'")
    student, teacher, *_ = DUC_LOSS.checked(student, teacher, dims, temperature, code)
    return _distributed.duc_loss(DUC_LOSS, student, teacher, dims, temperature, process_group, reduction=reduction)


def _reference(student: Tensor, teacher: Tensor, dims: Tensor, **options: Any) -> Tensor:
    if len(teacher) < len(student):
        raise ValueError(f"duc_loss: teacher must have at least {len(student)} rows, got {len(teacher)}")
    return reference.duc_loss(student, teacher, dims, **options)


DUC_LOSS = Op(
    "duc_loss",
    Argument("Tensor student", "N D", grad=True),
    Argument("Tensor teacher", "M D", grad=True),
    Argument("Tensor dims", "D", (torch.bool,)),
    TEMPERATURE,
    Argument("int reduction"),
    reference=_reference,
    saved={
        "stats": lambda student, **_: (3, student.shape[0]),
        # Times a factor for each row, the student's gradient.
        "direction": lambda student, need_student, **_: student.shape if need_student else (0,),
    },
    prepared=("student",),
    triton="duc",
)
