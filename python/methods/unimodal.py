"""One modality, trained alone with cross-entropy: UDI's anchor phase, and the members of the ensemble."""

import torch
from torch.nn.functional import cross_entropy

from fit import Task, fit, update
from models import Classifier, encoder_for, place


class Unimodal(Task):
    """The ancestor of all tasks that train one modality's classifier."""

    def __init__(self, run, modality):
        super().__init__(run, modality)
        self.view = run.data.modalities[modality]
        self.model = place(Classifier(encoder_for(self.view, run), run.data.classes), run)
        self.weights = list(self.model.parameters())

    def forward(self, batch, training=False):
        """(features, logits)."""
        return self.model(self.view.input(batch, training))

    def logits(self, batch):
        with self.run.autocast():
            return self.forward(batch)[1]

    def features_and_logits(self, batch):
        """Side by side: (N, FEATURES + C)."""
        with self.run.autocast():
            return torch.cat(self.forward(batch), dim=1)


class Alone(Unimodal):
    phase = "anchor"

    def __init__(self, run, modality):
        super().__init__(run, modality)
        self.optimizer = run.optimizer(self.weights)
        self.parts = {"model": self.model, "optimizer": self.optimizer}

    def step(self, batch):
        with self.run.autocast():
            loss = cross_entropy(self.forward(batch, training=True)[1], batch["labels"])
        update(self.optimizer, self.weights, torch.autograd.grad(loss, self.weights))
        return {"loss": loss}


def train_alone(run, modalities=None, epochs=None):
    """These modalities (all by default), each alone: their tasks, by name."""
    tasks = {modality: Alone(run, modality) for modality in modalities or run.data.modalities}
    fit(list(tasks.values()), run, epochs)
    return tasks
