"""What data is to the trainer: what is stored of each sample, and how a modality's input is made from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..options import Group, number, option, pathname

Encoder = str | Callable[[torch.Size], nn.Module]
FEATURES = 64  # width of the trainer's own encoders, unless an option says otherwise
Batch = dict[str, torch.Tensor]  # what is stored of some samples, their labels, and what samples they are


def presence(modality: str) -> str:
    """Name of the stored tensor, bool (N,), that tells which samples have this modality; without it all have."""
    return f"{modality} present"


@dataclass(frozen=True, kw_only=True)
class DataRoot(Group, title="data"):
    data_root: str | None = option(None, pathname, "folder of the data set's files", "DIR", movable=True)


@dataclass(frozen=True, kw_only=True)
class Fold(Group, title="data"):
    fold: int | None = option(
        None,
        number(int, 0),
        "which speakers, actors or films are held out for validation and test",
        "N",
        "0; of cremad none, its customary split",
    )


@dataclass
class Split:
    """Labels (N,) and whatever the modalities read, each tensor with N samples, in its smallest form.

    Labels are int64 in [0, classes); −1 in training means unlabelled. A sample that lacks a modality says so in the
    tensor of the name :func:`presence`, and has anything finite in that modality's own. ``ids`` names the samples in
    predictions.csv, by default by number.
    """

    labels: torch.Tensor
    stored: dict[str, torch.Tensor]
    ids: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: torch.Tensor, names: Sequence[str]) -> Batch:
        """These samples' labels and stored tensors of these names, and what samples they are."""
        tensors = {"labels": self.labels} | {name: self.stored[name] for name in names}
        return {"index": index} | {name: t.index_select(0, index) for name, t in tensors.items()}

    def present(self, modality: str) -> torch.Tensor | None:
        """The samples that have this modality, bool (N,) on the CPU; None if all do."""
        mask = self.stored.get(presence(modality))
        return None if mask is None or mask.all() else mask.cpu()

    def take(self, index: torch.Tensor) -> "Split":
        """These samples: numbers, or a bool of each."""
        ids = None if self.ids is None else [self.ids[i] for i in torch.arange(len(self))[index].tolist()]
        return Split(self.labels[index], {name: t[index] for name, t in self.stored.items()}, ids)

    def to(self, device: torch.device) -> "Split":
        return Split(self.labels.to(device), {name: t.to(device) for name, t in self.stored.items()}, self.ids)

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.labels, *self.stored.values()))


@dataclass
class Modality:
    """An encoder, and how its input is made from the stored tensors it reads, on the device.

    Args:
        encoder: a name (``cnn``, ``mlp``, ``resnet18``, or one's own, registered), or a callable from the shape of one
            sample to a fresh module from a batch of inputs to features (N, any width); a class will do.
        reads: names of the stored tensors.
        make: the input from batches of these tensors; by default the one tensor as float32. A frozen dataclass with a
            ``__call__`` is kept in a run folder with its fields.
        augment: changes an input at random, in training only.
        vary: makes the input in training, in the place of ``make``, from these tensors and from ``chance`` (N, 4):
            uniform numbers of each sample and step, the same for all modalities, so that a clip's pictures and its
            flow are cropped alike.
        width: of the features, for an encoder given by name.
        weights: a file of weights that an encoder given by name starts from.
    """

    encoder: Encoder
    reads: tuple[str, ...]
    make: Callable[..., torch.Tensor] = torch.Tensor.float
    augment: Callable[[torch.Tensor], torch.Tensor] | None = None
    vary: Callable[..., torch.Tensor] | None = None
    width: int = FEATURES
    weights: str | None = None

    @property
    def random(self) -> bool:
        """Whether its input differs from epoch to epoch."""
        return self.augment is not None or self.vary is not None

    def input(self, batch: Batch, training: bool = False) -> torch.Tensor:
        tensors = [batch[name] for name in self.reads]
        x = self.vary(*tensors, batch["chance"]) if training and self.vary else self.make(*tensors)
        if training and self.augment:
            x = self.augment(x)
        return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x

    def sample(self, split: Split, count: int = 1) -> torch.Tensor:
        """The input of the first samples."""
        return self.input(split.batch(torch.arange(count, device=split.labels.device), self.reads))


@dataclass
class Dataset:
    """A dataset of two or more modalities; ``name`` stands in tables and run folders, ``class_names`` in predictions.

    ``checked``: stored tensors of these names are known to be finite, and are not read through before training.
    ``shifted``: another test split, of another distribution, on which accuracies are reported too.
    """

    classes: int
    modalities: dict[str, Modality]
    train: Split
    val: Split
    test: Split
    name: str = "data"
    class_names: Sequence[str] | None = None
    checked: frozenset[str] = field(default_factory=frozenset)
    shifted: Split | None = None

    def splits(self) -> dict[str, Split]:
        further = {"shifted": self.shifted} if self.shifted else {}
        return {"train": self.train, "val": self.val, "test": self.test, **further}

    def to(self, device: torch.device) -> "Dataset":
        splits: dict[str, Any] = {name: split.to(device) for name, split in self.splits().items()}
        return replace(self, **splits)

    def nbytes(self) -> int:
        return sum(split.nbytes() for split in self.splits().values())
