"""Joint training, the usual baseline: one loss on the concatenated features of all modalities."""

from functools import partial

import torch

from .. import distributed
from ..data.dataset import Batch, presence
from ..evaluation.scores import scores
from ..models.classifiers import ConcatClassifier, JointClassifier
from ..models.encoders import is_stochastic
from ..registry import methods
from ..run import Run
from ..training.inference import outputs
from ..training.loop import fit_best
from ..training.task import Task, trainable, update
from .outcome import Outcome


class Joint(Task):
    """Trains one model of all modalities; other joint methods derive from it."""

    key = "joint"
    classifier: type = ConcatClassifier
    model: JointClassifier

    def __init__(self, run: Run, decay: float | None = None) -> None:
        super().__init__(run)
        self.decay = decay
        self.rename()
        views = run.data.modalities
        made = {name: self.make_encoder(name) for name in views}
        encoders = {name: encoder for name, (encoder, _) in made.items()}
        widths = {name: width for name, (_, width) in made.items()}
        self.random = any(view.random for view in views.values()) or any(map(is_stochastic, encoders.values()))
        self.model = self.place(self.classifier(encoders, widths, run.data.classes))
        self.parameters = trainable(self.model)
        self.optimizer = run.optimizer(self.parameters, decay)
        self.parts = {"model": self.model, "optimizer": self.optimizer}

    def forward(self, batch: Batch, training: bool = False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Features by modality, and logits."""
        views = self.run.data.modalities
        present = {name: batch[presence(name)] for name in views if presence(name) in batch}
        return self.model({name: view.input(batch, training) for name, view in views.items()}, present)

    def mean(self, rows: torch.Tensor, modality: str, batch: Batch) -> torch.Tensor:
        """The mean of a loss (N,) over the samples of the global batch that have the modality."""
        present = batch.get(presence(modality))
        if present is None:
            return rows.mean()
        count = distributed.total(present.sum()) / distributed.world()
        return (rows * present).sum() / count.clamp_min(1 / distributed.world())

    def unimodal_losses(self, logits: dict[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        """The cross-entropy of each modality's logits, over the samples that have it."""
        rows = {name: self.cross_entropy(z, batch["labels"], reduction="none") for name, z in logits.items()}
        return {name: self.mean(loss, name, batch) for name, loss in rows.items()}

    def confidence(self, logits: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """The mean probability of the label by each modality's logits, (M,), over the samples that have it."""
        labels = batch["labels"][:, None]
        p = {name: as_float(z.detach()).softmax(-1).gather(1, labels)[:, 0] for name, z in logits.items()}
        means = torch.stack([self.mean(rows, name, batch) for name, rows in p.items()])
        return distributed.total(means) / distributed.world()

    def step(self, batch):
        with self.run.autocast():
            loss = self.cross_entropy(self.forward(batch, training=True)[1], batch["labels"])
        update(self.optimizer, self.parameters, self.gradients(loss, self.parameters))
        return {"loss": loss}

    def logits(self, batch: Batch) -> torch.Tensor:
        with self.run.autocast():
            return self.forward(batch)[1]

    def share(self, modality: str, batch: Batch) -> torch.Tensor:
        """This modality's share of the logits: a prediction of its own."""
        with self.run.autocast():
            return self.model.shares(self.forward(batch)[0])[modality]


def as_float(t: torch.Tensor) -> torch.Tensor:
    """At least in float32: mixed precision makes bfloat16."""
    return t if t.dtype == torch.float64 else t.float()


def train_joint(*tasks: Joint) -> Outcome:
    """Trains the tasks, and scores the joint prediction and each modality's share of the logits by the best of them."""
    run = tasks[0].run
    (task,) = fit_best([tasks], run)
    shares = {m: outputs(task, run, partial(task.share, m), m) for m in run.data.modalities}
    metrics = {
        "modalities": {m: scores(z, run.labels) for m, z in shares.items()},
        "unimodal": {},
        "fused": {"rule": task.model.kind, **scores(outputs(task, run), run.labels)},
    }
    return Outcome(metrics, {task.key: task.model})


@methods.register("joint")
def joint(run: Run) -> Outcome:
    """One linear head on the concatenated features, one loss."""
    return train_joint(*(run.make(Joint, decay=decay) for decay in run.decays))
