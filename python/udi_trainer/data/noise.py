"""Noise in the training split, for studies of robustness."""

from dataclasses import replace

import torch

from ..errors import UserError
from ..seeds import derive_seed
from .dataset import Dataset


def add_noise(pixels: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    """Adds Gaussian noise to uint8 pixels, then clips and rounds. ``std`` is relative to the range of pixels.

    The Gaussian noise of ImageNet-C (Hendrycks & Dietterich 2019, arXiv 1903.12261).
    """
    noise = torch.randn(pixels.shape, generator=generator).to(pixels.device)
    return (pixels / 255 + std * noise).clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def corrupt(data: Dataset, inputs: float, labels: float) -> Dataset:
    """The dataset with noise in its training split, the same in every run. Validation and test stay clean.

    ``inputs``: standard deviation of Gaussian noise on everything that the modalities read, relative to the range of
    pixels and to the standard deviation of other tensors. ``labels``: the fraction of labels that are replaced by a
    uniformly drawn other class; unlabelled samples stay unlabelled. The labels replaced at a lower fraction are also
    replaced at a higher one.
    """

    def corrupted(name: str, x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed("noise", name))
        if x.dtype == torch.uint8:
            return add_noise(x, inputs, generator)
        if x.dtype == torch.bool:  # presence of a modality
            return x
        if x.dtype == torch.int16:  # sound
            x = x.float()
        if not x.is_floating_point():
            raise UserError(f"--noise: {name!r} is neither uint8 pixels nor floating point, but {x.dtype}")
        std = (x[~x.isnan()] if x.isnan().any() else x).std()  # NaN pads sequences
        return x + inputs * std * torch.randn(x.shape, generator=generator).to(x.device)

    train, generator = data.train, torch.Generator().manual_seed(derive_seed("noise"))
    wrong = torch.randperm(len(train), generator=generator)
    shift = torch.randint(1, data.classes, wrong.shape, generator=generator)
    shift[wrong[round(labels * len(train)) :]] = 0
    stored = {name: corrupted(name, x) for name, x in train.stored.items()}
    shifted = (train.labels + shift.to(train.labels.device)) % data.classes
    return replace(data, train=replace(train, labels=shifted.where(train.labels >= 0, train.labels), stored=stored))
