"""On-the-fly gradient modulation with generalisation enhancement (OGM-GE; Peng et al., CVPR 2022, arXiv 2203.15332).

Joint training that slows down the encoder of the leading modality and adds noise to the gradients of all encoders.
With s_m = sum over the batch of softmax(share of m in the logits)[label], and the gradient g of a weight in encoder m:

    rho_m = s_m / mean of the other s                    discrepancy ratio (of two modalities: s_a / s_b)
    k_m = 1 - tanh(alpha rho_m) if rho_m > 1 else 1      their equation 10
    g <- k_m g + N(0, std(g)^2)

Details that the paper leaves open follow the authors' code (github.com/GeWu-Lab/OGM-GE_CVPR2022): the noise has the
standard deviation of the unmodulated gradient of each tensor, and the second half of the epochs is plain joint
training. That code modulates convolutions only. Here every encoder weight of two or more dimensions is modulated, as in
the authors' later toolkit (GeWu-Lab/BalanceBenchmark), so that encoders without convolutions take part. Their formula
is for two modalities; the mean of the others extends it.

The authors train with SGD. AdamW divides by the gradient's running scale, so a steady k changes little with it.
"""

from dataclasses import dataclass

import torch

from .. import distributed
from ..options import Group, number, option, reads
from ..registry import methods
from ..run import Run
from ..training.task import update
from .joint import Joint, train_joint
from .outcome import Outcome

MODULATED = 0.5  # of all steps: the authors' README modulates epochs 0 to 50 of 100


@dataclass(frozen=True, kw_only=True)
class OGMGEOptions(Group, title="OGM-GE"):
    ogm_alpha: float = option(
        0.8,
        number(float, 0),
        "alpha of the modulation; the authors take 0.8 for CREMA-D, of few classes, and 0.1 for VGGSound, of 309",
    )


class OGMGE(Joint):
    key = "ogm-ge"

    def __init__(self, run: Run):
        super().__init__(run)
        self.random, self.alpha = True, run.options.of(OGMGEOptions).ogm_alpha
        encoders = self.model.encoders.items()
        self.owner = {w: name for name, encoder in encoders for w in encoder.parameters() if w.dim() > 1}
        self.end = MODULATED * run.options.epochs * run.steps

    def flags(self, number: int) -> dict:
        return {"modulate": number < self.end}

    def step(self, batch, modulate):
        with self.run.autocast():
            features, logits = self.forward(batch, training=True)
            loss = self.cross_entropy(logits, batch["labels"])
        k = dict.fromkeys(features, torch.ones_like(loss))
        if modulate:
            with torch.no_grad(), self.run.autocast():
                k = coefficients(self.model.shares(features), batch["labels"], self.alpha)
        grads = self.gradients(loss, self.parameters)
        if modulate:
            pairs = zip(self.parameters, grads, strict=True)
            grads = [enhanced(g, k[self.owner[w]]) if w in self.owner and g is not None else g for w, g in pairs]
        update(self.optimizer, self.parameters, grads)
        return {"loss": loss} | {f"k_{name}": x for name, x in k.items()}


def coefficients(shares: dict[str, torch.Tensor], labels: torch.Tensor, alpha: float) -> dict[str, torch.Tensor]:
    """k of each modality, from its share of the logits (N, C)."""
    score = torch.stack([z.float().softmax(-1).gather(1, labels[:, None]).sum() for z in shares.values()])
    score = distributed.total(score)
    ratio = score / ((score.sum() - score) / (len(score) - 1))
    return dict(zip(shares, torch.where(ratio > 1, 1 - torch.tanh(alpha * ratio), 1), strict=True))


def enhanced(grad: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return k * grad + grad.std() * distributed.noise_like(grad)


@methods.register("ogm-ge")
@reads(OGMGEOptions)
def ogm_ge(run: Run) -> Outcome:
    """Joint training that slows the leading modality's encoder down, and adds noise to all encoders' gradients."""
    return train_joint(run.make(OGMGE))
