"""Joint training with sum fusion: a linear head for each modality, their logits summed, one loss on the sum."""

from ..models.classifiers import SumClassifier
from ..registry import methods
from ..run import Run
from .joint import Joint, train_joint
from .outcome import Outcome


class JointSum(Joint):
    """The common form (``SumFusion`` in OGM-GE's code, GeWu-Lab/OGM-GE_CVPR2022): each head has a bias.

    A sum of linear heads is a linear head on the concatenated features, so it can learn the same functions. It differs
    in its initial weights, which are larger because each head is drawn for one modality's width, and in the speed of
    the bias.
    """

    key = "joint-sum"
    classifier = SumClassifier


@methods.register("joint-sum")
def joint_sum(run: Run) -> Outcome:
    """A linear head for each modality, the logits summed, one loss."""
    return train_joint(*(run.make(JointSum, decay=decay) for decay in run.decays))
