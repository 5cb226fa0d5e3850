"""Encoders: from one modality's inputs to features.

A new encoder is one function decorated with ``@encoders.register(name)`` that takes the shape of one sample and
returns a module from a batch to features (N, width).
"""

import torch
from torch import nn

from ..data.dataset import Modality, Split
from ..errors import UserError
from ..registry import encoders

FEATURES = 64  # of the encoders here; others may have any width


@encoders.register("cnn")
def cnn(shape: torch.Size) -> nn.Module:
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
def mlp(shape: torch.Size) -> nn.Module:
    """One hidden layer, for samples of any shape."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), 128), nn.ReLU(), nn.Linear(128, FEATURES), nn.ReLU())


@encoders.register("resnet18")
def resnet18(shape: torch.Size) -> nn.Module:
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


def make_encoder(name: str, modality: Modality, split: Split) -> tuple[nn.Module, int]:
    """A fresh encoder of this modality, and the width of its features.

    Images keep their channels last in memory: pooling and, in reduced precision, convolutions are quicker so.
    """
    two = modality.sample(split, min(2, len(split))).cpu()
    make = encoders.find(modality.encoder) if isinstance(modality.encoder, str) else modality.encoder
    if isinstance(make, nn.Module):
        raise UserError(f"the encoder of {name} is a module: give what makes one anew, a class, or a function")
    shape = two.shape[1:]
    try:
        encoder = make(shape)
        if len(shape) == 3:
            encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            features = encoder.eval()(two)
        encoder.train()
    except Exception as error:
        raise UserError(f"the encoder of {name} fails on inputs of shape {tuple(shape)}: {error}") from error
    if not isinstance(features, torch.Tensor) or features.dim() != 2 or len(features) != len(two):
        got = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise UserError(f"the encoder of {name} must make (N, width) of {len(two)} samples, got {got}")
    return encoder, features.shape[1]


def may_draw(encoder: nn.Module) -> bool:
    """Whether its steps may draw random numbers: a layer is known to, or is nobody's that one could know."""

    def draws(layer):
        if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
            return layer.dropout > 0
        known = nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d
        return isinstance(layer, known) or not type(layer).__module__.startswith(("torch.nn.", __name__))

    return any(map(draws, encoder.modules()))
