"""The kinds of columns that a manifest may contain: how cells are read, stored and turned into a modality's input.

A kind is a class registered by name. Its cells are lists of paths, text or lists of numbers; an empty cell is None.
"""

import functools
import math
import os
import pickle
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import first_line
from ..options import Group, Options, flag, number, option, pair, some_of
from ..registry import Registry
from . import pipelines
from .cache import KEY, VERSION, Cache, Unreadable, digest, file_key, numpy_type
from .dataset import Modality, sequence_encoder
from .pictures import Still, eight_bits, extremes, import_pillow, is_deep, is_gray, loses_bits, open_image, pages
from .pipelines import Features, Spectrogram, Tokens
from .sound import SILENCE, cancelling, integer_bits, mono, read_sound
from .words import words_of

kinds = Registry("kind")
STATISTICS_SAMPLES = 2000  # training samples, evenly spaced, that means and standard deviations are computed from
MAX_SECONDS = 10.0  # of sound, unless an option sets the length
MAX_SAMPLE_RATE = 22050  # hertz; the usual rate in the field
MISSING = b"-" * KEY  # the key of an empty cell
MAX_WORDS = 64  # of a text, or characters of scripts without spaces; the rest is ignored
USUAL_LENGTHS = 4  # sequences longer than so many times the median are cut
LISTED = 3  # files named in a note
DEEP_STILLS = 8  # of a clip, evenly spaced, whose range of values is looked at
BUCKETS = 8191  # of hashed words; 0 is padding
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".opus")
VIDEOS = (".mp4", ".avi", ".flv", ".mkv", ".webm", ".mov")
ARRAYS = (".npy", ".npz", ".pt")

Cell = Any  # a list of paths, a text, or a list of numbers, as its kind takes it


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Group, title="pictures and sound"):
    image_size: int | None = option(
        None, number(int, 4), "pixels that images and frames are resized to", "N", "64 or as small as they are"
    )
    frames: int = option(3, number(int, 1), "frames per clip: random ones in training, otherwise fixed ones")


@dataclass(frozen=True, kw_only=True)
class SoundOptions(Group, title="pictures and sound"):
    sample_rate: int | None = option(
        None, number(int, 100), "hertz that sound is resampled to", "N", "the median of training, at most 22050"
    )
    audio_length: float | None = option(
        None,
        number(float, above=0),
        "seconds of sound; shorter sound is repeated",
        "S",
        "of the longest in training, 10 at most",
    )
    stft: tuple[float, float] = option(
        (23.22, 16.01),
        pair("times WINDOW,HOP", number(float, above=0), number(float, above=0)),
        "window and hop of the spectrogram, in milliseconds",
        "WINDOW,HOP",
    )


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(Group, title="pictures and sound"):
    augment: tuple[str, ...] = option(
        (),
        some_of("crop", "flip", "spec"),
        "in training, at random: crop (images, sound), flip (images), spec (mask bands and times of spectrograms:"
        " SpecAugment)",
        "A,B",
        "none",
    )


@dataclass(frozen=True, kw_only=True)
class ArrayOptions(Group, title="data of your own"):
    array_length: int | None = option(
        None,
        number(int, 1),
        "steps of sequences in arrays; longer ones are cut",
        "N",
        "of the longest in training, at most 4 times the median",
    )


@dataclass(frozen=True, kw_only=True)
class Damage(Group, title="data of your own"):
    skip_bad: bool = option(False, flag, "leave out samples that cannot be read or are silent, and list them")


@dataclass
class Column:
    """A column of a manifest: its cells by row, and what reading them needs.

    ``bad``: reasons of unreadable rows. ``training``: the rows of training samples. ``lacking``: rows whose file is
    whole but lacks this modality, with what it lacks.
    """

    name: str
    cells: list
    options: Options
    cache: Cache
    bad: dict[int, str]
    training: Sequence[int] = ()
    lacking: dict[int, str] = field(default_factory=dict)

    def add_errors(self, errors: dict[int, str]) -> None:
        for row, reason in errors.items():
            self.bad.setdefault(row, reason)


