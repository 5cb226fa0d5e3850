"""Frozen modalities that others learn from: UDI's anchor, and the encoders below DI-MML's fusion head."""

import torch
from torch import nn

from .. import distributed
from ..data.dataset import Batch
from ..run import Run
from ..training.feed import Feed

CACHE_LIMIT = 2**30  # bytes; larger outputs are kept in bfloat16


class Frozen:
    """A trained modality. Its features and logits of the training samples are computed once, unless they are augmented.

    ``scale`` multiplies the logits: an inverse temperature.
    """

    def __init__(self, run: Run, modality: str, model: nn.Module, width: int, scale: float = 1.0):
        self.run, self.view, self.reads, self.scale = run, run.data.modalities[modality], (modality,), scale
        self.model, self.width = model.requires_grad_(False).eval(), width
        self.cache = None if self.view.random else self.compute_all()
        self.random = self.cache is None
        present = run.data.train.present(modality)
        self.present = None if present is None else present.to(run.device)  # samples with this modality; None: all

    def outputs(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Features and logits of a training batch."""
        if self.cache is None:
            return self.compute(batch, training=True)
        return tuple(t.index_select(0, batch["index"]) for t in self.cache)

    @torch.no_grad()
    def compute(self, batch: Batch, training: bool = False) -> tuple[torch.Tensor, ...]:
        with self.run.autocast():
            features, logits = self.model(self.view.input(batch, training))
        return features, logits if self.scale == 1 else self.scale * logits

    def compute_all(self) -> list[torch.Tensor]:
        train = self.run.data.train
        feed, count = Feed(self.run, train, self.reads), len(train)
        batches = feed.inference_batches(distributed.local_indices(count))
        parts = [self.compute(feed.complete(batch)) for batch in batches]
        cache = [distributed.gather(torch.cat(tensors), count) for tensors in zip(*parts, strict=True)]
        return [t.bfloat16() for t in cache] if sum(t.nbytes for t in cache) > CACHE_LIMIT else cache


class Fused:
    """Several frozen modalities as the teacher of one: the sum of all logits, and the features of the others."""

    def __init__(self, frozen: dict[str, Frozen], student: str):
        self.frozen, self.student, self.reads = frozen, student, tuple(frozen)
        self.width = sum(modality.width for m, modality in frozen.items() if m != student)
        self.random = any(modality.random for modality in frozen.values())
        self.present = None

    def outputs(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Features and logits of a training batch."""
        made = {m: modality.outputs(batch) for m, modality in self.frozen.items()}
        features = torch.cat([features for m, (features, _) in made.items() if m != self.student], dim=1)
        return features, torch.stack([logits for _, logits in made.values()]).sum(0)
