"""Multimodal learning with alternating unimodal adaptation (MLA; Zhang et al., CVPR 2024, arXiv 2311.10707).

All modalities share one linear head. In each batch they take turns: modality m and the head learn from CE(head(f_m), y)
alone. The head's gradient is projected so that it forgets little of the modalities and batches before. With h the mean
of f_m over the batch:

    G <- G P,   then P <- P - (P h)(P h)^T / (lambda + h^T P h),   lambda = 0.1^(1 + b / B) for batch b of B

starting from P = I. The prediction weights each sample's logits by certainty: sum_m w_m z_m, w = softmax_m(-H_m), with
H_m the entropy of softmax(z_m): the fusion rule ``entropy``.

Differences from the authors' code (github.com/Cecile-hi/Multimodal-Learning-with-Alternating-Unimodal-Adaptation): P is
looked up there for a parameter named ``module.weight``, which the head has not, so as published it changes nothing; its
denominator lambda + (P h) h^T is a matrix, and P is divided by its norm after each update. It takes the entropy over
the batch, not over the classes. Here features wider than the narrowest are projected to that width by a linear layer.
SGD at 0.001 there, and the epoch that is best on test; here validation decides.
"""

import torch
from torch import nn

from .. import distributed
from ..data.dataset import Batch
from ..errors import UserError
from ..evaluation.fusion import FusionOptions, Rule
from ..evaluation.scores import scores
from ..models.classifiers import Classifier
from ..models.encoders import is_stochastic
from ..options import reads
from ..registry import fusion_rules, methods
from ..run import Run
from ..training.inference import outputs
from ..training.loop import fit
from ..training.task import Task, trainable, update
from .joint import as_float
from .outcome import Outcome


@fusion_rules.register("entropy")
class Entropy(Rule):
    """Logits weighted per sample by exp(-entropy) of each modality's prediction, as in MLA."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return ((-entropy).softmax(0)[..., None] * logits).sum(0).softmax(-1)


class Projection(nn.Module):
    """P of the head's gradients, and the number of batches so far."""

    P: torch.Tensor
    count: torch.Tensor

    def __init__(self, width: int, steps: int):
        super().__init__()
        self.steps = steps  # of an epoch
        self.register_buffer("P", torch.eye(width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def add(self, h: torch.Tensor) -> None:
        """Protects the direction of h (D,)."""
        k = self.P @ h
        self.P -= k[:, None] * k / (0.1 ** (1 + self.count % self.steps / self.steps) + h @ k)


class SharedHeadClassifiers(nn.Module):
    """A classifier for each modality; they share their head. All features are as wide as the narrowest encoder's."""

    head: nn.Linear

    def __init__(self, encoders: dict[str, tuple[nn.Module, int]], classes: int):
        super().__init__()
        self.width = min(width for _, width in encoders.values())
        alone = {m: Classifier(*pair, classes, self.width) for m, pair in encoders.items()}
        self.alone, self.head = nn.ModuleDict(alone), next(iter(alone.values())).head
        for classifier in alone.values():
            classifier.head = self.head

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """(features, logits) by modality."""
        return {m: classifier(inputs[m]) for m, classifier in self.alone.items()}


class MLA(Task):
    key = "mla"
    model: SharedHeadClassifiers

    def __init__(self, run: Run):
        super().__init__(run)
        self.views = run.data.modalities
        if run.options.shard:
            raise UserError("method mla projects its head's gradients as a whole: leave out --shard")
        if lacking := [m for m in self.views if run.data.train.present(m) is not None]:
            raise UserError(f"method mla trains all modalities on each batch, and samples lack {', '.join(lacking)}")
        made = {name: self.make_encoder(name) for name in self.views}
        self.random = any(view.random for view in self.views.values()) or any(
            is_stochastic(e) for e, _ in made.values()
        )
        self.model = self.place(SharedHeadClassifiers(made, run.data.classes))
        self.parameters = trainable(self.model)
        self.optimizer = run.optimizer(self.parameters)
        self.projection = Projection(self.model.width, run.steps).to(run.device)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "projection": self.projection}

    def forward(self, batch: Batch, training: bool = False) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """(features, logits) by modality."""
        return self.model({m: view.input(batch, training) for m, view in self.views.items()})

    def step(self, batch):
        with self.run.autocast():
            made = self.forward(batch, training=True)
        losses, head = {}, self.model.head
        for m, (x, _) in made.items():  # the turns before have changed the head
            with self.run.autocast():
                losses[m] = loss = self.cross_entropy(head(x), batch["labels"])
            grads = dict(zip(self.parameters, self.gradients(loss, self.parameters), strict=True))
            grads[head.weight] = grads[head.weight] @ self.projection.P
            update(self.optimizer, self.parameters, list(grads.values()))
            self.projection.add(distributed.total(as_float(x.detach()).mean(0)) / distributed.world())
        self.projection.count += 1
        return {"loss": torch.stack(list(losses.values())).sum()} | {f"loss_{m}": x for m, x in losses.items()}

    def each(self, batch: Batch) -> torch.Tensor:
        """The logits of all modalities, (N, M C)."""
        with self.run.autocast():
            return torch.cat([z for _, z in self.forward(batch).values()], dim=1)

    def logits(self, batch: Batch) -> torch.Tensor:
        return Entropy()(torch.stack(self.each(batch).float().split(self.run.data.classes, dim=1))).log()


@methods.register("mla")
@reads(FusionOptions)
def mla(run: Run) -> Outcome:
    """Modalities take turns to train a shared head with projected gradients; outputs fused by certainty (MLA)."""
    task = run.make(MLA)
    fit([task], run)
    parts = {split: z.split(run.data.classes, dim=1) for split, z in outputs(task, run, task.each).items()}
    logits = {m: {split: z[i] for split, z in parts.items()} for i, m in enumerate(run.data.modalities)}
    fused, rule = run.fuse(logits, "entropy")
    metrics = {"modalities": {m: scores(z, run.labels) for m, z in logits.items()}, "unimodal": {}, "fused": fused}
    return Outcome(metrics, dict(task.model.alone.items()), rule)
