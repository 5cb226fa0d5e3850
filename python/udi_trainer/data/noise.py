"""Noise in the training split, for studies of robustness."""

from dataclasses import replace

import torch

from ..errors import UserError
from ..seeds import derive_seed
from .dataset import Dataset


def noisy(pixels: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    """uint8 pixels plus Gaussian noise, ``std`` of the pixels' range; clipped and rounded to pixels again.

    As corrupted images are made in ImageNet-C (Hendrycks & Dietterich 2019, arXiv 1903.12261).
    """
    noise = torch.randn(pixels.shape, generator=generator).to(pixels.device)
    return (pixels / 255 + std * noise).clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def corrupt(data: Dataset, inputs: float, labels: float) -> Dataset:
    """The dataset with noise in its training split, the same in every run; validation and test stay clean.

    ``inputs``: standard deviation of Gaussian noise on all that the modalities read, of pixels as a fraction of their
    range, of other tensors as a fraction of their own standard deviation. ``labels``: fraction of the labels replaced,
    each by any other class with the same probability; unlabelled samples stay so. A lower fraction's wrong labels are
    among a higher one's.
    """

    def noised(name: str, x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed("noise", name))
        if x.dtype == torch.uint8:
            return noisy(x, inputs, generator)
        if x.dtype == torch.bool:  # who has what
            return x
        if x.dtype == torch.int16:  # sound
            x = x.float()
        if not x.is_floating_point():
            raise UserError(f"--noise: {name!r} is neither pixels nor floating point, but {x.dtype}")
        return x + inputs * x.std() * torch.randn(x.shape, generator=generator).to(x.device)

    train, generator = data.train, torch.Generator().manual_seed(derive_seed("noise"))
    wrong = torch.randperm(len(train), generator=generator)
    shift = torch.randint(1, data.classes, wrong.shape, generator=generator)
    shift[wrong[round(labels * len(train)) :]] = 0
    stored = {name: noised(name, x) for name, x in train.stored.items()}
    shifted = (train.labels + shift.to(train.labels.device)) % data.classes
    return replace(data, train=replace(train, labels=shifted.where(train.labels >= 0, train.labels), stored=stored))
