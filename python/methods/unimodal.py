"""One modality, trained alone with cross-entropy: UDI's anchor phase, and the members of the ensemble."""

import torch
from torch.nn.functional import cross_entropy

from fit import Task, fit, update
from models import Classifier, encoder_for, place


class Alone(Task):
    phase = "anchor"

    def __init__(self, run, modality):
        super().__init__(run, modality)
        self.view = run.data.modalities[modality]
        self.model = place(Classifier(encoder_for(self.view, run), run.data.classes), run)
        self.weights = list(self.model.parameters())
        self.optimizer = run.optimizer(self.weights)
        self.parts = {"model": self.model, "optimizer": self.optimizer}

    def step(self, batch):
        with self.run.autocast():
            _, logits = self.model(self.view.input(batch, training=True))
            loss = cross_entropy(logits, batch["labels"])
        update(self.optimizer, self.weights, torch.autograd.grad(loss, self.weights))
        return {"loss": loss}

    def logits(self, batch):
        with self.run.autocast():
            return self.model(self.view.input(batch))[1]


def train_alone(run, modalities=None, epochs=None):
    """These modalities (all by default), each alone: their tasks, by name."""
    tasks = {modality: Alone(run, modality) for modality in modalities or run.data.modalities}
    fit(list(tasks.values()), run, epochs)
    return tasks
