"""Classifiers: shares of the logits, q."""

import pytest
import torch

from udi_trainer.methods.joint import Joint
from udi_trainer.methods.joint_sum import JointSum
from udi_trainer.models.classifiers import ConditionalGaussian

from ..helpers import make_run, training_batch


@pytest.mark.parametrize("dataset", ["cgdigits", "three"])
def test_shares_add_up(dataset, three_views):
    run = make_run(dataset)
    for task in (Joint(run), JointSum(run)):
        features, logits = task.forward(training_batch(task))
        shares = task.model.shares(features)
        assert list(shares) == list(features) == list(run.data.modalities)
        torch.testing.assert_close(sum(shares.values()), logits)


def test_sum_fusion_is_a_head_for_each_modality():
    run = make_run()
    concat, summed = Joint(run), JointSum(run)
    classes, views = run.data.classes, len(run.data.modalities)
    extra = sum(p.numel() for p in summed.parameters) - sum(p.numel() for p in concat.parameters)
    assert extra == (views - 1) * classes  # one bias per head
    batch = training_batch(summed)
    features, logits = summed.forward(batch)
    heads = [summed.model.heads[m](features[m]) for m in run.data.modalities]
    torch.testing.assert_close(logits, heads[0] + heads[1])

    # Both are the same function class: concatenated heads with the sum of the biases give the same logits.
    concat.model.encoders.load_state_dict(summed.model.encoders.state_dict())
    with torch.no_grad():
        concat.model.head.weight.copy_(torch.cat([head.weight for head in summed.model.heads.values()], dim=1))
        concat.model.head.bias.copy_(sum(head.bias for head in summed.model.heads.values()))
    torch.testing.assert_close(concat.forward(batch)[1], logits)


@pytest.mark.parametrize("depth, sizes", [(0, [64, 10]), (1, [64, 7, 10]), (2, [64, 7, 7, 10])])
def test_depth_and_width_of_q(depth, sizes):
    q = ConditionalGaussian(64, 5, 7, depth)
    assert [layer.weight.shape[::-1] for layer in q.layers[::2]] == list(zip(sizes, sizes[1:], strict=False))
    mu, logvar = q(100 * torch.randn(3, 64))
    assert mu.shape == logvar.shape == (3, 5) and logvar.abs().max() <= 1
