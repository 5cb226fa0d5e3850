"""Training splits of which few samples have a label, for studies of what the others are worth."""

from dataclasses import replace

import torch

from ..errors import UserError
from ..seeds import derive_seed
from .dataset import Dataset


def stratified(labels: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of so many samples, ascending: of each class in proportion, and at least one if there are enough."""
    place = torch.empty(len(labels), dtype=torch.float64)  # in its class, from 0 to 1
    shuffled = torch.randperm(len(labels), generator=generator)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        place[members[0]] = -1
    return place.argsort(stable=True)[:count].sort().values


def hide(data: Dataset, labels: int | float, seed: int) -> Dataset:
    """The dataset with so many labels in training, or that fraction of them, drawn by the seed; the others are −1."""
    train = data.train
    known = (train.labels >= 0).nonzero().flatten()
    count = labels if isinstance(labels, int) else round(labels * len(known))
    if not data.classes <= count <= len(known):
        raise UserError(
            f"--labels {labels}: {data.classes} classes take as many labels or more, and of {len(train)} training"
            f" samples {len(known)} have one"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "labels"))
    kept = known[stratified(train.labels[known].cpu(), count, generator)]
    hidden = torch.full_like(train.labels, -1)
    hidden[kept] = train.labels[kept]
    return replace(data, train=replace(train, labels=hidden))
