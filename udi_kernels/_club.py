"""CLUB: a contrastive log-ratio upper bound of mutual information (Cheng et al., ICML 2020, arXiv 2006.12013)."""

import torch
from torch import Tensor, nn
from torch.library import register_fake

from . import _distributed, reference
from ._ops import FLOATING, INTEGERS, LIBRARY, Argument, Op, define, dtensors, reduction_code

SMALL_CLASS = 48  # kSmallClass in csrc/enums.h


def club_mi(
    mu: Tensor,
    logvar: Tensor,
    y: Tensor,
    *,
    given: Tensor | None = None,
    reduction: str = "mean",
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    r"""CLUB upper bound of the mutual information, in nats, with all N x N negatives in O(N D).

    ``q(y|x) = N(mu(x), exp(logvar(x)))`` is a diagonal Gaussian. The value of row i is the mean over all j of
    ``log q(y_i|x_i) - log q(y_j|x_i)``. The mean over j needs no N x N x D tensor, because
    ``mean_j (y_j - mu_i)² = Var(y) + (mean(y) - mu_i)²`` with the population variance::

        value_i = 1/2 sum_d exp(-logvar_id) [Var(y_d) + (mean(y_d) - mu_id)² - (y_id - mu_id)²]

    With ``given`` it bounds I(X; Y | given): the class-conditional form of the same bound. The negatives of a row are
    the other samples of its class. With mean and variance over the n rows of the class::

        value_i = n/(n-1) 1/2 sum_d exp(-logvar_id) [Var(y_d) + (mean(y_d) - mu_id)² - (y_id - mu_id)²]

    which is 0 for the only row of a class. Fit ``q`` on features and one-hot labels, so that it knows the class too.

    Log-variances range from -88 (float64: -680) on. Below, ``exp(-logvar)`` stays at its value there, and a residual
    of 0 still counts 0. Products of it with squared residuals and incoming gradients must not exceed 3e38.

    Args:
        mu, logvar, y: shape (N, D), float16, bfloat16, float32 or float64, any strides, one device.
        given: shape (N,), integers, same device: the class of each row, any number from 0 on. A row of a negative class
            (-1: unlabelled) has value 0, is not among the negatives, and does not count in the mean, whatever it holds.
            So ``given=torch.where(mask, 0, -1)`` masks rows: the value is that of the others, all in one class.
        reduction: ``"mean"`` over rows (with ``given``, over the rows that have a class; 0 if none has), ``"sum"`` or
            ``"none"``.
        process_group: treats the rows of all its processes as one batch. The value is the bound of the whole batch. The
            gradient is the whole batch's in the local rows, times the number of processes, so that DDP's average over
            the processes is the gradient of one process with all rows.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or shape (N,) for ``"none"``.

    DTensors give the bound of the whole batch as a replicated DTensor, and its exact gradient, not multiplied. Rows may
    be sharded over one dimension of the mesh; then the reduction is not ``"none"``.

    Raises:
        TypeError: an argument is not a floating-point tensor, or ``given`` is not an integer tensor.
        ValueError: shapes or devices disagree, the reduction is unknown, or it is ``"none"`` with a process group.
    """
    code = reduction_code("club_mi", reduction)
    if not (type(mu) is type(y) is Tensor) and (module := dtensors(mu, logvar, y, given)):
        if process_group is not None:
            raise ValueError("club_mi: DTensors bring their own process group; pass process_group=None")
        return module.club_mi(CLUB_MI, (mu, logvar, y, given), reduction, code)
    if process_group is None:
        return CLUB_MI(mu, logvar, y, given, code)
    if reduction == "none":
        raise ValueError("club_mi: a process group needs reduction 'mean' or 'sum', got 'none'")
    mu, logvar, y, given, _ = CLUB_MI.checked(mu, logvar, y, given, code)
    return _distributed.club_mi(mu, logvar, y, given, process_group, reduction=reduction)


def club_nll(mu: Tensor, logvar: Tensor, y: Tensor, *, weight: Tensor | None = None) -> Tensor:
    r"""Negative log-likelihood that fits q, up to factor and constant: ``mean_i sum_d (y-mu)² exp(-logvar) + logvar``.

    Takes the tensors of :func:`club_mi`, with the same range of log-variances, and returns a scalar. It is
    ``CLUB.learning_loss`` in the authors' code.

    With ``weight``, shape (N,), floating-point, bool or integers, the mean over rows is ``sum_i weight_i row_i / sum_i
    weight_i``. Rows of weight 0 do not count, whatever they hold. If all weights are 0, so are value and gradients. The
    weights get no gradient. With the classes that :func:`club_mi` takes, a mask is ``weight=given >= 0``.
    """
    return CLUB_NLL(mu, logvar, y, weight)


class CLUB(nn.Module):
    """CLUB estimator of I(X; Y) with a network for q(y|x); drop-in for the class of that name in the authors' code.

    Args:
        x_dim, y_dim: sizes of the samples.
        hidden_size: each of the two networks (mean, log-variance) has one hidden layer of ``hidden_size // 2`` units.

    Methods take x_samples (N, x_dim) and y_samples (N, y_dim).

    The bound must change the samples alone: fix q by ``requires_grad_(False)`` while it is minimised. Otherwise its
    gradient also changes q, as in the authors' code, which makes q worse and the value less than the bound.
    """

    __module__ = "udi_kernels"  # pickles name the public place

    def __init__(self, x_dim: int, y_dim: int, hidden_size: int) -> None:
        super().__init__()
        hidden = hidden_size // 2
        self.p_mu = nn.Sequential(nn.Linear(x_dim, hidden), nn.ReLU(), nn.Linear(hidden, y_dim))
        self.p_logvar = nn.Sequential(nn.Linear(x_dim, hidden), nn.ReLU(), nn.Linear(hidden, y_dim), nn.Tanh())

    def get_mu_logvar(self, x_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(y|x), each (N, y_dim)."""
        return self.p_mu(x_samples), self.p_logvar(x_samples)

    def forward(self, x_samples: Tensor, y_samples: Tensor, given: Tensor | None = None) -> Tensor:
        """The upper bound of I(X; Y), or with classes (N,) of I(X; Y | given), a scalar in nats: :func:`club_mi`.

        Its gradient reaches q too, unless ``requires_grad_(False)`` fixes q.
        """
        return club_mi(*self.get_mu_logvar(x_samples), y_samples, given=given)

    def loglikeli(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        """Mean log-likelihood of q up to factor and constant, a scalar."""
        return -self.learning_loss(x_samples, y_samples)

    def learning_loss(self, x_samples: Tensor, y_samples: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss that fits q, a scalar; with weights (N,), a weighted mean: :func:`club_nll`."""
        return club_nll(*self.get_mu_logvar(x_samples), y_samples, weight=weight)


def _stats(mu: Tensor, given: Tensor | None, **_: object) -> tuple[int, ...]:
    """Statistics of the columns; with classes, on a CPU, those of the class that begins at row b in b // SMALL_CLASS.

    A class of up to SMALL_CLASS rows has none, nor has a class on a GPU.
    """
    rows, columns = mu.shape
    classes = rows // SMALL_CLASS if mu.device.type == "cpu" else 0
    return (5, columns) if given is None else (classes, 5, columns)


GAUSSIAN = [Argument(f"Tensor {name}", "N D", grad=True) for name in ("mu", "logvar", "y")]

CLUB_MI = Op(
    "club_mi",
    *GAUSSIAN,
    Argument("Tensor? given", "N", INTEGERS),  # for kernels, the table `club_classes` of it
    Argument("int reduction"),
    reference=reference.club_mi,
    saved={"stats": _stats},
    original={"given": lambda classes: classes[1, :-1]},
    triton="club",
)
CLUB_NLL = Op(
    "club_nll",
    *GAUSSIAN,
    Argument("Tensor? weight", "N", (*FLOATING, *INTEGERS, torch.bool)),  # for kernels, divided by their sum
    reference=reference.club_nll,
    triton="club",
)

define("club_classes", ["Tensor given"])  # of int64; see `reference.club_classes`
LIBRARY.impl("club_classes", reference.club_classes, "CUDA")


@register_fake("udi_kernels::club_classes", lib=LIBRARY)
def _(given):
    return given.new_empty((3, given.shape[0] + 1))
