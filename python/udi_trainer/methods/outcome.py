"""The return value of a method."""

from dataclasses import dataclass

from torch import nn

from ..evaluation.fusion import Mean, Rule


@dataclass
class Outcome:
    """The method's part of metrics.json, and its predictor: models, and the rule that fuses their logits.

    A model named after a modality reads its inputs; any other reads the inputs of all modalities.
    """

    metrics: dict
    models: dict[str, nn.Module]
    rule: Rule = Mean()
