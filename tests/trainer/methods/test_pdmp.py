"""PDMP: gradients scaled by modality, as its formula says, in float64."""

import torch

from udi_trainer import train
from udi_trainer.methods.pdmp import PDMP

from ..helpers import make_run, training_batch
from .formulas import gradient, loss_of


def test_step_is_gradient_descent_with_scaled_gradients(double_views):
    options = dict(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
    task = make_run(double_views, **options).make(PDMP, dominant="noisy")
    batch, parameters = training_batch(task), dict(task.model.named_parameters())
    grads = gradient(loss_of(task.forward(batch)[1], batch), parameters.values())
    before = [p.detach().clone() for p in parameters.values()]
    for group in task.optimizer.param_groups:  # as the training loop does
        group["lr"] = 0.1 * group.get("lr_scale", 1)
    task.step(batch)
    for (name, p), old, grad in zip(parameters.items(), before, grads, strict=True):
        place, m = name.split(".")[:2]
        factor = 1.0 if place == "head" else 2.0 if m == "noisy" else 0.5
        torch.testing.assert_close(p.detach(), old - 0.1 * factor * grad)


def test_the_dominant_modality_is_the_best_alone(three_views):
    metrics = train(three_views, "pdmp", epochs=2, baselines=[], progress=False).metrics
    assert metrics["dominant"] == "clean"
