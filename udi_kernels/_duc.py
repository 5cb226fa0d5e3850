"""The dimension-decoupled unidirectional contrastive (DUC) loss of DI-MML (Fan et al., arXiv 2407.19514)."""

import math

import torch
from torch import Tensor

from . import reference
from ._ops import Argument, Op, reduction_code


def duc_loss(
    student: Tensor,
    teacher: Tensor,
    dims: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""InfoNCE of the student's rows against the teacher's over a subset of the dimensions, in nats.

    Row i of both is the same sample. With plain dot products over the chosen dimensions S, without normalisation::

        loss_i = -log( exp(<student_i, teacher_i>_S / T) / sum_j exp(<student_i, teacher_j>_S / T) )

    In DI-MML, S holds the dimensions that are effective in the teacher's modality and not in the student's
    (:func:`effective_dims`), and the teacher is detached, so that only the student learns. The authors' code takes
    exponentials of the raw dot products, sample by sample; where these do not overflow, the values are the same. It
    adds the losses of both directions, which here are two calls with the roles exchanged.

    Nothing of size N x N is kept. At a time, at most 16 MB of dot products exist on a GPU, and one tile per thread on a
    CPU. The forward pass prepares the student's gradient, (N, D) in float32, if it is needed; for the teacher's the dot
    products are computed again.

    Args:
        student: shape (N, D), float16, bfloat16, float32 or float64, any strides.
        teacher: same shape and device; gets a gradient too if it requires one. Detach it to train the student alone.
        dims: shape (D,), bool: the chosen dimensions. The others are not read into the result, even if they hold NaN.
            If none is chosen, all dot products are 0 and the loss is log N.
        temperature: T > 0. Those below 1e-38 count as 1e-38, those above 8e37 as 8e37.
        reduction: ``"mean"`` over rows, ``"sum"`` or ``"none"``.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or shape (N,) for ``"none"``.

    Raises:
        TypeError: student or teacher is not a floating-point tensor, dims is not bool, or the temperature not a number.
        ValueError: shapes or devices disagree, or the temperature or the reduction is out of range.
    """
    return DUC_LOSS(student, teacher, dims, temperature, reduction_code("duc_loss", reduction))


DUC_LOSS = Op(
    "duc_loss",
    Argument("Tensor student", "N D", grad=True),
    Argument("Tensor teacher", "N D", grad=True),
    Argument("Tensor dims", "D", (torch.bool,)),
    Argument("float temperature", valid=lambda temperature: 0 < temperature < math.inf),
    Argument("int reduction"),
    reference=reference.duc_loss,
    saved={
        "stats": lambda student, **_: (3, student.shape[0]),
        # Times a factor for each row, the student's gradient.
        "direction": lambda student, need_student, **_: student.shape if need_student else (0,),
    },
    prepared=("student",),
    triton="duc",
)
