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
