"""CLUB: a contrastive log-ratio upper bound of mutual information (Cheng et al., ICML 2020, arXiv 2006.12013)."""

from torch import nn
from torch.compiler import is_dynamo_compiling

from . import _checks, reference
from ._ops import REDUCTIONS, ops, served


def club_mi(mu, logvar, y, *, reduction="mean"):
    r"""CLUB upper bound of the mutual information, in nats, with all N x N negatives in O(N D).

    ``q(y|x) = N(mu(x), exp(logvar(x)))`` is a diagonal Gaussian. The value of row i is the mean over all j of
    ``log q(y_i|x_i) - log q(y_j|x_i)``. The mean over j needs no N x N x D tensor, because
    ``mean_j (y_j - mu_i)² = Var(y) + (mean(y) - mu_i)²`` with the population variance::

        value_i = 1/2 sum_d exp(-logvar_id) [Var(y_d) + (mean(y_d) - mu_id)² - (y_id - mu_id)²]

    Args:
        mu, logvar, y: shape (N, D), float16, bfloat16, float32 or float64, any strides, one device.
        reduction: ``"mean"`` over rows, ``"sum"`` or ``"none"``.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or shape (N,) for ``"none"``.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices disagree, or the reduction is unknown.
    """
    if not is_dynamo_compiling():
        try:  # as in js_div
            return ops.club_mi.default(mu, logvar, y, REDUCTIONS.index(reduction))
        except Exception:
            pass
    mu, logvar, y = _checked("club_mi", mu, logvar, y)
    code = _checks.reduction("club_mi", reduction)
    if served("losses", _checks.device_type(mu), mu.dtype):
        return ops.club_mi(mu, logvar, y, code)
    return reference.club_mi(mu, logvar, y, reduction=reduction)


def club_nll(mu, logvar, y):
    r"""Negative log-likelihood that fits q, up to factor and constant: ``mean_i sum_d (y-mu)² exp(-logvar) + logvar``.

    Takes what :func:`club_mi` takes and returns a scalar; it is ``CLUB.learning_loss`` of the authors' code.
    """
    if not is_dynamo_compiling():
        try:
            return ops.club_nll.default(mu, logvar, y)
        except Exception:
            pass
    mu, logvar, y = _checked("club_nll", mu, logvar, y)
    return (ops if served("losses", _checks.device_type(mu), mu.dtype) else reference).club_nll(mu, logvar, y)


class CLUB(nn.Module):
    """CLUB estimator of I(X; Y) with a network for q(y|x); drop-in for the class of that name in the authors' code.

    Args:
        x_dim, y_dim: sizes of the samples.
        hidden_size: the two networks (mean, log-variance) have one hidden layer of ``hidden_size // 2`` units each.

    All methods take x_samples (N, x_dim), and y_samples (N, y_dim) where named.
    """

    def __init__(self, x_dim, y_dim, hidden_size):
        super().__init__()
        hidden = hidden_size // 2
        self.p_mu = nn.Sequential(nn.Linear(x_dim, hidden), nn.ReLU(), nn.Linear(hidden, y_dim))
        self.p_logvar = nn.Sequential(nn.Linear(x_dim, hidden), nn.ReLU(), nn.Linear(hidden, y_dim), nn.Tanh())

    def get_mu_logvar(self, x_samples):
        """Mean and log-variance of q(y|x), each (N, y_dim)."""
        return self.p_mu(x_samples), self.p_logvar(x_samples)

    def forward(self, x_samples, y_samples):
        """The upper bound, a scalar in nats: :func:`club_mi`."""
        return club_mi(*self.get_mu_logvar(x_samples), y_samples)

    def loglikeli(self, x_samples, y_samples):
        """Mean log-likelihood of q up to factor and constant, a scalar."""
        return -self.learning_loss(x_samples, y_samples)

    def learning_loss(self, x_samples, y_samples):
        """The loss that fits q, a scalar: :func:`club_nll`."""
        return club_nll(*self.get_mu_logvar(x_samples), y_samples)


def _checked(op, mu, logvar, y):
    """The three in their common dtype."""
    _checks.tensors(op, mu=mu, logvar=logvar, y=y)
    shape = mu.shape
    if len(shape) != 2:
        raise ValueError(f"{op}: mu must have shape (N, D), got {tuple(shape)}")
    for name, t in (("logvar", logvar), ("y", y)):
        if t.shape != shape:
            raise ValueError(f"{op}: {name} must have mu's shape {tuple(shape)}, got {tuple(t.shape)}")
    return _checks.promote(mu, logvar, y)
