"""Multi-view files: ``.mat`` of the multi-view repositories, and ``.ts`` of the time-series archives (UEA & UCR).

``.mat`` up to version 7 is read by scipy. Views are matrices (N, D) or (D, N), each a variable or an element of a cell
array. The labels are a variable named y, gt, gnd, label or the like, of any base, or one-hot. Variables in pairs such
as ``x1_train`` and ``x1_test`` keep that split.

``.ts`` has one case a line, its channels separated by colons, then the label. ``NAME_TRAIN.ts`` is read together with
``NAME_TEST.ts``. A modality is a group of channels, (T, channels); shorter series are padded with zeros.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..console import log
from ..errors import UserError
from ..options import Group, Options, assignments, option, pathname, reads
from ..registry import datasets
from ..seeds import derive_seed
from .dataset import DataRoot, Dataset, Modality, Split
from .digits import Resplit
from .kinds import first_line
from .labels import stratified
from .pipelines import Features
from .rows import label_order
from .splits import SPLIT_FRACTIONS

LABELS = ("y", "gt", "gnd", "label", "labels", "truth", "truelabel", "target", "targets", "class")
CHANNELS = dict.fromkeys(  # what the channels of known archives measure
    ("BasicMotions", "RacketSports"), {"accelerometer": "1+2+3", "gyroscope": "4+5+6"}
)


@dataclass(frozen=True, kw_only=True)
class MultiviewFile(Group, title="data of your own"):
    multiview: str | None = option(
        None,
        pathname,
        "file of --dataset multiview, below --data-root if that is given: .mat, or NAME_TRAIN.ts beside NAME_TEST.ts",
        "FILE",
        movable=True,
    )
    channels: dict[str, str] | None = option(
        None,
        assignments,
        "modalities of a .ts file: names, and the channels of each, counted from 1",
        "NAME=1+2,...",
        "each channel; of BasicMotions and RacketSports, accelerometer and gyroscope",
    )


@dataclass
class Views:
    """The samples of a file: arrays (N, ...) by modality, labels as text, and the test samples, if it names any."""

    arrays: dict[str, np.ndarray]
    labels: list[str]
    test: np.ndarray | None = None


@datasets.register("multiview", needs=("scipy",), extra="train")
@reads(MultiviewFile, DataRoot, Resplit)
def multiview(options: Options) -> Dataset:
    """A multi-view file, see --multiview."""
    own, root = options.of(MultiviewFile), options.of(DataRoot).data_root
    if own.multiview is None:
        raise UserError("dataset multiview needs --multiview FILE, a .mat or .ts file")
    path = Path(root or "", own.multiview)
    return build(read(path, own.channels), path.stem.removesuffix("_TRAIN"), options)


@datasets.register("breastcancer")
@reads(Resplit)
def breastcancer(options: Options) -> Dataset:
    """Breast cancer of Wisconsin (UCI, CC BY 4.0), from scikit-learn: mean, error and worst value of ten features."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    arrays = dict(zip(("mean", "error", "worst"), np.split(x, 3, axis=1), strict=True))
    return build(Views(arrays, [("malignant", "benign")[i] for i in y]), "breastcancer", options)


def read(path: Path, channels: dict[str, str] | None = None) -> Views:
    if channels and path.suffix.lower() == ".mat":
        raise UserError(f"--channels is for .ts files, and {path} is none")
    try:
        if path.suffix.lower() == ".mat":
            return read_mat(path)
        if path.suffix.lower() == ".ts":
            return read_ts(path, channels)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})") from None
    raise UserError(f"{path} is neither a .mat nor a .ts file")


