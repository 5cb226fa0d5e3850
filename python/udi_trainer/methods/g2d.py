"""Gradient-guided distillation (G2D; Rakib and Bagavathi, ICCV 2025, arXiv 2506.21514).

Unimodal teachers, trained alone and frozen, teach a joint student whose prediction is the mean of its heads' logits:

    L = CE(z, y) + sum_m [lambda KL(teacher m || student) + mu MSE(features m, teacher's features m)]

Sequential modality prioritisation: at first only the encoders of the weakest modalities learn, those whose teachers
give the labels of the batch the lowest probability. The other encoders' gradients are set to 0.

As in the authors' code (github.com/rAIson-Lab/G2D), lambda, mu and the temperature are 1, weights of two or more
dimensions are modulated, and with two modalities the stronger one waits for the first half of the epochs. For M
modalities that half is divided into M - 1 equal parts, and one more encoder learns in each. Their teachers and student
train for 300 epochs by SGD at 0.001, and the epoch that is best on test is kept; here validation decides.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch.nn.functional import mse_loss

from udi_kernels import js_div

from ..models.classifiers import MeanClassifier
from ..options import Group, number, option, reads
from ..registry import methods
from ..run import Run
from ..training.task import update
from .frozen import Frozen
from .joint import Joint, train_joint
from .outcome import Outcome
from .unimodal import train_alone


@dataclass(frozen=True, kw_only=True)
class G2DOptions(Group, title="G2D"):
    g2d_logits: float = option(1.0, number(float, 0), "weight of the teachers' predictions")
    g2d_features: float = option(1.0, number(float, 0), "weight of the teachers' features")
    g2d_prioritised: float = option(
        0.5, number(float, 0, below=1 + 1e-9), "fraction of the epochs in which weaker modalities go first"
    )


class G2D(Joint):
    key = "g2d"
    classifier = MeanClassifier

    def __init__(self, run: Run, teachers: Mapping[str, Frozen]):
        super().__init__(run)
        self.teachers, self.options = teachers, run.options.of(G2DOptions)
        self.random |= any(teacher.random for teacher in teachers.values())
        encoders = enumerate(self.model.encoders.values())
        self.owner = {w: m for m, encoder in encoders for w in encoder.parameters() if w.dim() > 1}
        self.end = self.options.g2d_prioritised * run.options.epochs * run.steps

    def flags(self, number: int) -> dict:
        count = len(self.teachers)
        return {"learning": count if number >= self.end else 1 + int(number / self.end * (count - 1))}

    def step(self, batch, learning):
        """``learning``: how many encoders learn."""
        taught = {m: teacher.outputs(batch) for m, teacher in self.teachers.items()}
        with self.run.autocast():
            features, logits = self.forward(batch, training=True)
            cls = self.cross_entropy(logits, batch["labels"])
            con = sum(self.mean(js_div(logits, z, beta=0, reduction="none"), m, batch) for m, (_, z) in taught.items())
            rows = {m: mse_loss(features[m], x, reduction="none").mean(1) for m, (x, _) in taught.items()}
            alike = sum(self.mean(loss, m, batch) for m, loss in rows.items())
            loss = cls + self.options.g2d_logits * con + self.options.g2d_features * alike
        rank = self.confidence({m: z for m, (_, z) in taught.items()}, batch).argsort(stable=True).argsort()
        k = (rank < learning).float()
        grads = self.gradients(loss, self.parameters)
        pairs = zip(self.parameters, grads, strict=True)
        grads = [g * k[self.owner[w]] if w in self.owner and g is not None else g for w, g in pairs]
        update(self.optimizer, self.parameters, grads)
        scalars = {"loss": loss, "cls": cls, "con": con, "features": alike}
        return scalars | {f"k_{m}": x for m, x in zip(features, k, strict=True)}


@methods.register("g2d")
@reads(G2DOptions)
def g2d(run: Run) -> Outcome:
    """A joint student of unimodal teachers, in which the encoders of weaker modalities learn first (G2D)."""
    teachers = {m: Frozen(run, m, task.model, task.width) for m, task in train_alone(run).items()}
    return train_joint(run.make(G2D, teachers=teachers))
