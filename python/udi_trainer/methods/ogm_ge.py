"""On-the-fly gradient modulation with generalisation enhancement (OGM-GE; Peng et al., CVPR 2022, arXiv 2203.15332).

Joint training, in which the encoder of the modality that leads is slowed down and all encoders' gradients get noise.
With s_m = sum over the batch of softmax(share of m in the logits)[label], and the gradient g of a weight in encoder m:

    rho_m = s_m / mean of the other s                    discrepancy ratio (of two modalities: s_a / s_b)
    k_m = 1 - tanh(alpha rho_m) if rho_m > 1 else 1      their equation 10
    g <- k_m g + N(0, std(g)^2)

Where paper and authors' code leave room, this follows the code (github.com/GeWu-Lab/OGM-GE_CVPR2022): the noise has the
standard deviation of the unmodulated gradient, tensor by tensor, and the second half of the epochs is plain joint
training. It modulates convolutions only, which in its ResNets is all but normalisation; here it is every encoder weight
of two or more dimensions, as in the authors' later toolkit (GeWu-Lab/BalanceBenchmark), so that an encoder without
convolutions is not left out. Theirs is for two modalities; the mean of the others extends it.

The authors train with SGD. AdamW divides by the gradient's running scale, so with it a steady k changes little.
"""

import torch
from torch.nn.functional import cross_entropy

from .. import distributed
from ..registry import methods
from ..run import Run
from ..training.task import update
from .joint import Joint, train_joint
from .outcome import Outcome

ALPHA = 0.8  # the authors' README: 0.8 for CREMA-D, of few classes as digits are; 0.1 for VGGSound, of 309
MODULATED = 0.5  # of all steps: the authors' README modulates epochs 0 to 50 of 100


class OGMGE(Joint):
    key = "ogm-ge"

    def __init__(self, run: Run):
        super().__init__(run)
        self.random = True
        encoders = self.model.encoders.items()
        self.owner = {w: name for name, encoder in encoders for w in encoder.parameters() if w.dim() > 1}
        self.end = MODULATED * run.options.epochs * run.steps

    def flags(self, number: int) -> dict:
        return {"modulate": number < self.end}

    def step(self, batch, modulate):
        with self.run.autocast():
            features, logits = self.forward(batch, training=True)
            loss = cross_entropy(logits, batch["labels"])
        k = dict.fromkeys(features, torch.ones_like(loss))
        if modulate:
            with torch.no_grad(), self.run.autocast():
                k = coefficients(self.model.shares(features), batch["labels"])
        grads = self.gradients(loss, self.parameters)
        if modulate:
            pairs = zip(self.parameters, grads, strict=True)
            grads = [enhanced(g, k[self.owner[w]]) if w in self.owner and g is not None else g for w, g in pairs]
        update(self.optimizer, self.parameters, grads)
        return {"loss": loss} | {f"k_{name}": x for name, x in k.items()}


def coefficients(shares: dict[str, torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """k of each modality, by its share of the logits (N, C)."""
    score = torch.stack([z.float().softmax(-1).gather(1, labels[:, None]).sum() for z in shares.values()])
    score = distributed.total(score)
    ratio = score / ((score.sum() - score) / (len(score) - 1))
    return dict(zip(shares, torch.where(ratio > 1, 1 - torch.tanh(ALPHA * ratio), 1), strict=True))


def enhanced(grad: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return k * grad + grad.std() * distributed.noise_like(grad)


@methods.register("ogm-ge")
def ogm_ge(run: Run) -> Outcome:
    """Joint training that slows the leading modality's encoder down, and adds noise to all encoders' gradients."""
    return train_joint(run.make(OGMGE))
