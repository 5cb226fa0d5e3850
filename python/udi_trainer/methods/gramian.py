"""Joint training on several losses, weighted by their gradients' Gramian: TorchJD's Jacobian descent on our ops.

The losses are the joint one and the cross-entropy of each modality's share of the logits, so that no modality can rely
on what another explains (as MMPareto, ICML 2024, arXiv 2405.17730, combines joint and unimodal losses). The model is
that of joint training, and every loss reaches all its parameters; separate heads would have parameters without
conflicts. UPGrad (arXiv 2406.16232) removes from each gradient what would increase another loss. Without conflicts it
is the mean.
"""

from udi_kernels import gramian, weighted_sum

from ..registry import methods
from ..run import Run
from ..training.task import update
from .joint import Joint, train_joint
from .outcome import Outcome


class Gramian(Joint):
    key = "gramian"
    capturable = False  # UPGrad solves a quadratic program on the CPU

    def __init__(self, run: Run):
        from torchjd.aggregation import UPGradWeighting

        super().__init__(run)
        self.weighting = UPGradWeighting()

    def step(self, batch):
        with self.run.autocast():
            features, logits = self.forward(batch, training=True)
            outputs = {"joint": logits, **self.model.shares(features)}
            losses = {name: self.cross_entropy(z, batch["labels"]) for name, z in outputs.items()}
        grads = [self.gradients(loss, self.parameters, retain_graph=True) for loss in losses.values()]
        gram = gramian(grads)
        weights = self.weighting(gram.nan_to_num(0, 0, 0) if self.loss_scale else gram)  # the step will be skipped
        update(self.optimizer, self.parameters, weighted_sum(grads, weights))
        scalars = {f"loss_{name}": loss for name, loss in losses.items()}
        scalars |= {f"weight_{name}": weight for name, weight in zip(losses, weights, strict=True)}
        return {"loss": losses["joint"], **scalars}


@methods.register("gramian", needs=("torchjd", "qpsolvers", "quadprog"), extra="experiments")
def gramian_weighted(run: Run) -> Outcome:
    """Joint loss and a loss for each modality's share, weighted by TorchJD's UPGrad on the gradients' Gramian."""
    return train_joint(run.make(Gramian))
