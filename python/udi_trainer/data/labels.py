"""Training splits with few labels, for studies of semi-supervised learning."""

from dataclasses import replace

import torch

from ..errors import UserError
from ..seeds import derive_seed
from .dataset import Dataset


def stratified(labels: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Sorted indices of ``count`` samples, stratified by class, with at least one of each class if possible."""
    position = torch.empty(len(labels), dtype=torch.float64)  # of a sample within its class, from 0 to 1
    shuffled = torch.randperm(len(labels), generator=generator)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        position[members[0]] = -1
    return position.argsort(stable=True)[:count].sort().values


def hide(data: Dataset, labels: int | float, seed: int) -> Dataset:
    """The dataset with this number or fraction of training labels, drawn by the seed; the other labels become −1."""
    train = data.train
    labelled = (train.labels >= 0).nonzero().flatten()
    count = labels if isinstance(labels, int) else round(labels * len(labelled))
    if not data.classes <= count <= len(labelled):
        raise UserError(
            f"--labels {labels}: {data.classes} classes need at least as many labels, and only {len(labelled)} of"
            f" {len(train)} training samples have one"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "labels"))
    kept = labelled[stratified(train.labels[labelled].cpu(), count, generator)]
    hidden = torch.full_like(train.labels, -1)
    hidden[kept] = train.labels[kept]
    return replace(data, train=replace(train, labels=hidden))
