"""Handwritten digits as two modalities: scikit-learn's and MNIST's, colored-and-gray or in halves.

A new dataset is one function decorated with ``@datasets.register(name)`` that takes ``data_root`` (a path or None)
and returns a :class:`Dataset`. Nothing here depends on the seed of a run: all seeds see the same samples.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..registry import datasets
from .dataset import Dataset, Modality, Split
from .noise import noisy

Part = tuple[torch.Tensor, torch.Tensor]  # pixels uint8 (N, H, W), labels (N,)

# Mean color of each digit, RGB.
COLORS = torch.tensor(
    [
        (220, 20, 60), (0, 128, 128), (253, 233, 16), (0, 149, 182), (237, 145, 33),
        (145, 30, 188), (70, 240, 240), (250, 197, 187), (210, 245, 60), (128, 0, 0),
    ]
) / 255  # fmt: skip
COLOR_VARIANCE = 0.03
LARGEST = 2**30  # bytes of an idx file's data; MNIST's largest has 47 million
HALVES = {"left": 0.1, "right": 0.3}  # of splitdigits, and the noise of each: standard deviation, of pixels' range


def colored_and_gray(train: Part, val: Part, test: Part, mean: float, std: float) -> Dataset:
    """Each split as two modalities: the gray digit, and the digit in a color.

    In training the color tells the digit: a shortcut. In validation and test it is drawn independently of the digit:
    a validation split with training colors would take the shortcut for skill, and make color the anchor.
    """
    generator = torch.Generator().manual_seed(0)

    def split(pixels, labels, shortcut):
        hue = labels if shortcut else torch.randint(10, labels.shape, generator=generator)
        jitter = torch.randn(len(labels), 3, generator=generator) * COLOR_VARIANCE**0.5
        return Split(labels, {"pixels": pixels, "color": (COLORS[hue] + jitter).clamp(0, 1)})

    modalities = {
        "gray": Modality("cnn", ("pixels",), lambda pixels: (pixels[:, None] / 255 - mean) / std),
        "color": Modality("cnn", ("pixels", "color"), lambda x, color: x[:, None] * (color / 255)[:, :, None, None]),
    }
    return Dataset(10, modalities, split(*train, True), split(*val, False), split(*test, False))


def split_in_halves(train: Part, val: Part, test: Part, mean: float, std: float) -> Dataset:
    """The left and the right half of each digit, with independent noise, in all splits alike: each has what the other
    lacks.
    """
    generator = torch.Generator().manual_seed(0)

    def split(pixels, labels):
        halves = zip(HALVES.items(), pixels.chunk(2, dim=2), strict=True)
        return Split(labels, {name: noisy(half, noise, generator) for (name, noise), half in halves})

    modalities = {name: Modality("cnn", (name,), lambda half: (half[:, None] / 255 - mean) / std) for name in HALVES}
    return Dataset(10, modalities, split(*train), split(*val), split(*test))


@datasets.register("cgdigits")
def cgdigits(data_root: str | Path | None) -> Dataset:
    """Colored-and-gray digits, 8x8, from scikit-learn."""
    return colored_and_gray(**digits())


@datasets.register("cgmnist")
def cgmnist(data_root: str | Path | None) -> Dataset:
    """Colored-and-gray MNIST, 28x28."""
    if data_root is None:
        raise UserError("dataset cgmnist needs --data-root DIR, the folder of MNIST's four idx.gz files")
    return colored_and_gray(**mnist(data_root))


@datasets.register("splitdigits")
def splitdigits(data_root: str | Path | None) -> Dataset:
    """The halves of scikit-learn's digits, 8x4, or with a data root of MNIST's, 28x14."""
    return split_in_halves(**(mnist(data_root) if data_root else digits()))


def digits() -> dict[str, Any]:
    """scikit-learn's digits, 8x8: 1077 for training, 360 each for validation and test."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise UserError('the bundled digits need scikit-learn: pip install -e ".[train]"') from None
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).mul(255 / 16).round().to(torch.uint8).view(-1, 8, 8)
    labels = torch.from_numpy(labels).long()
    rest, test = train_test_split(torch.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=360, stratify=labels[rest], random_state=0)
    train, val, test = ((pixels[part], labels[part]) for part in (train, val, test))
    return {"train": train, "val": val, "test": test, "mean": 0.3053, "std": 0.3760}


def mnist(data_root: str | Path) -> dict[str, Any]:
    """MNIST, 28x28: 55,000 for training, the last twelfth of the training file for validation."""
    root, files = Path(data_root), {}
    for part in ("train", "t10k"):
        for kind, dims in (("images", 3), ("labels", 1)):
            files[part, kind] = root / f"{part}-{kind}-idx{dims}-ubyte.gz"
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise UserError(f"--data-root {root} lacks {', '.join(missing)}: put MNIST's four idx.gz files there")
    parts = {}
    for part in ("train", "t10k"):
        pixels, labels = read_idx(files[part, "images"], 3), read_idx(files[part, "labels"], 1).long()
        if len(pixels) != len(labels):
            raise UserError(f"{root}: {len(pixels)} {part} images but {len(labels)} labels: download the files again")
        if labels.max() > 9:
            path, i = files[part, "labels"], int(labels.argmax())
            raise UserError(f"{path}: label {i} is {int(labels[i])}, no digit: download it again")
        parts[part] = pixels, labels
    pixels, labels = parts["train"]
    cut = len(labels) - len(labels) // 12
    train, val = (pixels[:cut], labels[:cut]), (pixels[cut:], labels[cut:])
    return {"train": train, "val": val, "test": parts["t10k"], "mean": 0.1307, "std": 0.3081}


def read_idx(path: Path, dims: int) -> torch.Tensor:
    """A gzipped idx file of unsigned bytes: magic 0 0 8 dims, the sizes big-endian, the data.

    Takes no more memory than the header announces, however much the file would unpack to.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"{path} {what}: download it again")

    try:
        with gzip.open(path) as file:
            header = file.read(4 + 4 * dims)
            if len(header) < 4 + 4 * dims or header[:4] != bytes((0, 0, 8, dims)):
                raise wrong(f"is not an idx file of unsigned bytes with {dims} dimension(s)")
            shape = [int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4)]
            size = math.prod(shape)  # of integers without end: four bytes a dimension can announce more than a tensor
            if not 0 < size <= LARGEST:
                raise wrong("holds no samples" if size == 0 else f"claims to hold {' x '.join(map(str, shape))} bytes")
            data = bytearray(file.read(size))
            if len(data) < size:
                raise wrong(f"is truncated ({len(data)} bytes of {size})")
            if file.read(1):
                raise wrong(f"has more than the {size} bytes that its header announces")
    except (OSError, EOFError, zlib.error) as error:
        raise wrong(f"cannot be read ({error})") from None
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)
