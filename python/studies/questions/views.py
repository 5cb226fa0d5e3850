from ..registry import studies
from ..study import NOISE, Study, Variant

SETTINGS = {
    "udi": "--controller static --baselines joint,joint-sum,ogm-ge,gramian",
    "udi, dynamic": "--controller dynamic",
    "udi, static 0.5,0.5": "--controller static --alpha 0.5,0.5",
    "udi, static 1,0": "--controller static --alpha 1,0",
    "udi, followers warm": "--controller static --follower-init anchor-phase",
    "udi, CLUB given the label": "--controller static --club given-label",
    "udi, residual": "--controller static --follower-loss residual",
    "udi, loglinear fusion": "--controller static --fusion loglinear",
    "co-training, loglinear fusion": "--controller static --teacher fused --rounds 2 --fusion loglinear",
    "dimml": "--method dimml",
}


@studies.register("views")
class Views(Study):
    """Where each modality carries what the other lacks (halves of a digit), when does UDI beat the other methods?"""

    variants = [
        Variant(name, f"--dataset splitdigits --baselines none {noise} {options}", condition)
        for condition, noise in NOISE.items()
        for name, options in SETTINGS.items()
    ]
