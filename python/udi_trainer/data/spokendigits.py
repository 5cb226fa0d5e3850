"""Spoken and written digits: the Free Spoken Digit Dataset beside MNIST, drawn to pairs of the same digit.

Speakers of validation and test are never heard in training: a fold holds out one speaker for validation and the next
two, in the alphabet's circle, for test. Every recording gets one image of its digit, training recordings from MNIST's
training images, the others from its test images, with noise that makes reading about as hard as listening. Pairs and
noise are drawn by the fold: all its runs see the same. Some training speakers may come without labels.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError
from ..options import Group, Options, number, option, reads
from ..registry import datasets
from .cache import Cache, CacheOptions
from .dataset import DataRoot, Dataset, Fold, Modality, Split
from .digits import mnist
from .kinds import Audio, Augmentation, Column, Sound
from .manifest import load
from .noise import noisy
from .pipelines import Features

NAME = re.compile(r"(\d)_(\w+)_(\d+)\.wav")


@dataclass(frozen=True, kw_only=True)
class SpokenDigits(Group, title="data"):
    labelled_speakers: int | None = option(None, number(int, 1), "how many training speakers have labels", "N", "all")
    image_noise: float = option(0.6, number(float, 0), "standard deviation of the images' noise, of pixels' range")


@datasets.register("spokendigits", needs=("soundfile",), extra="data")
@reads(DataRoot, Fold, SpokenDigits, CacheOptions, Sound, Augmentation)
def spokendigits(options: Options) -> Dataset:
    """Spoken digits of the Free Spoken Digit Dataset, and written ones of MNIST."""
    data_root, own, fold = options.of(DataRoot).data_root, options.of(SpokenDigits), options.of(Fold).fold or 0
    if data_root is None:
        raise UserError("dataset spokendigits needs --data-root DIR, with the wav files and MNIST's four idx.gz files")
    root = Path(data_root)
    files = sorted((p for p in root.rglob("*.wav") if NAME.fullmatch(p.name)), key=lambda p: p.name)
    if not files:
        raise UserError(f"--data-root {root} holds no recordings such as 7_jackson_32.wav, looked in all folders below")
    names = [NAME.fullmatch(p.name).groups() for p in files]
    speakers = sorted({speaker for _, speaker, _ in names})
    if len(speakers) < 4:
        raise UserError(f"--data-root {root}: recordings of {len(speakers)} speakers, a fold needs four or more")
    place = {speaker: (i - fold) % len(speakers) for i, speaker in enumerate(speakers)}
    part = ["val" if place[s] == 0 else "test" if place[s] <= 2 else "train" for _, s, _ in names]
    labelled = own.labelled_speakers or len(speakers) - 3
    if labelled > len(speakers) - 3:
        raise UserError(f"--labelled-speakers {labelled}: {len(speakers) - 3} speakers are for training")

    column = Column("speech", [[p] for p in files], options, Cache(options.of(CacheOptions).cache_dir), {})
    kind, keys, sound = load(Audio(column))
    if column.bad:
        raise UserError(next(iter(column.bad.values())))
    labels = torch.tensor([int(digit) for digit, *_ in names])
    written, generator = mnist(mnist_folder(root)), torch.Generator().manual_seed(fold)
    heard = [i for i, name in enumerate(part) if name == "train"]
    speech = kind.modality("speech", sound[heard], [keys[i] for i in heard])

    def split(name, pixels, digits):
        index = torch.tensor([i for i, where in enumerate(part) if where == name])
        pool = {d: (digits == d).nonzero().flatten() for d in range(10)}
        pool = {d: found[torch.randperm(len(found), generator=generator)] for d, found in pool.items()}
        used, images = defaultdict(int), []
        for d in labels[index].tolist():
            images.append(pool[d][used[d] % len(pool[d])])
            used[d] += 1
        image = noisy(pixels[torch.stack(images)], own.image_noise, generator)
        ids = [files[i].stem for i in index.tolist()]
        return Split(labels[index], {"image": image, "speech": sound[index]}, ids)

    train, test = split("train", *written["train"]), written["test"]
    train.labels[torch.tensor([place[names[i][1]] > 2 + labelled for i in heard])] = -1
    half = len(test[0]) // 2  # no image in both
    val = split("val", test[0][:half], test[1][:half])
    test = split("test", test[0][half:], test[1][half:])
    x = train.stored["image"].double()
    gray = Features((x.mean().item(),), (x.std().item(),), (1, *x.shape[1:]))
    modalities = {"image": Modality("cnn", ("image",), gray), "speech": speech}
    return Dataset(10, modalities, train, val, test, class_names=[str(d) for d in range(10)])


def mnist_folder(root: Path) -> Path:
    """Where MNIST's files are: there, below, or beside."""
    name = "train-images-idx3-ubyte.gz"
    found = [*root.rglob(name), *root.parent.glob(f"*/{name}")]
    return found[0].parent if found else root
