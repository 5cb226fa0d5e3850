"""What a method hands back."""

from dataclasses import dataclass

from torch import nn

from ..evaluation.fusion import Mean, Rule


@dataclass
class Outcome:
    """Its part of metrics.json, and what predicts: models whose logits the rule fuses.

    A model named as a modality reads that one's inputs; any other reads all modalities' inputs.
    """

    metrics: dict
    models: dict[str, nn.Module]
    rule: Rule = Mean()
