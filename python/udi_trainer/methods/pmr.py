"""Prototypical modal rebalance (PMR; Fan et al., CVPR 2023, arXiv 2211.07089).

Before each epoch, the prototypes c of a modality are the mean features of each class. They classify by distance, and
the modality m whose prototypes give the labels of the batch the lowest probability learns from them, too:

    p_m(k) = softmax_k(-||f_m - c_mk||),   L = CE(z, y) + alpha CE(p_m, y) for the slowest m

As in the authors' code (github.com/fanyunfeng-bit/Modal-Imbalance-PMR), the weight is alpha or 0, the slowest modality
is chosen anew in each batch, and the term ends after 70 of 130 epochs. Its commands set alpha to 2, and the momentum of
the prototypes to 0. Theirs are of a tenth of the training samples (of AVE's validation samples), here of all labelled
training samples, without augmentation. The paper's entropy term is not in that code, nor here. SGD at 0.001 there, and
the epoch that is best on test; here validation decides.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import one_hot

from .. import distributed
from ..data.dataset import presence
from ..models.classifiers import ConcatClassifier
from ..options import Group, number, option, reads
from ..registry import methods
from ..run import Run
from ..training.feed import Feed
from ..training.task import update
from .joint import Joint, as_float, train_joint
from .outcome import Outcome

MODULATED = 70 / 130  # of all steps


@dataclass(frozen=True, kw_only=True)
class PMROptions(Group, title="PMR"):
    pmr_alpha: float = option(2.0, number(float, 0), "weight of the prototypes' loss")


class PMR(Joint):
    key = "pmr"
    model: ConcatClassifier

    def __init__(self, run: Run):
        super().__init__(run)
        self.end, classes = MODULATED * run.options.epochs * run.steps, run.data.classes
        widths = dict(zip(run.data.modalities, self.model.widths, strict=True))
        means = {m: nn.Parameter(torch.zeros(classes, width), requires_grad=False) for m, width in widths.items()}
        self.prototypes = nn.ParameterDict(means).to(run.device)  # no optimizer knows them
        self.parts["prototypes"] = self.prototypes

    @torch.no_grad()
    def begin_epoch(self, epoch: int) -> None:
        """Sets the prototypes to the mean features (C, D) of each class, over the samples that have the modality."""
        train = self.run.data.train
        labelled = (train.labels >= 0).nonzero().flatten()
        feed = Feed(self.run, train, self.reads)
        rows: dict[str, list[torch.Tensor]] = {m: [] for m in self.prototypes}
        self.model.eval()
        for batch in feed.inference_batches(labelled.cpu()[distributed.local_indices(len(labelled))]):
            batch = feed.complete(batch)
            with self.run.autocast():
                features = self.forward(batch)[0]
            for m, x in features.items():
                present = batch.get(presence(m), torch.ones_like(batch["labels"]))[:, None].to(x.dtype)
                rows[m].append(as_float(torch.cat((x * present, present), dim=1)))
        classes = one_hot(train.labels[labelled].to(self.run.device), self.run.data.classes)
        for m, parts in rows.items():
            x = distributed.gather(torch.cat(parts), len(labelled))
            total = classes.T.to(x.dtype) @ x
            self.prototypes[m].copy_(total[:, :-1] / total[:, -1:].clamp_min(1))

    def flags(self, number: int) -> dict:
        return {"modulate": number < self.end}

    def step(self, batch, modulate):
        with self.run.autocast():
            features, logits = self.forward(batch, training=True)
            loss = joint = self.cross_entropy(logits, batch["labels"])
        slowest = torch.zeros(len(features), device=joint.device)
        if modulate:
            distances = {
                m: torch.cdist(as_float(x), self.prototypes[m], compute_mode=EXACT) for m, x in features.items()
            }
            by_prototype = {m: -d for m, d in distances.items()}
            score = self.confidence(by_prototype, batch)
            slowest = (score == score.min()).float() * (score.min() < score.max())
            alone = torch.stack(list(self.unimodal_losses(by_prototype, batch).values()))
            loss = joint + self.run.options.of(PMROptions).pmr_alpha * (slowest * alone).sum()
        update(self.optimizer, self.parameters, self.gradients(loss, self.parameters))
        return {"loss": joint} | {f"slowest_{m}": x for m, x in zip(features, slowest, strict=True)}


EXACT = "donot_use_mm_for_euclid_dist"  # a product of matrices loses digits of small distances


@methods.register("pmr")
@reads(PMROptions)
def pmr(run: Run) -> Outcome:
    """Joint training in which the slowest modality also learns from prototypes of its classes (PMR)."""
    return train_joint(run.make(PMR))
