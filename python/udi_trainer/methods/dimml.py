"""Detached and Interactive Multimodal Learning (DI-MML; Fan et al., arXiv 2407.19514).

Detached phase: every modality m has an encoder and a head of its own, and all share a linear classifier. They are
trained side by side, but no loss takes the outputs of several modalities, except the contrastive one:
    L = sum_m [CE(own head) + lambda CE(shared classifier)] + sum_(a, b) DUC(student b, teacher a)
After a warm-up, each modality's effective dimensions are found on the training samples. Student b learns from teacher a
on the dimensions that are effective in a but not in b; no gradient reaches a. Fusion phase: all of this is frozen, and
a linear head learns from the concatenated features. Prediction weights the logits of all heads by their certainty.

As in the authors' code (github.com/fanyunfeng-bit/DI-MML), lambda, DUC's weight and its schedule are constant. The
dimensions are found once, with the encoders in evaluation mode (there on augmented inputs, here on plain ones). Both
phases start from the initial learning rate.

Differences: their code keeps the epoch that is best on test, and the fusion head whose fused test accuracy is best.
Here the best mean validation accuracy decides, and the fusion head's own. Their certainty temperature is 1 or 3 by data
set; here it is chosen on validation. Their method is for two modalities of equal width; here all ordered pairs count,
and a linear layer reduces features to the narrowest width. Their optimizer and length are options:
    --optimizer sgd --lr 1e-3 --schedule step --batch-size 16 --epochs 150
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from udi_kernels import duc_loss, effective_dims

from .. import distributed
from ..console import log
from ..data.dataset import Batch, Dataset
from ..errors import UserError
from ..evaluation.fusion import FusionOptions
from ..evaluation.scores import scores
from ..models.classifiers import DetachedClassifiers, FeatureHead
from ..models.encoders import is_stochastic
from ..options import Group, number, one_of, option, reads
from ..registry import methods
from ..run import Run
from ..training.feed import Feed
from ..training.inference import outputs
from ..training.loop import fit
from ..training.task import Task, trainable, update
from .frozen import Frozen
from .outcome import Outcome

FUSION_HEAD = "fusion head"  # the name of its model; no modality has it


@dataclass(frozen=True, kw_only=True)
class DIMMLOptions(Group, title="DI-MML"):
    shared_weight: float = option(1.0, number(float, 0), "weight of the shared classifier's loss")
    contrast: str = option(
        "duc",
        one_of("duc", "full"),
        "contrastive loss between modalities: duc (one way, on complementary dimensions) or full (both ways, on all)",
    )
    contrast_weight: float = option(1.0, number(float, 0), "weight of the contrastive loss")
    contrast_temperature: float = option(10.0, number(float, above=0), "temperature of the contrastive loss")
    contrast_warmup: float = option(
        20 / 150,
        number(float, 0),
        "fraction of the epochs before the contrastive loss counts; the effective dimensions are then found",
        shown="20 of 150",
    )
    fusion_epochs: int = option(20, number(int, 1), "epochs of the fusion head")

    def check(self, data: Dataset) -> None:
        if lacking := [m for m in data.modalities if data.train.present(m) is not None]:
            raise UserError(f"method dimml trains all modalities together, and samples lack {', '.join(lacking)}")


class Dimensions(nn.Module):
    """Each modality's effective dimensions, bool (M, D)."""

    effective: torch.Tensor

    def __init__(self, modalities: int, width: int):
        super().__init__()
        self.register_buffer("effective", torch.ones(modalities, width, dtype=torch.bool))

    def complementary(self, teacher: int, student: int) -> torch.Tensor:
        return self.effective[teacher] & ~self.effective[student]


