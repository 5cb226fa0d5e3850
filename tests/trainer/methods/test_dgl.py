"""DGL against its formula, in float64."""

import torch

from udi_trainer.methods import dgl

from ..helpers import freeze, make_run, training_batch
from .formulas import check_gradients, gradient, loss_of


def test_step_is_the_plain_formula(double_views):
    task = dgl.DGL(make_run(double_views))
    freeze(task)
    batch, model = training_batch(task), task.model
    task.step(batch)
    features = task.forward(batch)[0]
    names = list(features)

    def logits(kept):
        return model.head(torch.cat([x if m in kept else 0 * x.detach() for m, x in features.items()], dim=1))

    for m in names:
        own = list(model.encoders[m].parameters())
        check_gradients(own, gradient(4.0 * loss_of(logits([m]), batch, m), own))
    head = list(model.head.parameters())
    check_gradients(head, gradient(loss_of(logits(names), batch), head))
