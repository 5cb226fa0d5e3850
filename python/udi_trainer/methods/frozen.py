"""A trained modality whose outputs others learn from: UDI's anchor, the encoders under DI-MML's fusion head."""

import torch
from torch import nn

from .. import distributed
from ..data.dataset import Batch
from ..run import Run
from ..training.feed import Feed
from ..training.loop import usable

CACHE_LIMIT = 2**30  # bytes of outputs above which they are kept in bfloat16


class Frozen:
    """Its features and logits of the training samples: computed once, unless its input is augmented.

    ``scale``: of the logits, the inverse of a temperature.
    """

    def __init__(self, run: Run, modality: str, model: nn.Module, width: int, scale: float = 1.0):
        self.run, self.view, self.reads, self.scale = run, run.data.modalities[modality], (modality,), scale
        self.model, self.width = model.requires_grad_(False).eval(), width
        self.cache = None if self.view.random else self.compute_all()
        self.random = self.cache is None
        has = usable(run.data.train, modality)
        self.has = None if has is None else has.to(run.device)  # which samples have this modality; None: all

    def outputs(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Of a batch of training."""
        if self.cache is None:
            return self.compute(batch, training=True)
        return tuple(t[batch["index"]] for t in self.cache)

    @torch.no_grad()
    def compute(self, batch: Batch, training: bool = False) -> tuple[torch.Tensor, ...]:
        with self.run.autocast():
            features, logits = self.model(self.view.input(batch, training))
        return features, logits if self.scale == 1 else self.scale * logits

    def compute_all(self) -> list[torch.Tensor]:
        train = self.run.data.train
        feed, count = Feed(self.run, train, self.reads), len(train)
        parts = [self.compute(feed.complete(batch)) for batch in feed.batches(distributed.local_indices(count), 1000)]
        cache = [distributed.gather(torch.cat(tensors), count) for tensors in zip(*parts, strict=True)]
        return [t.bfloat16() for t in cache] if sum(t.nbytes for t in cache) > CACHE_LIMIT else cache


class Fused:
    """Several frozen modalities as the teacher of one of them: the sum of their logits, and the others' features."""

    def __init__(self, frozen: dict[str, Frozen], student: str):
        self.frozen, self.student, self.reads = frozen, student, tuple(frozen)
        self.width = sum(modality.width for m, modality in frozen.items() if m != student)
        self.random = any(modality.random for modality in frozen.values())
        self.has = None

    def outputs(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Of a batch of training."""
        both = {m: modality.outputs(batch) for m, modality in self.frozen.items()}
        features = torch.cat([features for m, (features, _) in both.items() if m != self.student], dim=1)
        return features, torch.stack([logits for _, logits in both.values()]).sum(0)
