"""Fusion rules."""

import torch

from udi_trainer.evaluation.fusion import fuse
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
