"""Two-modality datasets of handwritten digits (scikit-learn's or MNIST's): colored-and-gray, halves, and with a hue.

A new data set is one function from :class:`Options` to a :class:`Dataset`, decorated with ``@datasets.register(name)``
and, for options of its own, ``@reads(...)``. All seeds of a run see the same samples, unless --resplit draws the splits
by seed.
"""

import gzip
import math
import zlib
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..options import Group, Options, number, option, reads
from ..registry import datasets
from ..seeds import derive_seed
from .dataset import DataRoot, Dataset, Modality, Split
from .labels import stratified
from .noise import add_noise

Part = tuple[torch.Tensor, torch.Tensor]  # pixels uint8 (N, H, W), labels (N,)

# Mean color of each digit, RGB.
COLORS = torch.tensor(
    [
        (220, 20, 60), (0, 128, 128), (253, 233, 16), (0, 149, 182), (237, 145, 33),
        (145, 30, 188), (70, 240, 240), (250, 197, 187), (210, 245, 60), (128, 0, 0),
    ]
) / 255  # fmt: skip
COLOR_VARIANCE = 0.03
MAX_BYTES = 2**30  # of an idx file's data; MNIST's largest file has 47 million
HUE_VARIANCE = 0.03  # in huedigits
HALVES = {"left": 0.1, "right": 0.3}  # in splitdigits: the standard deviation of each one's noise, for pixels in [0, 1]


def colored_and_gray(train: Part, val: Part, test: Part, mean: float, std: float) -> Dataset:
    """The digit in gray and the digit in a color, as two modalities.

    In training the color reveals the digit, which is a shortcut. In validation and test the color is independent of the
    digit. A validation split with training colors would reward the shortcut and make color the anchor.
    """
    generator = torch.Generator().manual_seed(0)

    def split(pixels, labels, shortcut):
        hue = labels if shortcut else torch.randint(10, labels.shape, generator=generator)
        jitter = torch.randn(len(labels), 3, generator=generator) * COLOR_VARIANCE**0.5
        return Split(labels, {"pixels": pixels, "color": (COLORS[hue] + jitter).clamp(0, 1)})

    modalities = {
        "gray": Modality("cnn", ("pixels",), lambda pixels: (pixels[:, None] / 255 - mean) / std),
        "color": Modality("cnn", ("pixels", "color"), in_color),
    }
    return Dataset(10, modalities, split(*train, True), split(*val, False), split(*test, False))


def split_in_halves(train: Part, val: Part, test: Part, mean: float, std: float, seed: int = 0) -> Dataset:
    """The left and the right half of each digit as complementary modalities, with independent noise in all splits."""
    generator = torch.Generator().manual_seed(seed)

    def split(pixels, labels):
        halves = zip(HALVES.items(), pixels.chunk(2, dim=2), strict=True)
        return Split(labels, {name: add_noise(half, noise, generator) for (name, noise), half in halves})

    modalities = {name: Modality("cnn", (name,), lambda half: (half[:, None] / 255 - mean) / std) for name in HALVES}
    return Dataset(10, modalities, split(*train), split(*val), split(*test))


def with_hue(train: Part, val: Part, test: Part, mean: float, std: float, rho: float, seed: int = 0) -> Dataset:
    """A hue and the digit in the same hue, so that both modalities contain the same shortcut.

    In training, validation and test the hue is the one of the label with probability rho, otherwise that of another
    label. In the shifted test split it is independent of the digit.
    """
    generator = torch.Generator().manual_seed(seed)

    def split(pixels, labels, rho):
        other = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
        own = torch.rand(len(labels), generator=generator) < rho
        jitter = torch.randn(len(labels), 3, generator=generator) * HUE_VARIANCE**0.5
        return Split(labels, {"pixels": pixels, "hue": (COLORS[labels.where(own, other)] + jitter).clamp(0, 1)})

    modalities = {
        "hue": Modality("mlp", ("hue",), lambda hue: (hue - 0.5) / 0.3),
        "digit": Modality("cnn", ("pixels", "hue"), in_color),
    }
    like_training = (split(*part, rho) for part in (train, val, test))
    data = Dataset(10, modalities, *like_training)
    return replace(data, shifted=split(*test, 0.1))


def in_color(pixels: torch.Tensor, color: torch.Tensor) -> torch.Tensor:
    return pixels[:, None] * (color / 255)[:, :, None, None]


@dataclass(frozen=True, kw_only=True)
class Resplit(Group, title="data"):
    resplit: int | None = option(
        None,
        number(int, 1),
        "draw training, this many samples of validation, and test by the seed",
        "N",
        "one split for all seeds",
    )


@dataclass(frozen=True, kw_only=True)
class Hue(Group, title="data"):
    rho: float = option(
        0.95,
        number(float, 0, below=1 + 1e-9),
        "how often the hue is the label's own; in the shifted test split it is random",
    )


@datasets.register("cgdigits")
def cgdigits(options: Options) -> Dataset:
    """Colored-and-gray digits, 8x8, from scikit-learn."""
    return colored_and_gray(**digits())


@datasets.register("cgmnist")
@reads(DataRoot)
def cgmnist(options: Options) -> Dataset:
    """Colored-and-gray MNIST, 28x28."""
    root = options.of(DataRoot).data_root
    if root is None:
        raise UserError("dataset cgmnist needs --data-root DIR, the folder of MNIST's four idx.gz files")
    return colored_and_gray(**mnist(root))


@datasets.register("splitdigits")
@reads(DataRoot, Resplit)
def splitdigits(options: Options) -> Dataset:
    """The halves of scikit-learn's digits, 8x4, or with a data root those of MNIST, 28x14."""
    return split_in_halves(**drawn(options))


