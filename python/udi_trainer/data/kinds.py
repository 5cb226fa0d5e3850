"""The kinds of columns that a manifest may contain: how cells are read, stored and turned into a modality's input.

A kind is a class registered by name. Its cells are lists of paths, text or lists of numbers; an empty cell is None.
"""

import functools
import os
import pickle
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..options import Group, Options, number, option, pair, some_of
from ..registry import Registry
from . import pipelines
from .cache import KEY, Cache, Unreadable, digest, file_key, numpy_type
from .dataset import Modality
from .pipelines import Features, Spectrogram, Tokens

kinds = Registry("kind")
STATISTICS_SAMPLES = 2000  # training samples, evenly spaced, that means and standard deviations are computed from
MAX_SECONDS = 10.0  # of sound, unless an option sets the length
MAX_SAMPLE_RATE = 22050  # hertz; the usual rate in the field
MISSING = b"-" * KEY  # the key of an empty cell
MAX_WORDS = 64  # of a text; the rest is ignored
SHORT = 512  # steps of a sequence that is convolved at full length
BUCKETS = 8191  # of hashed words; 0 is padding
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
SOUNDS = (".wav", ".flac", ".ogg")
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
        None, number(int, 100), "hertz that sound is resampled to", "N", "the lowest in the data, at most 22050"
    )
    audio_length: float | None = option(
        None,
        number(float, above=0),
        "seconds of sound; shorter sound is repeated",
        "S",
        "of the longest, 10 at most",
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


@dataclass
class Column:
    """A column of a manifest: its cells by row, and what reading them needs. ``bad``: reasons of unreadable rows."""

    name: str
    cells: list
    options: Options
    cache: Cache
    bad: dict[int, str]

    def add_errors(self, errors: dict[int, str]) -> None:
        for row, reason in errors.items():
            self.bad.setdefault(row, reason)


class Kind:
    """Reads a column in two passes, both cached: first the header of each file, then its content.

    The headers determine the shape in which all samples are stored.
    """

    encoder = "cnn"
    dtype = torch.uint8
    header_size = 4  # numbers in a header; 0: there is no first pass
    shape: tuple[int, ...]  # of a stored sample, set by `configure`

    def __init__(self, column: Column) -> None:
        self.column, options = column, column.options
        self.pictures, self.sound = options.of(PictureOptions), options.of(SoundOptions)
        self.augment = options.of(AugmentationOptions).augment

    def paths(self, cell: Cell) -> list[Path]:
        """The files that a cell refers to."""
        return cell

    def probe(self, cell: Cell) -> list[int]:
        """The header of a cell."""
        raise NotImplementedError

    def configure(self, headers: np.ndarray) -> None:
        """Sets ``shape`` and how to decode, from the headers (N, header_size) of all files."""

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
        """The headers of all files; None if one cannot be read."""
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
            x = values(sample).double().flatten(0, -2)
            std = x.std(0, correction=0)
            return {"mean": x.mean(0).tolist(), "std": torch.where(std > 1e-6 * x.abs().amax(0), std, 1).tolist()}

        key = digest("statistics", type(self).__name__, self.settings(), self.shape, settings, *keys)
        statistics = self.column.cache.memoize(key, compute)
        return tuple(statistics["mean"]), tuple(statistics["std"])


def import_pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ModuleNotFoundError:
        raise UserError('images need Pillow: pip install -e ".[data]"') from None
    return PIL


def import_soundfile() -> Any:
    try:
        import soundfile
    except (ModuleNotFoundError, OSError):
        raise UserError('sound needs soundfile: pip install -e ".[data]"') from None
    return soundfile


def open_image(path: Path) -> Any:
    """Opens an image. Pillow reads the header now and the pixels when they are needed."""
    try:
        return import_pillow().Image.open(path)
    except Exception as error:
        raise Unreadable(f"{path}: not a readable image ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def natural_sort_key(path: Path) -> list:
    """Sorts frame 2 before frame 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def frames_of(paths: list[Path]) -> list[Path]:
    """The images in a folder, in natural order, or the listed paths as they are."""
    return paths if len(paths) > 1 or not os.path.isdir(paths[0]) else images_in(paths[0])


def images_in(folder: Path) -> list[Path]:
    try:
        images = sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGES), key=natural_sort_key)
    except OSError as error:
        raise Unreadable(f"{folder}: {error.strerror}") from None
    if not images:
        raise Unreadable(f"{folder}: a folder without images")
    return images


@kinds.register("image", needs=("PIL",), extra="data")
class Image(Kind):
    """One image per cell, of any size, grayscale or color."""

    channels: int
    mode: str
    size: int
    margin: int

    def probe(self, cell: Cell) -> list[int]:
        image = open_image(self.first(cell))
        gray = image.mode in ("1", "L", "LA") or image.mode.startswith(("I", "F"))
        return [1 if gray else 3, *image.size, self.count(cell)]

    def first(self, cell: Cell) -> Path:
        if len(cell) != 1:
            raise Unreadable(f"{cell[0]}: {len(cell)} paths instead of one image")
        return cell[0]

    def count(self, cell: Cell) -> int:
        return 1

    def configure(self, headers: np.ndarray) -> None:
        self.channels = int(headers[:, 0].max())
        self.mode = "L" if self.channels == 1 else "RGB"
        self.size = self.pictures.image_size or min(64, int(headers[:, 1:3].max()))
        self.margin = round(self.size / 7) if "crop" in self.augment else 0
        self.shape = self.channels, self.size + self.margin, self.size + self.margin

    def settings(self) -> tuple:
        return (self.mode,)

    def decode(self, cell: Cell) -> np.ndarray:
        return self.pixels(cell[0])

    def pixels(self, path: Any) -> np.ndarray:
        """uint8 (channels, S, S), resized to a square without keeping proportions, as in OGM-GE's code."""
        image, square = open_image(path), self.shape[-2:]
        try:
            image = import_pillow().ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits: Pillow's conversion would keep the low byte
                image = import_pillow().Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert(self.mode)
            if image.size != square:
                image = image.resize(square, import_pillow().Image.Resampling.BILINEAR)
        except Exception as error:
            raise Unreadable(f"{path}: a damaged image ({first_line(error)})") from None
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
    """One clip per cell: a folder of images, or several paths.

    Stores evenly spaced frames, up to four times as many as are used. Shorter clips repeat frames.
    """

    def paths(self, cell: Cell) -> list[Path]:
        return watched_paths(frames_of(cell))

    def first(self, cell: Cell) -> Path:
        return frames_of(cell)[0]

    def count(self, cell: Cell) -> int:
        return len(frames_of(cell))

    def configure(self, headers: np.ndarray) -> None:
        super().configure(headers)
        used = self.pictures.frames
        self.shape = max(used, min(int(headers[:, 3].max()), 4 * used)), *self.shape

    def decode(self, cell: Cell) -> np.ndarray:
        return np.stack([self.pixels(path) for path in evenly_spaced(frames_of(cell), self.shape[0])])


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

    def first(self, cell: Cell) -> Path:
        return self.components(cell)[0][0]

    def count(self, cell: Cell) -> int:
        return len(self.components(cell)[0])

    def configure(self, headers: np.ndarray) -> None:
        super().configure(headers)
        self.channels, self.mode = 2, "L"
        self.shape = self.shape[0], 2, *self.shape[2:]

    def pixels(self, path: Any) -> np.ndarray:
        return np.concatenate([super(Flow, self).pixels(component) for component in path])

    def decode(self, cell: Cell) -> np.ndarray:
        pairs = [*zip(*self.components(cell), strict=True)]
        return np.stack([self.pixels(pair) for pair in evenly_spaced(pairs, self.shape[0])])


@kinds.register("audio", needs=("soundfile", "scipy"), extra="data")
class Audio(Kind):
    """One recording per cell, of any length and sample rate; channels are averaged.

    Stored as int16 after resampling. Shorter recordings are repeated, as in OGM-GE's code, and longer ones truncated.
    """

    dtype = torch.int16
    rate: int
    window: int
    hop: int
    length: int

    def probe(self, cell: Cell) -> list[int]:
        path = single_path(cell)
        try:
            info = import_soundfile().info(path)
            with open(path, "rb") as file:
                header, size = file.read(8), path.stat().st_size
        except Exception as error:
            raise Unreadable(f"{path}: not readable as sound ({first_line(error)})") from None
        announced = int.from_bytes(header[4:], "little") + 8
        if header[:4] == b"RIFF" and size < announced < 2**31 - 1:  # the header of a stream may announce the maximum
            raise Unreadable(f"{path}: truncated, {size} bytes of {announced}")
        if not info.frames:
            raise Unreadable(f"{path}: sound without samples")
        return [info.samplerate, info.frames, info.channels, 0]

    def configure(self, headers: np.ndarray) -> None:
        options = self.sound
        self.rate = options.sample_rate or min(MAX_SAMPLE_RATE, int(headers[:, 0].min()))
        longest = (headers[:, 1] / headers[:, 0]).max()
        used = options.audio_length or min(longest, MAX_SECONDS)
        stored = max(used, min(longest, MAX_SECONDS)) if "crop" in self.augment else used
        self.window, self.hop = (max(1, round(self.rate * ms / 1000)) for ms in options.stft)
        self.length = max(round(used * self.rate), self.window)
        self.shape = (max(round(stored * self.rate), self.length),)

    def settings(self) -> tuple:
        return (self.rate,)

    def decode(self, cell: Cell) -> np.ndarray:
        from scipy.signal import resample_poly

        path = single_path(cell)
        try:
            x, rate = import_soundfile().read(path, dtype="float32", always_2d=True)
        except Exception as error:
            raise Unreadable(f"{path}: damaged sound ({first_line(error)})") from None
        x = x.mean(1)
        if not np.isfinite(x).all():
            raise Unreadable(f"{path}: NaN or inf in sound")
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

    Sequences may differ in length (their first axis); shorter ones are padded with zeros.
    """

    header_size = 6  # whether uint8, the number of axes, their four sizes

    def paths(self, cell: Cell) -> list[Path]:
        return [split_row(single_path(cell))[0]]

    def key(self, cell: Cell) -> bytes:
        return digest(super().key(cell), split_row(single_path(cell))[1])

    def array(self, cell: Cell) -> np.ndarray:
        path, row = split_row(single_path(cell))
        try:
            x = load_array(path, path.stat().st_mtime_ns)
            return x if row is None else x[row]
        except pickle.UnpicklingError:  # torch's message recommends weights_only=False
            raise Unreadable(f"{single_path(cell)}: not a tensor") from None
        except Exception as error:
            raise Unreadable(f"{single_path(cell)}: not a readable array ({first_line(error)})") from None

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
        length = sizes[:, 0].max() if axes == 2 else np.bincount(sizes[:, 0]).argmax()
        self.shape = (int(length), *map(int, rest))
        self.dtype = torch.uint8 if headers[:, 0].all() else torch.float32
        self.encoder = {1: "mlp", 2: "fcn" if length <= SHORT else "cnn1d", 3: "cnn"}.get(axes, "mlp")

    def decode(self, cell: Cell) -> np.ndarray:
        with np.errstate(over="ignore"):
            x = np.asarray(self.array(cell), numpy_type(self.dtype))
        if not np.isfinite(x).all():
            raise Unreadable(f"{single_path(cell)}: NaN or inf as {x.dtype}")
        if x.ndim == 2 == len(self.shape) and x.shape[1:] == self.shape[1:]:
            return np.pad(x, ((0, self.shape[0] - len(x)), (0, 0)))
        if x.shape != self.shape:
            raise Unreadable(f"{single_path(cell)}: has shape {x.shape}, the others have {self.shape}")
        return x

    def modality(self, name: str, sample: torch.Tensor, keys: Sequence[bytes]) -> Modality:
        values = (lambda x: x) if sample.dim() < 4 else lambda x: x.flatten()[:, None]
        return Modality(self.encoder, (name,), Features(*self.normalisation(sample.float(), keys, values)))


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
        return re.findall(r"\w+", text.lower())[:MAX_WORDS]

    def probe(self, cell: Cell) -> list[int]:
        return [len(self.words(cell))]

    def configure(self, headers: np.ndarray) -> None:
        self.shape = (max(1, int(headers.max())),)

    def decode(self, cell: Cell) -> np.ndarray:
        hashes = [zlib.crc32(word.encode()) % BUCKETS + 1 for word in self.words(cell)]
        return np.array(hashes + [0] * (self.shape[0] - len(hashes)))

    def modality(self, name: str, sample: torch.Tensor, keys: Sequence[bytes]) -> Modality:
        return Modality(self.encoder, (name,), Tokens())


@kinds.register("number")
class Numbers(Kind):
    """One or more columns of numbers as a vector per row; cells are lists of floats."""

    header_size = 0

    def keys(self) -> list[bytes]:
        return [digest(cell) for cell in self.column.cells]

    def read_headers(self, keys: list[bytes]) -> np.ndarray:
        return np.zeros((len(keys), 0))

    def configure(self, headers: np.ndarray) -> None:
        self.shape = (max(len(cell) for cell in self.column.cells if cell),)

    def read(self, keys: list[bytes]) -> torch.Tensor:
        zeros = [0.0] * self.shape[0]
        return torch.tensor([cell or zeros for cell in self.column.cells])

    def modality(self, name: str, sample: torch.Tensor, keys: Sequence[bytes]) -> Modality:
        return Modality("mlp", (name,), Features(*self.normalisation(sample, keys, lambda x: x)))
