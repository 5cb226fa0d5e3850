"""Encoders: modules from the inputs of one modality to features.

A new encoder is one function decorated with ``@encoders.register(name)``. It takes the shape of one sample, and
optionally the width of the features, and returns a module from a batch to features (N, width). Image encoders are also
used for clips, with the mean over the frames.
"""

import inspect
from typing import Any, cast

import torch
from torch import nn

from ..console import log
from ..data.dataset import FEATURES, Modality, Split
from ..errors import UserError
from ..registry import encoders
from .weights import load_weights


@encoders.register("cnn")
def cnn(shape: torch.Size, features: int = FEATURES) -> nn.Module:
    """Two convolutions for images of 8x8 and more. Small images are pooled later, large ones get more layers.

    ReLU follows pooling: this computes the same function on a quarter of the elements.
    """
    channels, height, width = shape
    late = 2 if min(height, width) >= 16 else 1
    height, width, last, more = height // 2 // late, width // 2 // late, 32, []
    while max(height, width) > 16:
        pool = 2 if height > 8 else 1, 2 if width > 8 else 1
        more += [nn.Conv2d(last, 64, 3, padding=1), nn.MaxPool2d(pool), nn.ReLU()]
        height, width, last = height // pool[0], width // pool[1], 64
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(late), nn.ReLU(), *more,
        nn.Flatten(), nn.Linear(last * height * width, features), nn.ReLU(),
    )  # fmt: skip


@encoders.register("mlp")
def mlp(shape: torch.Size, features: int = FEATURES) -> nn.Module:
    """One hidden layer, for samples of any shape."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), 128), nn.ReLU(), nn.Linear(128, features), nn.ReLU())


@encoders.register("cnn1d")
def cnn1d(shape: torch.Size, features: int = FEATURES) -> nn.Module:
    """Three convolutions along the first axis of sequences (T, D), then the mean over time.

    Steps of zeros at the end are padding: the features are those of the sequence without them.
    """
    sizes = (shape[1], 64, 128, 128)
    pairs = zip(sizes, sizes[1:], strict=False)
    layers = [layer for a, b in pairs for layer in (nn.Conv1d(a, b, 5, stride=2, padding=2), nn.ReLU())]
    return Padded(Transpose(), *layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, features), nn.ReLU())


class Padded(nn.Sequential):
    """Layers over sequences (N, T, D), the first one a transposition, that see and pool the real steps only.

    Steps of zeros at the end are padding. BatchNorm's statistics include them.
    """

    def forward(self, x):
        transpose, *layers = self
        real = real_steps(x)[:, None]
        x = transpose(x)
        for layer in layers:
            x = layer(x)
            if isinstance(layer, nn.Conv1d):
                real = real[..., :: layer.stride[0]]
            elif isinstance(layer, nn.ReLU) and x.dim() == 3:
                x = x * real
            elif isinstance(layer, nn.AdaptiveAvgPool1d):
                x = x / real_share(real)
            elif isinstance(layer, MeanAndMax):
                x = layer.rescaled(x, real_share(real)[..., 0])
        return x


def real_share(real: torch.Tensor) -> torch.Tensor:
    """The share of real steps (N, 1, 1), of a mask (N, 1, T)."""
    return real.float().mean(2, keepdim=True).clamp_min(1 / real.shape[2])


@encoders.register("fcn")
def fcn(shape: torch.Size, features: int = FEATURES) -> nn.Module:
    """For short sequences (T, D): three convolutions with BatchNorm at full length, then mean and maximum over time.

    The fully convolutional network of Wang, Yan and Oates (arXiv 1611.06455), which takes the mean alone.
    """
    sizes = (shape[1], 64, 128, 64)
    layers: list[nn.Module] = []
    for inputs, outputs, kernel in zip(sizes, sizes[1:], (7, 5, 3), strict=False):
        layers += [nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm1d(outputs), nn.ReLU()]
    return Padded(Transpose(), *layers, MeanAndMax(), nn.Linear(2 * sizes[-1], features), nn.ReLU())


class MeanAndMax(nn.Module):
    """Over the last axis, side by side."""

    def forward(self, x):
        return torch.cat((x.mean(-1), x.amax(-1)), dim=1)

    def rescaled(self, x, share):
        """The result, with the mean over this share (N, 1) of the axis; the rest of it was 0."""
        mean, maximum = x.chunk(2, dim=1)
        return torch.cat((mean / share, maximum), dim=1)


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def real_steps(x: torch.Tensor) -> torch.Tensor:
    """Which steps of sequences (N, T, D) are not zeros at the end, bool (N, T)."""
    return x.ne(0).any(2).flip(1).cummax(1).values.flip(1)


@encoders.register("words")
class Words(nn.Module):
    """The mean of learned word embeddings. Inputs are word hashes (N, L) below 8192; 0 is padding."""

    def __init__(self, shape: torch.Size, features: int = FEATURES):
        super().__init__()
        self.vectors, self.head = nn.Embedding(8192, 64), nn.Linear(64, features)

    def forward(self, words):
        mask = (words != 0)[..., None]
        mean = (self.vectors(words.long()) * mask).sum(1) / mask.sum(1).clamp_min(1)
        return self.head(mean).relu()


@encoders.register("resnet18")
def resnet18(shape: torch.Size, features: int = FEATURES) -> nn.Module:
    """ResNet-18 (He et al. 2016) for images and spectrograms of 32x32 and more."""

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
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, features))


class FrameMean(nn.Module):
    """Applies an image encoder to each frame of clips (N, F, C, H, W) and averages the features."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.unloaded = encoder, [f"encoder.{name}" for name in getattr(encoder, "unloaded", ())]

    def forward(self, clips):
        frames = clips.flatten(0, 1).to(memory_format=torch.channels_last)
        return self.encoder(frames).unflatten(0, clips.shape[:2]).mean(1)


