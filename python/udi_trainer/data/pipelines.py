"""Input pipelines from stored samples to a modality's input, on the device: images, clips, sound, features, words.

Each is a frozen dataclass, so that a run folder can store it. A call returns the input for evaluation, ``vary`` the
augmented input for training. ``vary`` takes ``chance`` (N, 4), uniform in [0, 1): the crop position from the top, from
the left and in time, and whether to flip. All modalities of a sample share these numbers, so the images and the flow of
a clip are augmented alike.
"""

import functools
from dataclasses import dataclass

import torch

TOP, LEFT, FLIP, TIME = range(4)
MASKS = 2  # of SpecAugment, along each axis of a spectrogram; each covers at most an eighth of the axis
FLOOR = 1e-7  # added to magnitudes before the logarithm, as in OGM-GE's code


@functools.lru_cache
def constant(values: tuple, device: torch.device) -> torch.Tensor:
    """A tensor that is copied to the device once: a CUDA graph cannot contain a copy from the host."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Pictures:
    """Images uint8 (N, C, S, S) or clips (N, F, C, S, S), normalised per channel.

    Args:
        mean, std: per channel, for pixels in [0, 1].
        size: side of the crop in pixels; random in training, otherwise in the center.
        frames: number of frames taken from a clip, one from each of as many equal segments: random in training,
            otherwise the middle one (temporal segment networks, arXiv 1608.00859).
        flip: mirror half of the samples in training.
        flow: the channels are optical flow u and v; mirroring negates u.
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
        sample = torch.arange(len(x), device=x.device)
        if self.frames:
            segment = torch.arange(self.frames, device=x.device)
            frame = ((segment + chance[:, TIME, None]) * (x.shape[1] / self.frames)).long().clamp(max=x.shape[1] - 1)
            x = x[sample[:, None], frame]
        clip, spare = x.dim() == 5, x.shape[-1] - self.size
        if spare:
            offset = torch.arange(self.size, device=x.device)
            row, column = ((chance[:, axis, None] * (spare + 1)).long() + offset for axis in (TOP, LEFT))
            x = x[sample[:, None, None], ..., row[:, :, None], column[:, None, :]].movedim((1, 2), (-2, -1))
        if self.flip:
            mirrored = x.flip(-1)
            if self.flow:
                mirrored = torch.stack([255 - mirrored[..., 0, :, :], mirrored[..., 1, :, :]], dim=-3)
            x = torch.where((chance[:, FLIP] > 0.5).view(-1, *[1] * (x.dim() - 1)), mirrored, x)
        mean, std = (constant(values, x.device)[:, None, None] for values in (self.mean, self.std))
        return (x / 255 - mean) / std if not clip else (x / 255 - mean[None]) / std[None]


@dataclass(frozen=True)
class Spectrogram:
    """Normalised log-magnitude spectrograms (N, 1, frequencies, times) of sound, int16 (N, T).

    Args:
        mean, std: of all values.
        window, hop: of the short-time Fourier transform, in samples.
        length: length of the crop in samples; random in training, otherwise in the center.
        mask: mask bands of frequency and time in training: SpecAugment (Park et al. 2019, arXiv 1904.08779).
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
                    x = x.masked_fill(self.random_mask(x, axis), 0)
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
    def random_mask(x, axis):
        size = x.shape[axis]
        start, width = torch.rand(2, len(x), 1, device=x.device)
        width = width * size / 8
        position = torch.arange(size, device=x.device)
        start = start * (size - width)
        masked = (position >= start) & (position < start + width)
        return masked.view(len(x), *(size if a == axis else 1 for a in (1, 2, 3)))


def moments(x: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of (N, ..., D) by position of the last axis; the latter is 1 where x is constant."""
    x = x.double().flatten(0, -2)
    std = x.std(0, correction=0)
    return tuple(x.mean(0).tolist()), tuple(torch.where(std > 1e-6 * x.abs().amax(0), std, 1).tolist())


@dataclass(frozen=True)
class Features:
    """Normalised arrays (N, ...), with one mean or one per position of the last axis, reshaped to ``shape``.

    ``padded``: sequences (N, T, D) whose steps after the end are NaN. They become zeros, the mean.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, ...] | None = None
    padded: bool = False

    @classmethod
    def of(cls, x: torch.Tensor) -> "Features":
        """Standardises inputs like these, the training samples (N, ..., D): by position of the last axis."""
        return cls(*moments(x))

    def __call__(self, x):
        x = x if self.shape is None else x.view(len(x), *self.shape)
        x = (x.float() - constant(self.mean, x.device)) / constant(self.std, x.device)
        return x.nan_to_num(0) if self.padded else x


@dataclass(frozen=True)
class Tokens:
    """Word hashes, unchanged."""

    def __call__(self, x):
        return x
