"""Gradient blending (G-Blending; Wang, Tran and Feiszli, CVPR 2020, arXiv 1905.12681), offline.

A joint head and a head of each modality learn from a weighted sum of their losses. The weights come from a training of
each alone, by how much it generalises and overfits:

    L = sum_k w_k CE(z_k, y),   w_k = (1 / Z) G_k / O_k^2
    G = decrease of the validation loss,   O = increase of (validation loss - training loss)

from the initial model, whose loss is taken to be log C, to the kept epoch, best on validation. The training loss is the
mean over that epoch. The paper compares with the last epoch, on a part of the training samples that is held out. G and
O are at least 0.01 nats: otherwise a joint head that generalises worse than chance would not be trained at all, and a
loss that does not overfit would take all the weight.
"""

import math
from collections.abc import Mapping

import torch

from ..models.classifiers import HeadsClassifier
from ..registry import methods
from ..run import Run
from ..training.loop import best_epoch, fit
from ..training.task import update
from .joint import Joint, train_joint
from .outcome import Outcome
from .unimodal import train_alone

LEAST = 0.01  # nats


def blending_weights(histories: Mapping[str, list[dict]], classes: int, select: str | None = None) -> dict[str, float]:
    """w_k from the log of each training alone."""
    kept = {name: best_epoch(history, select) for name, history in histories.items()}
    gain = {name: max(LEAST, math.log(classes) - row["val_loss"]) for name, row in kept.items()}
    overfitting = {name: max(LEAST, row["val_loss"] - row["loss"]) for name, row in kept.items()}
    ratios = {name: gain[name] / overfitting[name] ** 2 for name in kept}
    return {name: ratio / sum(ratios.values()) for name, ratio in ratios.items()}


class GBlending(Joint):
    key = "g-blending"
    classifier = HeadsClassifier

    def __init__(self, run: Run, weights: dict[str, float]):
        super().__init__(run)
        self.weights = torch.tensor(list(weights.values()), device=run.device)

    def step(self, batch):
        with self.run.autocast():
            features, logits = self.forward(batch, training=True)
            losses = {"joint": self.cross_entropy(logits, batch["labels"])}
            losses |= self.unimodal_losses(self.model.shares(features), batch)
            loss = self.weights @ torch.stack(list(losses.values())).to(self.weights.dtype)
        update(self.optimizer, self.parameters, self.gradients(loss, self.parameters))
        return {"loss": loss} | {f"loss_{name}": x for name, x in losses.items()}


@methods.register("g-blending")
def g_blending(run: Run) -> Outcome:
    """Joint and unimodal losses, weighted by how each alone generalises and overfits (G-Blending)."""

    def choose() -> dict[str, float]:
        alone, joint = train_alone(run), run.make(Joint)
        fit([joint], run)
        histories = {"joint": run.history[joint.name]} | {m: run.history[task.name] for m, task in alone.items()}
        return blending_weights(histories, run.data.classes, run.options.select)

    weights = run.decide("blending weights", choose)
    outcome = train_joint(run.make(GBlending, weights=weights))
    outcome.metrics["blending_weights"] = weights
    return outcome
