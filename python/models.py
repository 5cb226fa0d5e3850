"""Encoders, by name, and the classifiers made of them.

A new encoder is one function decorated with ``@encoders.register(name)`` that takes the shape of one sample and
returns a module from a batch to (N, FEATURES).
"""

import torch
from torch import nn

from common import Registry

FEATURES = 64
encoders = Registry("encoder")


@encoders.register("cnn")
def cnn(shape):
    """Two convolutions, for images of 8x8 and more; small ones keep their resolution longer.

    ReLU comes after pooling: the same function, on a quarter of the elements.
    """
    channels, height, width = shape
    late = 2 if min(height, width) >= 16 else 1
    flat = 32 * (height // 2 // late) * (width // 2 // late)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(late), nn.ReLU(),
        nn.Flatten(), nn.Linear(flat, FEATURES), nn.ReLU(),
    )  # fmt: skip


@encoders.register("mlp")
def mlp(shape):
    """One hidden layer, for samples of any shape."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), 128), nn.ReLU(), nn.Linear(128, FEATURES), nn.ReLU())


@encoders.register("resnet18")
def resnet18(shape):
    """ResNet-18 (He et al. 2016), for images of 32x32 and more, spectrograms too."""

    def conv(inputs, outputs, size, stride=1):
        layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        return nn.Sequential(layer, nn.BatchNorm2d(outputs))

    class Block(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            stride = 1 if inputs == outputs else 2
            self.body = nn.Sequential(
                conv(inputs, outputs, 3, stride), nn.ReLU(inplace=True), conv(outputs, outputs, 3)
            )
            self.shortcut = nn.Identity() if stride == 1 else conv(inputs, outputs, 1, stride)

        def forward(self, x):
            return (self.body(x) + self.shortcut(x)).relu_()

    stem = conv(shape[0], 64, 7, 2), nn.ReLU(True), nn.MaxPool2d(3, 2, padding=1)
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [Block(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, FEATURES))


def encoder_for(modality, run):
    """Images keep their channels last in memory: pooling and, in reduced precision, convolutions are quicker so."""
    shape = modality.shape(run.data.train)
    encoder = encoders.find(modality.encoder)(shape)
    return encoder.to(memory_format=torch.channels_last) if len(shape) == 3 else encoder


def place(model, run):
    """The model on the run's device, compiled if the run wants that."""
    model.to(run.device)
    if run.options.compile:
        model.compile()
    return model


class Classifier(nn.Module):
    """One modality's encoder and linear head; returns (features, logits)."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(FEATURES, classes)

    def forward(self, x):
        features = self.encoder(x)
        return features, self.head(features)


class ConditionalGaussian(nn.Module):
    """q(y|x) of CLUB, a diagonal Gaussian: mean and log-variance, the latter between -1 and 1.

    ``depth``: layers of ``hidden`` units; 0 makes both linear in x.
    """

    def __init__(self, x_dim, y_dim, hidden, depth=1):
        super().__init__()
        sizes = [x_dim, *[hidden] * depth]
        layers = [layer for pair in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 2 * y_dim))

    def forward(self, x):
        mu, logvar = self.layers(x).chunk(2, dim=1)
        return mu, logvar.tanh()


class JointClassifier(nn.Module):
    """All modalities' encoders under a linear head; returns (features by modality, logits).

    The logits are the sum of one share per modality, which :meth:`shares` tells apart.
    """

    def __init__(self, encoders):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)

    def forward(self, inputs):
        features = {name: encoder(inputs[name]) for name, encoder in self.encoders.items()}
        return features, self.fuse(features)


class ConcatClassifier(JointClassifier):
    """One linear head on the concatenated features; its bias is shared out evenly."""

    def __init__(self, encoders, classes):
        super().__init__(encoders)
        self.head = nn.Linear(FEATURES * len(encoders), classes)

    def fuse(self, features):
        return self.head(torch.cat(tuple(features.values()), dim=1))

    def shares(self, features):
        weights, bias = self.head.weight.chunk(len(features), dim=1), self.head.bias / len(features)
        pairs = zip(features.items(), weights, strict=True)
        return {name: nn.functional.linear(x, weight, bias) for (name, x), weight in pairs}


class SumClassifier(JointClassifier):
    """A linear head on each modality's features, their logits summed."""

    def __init__(self, encoders, classes):
        super().__init__(encoders)
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, classes) for name in encoders})

    def fuse(self, features):
        return sum(self.shares(features).values())

    def shares(self, features):
        return {name: self.heads[name](x) for name, x in features.items()}