class Detached(Task):
    key = "dimml"
    model: DetachedClassifiers

    def __init__(self, run: Run):
        super().__init__(run)
        self.phase, self.views, self.options = "detached", run.data.modalities, run.options.of(DIMMLOptions)
        made = {name: self.make_encoder(name) for name in self.views}
        encoders = {name: encoder for name, (encoder, _) in made.items()}
        widths = {name: width for name, (_, width) in made.items()}
        self.random = any(view.random for view in self.views.values()) or any(map(is_stochastic, encoders.values()))
        self.model = self.place(DetachedClassifiers(encoders, widths, run.data.classes))
        self.projected = {name: width for name, width in widths.items() if width != self.model.width}
        self.parameters = trainable(self.model)
        self.optimizer = run.optimizer(self.parameters)
        self.dimensions = Dimensions(len(widths), self.model.width).to(run.device)
        self.warmup = round(self.options.contrast_warmup * run.options.epochs)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "dimensions": self.dimensions}

    def forward(self, batch: Batch, training: bool = False) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """(features, logits) by modality."""
        return self.model({name: view.input(batch, training) for name, view in self.views.items()})

    def begin_epoch(self, epoch: int) -> None:
        if epoch == self.warmup and self.options.contrast == "duc":
            self.dimensions.effective.copy_(self.find_dimensions())

    @torch.no_grad()
    def find_dimensions(self) -> torch.Tensor:
        train = self.run.data.train
        labelled = (train.labels >= 0).nonzero().flatten()
        feed, features = Feed(self.run, train, self.reads), []
        self.model.eval()
        for batch in feed.inference_batches(labelled.cpu()[distributed.local_indices(len(labelled))]):
            with self.run.autocast():
                features.append([x.float() for x, _ in self.forward(feed.complete(batch)).values()])
        labels = train.labels[labelled].to(self.run.device)
        columns = (distributed.gather(torch.cat(parts), len(labelled)) for parts in zip(*features, strict=True))
        return torch.stack([effective_dims(x, labels, self.run.data.classes) for x in columns])

    def flags(self, number: int) -> dict:
        return {"interact": number >= self.warmup * self.run.steps and self.options.contrast_weight > 0}

    def step(self, batch, interact):
        """``interact``: whether modalities learn from each other."""
        options = self.options
        with self.run.autocast():
            features, logits = zip(*self.forward(batch, training=True).values(), strict=True)
            own = [self.cross_entropy(z, batch["labels"]) for z in logits]
            shared = [self.cross_entropy(self.model.shared(x), batch["labels"]) for x in features]
            contrast = self.contrast(features) if interact else 0 * own[0]
        loss = sum(own) + options.shared_weight * sum(shared) + options.contrast_weight * contrast
        update(self.optimizer, self.parameters, self.gradients(loss, self.parameters))
        scalars = {"loss": loss, "contrast": contrast} | {f"cls_{m}": x for m, x in zip(self.views, own, strict=True)}
        return scalars | {f"shared_{m}": x for m, x in zip(self.views, shared, strict=True)}

    def contrast(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """The contrastive loss, summed over all ordered pairs of modalities and all rows of the global batch."""
        features = [distributed.gather_rows(x) for x in features]
        temperature, full = self.options.contrast_temperature, self.options.contrast == "full"
        total = torch.zeros((), device=features[0].device)
        for a, b in itertools.permutations(range(len(features)), 2):
            teacher = features[a] if full else features[a].detach()
            dims = self.dimensions.effective[a] if full else self.dimensions.complementary(a, b)
            total = total + duc_loss(features[b], teacher, dims, temperature=temperature)
        return total

    def logits(self, batch: Batch) -> torch.Tensor:
        """The logits of all heads, concatenated: (N, M C)."""
        with self.run.autocast():
            return torch.cat([z for _, z in self.forward(batch).values()], dim=1)

    def validate(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Means over the modalities, and the accuracy of each."""
        each = [Task.validate(self, z, labels) for z in self.by_modality(logits).values()]
        means = {name: sum(row[name] for row in each) / len(each) for name in each[0]}
        means["val_classes"] = min(row["val_classes"] for row in each)
        return means | {f"val_acc_{m}": row["val_acc"] for m, row in zip(self.views, each, strict=True)}

    def by_modality(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.views, logits.split(self.run.data.classes, dim=1), strict=True))


class FusionHead(Task):
    """A linear head on the frozen modalities' concatenated features."""

    key = "dimml-fusion"
    model: FeatureHead

    def __init__(self, run: Run, frozen: dict[str, Frozen]):
        super().__init__(run)
        self.phase, self.frozen = "fusion", frozen
        self.random = any(modality.cache is None for modality in frozen.values())
        width = sum(modality.width for modality in frozen.values())
        self.model = self.shard(FeatureHead(width, run.data.classes).to(run.device))
        self.parameters = list(self.model.parameters())
        self.optimizer = run.optimizer(self.parameters)
        self.parts = {"model": self.model, "optimizer": self.optimizer}

    @property
    def epochs(self) -> int:
        return self.run.options.of(DIMMLOptions).fusion_epochs

    def step(self, batch):
        features = torch.cat([modality.outputs(batch)[0] for modality in self.frozen.values()], dim=1)
        with self.run.autocast():
            loss = self.cross_entropy(self.model(features.float()), batch["labels"])
        update(self.optimizer, self.parameters, self.gradients(loss, self.parameters))
        return {"loss": loss}

    def logits(self, batch: Batch) -> torch.Tensor:
        features = torch.cat([modality.compute(batch)[0] for modality in self.frozen.values()], dim=1)
        with self.run.autocast():
            return self.model(features.float())


def effective(task: Detached) -> dict[str, dict]:
    """Each modality's effective dimensions, and how many of them the others lack."""
    names = list(task.views)
    found = {}
    for i, name in enumerate(names):
        others = {other: int(task.dimensions.complementary(i, j).sum()) for j, other in enumerate(names) if j != i}
        dims = task.dimensions.effective[i].nonzero().flatten().tolist()
        found[name] = {"dims": dims, "of": task.model.width, "lacking_in": others}
        lacking = ", ".join(f"{n} of them not in {other}" for other, n in others.items())
        log.info("%s: %d of %d dimensions are effective, %s", name, len(dims), task.model.width, lacking)
    return found


@methods.register("dimml", baselines=("udi", "ensemble", "joint"))
@reads(DIMMLOptions, FusionOptions)
def dimml(run: Run) -> Outcome:
    """Detached modalities that learn complementary dimensions from each other, fused by certainty."""
    detached = run.make(Detached)
    for name, width in detached.projected.items():
        log.info("%s: a linear layer brings %d features to %d, the narrowest", name, width, detached.model.width)
    fit([detached], run)
    logits = {split: detached.by_modality(z) for split, z in outputs(detached, run).items()}
    own = {name: {split: logits[split][name] for split in logits} for name in detached.views}
    alone = dict(detached.model.alone.items())
    head = run.make(
        FusionHead, frozen={name: Frozen(run, name, model, detached.model.width) for name, model in alone.items()}
    )
    fit([head], run)
    heads = own | {FUSION_HEAD: outputs(head, run)}
    fused, rule = run.fuse(heads, "certainty")
    metrics = {
        "modalities": {name: scores(z, run.labels) for name, z in own.items()},
        "part": "own head",
        "unimodal": {},
        "fusion_head": scores(heads[FUSION_HEAD], run.labels),
        "fused": fused,
    }
    if detached.options.contrast == "duc" and detached.warmup < run.options.epochs:
        metrics["effective_dims"] = effective(detached)
    return Outcome(metrics, alone | {FUSION_HEAD: head.model}, rule)