@datasets.register("fewdigits", labels=100, resplit=100)
@reads(DataRoot, Resplit)
def fewdigits(options: Options) -> Dataset:
    """splitdigits with few labels."""
    return splitdigits(options)


@datasets.register("huedigits", anchor="hue")
@reads(DataRoot, Resplit, Hue)
def huedigits(options: Options) -> Dataset:
    """A hue that usually reveals the label, and digits in this hue; scikit-learn's, or with a data root MNIST's."""
    return with_hue(**drawn(options), rho=options.of(Hue).rho)


def drawn(options: Options) -> dict[str, Any]:
    """scikit-learn's digits, or with a data root MNIST's: the original splits, or with --resplit drawn by the seed.

    Training keeps its size, validation has as many samples as --resplit says, and test gets the rest.
    """
    root, count = options.of(DataRoot).data_root, options.of(Resplit).resplit
    parts = mnist(root) if root else digits()
    if count is None:
        return parts
    names, seed = ("train", "val", "test"), derive_seed(options.seed, "resplit")
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = (torch.cat([parts[name][i] for name in names]) for i in (0, 1))
    size, free = len(parts["train"][1]), torch.ones(len(labels), dtype=torch.bool)
    if count >= len(labels) - size:
        raise UserError(f"--resplit {count}: training takes {size} of {len(labels)} digits, test needs some")
    for name, wanted in (("train", size), ("val", count), ("test", len(labels) - size - count)):
        remaining = free.nonzero().flatten()
        index = remaining[stratified(labels[remaining], wanted, generator)]
        free[index] = False
        parts[name] = pixels[index], labels[index]
    return parts | {"seed": seed}


def digits() -> dict[str, Any]:
    """scikit-learn's digits, 8x8: 1077 for training, 360 each for validation and test."""
    columns = scikit_digits()
    pixels = torch.from_numpy(columns[:, :-1]).mul(255 / 16).round().to(torch.uint8).view(-1, 8, 8)
    labels = columns[:, -1].astype(int)
    rest, test = split_off(labels, 360)
    train, val = (rest[part] for part in split_off(labels[rest], 360))
    targets = torch.from_numpy(labels)
    parts = {"train": train, "val": val, "test": test}
    return {name: (pixels[part], targets[part]) for name, part in parts.items()} | {"mean": 0.3053, "std": 0.3760}


def scikit_digits() -> np.ndarray:
    """Pixels from 0 to 16 and the label, by row. Read without importing scikit-learn, which takes a second."""
    package = find_spec("sklearn")
    if package is None:
        raise UserError('the bundled digits need scikit-learn: pip install -e ".[train]"')
    file = Path(str(package.origin)).parent / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    return np.column_stack(load_digits(return_X_y=True))


def split_off(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of all samples but ``count``, and of these, shuffled and stratified by label.

    The same as scikit-learn's ``train_test_split(..., test_size=count, stratify=labels, random_state=0)``.
    """
    generator, sizes = np.random.RandomState(0), np.bincount(labels)

    def shares(sizes: np.ndarray, count: int) -> np.ndarray:
        """How many samples of each class; of those with equal remainders chance decides which are rounded up."""
        exact = sizes / sizes.sum() * count
        whole = np.floor(exact)
        for remainder in np.unique(exact - whole)[::-1]:
            missing = int(count - whole.sum())
            (equal,) = np.where(exact - np.floor(exact) == remainder)
            if missing > 0:
                whole[generator.choice(equal, min(len(equal), missing), replace=False)] += 1
        return whole.astype(int)

    kept = shares(sizes, len(labels) - count)
    taken = shares(sizes - kept, count)
    orders = [np.flatnonzero(labels == c)[generator.permutation(size)] for c, size in enumerate(sizes)]
    rest = np.concatenate([order[:k] for order, k in zip(orders, kept, strict=True)])
    off = np.concatenate([order[k : k + t] for order, k, t in zip(orders, kept, taken, strict=True)])
    return generator.permutation(rest), generator.permutation(off)


def mnist(data_root: str | Path) -> dict[str, Any]:
    """MNIST, 28x28: 55,000 for training; the last twelfth of the training file is the validation split."""
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
            raise UserError(f"{path}: label {i} is {int(labels[i])}, not a digit: download it again")
        parts[part] = pixels, labels
    pixels, labels = parts["train"]
    cut = len(labels) - len(labels) // 12
    train, val = (pixels[:cut], labels[:cut]), (pixels[cut:], labels[cut:])
    return {"train": train, "val": val, "test": parts["t10k"], "mean": 0.1307, "std": 0.3081}


def read_idx(path: Path, dims: int) -> torch.Tensor:
    """Reads a gzipped idx file of unsigned bytes: magic 0 0 8 dims, big-endian sizes, data.

    Never allocates more memory than the header announces, even for a decompression bomb.
    """

    def damaged(what: str) -> UserError:
        return UserError(f"{path} {what}: download it again")

    try:
        with gzip.open(path) as file:
            header = file.read(4 + 4 * dims)
            if len(header) < 4 + 4 * dims or header[:4] != bytes((0, 0, 8, dims)):
                raise damaged(f"is not an idx file of unsigned bytes with {dims} dimension(s)")
            shape = [int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4)]
            size = math.prod(shape)  # Python integers do not overflow, unlike a product of tensor sizes
            if not 0 < size <= MAX_BYTES:
                raise damaged("has no samples" if size == 0 else f"claims to have {' x '.join(map(str, shape))} bytes")
            data = bytearray(file.read(size))
            if len(data) < size:
                raise damaged(f"is truncated ({len(data)} bytes of {size})")
            if file.read(1):
                raise damaged(f"has more than the {size} bytes that its header announces")
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(f"cannot be read ({error})") from None
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)
