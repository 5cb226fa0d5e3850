"""Self-training: what it learns from, and that it is not UDI."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from udi_kernels import js_div
from udi_trainer import Options
from udi_trainer.command import main
from udi_trainer.data.labels import hide
from udi_trainer.evaluation.fusion import temperature
from udi_trainer.methods.self_training import AloneStudent
from udi_trainer.methods.unimodal import train_alone
from udi_trainer.registry import datasets
from udi_trainer.training.inference import outputs

from ..helpers import make_run, read_log, read_metrics, without_times


def test_step():
    """Labels of the second half of a batch; of the first the calibrated predictions of the model's own teacher."""
    run = make_run(
        hide(datasets["splitdigits"](Options()), 60, 0), method="self-training", epochs=1, self_training_weight=3
    )
    teacher = train_alone(run, ["left"])["left"]
    student = run.make(AloneStudent, modality="left", teacher=teacher)
    index = torch.cat((torch.arange(16), (run.data.train.labels >= 0).nonzero().flatten()[:16]))
    batch = run.data.train.batch(index, ["left"])
    with torch.no_grad():
        taught = teacher.forward(batch)[1] / temperature(outputs(teacher, run)["val"], run.labels["val"])
        logits = student.forward(batch)[1]
        cls, con = cross_entropy(logits[16:], batch["labels"][16:]), js_div(logits[:16], taught[:16])
    torch.testing.assert_close(student.step(batch)["loss"].detach(), cls + 3 * con)


@pytest.mark.parametrize("method", ["self-training", "joint-self-training"])
def test_methods(method):
    options = ["--dataset", "splitdigits", "--labels", "60", "--epochs", "2", "--batch-size", "32"]
    assert main([*options, "--method", method, "--out", "run"]) == 0
    metrics = read_metrics("run")
    phases = [row["phase"] for row in read_log("run")]
    assert phases.count("student") == (4 if method == "self-training" else 2) == len(phases) / 2
    assert metrics["fused"]["test_acc"] > 0.3 and set(metrics["modalities"]) == {"left", "right"}
    assert main(["--resume", "run"]) == 0 and without_times(read_metrics("run")) == without_times(metrics)
