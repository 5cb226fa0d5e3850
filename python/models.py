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
    """Two convolutions, for images of 8x8 and more; small ones keep their resolution longer."""
    channels, height, width = shape
    late = 2 if min(height, width) >= 16 else 1
    flat = 32 * (height // 2 // late) * (width // 2 // late)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(late),
        nn.Flatten(), nn.Linear(flat, FEATURES), nn.ReLU(),
    )  # fmt: skip


@encoders.register("mlp")
def mlp(shape):
    """One hidden layer, for samples of any shape."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), 128), nn.ReLU(), nn.Linear(128, FEATURES), nn.ReLU())


def encoder_for(modality, run):
    """Images keep their channels last in memory: pooling and, in reduced precision, convolutions are quicker so."""
    shape = modality.shape(run.data.train)
    encoder = encoders.find(modality.encoder)(shape)
    if len(shape) == 3:
        encoder.to(memory_format=torch.channels_last)
    if run.options.compile:
        encoder.compile(dynamic=False)
    return encoder


class Classifier(nn.Module):
    """One modality's encoder and linear head; returns (features, logits)."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(FEATURES, classes)

    def forward(self, x):
        features = self.encoder(x)
        return features, self.head(features)


class ConcatClassifier(nn.Module):
    """All modalities' encoders under one linear head on their concatenated features; returns the logits.

    The head is linear, so the logits are the sum of one share per modality; the bias is shared out evenly.
    """

    def __init__(self, encoders, classes):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.head = nn.Linear(FEATURES * len(encoders), classes)

    def forward(self, inputs):
        return self.head(torch.cat([encoder(inputs[name]) for name, encoder in self.encoders.items()], dim=1))

    def shares(self, inputs):
        weights = self.head.weight.chunk(len(self.encoders), dim=1)
        bias = self.head.bias / len(self.encoders)
        return {
            name: nn.functional.linear(encoder(inputs[name]), weight, bias)
            for (name, encoder), weight in zip(self.encoders.items(), weights, strict=True)
        }
