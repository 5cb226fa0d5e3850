"""Similarity of features."""

import pytest
import torch

from udi_trainer.evaluation.similarity import cross_prediction, linear_cka


def test_linear_cka():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 8, generator=generator), torch.randn(400, 5, generator=generator)
    assert linear_cka(x, x) == pytest.approx(1)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert linear_cka(x, y) < 0.05
    mixed = torch.cat((x[:, :4], y), dim=1)
    center = torch.eye(400, dtype=torch.double) - 1 / 400
    a, b = (center @ z @ z.T @ center for z in (x.double(), mixed.double()))  # with N x N kernels
    assert linear_cka(x, mixed) == pytest.approx(((a * b).sum() / (a.norm() * b.norm())).item())
    assert linear_cka(x, mixed) == pytest.approx(linear_cka(mixed, x))
    assert linear_cka(x, torch.ones(400, 3)) == 0


def test_cross_prediction():
    """For a linear function plus noise it is 1 - noise / variance, on held-out samples."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 5, generator=generator)
    x = {split: torch.randn(4000, 8, generator=generator) + 2 for split in ("val", "test")}
    y = {split: z @ weight - 7 for split, z in x.items()}
    assert cross_prediction(x, y) == pytest.approx(1, abs=1e-3)
    scale = weight.square().sum(0).mean().sqrt()
    noisy = {split: z + scale * torch.randn(z.shape, generator=generator) for split, z in y.items()}
    assert cross_prediction(x, noisy) == pytest.approx(0.5, abs=0.03)
    other = {split: torch.randn(4000, 5, generator=generator) for split in x}
    assert -0.02 < cross_prediction(x, other) < 0.02
    constant = {split: torch.ones(4000, 3) for split in x}
    assert cross_prediction(x, constant) == 0
    assert cross_prediction(constant, other) == 0
