from ..registry import studies
from ..study import NOISE, Study, Variant

SETTINGS = {
    "udi": "--baselines joint,joint-sum,ogm-ge,gramian",
    "udi, dynamic": "--controller dynamic",
    "udi, static 0.5,0.5": "--alpha 0.5,0.5",
    "udi, static 1,0": "--alpha 1,0",
    "udi, followers warm": "--follower-init anchor-phase",
    "udi, CLUB given the label": "--club given-label",
    "udi, residual": "--follower-loss residual",
    "udi, loglinear fusion": "--fusion loglinear",
    "co-training, loglinear fusion": "--teacher fused --rounds 2 --fusion loglinear",
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
