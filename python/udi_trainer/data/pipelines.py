"""From stored samples to a modality's input, on the device: pictures, clips, spectrograms, features, words.

Each is a frozen dataclass, so that a run folder can keep it. A call makes the input as evaluation sees it, ``vary`` as
training does, from ``chance`` (N, 4), uniform in [0, 1): where to crop from the top, from the left and in time, and
whether to flip. All modalities of a sample share them, so its pictures and its flow move together.
"""

import functools
from dataclasses import dataclass

import torch

TOP, LEFT, FLIP, TIME = range(4)
MASKS = 2  # of SpecAugment, along either axis of a spectrogram; each hides at most an eighth of it
FLOOR = 1e-7  # added to magnitudes before the logarithm, as in OGM-GE's code


@functools.lru_cache
def constant(values: tuple, device: torch.device) -> torch.Tensor:
    """Copied to the device once: a CUDA graph cannot contain a copy."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Pictures:
    """uint8 (N, C, S, S), or clips of frames (N, F, C, S, S), normalised by channel; of clips, some of the frames.

    Args:
        mean, std: of each channel, of pixels' range 0 to 1.
        size: pixels on a side of what is cropped, at random or from the middle.
        frames: how many of a clip's frames: one from each of so many equal parts, at random or the middle one
            (temporal segment networks, arXiv 1608.00859).
        flip: mirror half of the samples.
        flow: channels are u and v, and mirrored flow goes the other way.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    frames: int | None = None
    flip: bool = False
    flow: bool = False

    def __call__(self, x):
        return self.vary(x, torch.full((len(x), 4), 0.5, device=x.device))

    def vary(self, x, chance):
        number = torch.arange(len(x), device=x.device)
        if self.frames:
            part = torch.arange(self.frames, device=x.device)
            picked = ((part + chance[:, TIME, None]) * (x.shape[1] / self.frames)).long().clamp(max=x.shape[1] - 1)
            x = x[number[:, None], picked]
        clip, spare = x.dim() == 5, x.shape[-1] - self.size
        if spare:
            side = torch.arange(self.size, device=x.device)
            top, left = ((chance[:, axis, None] * (spare + 1)).long() + side for axis in (TOP, LEFT))
            x = x[number[:, None, None], ..., top[:, :, None], left[:, None, :]].movedim((1, 2), (-2, -1))
        if self.flip:
            mirrored = x.flip(-1)
            if self.flow:
                mirrored = torch.stack([255 - mirrored[..., 0, :, :], mirrored[..., 1, :, :]], dim=-3)
            x = torch.where((chance[:, FLIP] > 0.5).view(-1, *[1] * (x.dim() - 1)), mirrored, x)
        mean, std = (constant(values, x.device)[:, None, None] for values in (self.mean, self.std))
        return (x / 255 - mean) / std if not clip else (x / 255 - mean[None]) / std[None]


@dataclass(frozen=True)
class Spectrogram:
    """Sound, int16 (N, T), to the logarithm of its magnitudes (N, 1, frequencies, times), normalised.

    Args:
        mean, std: of all values.
        window, hop: in samples.
        length: samples of what is cut out, at random or from the middle.
        mask: hide bands of frequencies and spans of time in training: SpecAugment (Park et al. 2019, arXiv 1904.08779).
    """

    mean: float
    std: float
    window: int
    hop: int
    length: int
    mask: bool = False

    def __call__(self, x):
        return self.transform(x, torch.full((len(x), 4), 0.5, device=x.device))

    def vary(self, x, chance):
        x = self.transform(x, chance)
        if self.mask:
            for axis in (2, 3):
                for _ in range(MASKS):
                    x = x.masked_fill(self.hidden(x, axis), 0)
        return x

    def transform(self, x, chance):
        spare = x.shape[1] - self.length
        if spare:
            start = (chance[:, TIME, None] * (spare + 1)).long()
            x = x.gather(1, start + torch.arange(self.length, device=x.device))
        hann = torch.hann_window(self.window, device=x.device)
        z = torch.stft(x / 2**15, self.window, self.hop, window=hann, return_complex=True, pad_mode="constant")
        return (((z.abs() + FLOOR).log() - self.mean) / self.std)[:, None]

    @staticmethod
    def hidden(x, axis):
        size = x.shape[axis]
        start, width = torch.rand(2, len(x), 1, device=x.device)
        width = width * size / 8
        place = torch.arange(size, device=x.device)
        start = start * (size - width)
        masked = (place >= start) & (place < start + width)
        return masked.view(len(x), *(size if a == axis else 1 for a in (1, 2, 3)))


@dataclass(frozen=True)
class Features:
    """Arrays (N, ...), normalised, by one value or one for each place of the last axis; given another shape, if any."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, ...] | None = None

    def __call__(self, x):
        x = x if self.shape is None else x.view(len(x), *self.shape)
        return (x.float() - constant(self.mean, x.device)) / constant(self.std, x.device)


@dataclass(frozen=True)
class Tokens:
    """Hashes of words, as they are."""

    def __call__(self, x):
        return x
