"""MMPareto (Wei and Hu, ICML 2024, arXiv 2405.17730): Pareto integration of the joint and the unimodal gradients.

A joint head learns from L_M, and a head of each modality m from L_m. The encoder of m gets both gradients, g_M and g_m:

    (a, b) = (1/2, 1/2) if <g_M, g_m> > 0, else argmin_{a + b = 1} ||a g_M + b g_m||
    h = 2 (a g_M + b g_m);   g <- gamma max(1, ||g_M + g_m|| / ||h||) h

so that without a conflict it is gamma (g_M + g_m), and with one, h at the length of the sum. All norms follow from the
Gram matrix of the two. Heads get the gradients of their own losses.

The authors' code (github.com/GeWu-Lab/MMPareto_ICML2024) rescales each parameter tensor by its own norms; here, as in
the paper, the encoder's gradient is rescaled as a whole. gamma is 1.5 there. It has SGD at 0.002 and keeps the epoch
that is best on test; here validation decides. Under AdamW a constant gamma changes little.
"""

from dataclasses import dataclass

import torch

from udi_kernels import gramian, weighted_sum

from ..models.classifiers import HeadsClassifier
from ..options import Group, number, option, reads
from ..registry import methods
from ..run import Run
from ..training.task import update
from .joint import Joint, train_joint
from .outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class MMParetoOptions(Group, title="MMPareto"):
    mmpareto_gamma: float = option(1.5, number(float, above=0), "factor of the encoders' gradients")


class MMPareto(Joint):
    key = "mmpareto"
    classifier = HeadsClassifier

    def __init__(self, run: Run):
        super().__init__(run)
        self.gamma = run.options.of(MMParetoOptions).mmpareto_gamma
        place = {p: i for i, p in enumerate(self.parameters)}
        encoders = self.model.encoders.items()
        self.of = {m: [place[p] for p in encoder.parameters() if p in place] for m, encoder in encoders}

    def step(self, batch):
        with self.run.autocast():
            features, logits = self.forward(batch, training=True)
            joint = self.cross_entropy(logits, batch["labels"])
            alone = self.unimodal_losses(self.model.shares(features), batch)
        # No parameter gets two modalities' gradients, so one backward pass serves all unimodal losses.
        ours = self.gradients(joint, self.parameters, retain_graph=True)
        theirs = self.gradients(list(alone.values()), self.parameters)
        grads = [g if g is not None else t for g, t in zip(ours, theirs, strict=True)]  # of the heads
        scalars = {"loss": joint} | {f"loss_{m}": loss for m, loss in alone.items()}
        for m, indices in self.of.items():
            learning, weights = [i for i in indices if ours[i] is not None], torch.zeros_like(joint).expand(2)
            if learning:  # the encoder is not frozen
                pair = [[side[i] for i in learning] for side in (ours, theirs)]
                weights = pareto_weights(gramian(pair), self.gamma)
                for i, g in zip(learning, weighted_sum(pair, weights), strict=True):
                    grads[i] = g
            scalars[f"weight_{m}"] = weights[1]
        update(self.optimizer, self.parameters, grads)
        return scalars


def pareto_weights(gram: torch.Tensor, gamma: float) -> torch.Tensor:
    """The weights (2,) of the joint and the unimodal gradient, from their Gram matrix."""
    (mm, mu), (_, uu) = gram
    tiny = torch.finfo(gram.dtype).tiny
    a = torch.where(mu > 0, 0.5, (uu - mu) / (mm + uu - 2 * mu).clamp_min(tiny))
    pair = torch.stack((a, 1 - a))
    length, plain = (2 * pair) @ gram @ (2 * pair), gram.sum()
    return 2 * gamma * pair * (plain / length.clamp_min(tiny)).clamp_min(1).sqrt()


@methods.register("mmpareto")
@reads(MMParetoOptions)
def mmpareto(run: Run) -> Outcome:
    """Joint and unimodal losses; the encoders' two gradients are combined without conflict (MMPareto)."""
    return train_joint(run.make(MMPareto))
