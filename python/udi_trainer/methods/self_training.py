"""Self-training: a model learns from its own earlier predictions of samples without labels.

Pseudo-labels are soft: the calibrated probabilities of the model that was trained on the labelled samples alone. The
loss is the one with which UDI's followers learn from the anchor, so what UDI gains beyond self-training comes from the
other modality.
"""

from dataclasses import dataclass

from udi_kernels import js_div

from ..evaluation.fusion import FusionOptions, temperature
from ..evaluation.scores import scores
from ..options import Group, number, option, reads
from ..registry import methods
from ..run import Run
from ..training.inference import outputs, predict
from ..training.loop import fit
from ..training.task import Task, taken, update
from .joint import Joint, train_joint
from .outcome import Outcome
from .unimodal import Alone, train_alone


@dataclass(frozen=True, kw_only=True)
class SelfTrainingOptions(Group, title="self-training"):
    self_training_weight: float = option(1.0, number(float, 0), "weight of the consistency with the pseudo-labels")


class Student(Task):
    """A mixin that replaces the step of the class after it. ``teacher``: the trained task of the same kind."""

    def __init__(self, run: Run, *, teacher: Task, **arguments: str) -> None:
        super().__init__(run, **arguments)
        self.phase, self.semi_supervised = "student", bool((run.data.train.labels < 0).any())
        t = run.decide("temperature", lambda: temperature(outputs(teacher, run)["val"], run.labels["val"]))
        self.pseudo_logits = (predict(teacher, run, run.data.train) / t).to(run.device)
        self.weight = run.options.of(SelfTrainingOptions).self_training_weight

    def step(self, batch):
        any_rows, labelled = self.rows(batch)
        with self.run.autocast():
            logits = self.forward(batch, training=True)[1]
            cls = self.cross_entropy(*taken(labelled, logits, batch["labels"]))
            any_logits, index = taken(any_rows, logits, batch["index"])
            con = js_div(any_logits, self.pseudo_logits[index])
            loss = cls + self.weight * con
        update(self.optimizer, self.parameters, self.gradients(loss, self.parameters))
        return {"loss": loss, "cls": cls, "con": con}


class AloneStudent(Student, Alone):
    key = "student"


class JointStudent(Student, Joint):
    key = "joint-student"


@methods.register("self-training")
@reads(SelfTrainingOptions, FusionOptions)
def self_training(run: Run) -> Outcome:
    """Each modality learns from its own earlier predictions; outputs fused."""
    teachers = train_alone(run)
    tasks = {m: run.make(AloneStudent, modality=m, teacher=teacher) for m, teacher in teachers.items()}
    fit(list(tasks.values()), run)
    logits = {m: outputs(task, run) for m, task in tasks.items()}
    fused, rule = run.fuse(logits)
    metrics = {
        "modalities": {m: scores(z, run.labels) for m, z in logits.items()},
        "unimodal": {m: scores(outputs(teacher, run), run.labels) for m, teacher in teachers.items()},
        "part": "student",
        "fused": fused,
    }
    return Outcome(metrics, {m: task.model for m, task in tasks.items()}, rule)


@methods.register("joint-self-training")
@reads(SelfTrainingOptions)
def joint_self_training(run: Run) -> Outcome:
    """The joint model learns from its own earlier predictions."""
    teacher = run.make(Joint)
    fit([teacher], run)
    return train_joint(run.make(JointStudent, teacher=teacher))
