"""Disentangled gradient learning (DGL; Wei, Luo and Luo, ICCV 2025, arXiv 2507.10213).

The joint loss trains the fusion module alone, and unimodal losses train the encoders alone. With z(f_1, ..., f_M) the
joint head on the concatenated features, and z_m its logits with all features but f_m set to 0:

    head:       gradient of CE(z(sg f_1, ..., sg f_M), y), where sg stops the gradient
    encoder m:  gradient of alpha CE(z_m, y)

The authors' code (github.com/shicaiwei123/ICCV2025-GDL) takes alpha 4 or 5 for CREMA-D and 2 or 3 for Kinetics-Sounds.
It clips the gradient's norm to 40, which is left out here, has SGD at 0.002, and keeps the epoch that is best on test;
here validation decides. Under AdamW a constant alpha changes little.
"""

from dataclasses import dataclass

import torch

from ..options import Group, number, option, reads
from ..registry import methods
from ..run import Run
from ..training.task import update
from .joint import Joint, train_joint
from .outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class DGLOptions(Group, title="DGL"):
    dgl_alpha: float = option(4.0, number(float, above=0), "weight of the unimodal losses")


class DGL(Joint):
    key = "dgl"

    def __init__(self, run: Run):
        super().__init__(run)
        encoders = set(self.model.encoders.parameters())
        self.ends = [p for p in self.parameters if p in encoders], [p for p in self.parameters if p not in encoders]

    def step(self, batch):
        with self.run.autocast():
            features = self.forward(batch, training=True)[0]
            joint = self.cross_entropy(self.model.fuse({m: x.detach() for m, x in features.items()}), batch["labels"])
            zeros = {m: torch.zeros_like(x) for m, x in features.items()}
            alone = self.unimodal_losses({m: self.model.fuse(zeros | {m: x}) for m, x in features.items()}, batch)
            unimodal = self.run.options.of(DGLOptions).dgl_alpha * torch.stack(list(alone.values())).sum()
        encoders, head = self.ends
        grads = [*self.gradients(unimodal, encoders), *self.gradients(joint, head)]
        update(self.optimizer, [*encoders, *head], grads)
        return {"loss": joint} | {f"loss_{m}": loss for m, loss in alone.items()}


@methods.register("dgl")
@reads(DGLOptions)
def dgl(run: Run) -> Outcome:
    """The joint loss trains the head only, unimodal losses through this head train the encoders only (DGL)."""
    return train_joint(run.make(DGL))
