"""Classifiers: encoders under linear heads. All return (features, logits)."""

import torch
from torch import nn

from ..registry import classifiers


@classifiers.register("unimodal")
class Classifier(nn.Module):
    """One modality's encoder and linear head."""

    kind = "unimodal"

    def __init__(self, encoder: nn.Module, width: int, classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.encoder(x)
        return features, self.head(features)


class JointClassifier(nn.Module):
    """All modalities' encoders under a linear head; features come by modality.

    The logits are the sum of one share per modality, which :meth:`shares` tells apart.
    """

    def __init__(self, encoders: dict[str, nn.Module]):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)

    def forward(
        self, inputs: dict[str, torch.Tensor], present: dict[str, torch.Tensor] | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """``present``: which samples have a modality; the features of the others are 0. Not named: all have it."""
        features = {name: encoder(inputs[name]) for name, encoder in self.encoders.items()}
        for name, has in (present or {}).items():
            features[name] = features[name] * has[:, None].to(features[name].dtype)
        return features, self.fuse(features)


@classifiers.register("concat")
class ConcatClassifier(JointClassifier):
    """One linear head on the concatenated features; its bias is shared out evenly."""

    kind = "concat"

    def __init__(self, encoders: dict[str, nn.Module], widths: dict[str, int], classes: int):
        super().__init__(encoders)
        self.widths = list(widths.values())
        self.head = nn.Linear(sum(self.widths), classes)

    def fuse(self, features):
        return self.head(torch.cat(tuple(features.values()), dim=1))

    def shares(self, features):
        weights, bias = self.head.weight.split(self.widths, dim=1), self.head.bias / len(features)
        pairs = zip(features.items(), weights, strict=True)
        return {name: nn.functional.linear(x, weight, bias) for (name, x), weight in pairs}


@classifiers.register("sum")
class SumClassifier(JointClassifier):
    """A linear head on each modality's features, their logits summed."""

    kind = "sum"

    def __init__(self, encoders: dict[str, nn.Module], widths: dict[str, int], classes: int):
        super().__init__(encoders)
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, width in widths.items()})

    def fuse(self, features):
        return sum(self.shares(features).values())

    def shares(self, features):
        return {name: self.heads[name](x) for name, x in features.items()}


class ConditionalGaussian(nn.Module):
    """q(y|x) of CLUB, a diagonal Gaussian: mean and log-variance, the latter between -1 and 1.

    ``depth``: layers of ``hidden`` units; 0 makes both linear in x.
    """

    def __init__(self, x_dim: int, y_dim: int, hidden: int, depth: int = 1):
        super().__init__()
        sizes = [x_dim, *[hidden] * depth]
        layers = [layer for pair in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 2 * y_dim))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mu, logvar = self.layers(x).chunk(2, dim=1)
        return mu, logvar.tanh()