class Kind:
    """Reads a column in two passes, both cached: first the header of each file, then its content.

    The headers of training files determine the shape in which all samples are stored. ``notes``: what the user should
    know about the files.
    """

    encoder = "cnn"
    dtype = torch.uint8
    header_size = 4  # numbers in a header; 0: there is no first pass
    shape: tuple[int, ...]  # of a stored sample, set by `configure`
    state: dict[str, Any]  # all that `configure` has set: plain values, kept to read new files alike

    def __init__(self, column: Column) -> None:
        self.column, options = column, column.options
        self.notes: list[str] = []
        self.pictures, self.sound = options.of(PictureOptions), options.of(SoundOptions)
        self.augment = options.of(AugmentationOptions).augment

    def paths(self, cell: Cell) -> list[Path]:
        """The files that a cell refers to."""
        return cell

    def probe(self, cell: Cell) -> list[int]:
        """The header of a cell."""
        raise NotImplementedError

    def configure(self, headers: np.ndarray) -> None:
        """Sets ``shape`` and how to decode, from the headers (N, header_size) of training files."""

    def review(self, headers: np.ndarray, rows: Sequence[int]) -> None:
        """Notes what is odd about the files in these rows, from their headers."""

    def note(self, what: str, odd: np.ndarray, rows: Sequence[int]) -> None:
        """Notes what the rows marked by ``odd`` (N,) have in common, with the names of some files."""
        if marked := odd.nonzero()[0].tolist():
            files = [str(self.paths(self.column.cells[rows[i]])[0]) for i in marked[:LISTED]]
            more = ", ..." if len(marked) > LISTED else ""
            count = f"{len(marked)} of {len(rows)}"
            self.notes.append(f"column {self.column.name}: {what}: {', '.join(files)}{more} ({count})")

    def decode(self, cell: Cell) -> np.ndarray:
        raise NotImplementedError

    def modality(self, name: str, sample: torch.Tensor, keys: Sequence[bytes]) -> Modality:
        """``sample``: stored training samples with these keys, for the mean and standard deviation."""
        raise NotImplementedError

    def settings(self) -> tuple:
        """Everything that :meth:`decode` depends on besides the files and the stored shape."""
        return ()

    def keys(self) -> list[bytes]:
        """The key of each cell; files that do not exist are recorded as bad."""
        keys = []
        for row, cell in enumerate(self.column.cells):
            try:
                keys.append(MISSING if cell is None or row in self.column.bad else self.key(cell))
            except Unreadable as error:
                self.column.bad[row] = str(error)
                keys.append(MISSING)
        return keys

    def key(self, cell: Cell) -> bytes:
        return file_key(self.paths(cell))

    def read_headers(self, keys: list[bytes]) -> np.ndarray | None:
        """The headers of all files, without those of empty cells; None if one cannot be read."""
        column, name = self.column, f"{self.column.name} headers"
        present = [i for i, key in enumerate(keys) if key != MISSING]
        headers, errors = column.cache.column(
            name, (type(self).__name__,), [keys[i] for i in present],
            lambda i: np.array(self.probe(column.cells[present[i]])), (self.header_size,), torch.int64,
        )  # fmt: skip
        column.add_errors({present[i]: reason for i, reason in errors.items()})
        return None if headers is None else headers.numpy()

    def read(self, keys: list[bytes]) -> torch.Tensor | None:
        """The stored tensor, with zeros for empty cells; None if a sample cannot be read."""
        zeros, column = np.zeros(self.shape), self.column

        def decode(row: int) -> np.ndarray:
            return zeros if column.cells[row] is None else self.decode(column.cells[row])

        stored, errors = column.cache.column(
            column.name, (type(self).__name__, *self.settings()), keys, decode, self.shape, self.dtype
        )
        column.add_errors(errors)
        return stored

    def normalisation(
        self,
        sample: torch.Tensor,
        keys: Sequence[bytes],
        values: Callable[[torch.Tensor], torch.Tensor],
        *settings: Any,
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel of ``values(sample)`` (..., channels); cached."""

        def compute() -> dict:
            mean, std = pipelines.moments(values(sample))
            return {"mean": mean, "std": std}

        key = digest("statistics", VERSION, type(self).__name__, self.settings(), self.shape, settings, *keys)
        statistics = self.column.cache.memoize(key, compute)
        return tuple(statistics["mean"]), tuple(statistics["std"])


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no data, but left by an operating system, an editor or a notebook."""
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini", "__MACOSX")


def natural_sort_key(path: Path) -> list:
    """Sorts frame 2 before frame 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def frames_of(paths: list[Path]) -> list[Path]:
    """The images in a folder, in natural order, or the listed paths as they are."""
    return paths if len(paths) > 1 or not os.path.isdir(paths[0]) else images_in(paths[0])


def images_in(folder: Path) -> list[Path]:
    try:
        found = (p for p in folder.iterdir() if p.suffix.lower() in IMAGES and not is_hidden(p.name))
        images = sorted(found, key=natural_sort_key)
    except OSError as error:
        raise Unreadable(f"{folder}: {error.strerror}") from None
    if not images:
        raise Unreadable(f"{folder}: a folder without images")
    return images


@kinds.register("image", needs=("PIL",), extra="data")
class Image(Kind):
    """One image per cell, of any size, grayscale or color.

    Pixels of more than 8 bits are scaled from the range of values that the training files use.
    """

    header_size = 8  # channels, width, height, number of stills, deep, lowest value, highest value, loses bits
    channels: int
    mode: str
    size: int
    margin: int
    limits: tuple[float, float] = (0.0, 65535.0)  # of deep pictures

    def stills(self, cell: Cell) -> list[Still]:
        """The stills that a cell stands for, in order."""
        if len(cell) != 1:
            raise Unreadable(f"{cell[0]}: {len(cell)} paths instead of one image")
        return [(cell[0], 0)]

    def probe(self, cell: Cell) -> list[int]:
        stills = self.stills(cell)
        image = open_image(*stills[0])
        header = [1 if is_gray(image) else 3, *image.size, max(len(stills), pages(image)), is_deep(image)]
        some = evenly_spaced(stills, min(len(stills), DEEP_STILLS)) if is_deep(image) else []
        low, high = zip(*map(extremes, some), strict=True) if some else ([0.0], [0.0])
        return [*header, *np.array([min(low), max(high)]).view(np.int64).tolist(), loses_bits(image)]

    def configure(self, headers: np.ndarray) -> None:
        self.channels = int(headers[:, 0].max())
        self.mode = "L" if self.channels == 1 else "RGB"
        self.size = self.pictures.image_size or min(64, int(headers[:, 1:3].max()))
        self.margin = round(self.size / 7) if "crop" in self.augment else 0
        self.shape = self.channels, self.size + self.margin, self.size + self.margin
        deep = headers[headers[:, 4] > 0]
        if len(deep):
            low, high = (np.ascontiguousarray(deep[:, i]).view(np.float64) for i in (5, 6))
            self.limits = float(low.min()), max(float(high.max()), float(np.nextafter(low.min(), np.inf)))

    def review(self, headers: np.ndarray, rows: Sequence[int]) -> None:
        low, high = self.limits
        self.note(f"more than 8 bits a pixel, of which {low:g} to {high:g} become 0 to 255", headers[:, 4] > 0, rows)
        self.note("16 bits a color, of which the upper 8 are read", headers[:, 7] > 0, rows)
        if type(self) is Image:
            only = f"the first of several pictures is read (--kinds {self.column.name}=frames reads them all)"
            self.note(only, headers[:, 3] > 1, rows)

    def settings(self) -> tuple:
        return self.mode, self.limits

    def decode(self, cell: Cell) -> np.ndarray:
        return self.pixels(self.stills(cell)[0])

    def pixels(self, still: Any) -> np.ndarray:
        return self.square(eight_bits(still, self.limits, self.mode))

    def square(self, image: Any) -> np.ndarray:
        """uint8 (channels, S, S), resized to a square without keeping proportions, as in OGM-GE's code."""
        square = self.shape[-2:]
        if image.size != square:
            image = image.resize(square, import_pillow().Image.Resampling.BILINEAR)
        x = np.asarray(image)
        return x[None] if x.ndim == 2 else x.transpose(2, 0, 1)

    def modality(self, name: str, sample: torch.Tensor, keys: Sequence[bytes]) -> Modality:
        mean, std = self.normalisation(sample, keys, lambda x: x.movedim(-3, -1) / 255)
        augment, clip = self.augment, len(self.shape) == 4
        frames = self.pictures.frames if clip and self.shape[0] > self.pictures.frames else None
        pipeline = pipelines.Pictures(mean, std, self.size, frames, "flip" in augment, self.channels == 2)
        vary = pipeline.vary if self.margin or frames or pipeline.flip else None
        unaugmented = pipelines.Pictures(mean, std, self.size, frames, False, self.channels == 2)
        return Modality(self.encoder, (name,), unaugmented, vary=vary)


@kinds.register("frames", needs=("PIL",), extra="data")
class Frames(Image):
    """One clip per cell: a folder of images, several paths, or a GIF or TIFF of several pictures.

    Stores evenly spaced frames, up to four times as many as are used. Shorter clips repeat frames.
    """

    def paths(self, cell: Cell) -> list[Path]:
        return watched_paths(frames_of(cell))

    def stills(self, cell: Cell) -> list[Still]:
        frames = frames_of(cell)
        count = pages(open_image(frames[0])) if len(frames) == 1 else 1
        return [(path, page) for path in frames for page in range(count)]

    def configure(self, headers: np.ndarray) -> None:
        super().configure(headers)
        used = self.pictures.frames
        self.shape = max(used, min(int(headers[:, 3].max()), 4 * used)), *self.shape

    def decode(self, cell: Cell) -> np.ndarray:
        return np.stack([self.pixels(still) for still in evenly_spaced(self.stills(cell), self.shape[0])])


def watched_paths(frames: list[Path]) -> list[Path]:
    """The paths whose changes invalidate a cached clip.

    For a long clip: its folders, which change when a frame is added or removed, and 32 of its frames.
    """
    folders = sorted({frame.parent for frame in frames})
    return frames if len(frames) <= 32 else [*folders, *evenly_spaced(frames, 32)]


def evenly_spaced(items: list, count: int) -> list:
    """The middle items of ``count`` equal parts."""
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


@kinds.register("flow", needs=("PIL",), extra="data")
class Flow(Frames):
    """Optical flow as grayscale images: a folder with subfolders u and v, or two folders (or lists), u first."""

    def components(self, cell: Cell) -> tuple[list[Path], list[Path]]:
        if len(cell) == 1:
            u, v = images_in(cell[0] / "u"), images_in(cell[0] / "v")
        elif len(cell) == 2 and any(map(os.path.isdir, cell)):
            u, v = map(images_in, cell)
        else:
            u, v = cell[: len(cell) // 2], cell[len(cell) // 2 :]
        if len(u) != len(v):
            raise Unreadable(f"{cell[0]}: {len(u)} frames of u, {len(v)} of v")
        return u, v

    def paths(self, cell: Cell) -> list[Path]:
        u, v = self.components(cell)
        return watched_paths([*u, *v])

    def stills(self, cell: Cell) -> list[Still]:
        return [(path, 0) for path in self.components(cell)[0]]

    def configure(self, headers: np.ndarray) -> None:
        super().configure(headers)
        self.channels, self.mode = 2, "L"
        self.shape = self.shape[0], 2, *self.shape[2:]

    def pixels(self, still: Any) -> np.ndarray:
        return np.concatenate([super(Flow, self).pixels((component, 0)) for component in still])

    def decode(self, cell: Cell) -> np.ndarray:
        pairs = [*zip(*self.components(cell), strict=True)]
        return np.stack([self.pixels(pair) for pair in evenly_spaced(pairs, self.shape[0])])


@kinds.register("audio", needs=("soundfile", "scipy"), extra="data")
class Audio(Kind):
    """One recording per cell, of any length and sample rate; channels are averaged.

    Stored as int16 after resampling. Shorter recordings are repeated, as in OGM-GE's code, and longer ones truncated.
    """

    dtype = torch.int16
    header_size = 6  # sample rate, length, whether cut, silent, with channels that cancel each other out, bits
    rate: int
    window: int
    hop: int
    length: int

    def recording(self, path: Path) -> tuple[np.ndarray, int, bool]:
        """As :func:`read_sound`."""
        return read_sound(path)

    def probe(self, cell: Cell) -> list[int]:
        path = single_path(cell)
        x, rate, cut = self.recording(path)
        if not np.isfinite(x).all():
            raise Unreadable(f"{path}: NaN or inf in sound")
        return [rate, len(x), cut, np.ptp(mono(x)) <= SILENCE, cancelling(x), integer_bits(x)]

    def configure(self, headers: np.ndarray) -> None:
        options = self.sound
        rates = np.sort(headers[:, 0])
        self.rate = options.sample_rate or min(MAX_SAMPLE_RATE, int(rates[(len(rates) - 1) // 2]))
        longest = (headers[:, 1] / headers[:, 0]).max()
        used = options.audio_length or min(longest, MAX_SECONDS)
        stored = max(used, min(longest, MAX_SECONDS)) if "crop" in self.augment else used
        self.window, self.hop = (max(1, round(self.rate * ms / 1000)) for ms in options.stft)
        self.length = max(round(used * self.rate), self.window)
        self.shape = (max(round(stored * self.rate), self.length),)

    def review(self, headers: np.ndarray, rows: Sequence[int]) -> None:
        rate, length, cut, silent, cancel, bits = headers.T
        silent = silent > 0
        if self.column.options.of(Damage).skip_bad:
            files = {row: self.column.cells[row][0] for row in np.array(rows)[silent].tolist()}
            self.column.add_errors({row: f"{path}: silent" for row, path in files.items()})
        else:
            self.note("silent (--skip-bad leaves it out)", silent, rows)
        if self.sound.sample_rate is None:
            low = f"sample rate below the {self.rate} Hz used, so high frequencies are missing (--sample-rate)"
            self.note(low, rate < self.rate, rows)
        if self.sound.audio_length is None:
            seconds = self.shape[0] / self.rate
            self.note(f"longer than the {seconds:.2f} s read (--audio-length)", length > 1.05 * seconds * rate, rows)
        self.note("ends early, so the file is probably cut", cut > 0, rows)
        self.note("channels that cancel each other out: the first is used", (cancel > 0) & ~silent, rows)
        self.note("floating-point samples in the range of integers: scaled to -1 to 1", bits > 0, rows)

    def settings(self) -> tuple:
        return (self.rate,)

    def decode(self, cell: Cell) -> np.ndarray:
        from scipy.signal import resample_poly

        x, rate, _ = self.recording(single_path(cell))
        x = mono(x)
        if rate != self.rate:
            divisor = np.gcd(rate, self.rate)
            x = resample_poly(x, self.rate // divisor, rate // divisor)
        return (np.resize(x, self.shape).clip(-1, 1) * 32767).round()

    def modality(self, name: str, sample: torch.Tensor, keys: Sequence[bytes]) -> Modality:
        raw = Spectrogram(0.0, 1.0, self.window, self.hop, self.length)
        mean, std = self.normalisation(
            sample, keys, lambda x: torch.cat([raw(part).flatten() for part in x.split(100)])[:, None], raw
        )
        pipeline = Spectrogram(mean[0], std[0], self.window, self.hop, self.length, "spec" in self.augment)
        vary = pipeline.vary if self.length < self.shape[0] or pipeline.mask else None
        return Modality(self.encoder, (name,), pipeline, vary=vary)


def single_path(cell: Cell) -> Path:
    if len(cell) != 1:
        raise Unreadable(f"{cell[0]}: {len(cell)} paths instead of one")
    return cell[0]


@kinds.register("array")
class Array(Kind):
    """Features on disk: .npy, .npz (its first array) or .pt (a tensor). FILE#17 is row 17 of an array of all samples.

    Sequences (T, D) may differ in length; shorter ones are padded with NaN, which the pipeline turns into zeros.
    """

    header_size = 6  # whether uint8, the number of axes, their four sizes

    def paths(self, cell: Cell) -> list[Path]:
        return [split_row(single_path(cell))[0]]

    def key(self, cell: Cell) -> bytes:
        return digest(super().key(cell), split_row(single_path(cell))[1])

    def array(self, cell: Cell) -> np.ndarray:
        path, row = split_row(single_path(cell))
        if path.suffix.lower() not in ARRAYS:
            raise Unreadable(f"{path}: arrays are read from {', '.join(ARRAYS)} (numpy.save writes one)")
        try:
            x = load_array(path, path.stat().st_mtime_ns)
            return x if row is None else x[row]
        except pickle.UnpicklingError:  # torch's message recommends weights_only=False
            raise Unreadable(f"{single_path(cell)}: not a tensor") from None
        except Exception as error:
            reason = first_line(error)
            if "allow_pickle" in reason or "Python objects" in reason:  # NumPy's advice would run code from the file
                reason = "it holds Python objects, or is no such file: save numbers, with rows of the same shape"
            raise Unreadable(f"{single_path(cell)}: not a readable array ({reason})") from None

    def probe(self, cell: Cell) -> list[int]:
        x = self.array(cell)
        if not 1 <= x.ndim <= 4 or x.dtype.kind not in "buif" or not x.size:
            raise Unreadable(f"{single_path(cell)}: must be numeric with 1 to 4 axes, got {x.dtype} {x.shape}")
        return [x.dtype == np.uint8, x.ndim, *x.shape, *[0] * (4 - x.ndim)]

    def configure(self, headers: np.ndarray) -> None:
        values, counts = np.unique(headers[:, 1], return_counts=True)
        axes = int(values[counts.argmax()])
        sizes = headers[headers[:, 1] == axes, 2 : 2 + axes]
        usual = np.unique(sizes[:, 1:], axis=0, return_counts=True)
        rest = usual[0][usual[1].argmax()] if axes > 1 else ()
        lengths = sizes[:, 0]
        length = int(np.bincount(lengths).argmax())
        if axes == 2:
            bound = math.ceil(USUAL_LENGTHS * np.median(lengths))
            length = self.column.options.of(ArrayOptions).array_length or min(int(lengths.max()), bound)
        self.shape = (length, *map(int, rest))
        padded = axes == 2 and len(set(lengths)) > 1
        self.dtype = torch.uint8 if headers[:, 0].all() and not padded else torch.float32
        self.encoder = {1: "mlp", 2: sequence_encoder(length), 3: "cnn"}.get(axes, "mlp")

    def review(self, headers: np.ndarray, rows: Sequence[int]) -> None:
        if len(self.shape) == 2:
            longer = (headers[:, 1] == 2) & (headers[:, 2] > self.shape[0])
            longest = headers[longer, 2].max(initial=0)
            keep = f"--array-length {longest} keeps all of them"
            self.note(f"sequences of up to {longest} steps are cut to {self.shape[0]} ({keep})", longer, rows)

    def decode(self, cell: Cell) -> np.ndarray:
        given = self.array(cell)
        if self.dtype == torch.uint8 and given.dtype != np.uint8:
            raise Unreadable(f"{single_path(cell)}: has {given.dtype}, the training files have uint8")
        with np.errstate(over="ignore"):
            x = np.asarray(given, numpy_type(self.dtype))
        if not np.isfinite(x).all():
            raise Unreadable(f"{single_path(cell)}: NaN or inf as {x.dtype}")
        if x.ndim == 2 == len(self.shape) and x.shape[1:] == self.shape[1:]:
            x = x[: self.shape[0]]
            if self.dtype == torch.float32:
                x = np.pad(x, ((0, self.shape[0] - len(x)), (0, 0)), constant_values=np.nan)
        if x.shape != self.shape:
            turned = x.ndim == 2 == len(self.shape) and x.shape[0] == self.shape[0]
            hint = ": sequences may differ along their first axis, so save them as (steps, features)" * turned
            raise Unreadable(f"{single_path(cell)}: has shape {x.shape}, the others have {self.shape}{hint}")
        return x

    def modality(self, name: str, sample: torch.Tensor, keys: Sequence[bytes]) -> Modality:
        padded = sample.dim() == 3 and sample.is_floating_point()

        def values(x: torch.Tensor) -> torch.Tensor:
            x = x if x.dim() < 4 else x.flatten()[:, None]
            return x[~x.isnan().any(-1)] if padded else x

        statistics = self.normalisation(sample.float(), keys, values)
        return Modality(self.encoder, (name,), Features(*statistics, padded=padded))


def split_row(path: Path) -> tuple[Path, int | None]:
    """Splits FILE#17 into the file and the row."""
    name, _, row = path.name.rpartition("#")
    return (path.with_name(name), int(row)) if name and row.isascii() and row.isdigit() else (path, None)


@functools.lru_cache(maxsize=8)
def load_array(path: Path, modified: int) -> np.ndarray:
    if path.suffix.lower() == ".pt":
        x = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"not a tensor, but {type(x).__name__}")
        x = x.detach()
        return x.float().numpy() if x.dtype in (torch.float16, torch.bfloat16) else x.numpy()
    x = np.load(path, mmap_mode="r", allow_pickle=False)
    return x if isinstance(x, np.ndarray) else x[x.files[0]]


@kinds.register("text")
class Text(Kind):
    """Text in the cell or in a .txt file; stored as hashes of the first 64 words."""

    encoder, dtype, header_size = "words", torch.int32, 1

    def key(self, cell: Cell) -> bytes:
        return digest(cell) if isinstance(cell, str) else super().key(cell)

    def words(self, cell: Cell) -> list[str]:
        try:
            text = cell if isinstance(cell, str) else single_path(cell).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise Unreadable(f"{cell[0]}: not UTF-8 text ({first_line(error)})") from None
        return words_of(text, MAX_WORDS)

    def probe(self, cell: Cell) -> list[int]:
        return [len(self.words(cell))]

    def configure(self, headers: np.ndarray) -> None:
        self.shape = (max(1, int(headers.max())),)

    def decode(self, cell: Cell) -> np.ndarray:
        hashes = [zlib.crc32(word.encode()) % BUCKETS + 1 for word in self.words(cell)[: self.shape[0]]]
        return np.array(hashes + [0] * (self.shape[0] - len(hashes)))

    def modality(self, name: str, sample: torch.Tensor, keys: Sequence[bytes]) -> Modality:
        return Modality(self.encoder, (name,), Tokens())
