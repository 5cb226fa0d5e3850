"""Joint training: one loss on all modalities' concatenated features, the usual way and the baseline."""

import torch
from torch.nn.functional import cross_entropy

from fit import fit, outputs
from fusion import scores
from models import ConcatClassifier, encoder_for

from . import methods


class Joint:
    phase, modality, name = "joint", None, "joint"

    def __init__(self, run):
        self.run = run
        torch.manual_seed(run.seed(self.name))
        encoders = {name: encoder_for(view, run.data.train) for name, view in run.data.modalities.items()}
        self.model = ConcatClassifier(encoders, run.data.classes).to(run.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.optimizers = [self.optimizer]
        self.parts = {"model": self.model, "optimizer": self.optimizer}

    def inputs(self, split, index):
        return {name: view.batch(split, index) for name, view in self.run.data.modalities.items()}

    def step(self, index, number):
        train = self.run.data.train
        with self.run.autocast():
            loss = cross_entropy(self.model(self.inputs(train, index)), train.labels[index])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss}

    def logits(self, split, index):
        with self.run.autocast():
            return self.model(self.inputs(split, index))


class Share:
    """One modality's share of a joint model's logits, as a predictor of its own."""

    def __init__(self, joint, modality):
        self.joint, self.model, self.modality = joint, joint.model, modality

    def logits(self, split, index):
        with self.joint.run.autocast():
            return self.model.shares(self.joint.inputs(split, index))[self.modality]


@methods.register("joint")
def joint(run):
    """One linear head on the concatenated features, one loss."""
    task = fit(Joint(run), run)
    shares = {m: scores(outputs(Share(task, m), run), run.labels) for m in run.data.modalities}
    return {"modalities": shares, "unimodal": {}, "fused": {"rule": "concat", **scores(outputs(task, run), run.labels)}}
