"""Fused kernels for multimodal learning without a joint loss."""

from ._info import build_info
from .certainty import certainty_fusion
from .club import CLUB, club_mi, club_nll
from .duc import duc_loss
from .effective_dims import effective_dims
from .gradients import GradientPlan, alignment_weights, gramian, weighted_sum
from .js_div import js_div

__all__ = [
    "CLUB",
    "GradientPlan",
    "alignment_weights",
    "build_info",
    "certainty_fusion",
    "club_mi",
    "club_nll",
    "duc_loss",
    "effective_dims",
    "gramian",
    "js_div",
    "weighted_sum",
]
__version__ = "0.2.0"
