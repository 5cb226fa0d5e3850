"""Datasets: the tensors stored for each sample, and how the input of a modality is computed from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..options import Group, number, option, pathname

Encoder = str | Callable[[torch.Size], nn.Module]
SHORT = 512  # steps of a sequence that is convolved at full length
FEATURES = 64  # width of the trainer's own encoders, unless an option says otherwise
Batch = dict[str, torch.Tensor]  # stored tensors of some samples, and their labels and indices


def sequence_encoder(steps: int) -> str:
    """The default encoder of sequences of this length."""
    return "fcn" if steps <= SHORT else "cnn1d"


def presence(modality: str) -> str:
    """The name of the stored bool tensor (N,) that marks the samples with this modality. Without it, all have it."""
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
    """Labels (N,) and the tensors that the modalities read, N samples each, in compact form.

    Labels are int64 in [0, classes); −1 in training means unlabelled. The tensor named :func:`presence` marks the
    samples that have a modality; those that lack it have arbitrary finite values in its own tensors. ``ids`` are the
    names of the samples in predictions.csv, by default their indices.
    """

    labels: torch.Tensor
    stored: dict[str, torch.Tensor]
    ids: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: torch.Tensor, names: Sequence[str]) -> Batch:
        """The indices, labels and named tensors of the samples at ``index``."""
        tensors = {"labels": self.labels} | {name: self.stored[name] for name in names}
        return {"index": index} | {name: t.index_select(0, index) for name, t in tensors.items()}

    def present(self, modality: str) -> torch.Tensor | None:
        """The samples that have this modality, bool (N,) on the CPU; None if all do."""
        mask = self.stored.get(presence(modality))
        return None if mask is None or mask.all() else mask.cpu()

    def take(self, index: torch.Tensor) -> "Split":
        """The split of these samples only, given as indices or as a bool mask."""
        ids = None if self.ids is None else [self.ids[i] for i in torch.arange(len(self))[index].tolist()]
        return Split(self.labels[index], {name: t[index] for name, t in self.stored.items()}, ids)

    def cloned(self) -> "Split":
        """With tensors of its own: autograd saves none that was made under ``torch.inference_mode``."""
        return Split(self.labels.clone(), {name: t.clone() for name, t in self.stored.items()}, self.ids)

    def to(self, device: torch.device) -> "Split":
        return Split(self.labels.to(device), {name: t.to(device) for name, t in self.stored.items()}, self.ids)

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.labels, *self.stored.values()))


@dataclass
class Modality:
    """An encoder, and how its input is computed on the device from the stored tensors that it reads.

    Args:
        encoder: a registered name (``cnn``, ``mlp``, ``resnet18``, or your own), or a callable such as a class that
            takes the shape of one sample and returns a new module, from a batch of inputs to features (N, width).
        reads: names of the stored tensors.
        make: computes the input from batches of these tensors; by default the single tensor as float32. A run folder
            can store a frozen dataclass with a ``__call__``, including its fields.
        augment: a random augmentation of the input, used in training only.
        vary: replaces ``make`` in training. It takes these tensors and ``chance`` (N, 4), uniform random numbers per
            sample and step, the same for all modalities, so the images and the flow of a clip are cropped alike.
        width: width of the features, for an encoder given by name.
        weights: file with initial weights, for an encoder given by name.
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
        """Whether the training input is random."""
        return self.augment is not None or self.vary is not None

    def input(self, batch: Batch, training: bool = False) -> torch.Tensor:
        tensors = [batch[name] for name in self.reads]
        x = self.vary(*tensors, batch["chance"]) if training and self.vary else self.make(*tensors)
        if training and self.augment:
            x = self.augment(x)
        return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x

    def sample(self, split: Split, count: int = 1) -> torch.Tensor:
        """The input of the first ``count`` samples."""
        return self.input(split.batch(torch.arange(count, device=split.labels.device), self.reads))


@dataclass
class Dataset:
    """A dataset of two or more modalities.

    ``name`` appears in tables and run folders, ``class_names`` in predictions. ``checked``: names of stored tensors
    that are known to be finite, so they are not checked before training. ``shifted``: a second test split with a
    distribution shift, on which accuracies are reported, too. ``recipe``: how the samples were made from the columns of
    a manifest, in plain values, see ``recipe.py``.
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
    recipe: dict[str, Any] | None = None

    def named_classes(self) -> list[str]:
        """The names of the classes, by default their numbers."""
        return list(self.class_names or map(str, range(self.classes)))

    def splits(self) -> dict[str, Split]:
        shifted = {"shifted": self.shifted} if self.shifted else {}
        return {"train": self.train, "val": self.val, "test": self.test, **shifted}

    def joined(self) -> "Dataset":
        """With training and validation together as its training split, in this order; it has all tensors read."""
        parts, masks = (self.train, self.val), {presence(m) for m in self.modalities}
        read = {name for view in self.modalities.values() for name in view.reads}
        read |= masks & set().union(*(part.stored for part in parts))

        def tensor(name: str) -> torch.Tensor:
            train, val = (part.stored.get(name, torch.ones(len(part), dtype=torch.bool)) for part in parts)
            if train.shape[1:] != val.shape[1:]:
                shapes = f"{tuple(train.shape[1:])} and {tuple(val.shape[1:])}"
                raise UserError(f"training and validation cannot be joined: samples of {name} have shapes {shapes}")
            return torch.cat((train, val.to(train)))

        labels = torch.cat((self.train.labels, self.val.labels.to(self.train.labels)))
        ids = None if None in (self.train.ids, self.val.ids) else [*self.train.ids, *self.val.ids]  # type: ignore
        return replace(self, train=Split(labels, {name: tensor(name) for name in sorted(read)}, ids))

    def to(self, device: torch.device) -> "Dataset":
        splits: dict[str, Any] = {name: split.to(device) for name, split in self.splits().items()}
        return replace(self, **splits)

    def nbytes(self) -> int:
        return sum(split.nbytes() for split in self.splits().values())