def build(views: Views, name: str, options: Options) -> Dataset:
    """The dataset: splits of the file, or drawn, stratified by class; arrays normalised by position or channel.

    As in a manifest, 15% of all samples validate where the file names no test samples, and as many test. With --resplit
    all samples are drawn anew by the seed: training keeps its size.
    """
    names = sorted(set(views.labels), key=label_order)
    labels = torch.tensor([names.index(label) for label in views.labels])
    everything, count = torch.arange(len(labels)), options.of(Resplit).resplit
    test = None if views.test is None else torch.from_numpy(views.test).nonzero().flatten()
    pool = everything if views.test is None else torch.from_numpy(~views.test).nonzero().flatten()
    share = 1 - SPLIT_FRACTIONS["train"] if test is None else SPLIT_FRACTIONS["val"] / (1 - SPLIT_FRACTIONS["test"])
    held = round(share * len(pool))
    generator = torch.Generator().manual_seed(0 if count is None else derive_seed(options.seed, "resplit"))

    def draw(pool: torch.Tensor, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.zeros(len(pool), dtype=torch.bool)
        chosen[stratified(labels[pool], wanted, generator)] = True
        return pool[chosen], pool[~chosen]

    if count is not None:
        train, rest = draw(everything, len(pool) - held)
        if count >= len(rest):
            raise UserError(f"--resplit {count}: training takes {len(train)} of {len(labels)} samples, test needs some")
        val, test = draw(rest, count)
    else:
        train, val = draw(pool, len(pool) - held)
        if test is None:
            val, test = draw(val, held // 2)

    stored, modalities = {}, {}
    for m, array in views.arrays.items():
        stored[m] = torch.from_numpy(array if array.dtype == np.uint8 else array.astype(np.float32))
        modalities[m] = Modality("mlp" if array.ndim == 2 else "cnn1d", (m,), Features.of(stored[m][train]))
    splits: dict[str, Any] = {
        part: Split(labels[rows], {m: t[rows] for m, t in stored.items()}, [str(i) for i in rows.tolist()])
        for part, rows in (("train", train), ("val", val), ("test", test))
    }
    return Dataset(len(names), modalities, **splits, name=name, class_names=names)


# --- .mat ---


def read_mat(path: Path) -> Views:
    """The views of a .mat file, in the order of its variables."""
    from scipy.io import loadmat

    with open(path, "rb") as file:
        version = file.read(19)
    if version == b"MATLAB 7.3 MAT-file":
        remedy = "save it by MATLAB's save(..., '-v7'), or read it with h5py and write its arrays by scipy.io.savemat"
        raise UserError(f"{path} is a MATLAB 7.3 file, which scipy does not read: {remedy}")
    try:
        variables = {name: value for name, value in loadmat(path).items() if not name.startswith("__")}
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"{path} is not a readable .mat file ({first_line(error)})") from None
    parts: dict[str, dict[str, Any]] = {"train": {}, "test": {}}
    for name, value in variables.items():
        if match := re.fullmatch(r"(.+?)_?(train|test)", name, re.IGNORECASE):
            parts[match[2].lower()][match[1]] = value
    if not (parts["train"] and parts["test"]):
        return Views(*views_of(path, variables))
    (train, train_labels), (test, test_labels) = (views_of(path, part) for part in parts.values())
    if {m: x.shape[1] for m, x in train.items()} != {m: x.shape[1] for m, x in test.items()}:
        raise UserError(f"{path}: views of training and test differ: {list(train)}, {list(test)}")
    arrays = {m: np.concatenate([train[m], test[m]]) for m in train}
    labels = [*train_labels, *test_labels]
    return Views(arrays, labels, np.arange(len(labels)) >= len(train_labels))


def views_of(path: Path, variables: dict[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The views (N, D) among these variables, and the labels."""
    named = [name for name in variables if name.lower() in LABELS]
    if len(named) != 1:
        raise UserError(f"{path} needs one variable of labels, {', '.join(LABELS)}: it has {', '.join(variables)}")
    labels = labels_of(variables[named[0]])
    found, ignored = {}, []
    for name, value in variables.items():
        if name in named:
            continue
        cell = value.dtype == object
        for i, x in enumerate(value.ravel() if cell else [value], 1):
            x = x.toarray() if hasattr(x, "toarray") else np.asarray(x)
            view = f"{name}{i}" if cell else name
            if x.ndim == 2 and x.dtype.kind in "buif" and len(labels) in x.shape and x.size > len(labels):
                found[view] = x
            else:
                ignored.append(f"{view} {x.dtype} {'x'.join(map(str, x.shape))}")
    if ignored:
        log.info("%s: no views: %s", path, ", ".join(ignored))
    n = len(labels)
    square = {m: x.shape == (n, n) for m, x in found.items()}
    transposed = {m: len(x) != n for m, x in found.items()}
    others = [transposed[m] for m in found if not square[m]]
    transposed |= {m: bool(others) and all(others) for m in found if square[m]}  # a square matrix is as the others are
    arrays = {m: np.ascontiguousarray(x.T if transposed[m] else x) for m, x in found.items()}
    return arrays, labels


def labels_of(value: np.ndarray) -> list[str]:
    """The labels as text: numbers of any base, strings, or rows of one-hot codes."""
    if value.dtype == object and value.size and value.ravel()[0].dtype.kind not in "US":
        value = value.ravel()[0]  # some files repeat them for each view, in a cell
    if value.ndim == 2 and min(value.shape) > 1:
        codes = value if value.shape[0] >= value.shape[1] else value.T
        if not ((codes == 0) | (codes == 1)).all() or not (codes.sum(1) == 1).all():
            raise UserError(f"labels of shape {value.shape} are neither a vector nor one-hot")
        value = codes.argmax(1) + 1
    flat = (x.ravel()[0] if isinstance(x, np.ndarray) and x.size else x for x in value.ravel())
    return [str(int(x)) if isinstance(x, np.number) and float(x).is_integer() else str(x).strip() for x in flat]


# --- .ts ---


def read_ts(path: Path, channels: dict[str, str] | None) -> Views:
    """The series of NAME_TRAIN.ts and NAME_TEST.ts, or of a single file."""
    pair = [path.with_name(re.sub(r"_(TRAIN|TEST)\.ts$", rf"_{part}.ts", path.name)) for part in ("TRAIN", "TEST")]
    parts = [series_of(file) for file in dict.fromkeys(pair)]
    cases = [case for _, cases, _ in parts for case in cases]
    labels = [label for _, _, labels in parts for label in labels]
    if len({len(case) for case in cases}) != 1:
        raise UserError(f"{path}: cases differ in their number of channels")
    length = max(len(series) for case in cases for series in case)
    x = np.zeros((len(cases), length, len(cases[0])), np.float32)
    for i, case in enumerate(cases):
        for c, series in enumerate(case):
            x[i, : len(series), c] = series
    test = None if len(parts) == 1 else np.arange(len(cases)) >= len(parts[0][1])
    return Views(grouped(x, channels or CHANNELS.get(parts[0][0]), path), labels, test)


def series_of(path: Path) -> tuple[str, list[list[np.ndarray]], list[str]]:
    """The name of the problem, the channels of each case, and its label."""
    header, cases, labels, begun = {}, [], [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not (line := line.strip()) or line.startswith("#"):
            continue
        if not begun:
            key, _, value = line.partition(" ")
            begun = key.lower() == "@data"
            header[key.lower()] = value.strip()
            continue
        *series, label = line.split(":")
        try:
            cases.append([np.array(text.split(","), np.float32) for text in series])
        except ValueError:
            raise UserError(f"{path}, line {number} has values that are not numbers: fill in what is missing") from None
        labels.append(label.strip())
    if header.get("@timestamps", "").lower() == "true" or not header.get("@classlabel", "").lower().startswith("true"):
        raise UserError(f"{path}: its header must have @classLabel true, and no time stamps")
    if not cases:
        raise UserError(f"{path} has no cases below @data")
    return header.get("@problemname", ""), cases, labels


def grouped(x: np.ndarray, groups: dict[str, str] | None, path: Path) -> dict[str, np.ndarray]:
    """The modalities (N, T, channels) of the series (N, T, C)."""
    groups = groups or {f"channel{c}": str(c) for c in range(1, x.shape[2] + 1)}

    def indices(name: str, text: str) -> Iterable[int]:
        for part in text.split("+"):
            if not part.isdecimal() or not 1 <= int(part) <= x.shape[2]:
                raise UserError(f"--channels {name}={text}: {path} has the channels 1 to {x.shape[2]}")
            yield int(part) - 1

    return {name: np.ascontiguousarray(x[:, :, list(indices(name, text))]) for name, text in groups.items()}
