"""What a column of a manifest may hold: how its cells are read, stored and made a modality's input.

A kind is a class registered by name. Its cells are lists of paths (or text, or numbers), None where empty.
"""

import functools
import os
import pickle
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from ..options import Group, Options, number, option, pair, some_of
from ..registry import Registry
from . import pipelines
from .cache import KEY, Cache, Unreadable, digest, key_of, numpy_type
from .dataset import Modality
from .pipelines import Features, Spectrogram, Tokens

kinds = Registry("kind")
SAMPLES = 2000  # of training, spread evenly, that means and standard deviations are taken from
LONGEST = 10.0  # seconds of sound, unless an option wants more
FIELD_RATE = 22050  # hertz: the field's sample rate
MISSING = b"-" * KEY  # the key of an empty cell
WORDS = 64  # of a text that count
BUCKETS = 8191  # of hashed words; 0 is none
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
SOUNDS = (".wav", ".flac", ".ogg")
ARRAYS = (".npy", ".npz", ".pt")


@dataclass(frozen=True, kw_only=True)
class Pictures(Group, title="pictures and sound"):
    image_size: int | None = option(
        None, number(int, 4), "pixels that images and frames are resized to", "N", "64 or as small as they are"
    )
    frames: int = option(3, number(int, 1), "frames of a clip: random ones in training, else fixed ones")


