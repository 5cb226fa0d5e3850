"""Fusion rules."""

import pytest
import torch

from udi_trainer.evaluation.fusion import AUTO, LogLinear, fuse, temperature
from udi_trainer.registry import fusion_rules


def test_fusion_rules():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (500,), generator=generator)
    good = 3 * torch.nn.functional.one_hot(labels, 3) + torch.randn(500, 3, generator=generator)
    bad = 6 * torch.randn(500, 3, generator=generator)
    z = torch.stack((good, bad))
    fitted = {name: rule.fit(z, labels) for name, rule in fusion_rules.items()}
    for rule in fitted.values():
        torch.testing.assert_close(rule(z).sum(-1), torch.ones(500, dtype=rule(z).dtype))
    torch.testing.assert_close(fitted["mean"](z), (good.softmax(-1) + bad.softmax(-1)) / 2)
    torch.testing.assert_close(fitted["sum"](z), (good + bad).softmax(-1))
    weights = fitted["weighted"].weights
    assert abs(sum(weights) - 1) < 1e-9 and weights[0] > 0.8

    def nll(w):
        p = (w * good.softmax(-1) + (1 - w) * bad.softmax(-1)).double()
        return -p[torch.arange(500), labels].log().mean().item()

    assert nll(weights[0]) <= min(nll(w) for w in torch.linspace(0, 1, 101).tolist()) + 1e-6
    logits = {"a": {"val": good, "test": bad}, "b": {"val": bad, "test": good}}
    metrics, rule = fuse("auto", logits, {"val": labels, "test": labels})
    assert metrics["rule"] == max(metrics["by_rule"], key=lambda name: metrics["by_rule"][name]["val_acc"])
    assert isinstance(rule, fusion_rules[metrics["rule"]])
    assert fuse("sum", logits, {"val": labels, "test": labels})[0]["rule"] == "sum"


def test_loglinear():
    """Maximum-likelihood weights match a grid search, a temperature undoes a factor, and all values are finite."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (400,), generator=generator)
    hot = torch.nn.functional.one_hot(labels, 3)
    z = torch.stack([s * hot + torch.randn(400, 3, generator=generator) for s in (2.0, 1.0)]) * torch.tensor(3.0)
    rule = LogLinear.fit(z, labels)

    def nll(weights):
        fused = torch.einsum("m,mnc->nc", torch.tensor(weights, dtype=torch.float64), z.double())
        return torch.nn.functional.cross_entropy(fused, labels).item()

    grid = torch.linspace(0, 1.5, 76).tolist()
    assert nll(rule.weights) <= min(nll([a, b]) for a in grid for b in grid) + 1e-9
    a, b = rule.weights
    torch.testing.assert_close(rule(z).log(), (a * z[0].double() + b * z[1].double()).log_softmax(-1))
    assert temperature(5 * z[0], labels) == pytest.approx(5 * temperature(z[0], labels), rel=1e-4)
    missing = z[0].clone()
    missing[:100] = torch.nan
    assert temperature(missing, labels) == pytest.approx(temperature(z[0, 100:], labels[100:]))
    perfect = LogLinear.fit(torch.stack((100.0 * hot, z[0])), labels)
    assert torch.tensor(perfect.weights).isfinite().all() and perfect(torch.stack((100.0 * hot, z[0]))).isfinite().all()
    metrics, _ = fuse("loglinear", {"a": {"val": z[0], "test": z[0]}, "b": {"val": z[1], "test": z[1]}},
                      {"val": labels, "test": labels})  # fmt: skip
    assert metrics["temperature"]["a"] == pytest.approx(temperature(z[0], labels))
    assert list(metrics["weights"].values()) == rule.weights


def test_auto_chooses_among_the_same_three():
    assert AUTO == ("mean", "sum", "weighted")  # until all studies are rerun with the log-linear rule
