"""MMPareto against its formula, in float64."""

import pytest
import torch

from udi_trainer.methods import mmpareto

from ..helpers import freeze, make_run, training_batch
from .formulas import check_gradients, flat, gradient, loss_of


def direction(joint, alone, gamma):
    """h of the paper, for flat gradients, with the least norm by brute force."""
    if joint @ alone > 0:
        return gamma * (joint + alone)
    a = torch.linspace(0, 1, 100_001)[:, None]
    mixes = a * joint + (1 - a) * alone
    h = 2 * mixes[mixes.norm(dim=1).argmin()]
    return gamma * h * max(1, (joint + alone).norm() / h.norm())


@pytest.mark.parametrize("conflict", [False, True])
def test_weights(conflict):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        joint, alone = torch.randn(2, 12, generator=generator, dtype=torch.float64)
        if (joint @ alone < 0) != conflict:
            joint = -joint
        vectors = torch.stack((joint, 3 * alone))
        weights = mmpareto.pareto_weights(vectors @ vectors.T, 1.5)
        torch.testing.assert_close(weights @ vectors, direction(*vectors, 1.5), rtol=1e-3, atol=1e-3)
        if not conflict:
            torch.testing.assert_close(weights, torch.full((2,), 1.5, dtype=torch.float64))


def test_opposite_and_zero_gradients():
    for gram in ([[1.0, -1.0], [-1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]):
        assert mmpareto.pareto_weights(torch.tensor(gram), 1.5).isfinite().all()


def test_step_is_the_plain_formula(double_views):
    task = mmpareto.MMPareto(make_run(double_views))
    batch, parameters = training_batch(task), list(task.model.parameters())
    conflicts = 0
    for trial in range(2):
        if trial:  # heads that disagree with the joint one
            with torch.no_grad():
                for head in task.model.heads.values():
                    head.weight *= -1
        freeze(task)
        task.step(batch)
        features, logits = task.forward(batch)
        shares = {m: head(features[m]) for m, head in task.model.heads.items()}
        wanted = gradient(loss_of(logits, batch) + sum(loss_of(z, batch, m) for m, z in shares.items()), parameters)
        wanted = dict(zip(parameters, wanted, strict=True))
        for m, encoder in task.model.encoders.items():
            own = list(encoder.parameters())
            joint, alone = gradient(loss_of(logits, batch), own), gradient(loss_of(shares[m], batch, m), own)
            conflicts += bool(flat(joint) @ flat(alone) < 0)
            mixed = mmpareto.pareto_weights(
                torch.stack((flat(joint), flat(alone))) @ torch.stack((flat(joint), flat(alone))).T, 1.5
            )
            wanted |= {p: mixed[0] * a + mixed[1] * b for p, a, b in zip(own, joint, alone, strict=True)}
        check_gradients(parameters, wanted.values())
    assert 0 < conflicts < 6
