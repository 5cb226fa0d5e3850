"""One modality, trained alone with cross-entropy: UDI's anchor phase, and the members of the ensemble."""

import torch
from torch.nn.functional import cross_entropy

from fit import fit
from models import Classifier, encoder_for


class Alone:
    phase = "anchor"

    def __init__(self, run, modality):
        self.run, self.modality, self.name = run, modality, f"{self.phase}-{modality}"
        self.view = run.data.modalities[modality]
        torch.manual_seed(run.seed(self.name))
        self.model = Classifier(encoder_for(self.view, run.data.train), run.data.classes).to(run.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.optimizers = [self.optimizer]
        self.parts = {"model": self.model, "optimizer": self.optimizer}

    def step(self, index, number):
        train = self.run.data.train
        with self.run.autocast():
            _, logits = self.model(self.view.batch(train, index))
            loss = cross_entropy(logits, train.labels[index])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss}

    def logits(self, split, index):
        with self.run.autocast():
            return self.model(self.view.batch(split, index))[1]


def train_alone(run):
    """Every modality alone: its task, by name."""
    return {modality: fit(Alone(run, modality), run) for modality in run.data.modalities}