def named_encoder(name: str, modality: Modality, shape: torch.Size, tell: bool) -> nn.Module:
    """The encoder registered under the modality's encoder name; for clips, applied per frame."""
    clip = len(shape) == 4
    make = encoders.find(str(modality.encoder))
    widths = (modality.width,) if len(inspect.signature(make).parameters) > 1 else ()  # some have a width of their own
    encoder = make(shape[1:] if clip else shape, *widths)
    if modality.weights:
        said = load_weights(encoder, modality.weights)
        if tell:
            log.info("encoder of %s: %s", name, said)
    return FrameMean(encoder) if clip else encoder


def make_encoder(name: str, modality: Modality, split: Split, tell: bool = False) -> tuple[nn.Module, int]:
    """A new encoder for this modality, and the width of its features. ``tell``: log what was loaded from a file.

    Image encoders use the channels-last format: pooling is faster, and so are convolutions in reduced precision.
    """
    batch = modality.sample(split, min(2, len(split))).cpu()
    if isinstance(modality.encoder, nn.Module):
        raise UserError(f"the encoder of {name} is a module: give a class or a function that creates new ones")
    shape = batch.shape[1:]
    try:
        by_name = isinstance(modality.encoder, str)
        encoder = named_encoder(name, modality, shape, tell) if by_name else modality.encoder(shape)  # type: ignore
        if len(shape) == 3:
            cast(Any, encoder).to(memory_format=torch.channels_last)  # torch's type hints lack it
        with torch.no_grad():
            features = encoder.eval()(batch)
        encoder.train()
    except UserError:
        raise
    except Exception as error:
        usual = torch.get_default_dtype()
        hint = "" if usual == torch.float32 else f" (its parameters are {usual} by default, the inputs {batch.dtype})"
        raise UserError(f"the encoder of {name} fails on inputs of shape {tuple(shape)}: {error}{hint}") from error
    if not isinstance(features, torch.Tensor) or features.dim() != 2 or len(features) != len(batch):
        got = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise UserError(f"the encoder of {name} must return (N, width) for {len(batch)} samples, got {got}")
    if features.dtype != (usual := torch.get_default_dtype()):  # that of the layers above them
        raise UserError(f"the encoder of {name} returns {features.dtype}, but features must be {usual}")
    return encoder, features.shape[1]


def is_stochastic(encoder: nn.Module) -> bool:
    """Whether training steps may draw random numbers: true for dropout-like layers, and for any unknown layer."""

    def may_draw(layer):
        if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
            return layer.dropout > 0
        random = nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d
        return isinstance(layer, random) or not type(layer).__module__.startswith(("torch.nn.", __name__))

    return any(map(may_draw, encoder.modules()))
