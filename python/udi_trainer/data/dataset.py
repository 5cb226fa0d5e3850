"""What data is to the trainer: what is stored of each sample, and how a modality's input is made from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

Encoder = str | Callable[[torch.Size], nn.Module]
Batch = dict[str, torch.Tensor]  # what is stored of some samples, their labels, and what samples they are


@dataclass
class Split:
    """Labels (N,) and whatever the modalities read, each tensor with N samples, in its smallest form.

    Labels are int64 in [0, classes); −1 in training means unlabelled.
    """

    labels: torch.Tensor
    stored: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: torch.Tensor, names: Sequence[str]) -> Batch:
        """These samples' labels and stored tensors of these names, and what samples they are."""
        tensors = {"labels": self.labels} | {name: self.stored[name] for name in names}
        return {"index": index} | {name: t.index_select(0, index) for name, t in tensors.items()}

    def to(self, device: torch.device) -> "Split":
        return Split(self.labels.to(device), {name: t.to(device) for name, t in self.stored.items()})

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.labels, *self.stored.values()))


@dataclass
class Modality:
    """An encoder, and how its input is made from the stored tensors it reads, on the device.

    Args:
        encoder: a name (``cnn``, ``mlp``, ``resnet18``, or one's own, registered), or a callable from the shape of one
            sample to a fresh module from a batch of inputs to features (N, any width); a class will do.
        reads: names of the stored tensors.
        make: the input from batches of these tensors; by default the one tensor as float32.
        augment: changes an input at random, in training only.
    """

    encoder: Encoder
    reads: tuple[str, ...]
    make: Callable[..., torch.Tensor] = torch.Tensor.float
    augment: Callable[[torch.Tensor], torch.Tensor] | None = None

    def input(self, batch: Batch, training: bool = False) -> torch.Tensor:
        x = self.make(*(batch[name] for name in self.reads))
        if training and self.augment:
            x = self.augment(x)
        return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x

    def sample(self, split: Split, count: int = 1) -> torch.Tensor:
        """The input of the first samples."""
        return self.input(split.batch(torch.arange(count, device=split.labels.device), self.reads))


@dataclass
class Dataset:
    """A dataset of two or more modalities; ``name`` stands in tables and run folders."""

    classes: int
    modalities: dict[str, Modality]
    train: Split
    val: Split
    test: Split
    name: str = "data"

    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "val": self.val, "test": self.test}

    def to(self, device: torch.device) -> "Dataset":
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    def nbytes(self) -> int:
        return sum(split.nbytes() for split in self.splits().values())
