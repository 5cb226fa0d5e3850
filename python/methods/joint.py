"""Joint training: one loss on all modalities' concatenated features, the usual way and the baseline."""

import torch
from torch.nn.functional import cross_entropy

from fit import Task, fit, outputs, update
from fusion import scores
from models import ConcatClassifier, encoder_for, place

from . import methods


class Joint(Task):
    phase = "joint"

    def __init__(self, run):
        super().__init__(run)
        encoders = {name: encoder_for(view, run) for name, view in run.data.modalities.items()}
        self.model = place(ConcatClassifier(encoders, run.data.classes), run)
        self.weights = list(self.model.parameters())
        self.optimizer = run.optimizer(self.weights)
        self.parts = {"model": self.model, "optimizer": self.optimizer}

    def inputs(self, batch, training=False):
        return {name: view.input(batch, training) for name, view in self.run.data.modalities.items()}

    def step(self, batch):
        with self.run.autocast():
            loss = cross_entropy(self.model(self.inputs(batch, training=True)), batch["labels"])
        update(self.optimizer, self.weights, torch.autograd.grad(loss, self.weights))
        return {"loss": loss}

    def logits(self, batch):
        with self.run.autocast():
            return self.model(self.inputs(batch))


class Share:
    """One modality's share of a joint model's logits, as a predictor of its own."""

    def __init__(self, joint, modality):
        self.joint, self.model, self.reads, self.modality = joint, joint.model, joint.reads, modality

    def logits(self, batch):
        with self.joint.run.autocast():
            return self.model.shares(self.joint.inputs(batch))[self.modality]


@methods.register("joint")
def joint(run):
    """One linear head on the concatenated features, one loss."""
    task = Joint(run)
    fit([task], run)
    shares = {m: scores(outputs(Share(task, m), run), run.labels) for m in run.data.modalities}
    return {"modalities": shares, "unimodal": {}, "fused": {"rule": "concat", **scores(outputs(task, run), run.labels)}}
