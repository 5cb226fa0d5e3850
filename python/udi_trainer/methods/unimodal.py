"""One modality, trained alone with cross-entropy: UDI's anchor phase, and the members of the ensemble."""

from collections.abc import Sequence

import torch

from ..data.dataset import Batch
from ..models.classifiers import Classifier
from ..models.encoders import is_stochastic
from ..run import Run
from ..training.loop import fit_best
from ..training.task import Task, trainable, update


class Unimodal(Task):
    """Trains the classifier of one modality; the tasks for single modalities derive from it."""

    model: Classifier
    modality: str

    def __init__(self, run: Run, modality: str) -> None:
        super().__init__(run, modality)
        self.view = run.data.modalities[modality]
        encoder, self.width = self.make_encoder(modality)
        self.random = self.view.random or is_stochastic(encoder)
        self.model = self.place(Classifier(encoder, self.width, run.data.classes))
        self.parameters = trainable(self.model)

    def forward(self, batch: Batch, training: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(features, logits)."""
        return self.model(self.view.input(batch, training))

    def logits(self, batch: Batch) -> torch.Tensor:
        with self.run.autocast():
            return self.forward(batch)[1]

    def features_and_logits(self, batch: Batch) -> torch.Tensor:
        """Side by side: (N, width + C)."""
        with self.run.autocast():
            return torch.cat(self.forward(batch), dim=1)


class Alone(Unimodal):
    key = "anchor"

    def __init__(self, run: Run, modality: str, decay: float | None = None) -> None:
        """``decay``: the weight decay, by default the one chosen for the modality."""
        super().__init__(run, modality)
        self.decay = run.decay.get(modality) if decay is None else decay
        self.optimizer = run.optimizer(self.parameters, self.decay)
        self.parts = {"model": self.model, "optimizer": self.optimizer}

    def step(self, batch):
        with self.run.autocast():
            loss = self.cross_entropy(self.forward(batch, training=True)[1], batch["labels"])
        update(self.optimizer, self.parameters, self.gradients(loss, self.parameters))
        return {"loss": loss}


def train_alone(
    run: Run, modalities: Sequence[str] | None = None, epochs: int | None = None, phase: str = "unimodal"
) -> dict[str, Alone]:
    """Trains these modalities (by default all), each alone; returns their tasks by modality."""
    names = list(modalities or run.data.modalities)
    tried = [[run.make(Alone, modality=m, decay=decay) for decay in run.decays] for m in names]
    for task in (task for group in tried for task in group):
        task.phase = phase
        task.rename()
    tasks = dict(zip(names, fit_best(tried, run, epochs), strict=True))
    run.decay = {m: task.decay for m, task in tasks.items() if task.decay is not None}
    return tasks
