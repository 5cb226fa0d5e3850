"""Spoken and written digits: recordings of the Free Spoken Digit Dataset, paired with MNIST images of the same digit.

A fold holds out one speaker for validation and the next two, in cyclic alphabetical order, for test; training has no
recording of these speakers. Each recording is paired with an image: training recordings with MNIST's training images,
the others with its test images. Noise makes the images about as hard to classify as the recordings. The fold seeds the
pairs and the noise, so all runs of a fold see the same data. Some training speakers can be left unlabelled.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from ..console import log
from ..errors import UserError
from ..options import Group, Options, number, option, reads
from ..registry import datasets
from .cache import Cache, CacheOptions
from .dataset import DataRoot, Dataset, Fold, Modality, Split
from .digits import mnist
from .kinds import Audio, AugmentationOptions, Column, Damage, Kind, SoundOptions, is_hidden
from .manifest import load_column
from .noise import add_noise
from .pipelines import Features

NAME = re.compile(r"(\d)_(\w+)_(\d+)\.wav")


@dataclass(frozen=True, kw_only=True)
class SpokenDigits(Group, title="data"):
    labelled_speakers: int | None = option(None, number(int, 1), "how many training speakers have labels", "N", "all")
    image_noise: float = option(0.6, number(float, 0), "standard deviation of the images' noise, of pixels' range")


@datasets.register("spokendigits", needs=("soundfile",), extra="data")
@reads(DataRoot, Fold, SpokenDigits, Damage, CacheOptions, SoundOptions, AugmentationOptions)
def spokendigits(options: Options) -> Dataset:
    """Spoken digits of the Free Spoken Digit Dataset, and written ones of MNIST."""
    data_root, own, fold = options.of(DataRoot).data_root, options.of(SpokenDigits), options.of(Fold).fold or 0
    if data_root is None:
        raise UserError("dataset spokendigits needs --data-root DIR, with the wav files and MNIST's four idx.gz files")
    root = Path(data_root)
    found = (p for p in root.rglob("*.wav") if NAME.fullmatch(p.name))
    visible = (p for p in found if not any(map(is_hidden, p.relative_to(root).parts)))
    files = sorted(visible, key=lambda p: p.name)
    if not files:
        raise UserError(f"--data-root {root} and its subfolders contain no recordings such as 7_jackson_32.wav")
    speakers = sorted({speaker for _, speaker in map(parts_of, files)})
    if len(speakers) < 4:
        raise UserError(f"--data-root {root} has recordings of {len(speakers)} speakers, but a fold needs four or more")
    place = {speaker: (i - fold) % len(speakers) for i, speaker in enumerate(speakers)}
    labelled = own.labelled_speakers or len(speakers) - 3
    if labelled > len(speakers) - 3:
        raise UserError(f"--labelled-speakers {labelled}: only {len(speakers) - 3} speakers are for training")

    files, kind, keys, sound = read_recordings(files, options)
    names = [*map(parts_of, files)]
    part = ["val" if place[s] == 0 else "test" if place[s] <= 2 else "train" for _, s in names]
    labels = torch.tensor([int(digit) for digit, _ in names])
    images, generator = mnist(mnist_folder(root)), torch.Generator().manual_seed(fold)
    train_rows = [i for i, name in enumerate(part) if name == "train"]
    speech = kind.modality("speech", sound[train_rows], [keys[i] for i in train_rows])

    def split(name: str, pixels: torch.Tensor, digits: torch.Tensor) -> Split:
        index = torch.tensor([i for i, split_name in enumerate(part) if split_name == name])
        pool = {d: (digits == d).nonzero().flatten() for d in range(10)}
        pool = {d: rows[torch.randperm(len(rows), generator=generator)] for d, rows in pool.items()}
        used, chosen = defaultdict[int, int](int), []
        for d in labels[index].tolist():
            chosen.append(pool[d][used[d] % len(pool[d])])
            used[d] += 1
        image = add_noise(pixels[torch.stack(chosen)], own.image_noise, generator)
        ids = [files[i].stem for i in index.tolist()]
        return Split(labels[index], {"image": image, "speech": sound[index]}, ids)

    train, (pixels, digits) = split("train", *images["train"]), images["test"]
    train.labels[torch.tensor([place[names[i][1]] > 2 + labelled for i in train_rows])] = -1
    half = len(pixels) // 2  # validation and test share no image
    val = split("val", pixels[:half], digits[:half])
    test = split("test", pixels[half:], digits[half:])
    x = train.stored["image"].double()
    gray = Features((x.mean().item(),), (x.std().item(),), (1, *x.shape[1:]))
    modalities = {"image": Modality("cnn", ("image",), gray), "speech": speech}
    return Dataset(10, modalities, train, val, test, class_names=[str(d) for d in range(10)])


def parts_of(file: Path) -> tuple[str, str]:
    """The digit and the speaker of a recording, from its name."""
    digit, _, rest = file.stem.partition("_")
    return digit, rest.rpartition("_")[0]


def read_recordings(files: list[Path], options: Options) -> tuple[list[Path], Kind, list[bytes], torch.Tensor]:
    """The recordings that can be read, their kind, keys and samples. Others are refused, or left out by --skip-bad.

    All recordings determine the stored length, so it is the same in every fold.
    """
    while True:
        column = Column("speech", [[p] for p in files], options, Cache(options.of(CacheOptions).cache_dir), {})
        kind, keys, sound = load_column(Audio(column))
        if sound is not None and not column.bad:
            for note in kind.notes:
                log.warning(note)
            return files, kind, keys, sound
        bad = [column.bad[row] for row in sorted(column.bad)]
        if not options.of(Damage).skip_bad:
            raise UserError(f"{bad[0]}{f'; and {len(bad) - 1} more' if bad[1:] else ''} (--skip-bad leaves them out)")
        for reason in bad:
            log.warning("left out: %s", reason)
        files = [file for row, file in enumerate(files) if row not in column.bad]


def mnist_folder(root: Path) -> Path:
    """The folder of MNIST's files: ``root``, a subfolder or a sibling folder."""
    name = "train-images-idx3-ubyte.gz"
    files = [*root.rglob(name), *root.parent.glob(f"*/{name}")]
    return files[0].parent if files else root
