"""Joint training: one loss on all modalities' concatenated features, the usual way and the baseline."""

from functools import partial

import torch
from torch.nn.functional import cross_entropy

from fit import Task, fit, outputs, update
from fusion import scores
from models import ConcatClassifier, encoder_for, place

from . import methods


class Joint(Task):
    """The ancestor of all methods that train one model of all modalities."""

    phase = "joint"
    fusion, classifier = "concat", ConcatClassifier

    def __init__(self, run):
        super().__init__(run)
        encoders = {name: encoder_for(view, run) for name, view in run.data.modalities.items()}
        self.model = place(self.classifier(encoders, run.data.classes), run)
        self.weights = list(self.model.parameters())
        self.optimizer = run.optimizer(self.weights)
        self.parts = {"model": self.model, "optimizer": self.optimizer}

    def forward(self, batch, training=False):
        """Features by modality, and logits."""
        return self.model({name: view.input(batch, training) for name, view in self.run.data.modalities.items()})

    def step(self, batch):
        with self.run.autocast():
            loss = cross_entropy(self.forward(batch, training=True)[1], batch["labels"])
        update(self.optimizer, self.weights, torch.autograd.grad(loss, self.weights))
        return {"loss": loss}

    def logits(self, batch):
        with self.run.autocast():
            return self.forward(batch)[1]

    def share(self, modality, batch):
        """This modality's share of the logits: a prediction of its own."""
        with self.run.autocast():
            return self.model.shares(self.forward(batch)[0])[modality]


def train_joint(task):
    """Trains it to the end; the figures of the joint prediction, and of each modality's share of the logits."""
    run = task.run
    fit([task], run)
    shares = {m: outputs(task, run, partial(task.share, m)) for m in run.data.modalities}
    return {
        "modalities": {m: scores(z, run.labels) for m, z in shares.items()},
        "unimodal": {},
        "fused": {"rule": task.fusion, **scores(outputs(task, run), run.labels)},
    }


@methods.register("joint")
def joint(run):
    """One linear head on the concatenated features, one loss."""
    return train_joint(Joint(run))
