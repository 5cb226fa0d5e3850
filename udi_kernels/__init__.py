"""Fused kernels for multimodal learning without a joint loss."""

from ._certainty import certainty_fusion
from ._club import CLUB, club_mi, club_nll
from ._duc import duc_loss
from ._effective_dims import effective_dims
from ._gradients import GradientPlan, alignment_weights, gramian, weighted_sum
from ._info import build_info
from ._js_div import js_div
from ._js_div_topk import js_div_topk
from ._linear_js_div import LinearJSDiv, linear_js_div
from ._skew_kl import skew_kl

__all__ = [
    "CLUB",
    "GradientPlan",
    "LinearJSDiv",
    "alignment_weights",
    "build_info",
    "certainty_fusion",
    "club_mi",
    "club_nll",
    "duc_loss",
    "effective_dims",
    "gramian",
    "js_div",
    "js_div_topk",
    "linear_js_div",
    "skew_kl",
    "weighted_sum",
]
__version__ = "0.2.0"
