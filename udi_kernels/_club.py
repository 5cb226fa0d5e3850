"""CLUB: a contrastive log-ratio upper bound of mutual information (Cheng et al., ICML 2020, arXiv 2006.12013)."""

import torch
from torch import Tensor, nn
from torch.library import register_fake

from . import _checks, _distributed, reference
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

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
    the other samples of its class, so that with mean and variance over the n rows of its class::

        value_i = n/(n-1) 1/2 sum_d exp(-logvar_id) [Var(y_d) + (mean(y_d) - mu_id)² - (y_id - mu_id)²]

    which is 0 for the only row of a class. ``q`` should know the class too: fit it on features and one-hot labels.

    Args:
        mu, logvar, y: shape (N, D), float16, bfloat16, float32 or float64, any strides, one device.
        given: shape (N,), integers, same device: each row's class, any numbers from 0 on. A row of a negative class
            (-1: unlabelled) is worth 0, is no row's negative, and does not count in the mean.
        reduction: ``"mean"`` over rows (with ``given``: those of a class, and 0 where there are none), ``"sum"`` or
            ``"none"``.
        process_group: the rows of all its processes are one batch: the value is the bound of the whole, the gradient in
            the local rows that of the whole times the number of processes, so that averaging equals one process.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or shape (N,) for ``"none"``.

    Raises:
        TypeError: an argument is not a floating-point tensor, or given not one of integers.
        ValueError: shapes or devices disagree, or the reduction is unknown, or ``"none"`` of a process group.
    """
    if not (isinstance(mu, Tensor) and isinstance(logvar, Tensor) and isinstance(y, Tensor)):
        _checks.not_tensors("club_mi", mu=mu, logvar=logvar, y=y)
    if given is not None and not isinstance(given, Tensor):
        _checks.not_tensors("club_mi", given=given)
    code = _checks.reduction("club_mi", reduction)
    if process_group is not None:
        if reduction == "none":
            raise ValueError("club_mi: a process group needs reduction 'mean' or 'sum', got 'none'")
        mu, logvar, y = _checked("club_mi", mu, logvar, y, given)
        return _distributed.club_mi(mu, logvar, y, given, process_group, reduction=reduction)
    if native():
        return ops.club_mi.default(mu, logvar, y, given, code)
    mu, logvar, y = _checked("club_mi", mu, logvar, y, given)
    return reference.club_mi(mu, logvar, y, given, reduction=reduction)


def club_nll(mu: Tensor, logvar: Tensor, y: Tensor) -> Tensor:
    r"""Negative log-likelihood that fits q, up to factor and constant: ``mean_i sum_d (y-mu)² exp(-logvar) + logvar``.

    Takes what :func:`club_mi` takes and returns a scalar; it is ``CLUB.learning_loss`` of the authors' code.
    """
    if not (isinstance(mu, Tensor) and isinstance(logvar, Tensor) and isinstance(y, Tensor)):
        _checks.not_tensors("club_nll", mu=mu, logvar=logvar, y=y)
    if native():
        return ops.club_nll.default(mu, logvar, y)
    return reference.club_nll(*_checked("club_nll", mu, logvar, y))


class CLUB(nn.Module):
    """CLUB estimator of I(X; Y) with a network for q(y|x); drop-in for the class of that name in the authors' code.

    Args:
        x_dim, y_dim: sizes of the samples.
        hidden_size: the two networks (mean, log-variance) have one hidden layer of ``hidden_size // 2`` units each.

    All methods take x_samples (N, x_dim), and y_samples (N, y_dim) where named.
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
        """The upper bound of I(X; Y), or with classes (N,) of I(X; Y | given), a scalar in nats: :func:`club_mi`."""
        return club_mi(*self.get_mu_logvar(x_samples), y_samples, given=given)

    def loglikeli(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        """Mean log-likelihood of q up to factor and constant, a scalar."""
        return -self.learning_loss(x_samples, y_samples)

    def learning_loss(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        """The loss that fits q, a scalar: :func:`club_nll`."""
        return club_nll(*self.get_mu_logvar(x_samples), y_samples)


def _checked(op: str, mu: Tensor, logvar: Tensor, y: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...]:
    """The first three in their common dtype, all checked as csrc/ops/club.h does."""
    _checks.tensors(op, mu=mu, logvar=logvar, y=y)
    if mu.dim() != 2:
        raise ValueError(f"{op}: mu must have shape (N, D), got {tuple(mu.shape)}")
    _checks.same_shape(op, mu=mu, logvar=logvar, y=y)
    if given is not None:
        if given.dtype not in INTEGERS:
            raise TypeError(f"{op}: given must be of integers, got {given.dtype}; pass given.long()")
        rows = tuple(mu.shape[:1])
        if given.shape != rows:
            raise ValueError(f"{op}: given must have shape {rows}, one class per row of mu, got {tuple(given.shape)}")
        if given.device != mu.device:
            raise ValueError(
                f"{op}: given must be on {mu.device} as mu is, got {given.device}; pass given.to(mu.device)"
            )
    return _checks.promote(mu, logvar, y)


LIBRARY.define("club_mi(Tensor mu, Tensor logvar, Tensor y, Tensor? given, int reduction) -> Tensor")
LIBRARY.define("club_mi_reference(Tensor mu, Tensor logvar, Tensor y, Tensor? given, int reduction) -> Tensor")
# given: int64; returns (3, N + 1) of int64, as `reference.club_classes`.
LIBRARY.define("club_classes(Tensor given) -> Tensor")
# Of kernels: the inputs have one dtype. stats: (5, D) column statistics of the shifted data, the shift first. With
# classes (N // 48, 5, D) on a CPU, those of a class of more than 48 rows that begins at b in b // 48, and else none.
LIBRARY.define(
    "club_mi_fwd(Tensor mu, Tensor logvar, Tensor y, Tensor? classes, int reduction) -> (Tensor loss, Tensor stats)"
)
LIBRARY.define(
    "club_mi_bwd(Tensor grad, Tensor mu, Tensor logvar, Tensor y, Tensor? classes, Tensor stats, int reduction,"
    " bool need_mu, bool need_logvar, bool need_y) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define("club_nll(Tensor mu, Tensor logvar, Tensor y) -> Tensor")
LIBRARY.define("club_nll_reference(Tensor mu, Tensor logvar, Tensor y) -> Tensor")
LIBRARY.define("club_nll_fwd(Tensor mu, Tensor logvar, Tensor y) -> Tensor")
LIBRARY.define(
    "club_nll_bwd(Tensor grad, Tensor mu, Tensor logvar, Tensor y, bool need_mu, bool need_logvar, bool need_y)"
    " -> (Tensor, Tensor, Tensor)"
)


@register_fake("udi_kernels::club_classes", lib=LIBRARY)
def _(given):
    return given.new_empty((3, given.shape[0] + 1))


@register_fake("udi_kernels::club_mi_fwd", lib=LIBRARY)
def _(mu, logvar, y, classes, reduction):
    rows, columns = mu.shape
    stats = (5, columns) if classes is None else (rows // 48 if mu.device.type == "cpu" else 0, 5, columns)
    return loss_like(mu, reduction, rows), loss_like(mu, 0, 0).new_empty(stats)


@register_fake("udi_kernels::club_mi_bwd", lib=LIBRARY)
def _(grad, mu, logvar, y, classes, stats, reduction, need_mu, need_logvar, need_y):
    return grads_like((mu, logvar, y), (need_mu, need_logvar, need_y))


@register_fake("udi_kernels::club_nll_fwd", lib=LIBRARY)
def _(mu, logvar, y):
    return loss_like(mu, 1, 0)


@register_fake("udi_kernels::club_nll_bwd", lib=LIBRARY)
def _(grad, mu, logvar, y, need_mu, need_logvar, need_y):
    return grads_like((mu, logvar, y), (need_mu, need_logvar, need_y))


def _mi_reference(mu, logvar, y, given, reduction):
    return reference.club_mi(mu, logvar, y, given, reduction=REDUCTIONS[reduction])


def _mi_reference_of_classes(mu, logvar, y, classes, stats, reduction):
    return _mi_reference(mu, logvar, y, None if classes is None else classes[1, :-1], reduction)


served_by_reference("club_mi_reference", _mi_reference)
served_by_reference("club_nll_reference", reference.club_nll)
differentiable("club_mi_bwd", 3, _mi_reference_of_classes)
differentiable("club_nll_bwd", 3, reference.club_nll)
LIBRARY.impl("club_classes", reference.club_classes, "CUDA")
launched_by_triton("club", ("club_mi_fwd", "club_mi_bwd", "club_nll_fwd", "club_nll_bwd"))