@dataclass(frozen=True, kw_only=True)
class Sound(Group, title="pictures and sound"):
    sample_rate: int | None = option(
        None, number(int, 100), "hertz that sound is resampled to", "N", "the lowest there, 22050 at most"
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
class Augmentation(Group, title="pictures and sound"):
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
    """Of a manifest: cells by row, and what reading them needs. ``bad`` collects what cannot be read, by row."""

    name: str
    cells: list
    options: Options
    cache: Cache
    bad: dict[int, str]

    def collect(self, errors: dict[int, str]):
        for row, reason in errors.items():
            self.bad.setdefault(row, reason)


class Kind:
    """Reads a column in two passes, both of which the cache remembers: what each file is, and what it holds.

    The first decides on the shape that all are stored in.
    """

    encoder = "cnn"
    dtype = torch.uint8
    facts = 4  # numbers that the first pass keeps of a file; 0: it has nothing to find out

    def __init__(self, column: Column):
        self.column, self.pictures, self.sound = column, column.options.of(Pictures), column.options.of(Sound)
        self.augment = column.options.of(Augmentation).augment

    def paths(self, cell) -> list[Path]:
        """The files that a cell stands for."""
        return cell

    def probe(self, cell) -> list[int]:
        raise NotImplementedError

    def settle(self, facts: np.ndarray):
        """Decides on ``shape`` and on how to decode, from the facts (N, facts) of all files that there are."""

    def decode(self, cell) -> np.ndarray:
        raise NotImplementedError

    def modality(self, name: str, sample: torch.Tensor, keys: Sequence[bytes]) -> Modality:
        """``sample``: stored training samples, of these keys, for their mean and standard deviation."""
        raise NotImplementedError

    def settings(self) -> tuple:
        """All that :meth:`decode` depends on, beside the files and the stored shape."""
        return ()

    def keys(self) -> list[bytes]:
        """Of each cell; what is not there is noted as bad."""
        keys = []
        for row, cell in enumerate(self.column.cells):
            try:
                keys.append(MISSING if cell is None or row in self.column.bad else self.key(cell))
            except Unreadable as error:
                self.column.bad[row] = str(error)
                keys.append(MISSING)
        return keys

    def key(self, cell) -> bytes:
        return key_of(self.paths(cell))

    def find_out(self, keys: list[bytes]) -> np.ndarray | None:
        """The facts of the readable files; None if one could not be read."""
        column, name = self.column, f"{self.column.name} headers"
        present = [i for i, key in enumerate(keys) if key != MISSING]
        facts, errors = column.cache.column(
            name, (type(self).__name__,), [keys[i] for i in present],
            lambda i: np.array(self.probe(column.cells[present[i]])), (self.facts,), torch.int64,
        )  # fmt: skip
        column.collect({present[i]: reason for i, reason in errors.items()})
        return None if facts is None else facts.numpy()

    def read(self, keys: list[bytes]) -> torch.Tensor | None:
        """The stored tensor, zeros where a cell is empty; None if something could not be read."""
        zeros, column = np.zeros(self.shape), self.column

        def decode(row):
            return zeros if column.cells[row] is None else self.decode(column.cells[row])

        stored, errors = column.cache.column(
            column.name, (type(self).__name__, *self.settings()), keys, decode, self.shape, self.dtype
        )
        column.collect(errors)
        return stored

    def normalisation(self, sample: torch.Tensor, keys: Sequence[bytes], values, *settings) -> tuple:
        """Mean and standard deviation of ``values(sample)``, (..., channels), by channel; remembered."""

        def compute():
            x = values(sample).double().flatten(0, -2)
            std = x.std(0, correction=0)
            return {"mean": x.mean(0).tolist(), "std": torch.where(std > 1e-6 * x.abs().amax(0), std, 1).tolist()}

        key = digest("statistics", type(self).__name__, self.settings(), self.shape, settings, *keys)
        found = self.column.cache.remember(key, compute)
        return tuple(found["mean"]), tuple(found["std"])


def pillow():
    try:
        import PIL.Image
        import PIL.ImageOps
    except ModuleNotFoundError:
        raise UserError('images need Pillow: pip install -e ".[data]"') from None
    return PIL


def sound_library():
    try:
        import soundfile
    except (ModuleNotFoundError, OSError):
        raise UserError('sound needs soundfile: pip install -e ".[data]"') from None
    return soundfile


def opened(path: Path):
    """A picture's header; its pixels are read when they are needed."""
    try:
        return pillow().Image.open(path)
    except Exception as error:
        raise Unreadable(f"{path}: no image that can be read ({reason(error)})") from None


def reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def natural(path: Path) -> list:
    """A sort key that puts frame 2 before frame 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def frames_of(paths: list[Path]) -> list[Path]:
    """Those of a folder in the order of their numbers, or those that are listed."""
    return paths if len(paths) > 1 or not os.path.isdir(paths[0]) else inside(paths[0])


def inside(folder: Path) -> list[Path]:
    try:
        found = sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGES), key=natural)
    except OSError as error:
        raise Unreadable(f"{folder}: {error.strerror}") from None
    if not found:
        raise Unreadable(f"{folder}: a folder without images")
    return found


@kinds.register("image", needs=("PIL",), extra="data")
class Image(Kind):
    """A picture a cell, of any size, in gray or color."""

    def probe(self, cell):
        picture = opened(self.first(cell))
        gray = picture.mode in ("1", "L", "LA") or picture.mode.startswith(("I", "F"))
        return [1 if gray else 3, *picture.size, self.count(cell)]

    def first(self, cell):
        if len(cell) != 1:
            raise Unreadable(f"{cell[0]}: {len(cell)} paths in the place of one image")
        return cell[0]

    def count(self, cell):
        return 1

    def settle(self, facts):
        self.channels = int(facts[:, 0].max())
        self.mode = "L" if self.channels == 1 else "RGB"
        self.size = self.pictures.image_size or min(64, int(facts[:, 1:3].max()))
        self.margin = round(self.size / 7) if "crop" in self.augment else 0
        self.shape = self.channels, self.size + self.margin, self.size + self.margin

    def settings(self):
        return (self.mode,)

    def decode(self, cell):
        return self.pixels(cell[0])

    def pixels(self, path):
        """uint8 (channels, S, S), squeezed into a square as in OGM-GE's code."""
        picture, square = opened(path), self.shape[-2:]
        try:
            picture = pillow().ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16 bits, the lower of which a conversion would keep
                picture = pillow().Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            picture = picture.convert(self.mode)
            if picture.size != square:
                picture = picture.resize(square, pillow().Image.Resampling.BILINEAR)
        except Exception as error:
            raise Unreadable(f"{path}: a damaged image ({reason(error)})") from None
        x = np.asarray(picture)
        return x[None] if x.ndim == 2 else x.transpose(2, 0, 1)

    def modality(self, name, sample, keys):
        mean, std = self.normalisation(sample, keys, lambda x: x.movedim(-3, -1) / 255)
        augment, clip = self.augment, len(self.shape) == 4
        frames = self.pictures.frames if clip and self.shape[0] > self.pictures.frames else None
        pipeline = pipelines.Pictures(mean, std, self.size, frames, "flip" in augment, self.channels == 2)
        vary = pipeline.vary if self.margin or frames or pipeline.flip else None
        still = pipelines.Pictures(mean, std, self.size, frames, False, self.channels == 2)
        return Modality(self.encoder, (name,), still, vary=vary)


@kinds.register("frames", needs=("PIL",), extra="data")
class Frames(Image):
    """A clip a cell: a folder of pictures, or several paths.

    Up to four times as many frames as are used are stored, evenly spaced; of a clip that has fewer some come twice.
    """

    def paths(self, cell):
        return noted(frames_of(cell))

    def first(self, cell):
        return frames_of(cell)[0]

    def count(self, cell):
        return len(frames_of(cell))

    def settle(self, facts):
        super().settle(facts)
        wanted = self.pictures.frames
        self.shape = max(wanted, min(int(facts[:, 3].max()), 4 * wanted)), *self.shape

    def decode(self, cell):
        return np.stack([self.pixels(path) for path in spread(frames_of(cell), self.shape[0])])


def noted(frames: list[Path]) -> list[Path]:
    """Those whose change is noticed: of a long clip the folders, which change with the number of frames, and some."""
    folders = sorted({frame.parent for frame in frames})
    return frames if len(frames) <= 32 else [*folders, *spread(frames, 32)]


def spread(paths: list, count: int) -> list:
    """So many of them, the middle ones of equal parts."""
    return [paths[int((i + 0.5) * len(paths) / count)] for i in range(count)]


@kinds.register("flow", needs=("PIL",), extra="data")
class Flow(Frames):
    """Optical flow: a folder with the folders u and v, or two folders (or lists), that of u first; gray pictures."""

    def halves(self, cell):
        if len(cell) == 1:
            u, v = inside(cell[0] / "u"), inside(cell[0] / "v")
        elif len(cell) == 2 and any(map(os.path.isdir, cell)):
            u, v = map(inside, cell)
        else:
            u, v = cell[: len(cell) // 2], cell[len(cell) // 2 :]
        if len(u) != len(v):
            raise Unreadable(f"{cell[0]}: {len(u)} frames of u, {len(v)} of v")
        return u, v

    def paths(self, cell):
        u, v = self.halves(cell)
        return noted([*u, *v])

    def first(self, cell):
        return self.halves(cell)[0][0]

    def count(self, cell):
        return len(self.halves(cell)[0])

    def settle(self, facts):
        super().settle(facts)
        self.channels, self.mode = 2, "L"
        self.shape = self.shape[0], 2, *self.shape[2:]

    def pixels(self, path):
        return np.concatenate([super(Flow, self).pixels(half) for half in path])

    def decode(self, cell):
        return np.stack([self.pixels(pair) for pair in spread([*zip(*self.halves(cell), strict=True)], self.shape[0])])


@kinds.register("audio", needs=("soundfile", "scipy"), extra="data")
class Audio(Kind):
    """A recording a cell, of any length and rate; channels are averaged.

    Stored as int16, resampled; shorter recordings are repeated, as in OGM-GE's code, and longer ones cut.
    """

    dtype = torch.int16

    def probe(self, cell):
        path = one(cell)
        try:
            facts = sound_library().info(path)
            with open(path, "rb") as file:
                header, size = file.read(8), path.stat().st_size
        except Exception as error:
            raise Unreadable(f"{path}: no sound that can be read ({reason(error)})") from None
        promised = int.from_bytes(header[4:], "little") + 8
        if header[:4] == b"RIFF" and size < promised < 2**31 - 1:  # a stream's header may promise the utmost
            raise Unreadable(f"{path}: truncated, {size} bytes of {promised}")
        if not facts.frames:
            raise Unreadable(f"{path}: sound without samples")
        return [facts.samplerate, facts.frames, facts.channels, 0]

    def settle(self, facts):
        options = self.sound
        self.rate = options.sample_rate or min(FIELD_RATE, int(facts[:, 0].min()))
        longest = (facts[:, 1] / facts[:, 0]).max()
        used = options.audio_length or min(longest, LONGEST)
        stored = max(used, min(longest, LONGEST)) if "crop" in self.augment else used
        self.window, self.hop = (max(1, round(self.rate * ms / 1000)) for ms in options.stft)
        self.length = max(round(used * self.rate), self.window)
        self.shape = (max(round(stored * self.rate), self.length),)

    def settings(self):
        return (self.rate,)

    def decode(self, cell):
        from scipy.signal import resample_poly

        path = one(cell)
        try:
            x, rate = sound_library().read(path, dtype="float32", always_2d=True)
        except Exception as error:
            raise Unreadable(f"{path}: damaged sound ({reason(error)})") from None
        x = x.mean(1)
        if not np.isfinite(x).all():
            raise Unreadable(f"{path}: NaN or inf in sound")
        if rate != self.rate:
            divisor = np.gcd(rate, self.rate)
            x = resample_poly(x, self.rate // divisor, rate // divisor)
        return (np.resize(x, self.shape).clip(-1, 1) * 32767).round()

    def modality(self, name, sample, keys):
        plain = Spectrogram(0.0, 1.0, self.window, self.hop, self.length)
        mean, std = self.normalisation(
            sample, keys, lambda x: torch.cat([plain(part).flatten() for part in x.split(100)])[:, None], plain
        )
        pipeline = Spectrogram(mean[0], std[0], self.window, self.hop, self.length, "spec" in self.augment)
        vary = pipeline.vary if self.length < self.shape[0] or pipeline.mask else None
        return Modality(self.encoder, (name,), pipeline, vary=vary)


def one(cell) -> Path:
    if len(cell) != 1:
        raise Unreadable(f"{cell[0]}: {len(cell)} paths in the place of one")
    return cell[0]


@kinds.register("array")
class Array(Kind):
    """Ready features: .npy, .npz (its first array) or .pt (a tensor); FILE#17 is row 17 of one array of all samples.

    Sequences may differ in their length, their first axis, and are filled up with zeros.
    """

    facts = 6  # whether bytes, the number of axes, their sizes

    def paths(self, cell):
        return [parted(one(cell))[0]]

    def key(self, cell):
        return digest(super().key(cell), parted(one(cell))[1])

    def array(self, cell):
        path, row = parted(one(cell))
        try:
            x = loaded(path, path.stat().st_mtime_ns)
            return x if row is None else x[row]
        except pickle.UnpicklingError:  # torch would advise to load it without its safeguard
            raise Unreadable(f"{one(cell)}: no tensor") from None
        except Exception as error:
            raise Unreadable(f"{one(cell)}: no array that can be read ({reason(error)})") from None

    def probe(self, cell):
        x = self.array(cell)
        if not 1 <= x.ndim <= 4 or x.dtype.kind not in "buif" or not x.size:
            raise Unreadable(f"{one(cell)}: numbers of 1 to 4 axes are wanted, this is {x.dtype} {x.shape}")
        return [x.dtype == np.uint8, x.ndim, *x.shape, *[0] * (4 - x.ndim)]

    def settle(self, facts):
        values, counts = np.unique(facts[:, 1], return_counts=True)
        axes = int(values[counts.argmax()])
        sizes = facts[facts[:, 1] == axes, 2 : 2 + axes]
        usual = np.unique(sizes[:, 1:], axis=0, return_counts=True)
        rest = usual[0][usual[1].argmax()] if axes > 1 else ()
        length = sizes[:, 0].max() if axes == 2 else np.bincount(sizes[:, 0]).argmax()
        self.shape = (int(length), *map(int, rest))
        self.dtype = torch.uint8 if facts[:, 0].all() else torch.float32
        self.encoder = {1: "mlp", 2: "cnn1d", 3: "cnn"}.get(axes, "mlp")

    def decode(self, cell):
        with np.errstate(over="ignore"):
            x = np.asarray(self.array(cell), numpy_type(self.dtype))
        if not np.isfinite(x).all():
            raise Unreadable(f"{one(cell)}: NaN or inf as {x.dtype}")
        if x.ndim == 2 == len(self.shape) and x.shape[1:] == self.shape[1:]:
            return np.pad(x, ((0, self.shape[0] - len(x)), (0, 0)))
        if x.shape != self.shape:
            raise Unreadable(f"{one(cell)}: of shape {x.shape}, others are {self.shape}")
        return x

    def modality(self, name, sample, keys):
        values = (lambda x: x) if sample.dim() < 4 else lambda x: x.flatten()[:, None]
        return Modality(self.encoder, (name,), Features(*self.normalisation(sample.float(), keys, values)))


def parted(path: Path) -> tuple[Path, int | None]:
    """FILE#17 into the file and the row."""
    name, _, row = path.name.rpartition("#")
    return (path.with_name(name), int(row)) if name and row.isdigit() else (path, None)


@functools.lru_cache(maxsize=8)
def loaded(path: Path, changed: int) -> np.ndarray:
    if path.suffix.lower() == ".pt":
        x = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"no tensor, but {type(x).__name__}")
        x = x.detach()
        return x.float().numpy() if x.dtype in (torch.float16, torch.bfloat16) else x.numpy()
    x = np.load(path, mmap_mode="r", allow_pickle=False)
    return x if isinstance(x, np.ndarray) else x[x.files[0]]


@kinds.register("text")
class Text(Kind):
    """Words, in the cell or in a .txt file; stored as hashes of the first 64."""

    encoder, dtype, facts = "words", torch.int32, 1

    def key(self, cell):
        return digest(cell) if isinstance(cell, str) else super().key(cell)

    def words(self, cell):
        try:
            text = cell if isinstance(cell, str) else one(cell).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise Unreadable(f"{cell[0]}: no UTF-8 text ({reason(error)})") from None
        return re.findall(r"\w+", text.lower())[:WORDS]

    def probe(self, cell):
        return [len(self.words(cell))]

    def settle(self, facts):
        self.shape = (max(1, int(facts.max())),)

    def decode(self, cell):
        hashed = [zlib.crc32(word.encode()) % BUCKETS + 1 for word in self.words(cell)]
        return np.array(hashed + [0] * (self.shape[0] - len(hashed)))

    def modality(self, name, sample, keys):
        return Modality(self.encoder, (name,), Tokens())


@kinds.register("number")
class Numbers(Kind):
    """Columns of numbers, one vector a row; cells are lists of floats."""

    facts = 0

    def keys(self):
        return [digest(cell) for cell in self.column.cells]

    def find_out(self, keys):
        return np.zeros((len(keys), 0))

    def settle(self, facts):
        self.shape = (max(len(cell) for cell in self.column.cells if cell),)

    def read(self, keys):
        zeros = [0.0] * self.shape[0]
        return torch.tensor([cell or zeros for cell in self.column.cells])

    def modality(self, name, sample, keys):
        return Modality("mlp", (name,), Features(*self.normalisation(sample, keys, lambda x: x)))
