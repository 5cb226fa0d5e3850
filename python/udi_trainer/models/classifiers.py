"""Classifiers: encoders with linear heads, which return (features, logits), and a head without an encoder."""

from functools import reduce

import torch
from torch import nn

from ..registry import classifiers


@classifiers.register("unimodal")
class Classifier(nn.Module):
    """One modality's encoder and linear head."""

    kind = "unimodal"

    head: nn.Linear

    def __init__(self, encoder: nn.Module, width: int, classes: int, features: int | None = None):
        """``features``: width of the features; if it differs from the encoder's, a linear layer projects to it."""
        super().__init__()
        self.arguments = {"features": features}
        self.encoder = encoder if features in (None, width) else nn.Sequential(encoder, nn.Linear(width, features))
        self.head = nn.Linear(features or width, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.encoder(x)
        return features, self.head(features)


class DetachedClassifiers(nn.Module):
    """A classifier per modality and a shared linear head. All features are as wide as the narrowest encoder's."""

    def __init__(self, encoders: dict[str, nn.Module], widths: dict[str, int], classes: int):
        super().__init__()
        self.width = min(widths.values())
        self.alone = nn.ModuleDict({m: Classifier(encoders[m], widths[m], classes, self.width) for m in encoders})
        self.shared = nn.Linear(self.width, classes)

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """(features, logits of its own head) by modality."""
        return {name: classifier(inputs[name]) for name, classifier in self.alone.items()}


class JointClassifier(nn.Module):
    """The encoders of all modalities with a joint linear head; :meth:`shares` are predictions of single modalities."""

    encoders: nn.ModuleDict

    def __init__(self, encoders: dict[str, nn.Module]):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)

    def fuse(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def shares(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each modality's share of the logits, or the logits of its own head."""
        raise NotImplementedError

    def forward(
        self, inputs: dict[str, torch.Tensor], present: dict[str, torch.Tensor] | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Returns (features by modality, logits).

        ``present`` marks the samples that have a modality (default: all); the features of the others are set to 0.
        """
        features = {name: encoder(inputs[name]) for name, encoder in self.encoders.items()}
        for name, has in (present or {}).items():
            features[name] = features[name] * has[:, None].to(features[name].dtype)
        return features, self.fuse(features)


@classifiers.register("concat")
class ConcatClassifier(JointClassifier):
    """A linear head on the concatenated features. The shares divide its bias evenly."""

    kind = "concat"
    widths: list[int]

    def __init__(self, encoders: dict[str, nn.Module], widths: dict[str, int], classes: int):
        super().__init__(encoders)
        self.widths = list(widths.values())
        self.head = nn.Linear(sum(self.widths), classes)

    def fuse(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.head(torch.cat(tuple(features.values()), dim=1))

    def shares(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights, bias = self.head.weight.split(self.widths, dim=1), self.head.bias / len(features)
        pairs = zip(features.items(), weights, strict=True)
        return {name: nn.functional.linear(x, weight, bias) for (name, x), weight in pairs}


@classifiers.register("sum")
class SumClassifier(JointClassifier):
    """A linear head on each modality's features; the logits are summed."""

    kind = "sum"
    heads: nn.ModuleDict

    def __init__(self, encoders: dict[str, nn.Module], widths: dict[str, int], classes: int):
        super().__init__(encoders)
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, width in widths.items()})

    def fuse(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        return reduce(torch.add, self.shares(features).values())

    def shares(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self.heads[name](x) for name, x in features.items()}


@classifiers.register("mean")
class MeanClassifier(SumClassifier):
    """A linear head on each modality's features; the logits are averaged. The shares are the logits before that."""

    kind = "mean"

    def fuse(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().fuse(features) / len(features)


@classifiers.register("concat-heads")
class HeadsClassifier(ConcatClassifier):
    """A linear head on the concatenated features, and a head of its own for each modality, which gives its share."""

    kind = "concat-heads"

    def __init__(self, encoders: dict[str, nn.Module], widths: dict[str, int], classes: int):
        super().__init__(encoders, widths, classes)
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, width in widths.items()})

    def shares(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self.heads[name](x) for name, x in features.items()}


@classifiers.register("features")
class FeatureHead(nn.Module):
    """A linear head on the concatenated features (N, width) of other models; returns the logits."""

    kind = "features"

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.arguments = {"width": width}
        self.head = nn.Linear(width, classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features)


class ConditionalGaussian(nn.Module):
    """q(y|x) of CLUB: a diagonal Gaussian with mean and log-variance, the latter between -1 and 1.

    ``depth``: number of hidden layers of ``hidden`` units. With 0, both depend linearly on x (before tanh).
    """

    def __init__(self, x_dim: int, y_dim: int, hidden: int, depth: int = 1):
        super().__init__()
        sizes = [x_dim, *[hidden] * depth]
        layers = [layer for pair in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 2 * y_dim))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mu, logvar = self.layers(x).chunk(2, dim=1)
        return mu, logvar.tanh()
