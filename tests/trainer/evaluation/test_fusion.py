"""Fusion rules."""

import pytest
import torch

from udi_trainer.evaluation.fusion import AUTO, LogLinear, cross_validated, fuse, temperature
from udi_trainer.evaluation.scores import accuracy, macro_f1
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
    assert metrics["rule"] == max(metrics["log_likelihood"], key=metrics["log_likelihood"].get)
    assert isinstance(rule, fusion_rules[metrics["rule"]])
    asked, _ = fuse("sum", logits, {"val": labels, "test": labels})
    assert asked["rule"] == "sum" and not asked["log_likelihood"]


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


def test_calibrated_sum():
    """Each modality is scaled by its own temperature, whatever the others say."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    hot = torch.nn.functional.one_hot(labels, 3)
    z = torch.stack([s * hot + torch.randn(300, 3, generator=generator) for s in (4.0, 1.0)]) * torch.tensor(5.0)
    rule = fusion_rules["calibrated"].fit(z, labels)
    scaled = [x.double() / temperature(x, labels) for x in z]
    torch.testing.assert_close(rule(z), (scaled[0] + scaled[1]).softmax(-1))
    alone = fusion_rules["calibrated"].fit(torch.stack((z[0], z[0])), labels)
    assert alone.weights == pytest.approx([rule.weights[0]] * 2)
    missing = rule.subset(torch.tensor([False, True]))
    torch.testing.assert_close(missing(z[1:]), scaled[1].softmax(-1))


def test_likelihood_is_of_samples_that_the_rule_was_not_fitted_on(register):
    """A rule that remembers the labels it was fitted on gains nothing by them, and folds are stratified."""
    labels = torch.arange(40).sort().values // 10
    seen = []

    class Memory(fusion_rules["sum"]):
        @classmethod
        def fit(cls, logits, labels):
            seen.append((logits[0, :, 0].tolist(), labels))
            return cls()

        def __call__(self, logits):
            remembered = torch.tensor([x in seen[-1][0] for x in logits[0, :, 0].tolist()])
            return torch.where(remembered[:, None], torch.nn.functional.one_hot(labels[:1], 4), torch.tensor(0.25))

    register(fusion_rules, "memory", Memory)
    z = torch.arange(40.0)[None, :, None].expand(2, 40, 4)
    assert cross_validated("memory", z, labels) == pytest.approx(torch.tensor(0.25).log().item())
    assert len(seen) == 5 and all(fitted.bincount().tolist() == [8] * 4 for _, fitted in seen)
    assert {x for kept, _ in seen for x in set(range(40)) - set(kept)} == set(range(40))
    assert cross_validated("sum", torch.zeros(2, 1, 4), labels[:1]) == pytest.approx(torch.tensor(0.25).log().item())


def test_auto_takes_the_rule_of_the_highest_cross_validated_likelihood():
    """Not the one that is most accurate on validation; the plain sum of overconfident logits loses, and weighted is
    chosen by name only."""
    assert AUTO == ("sum", "loglinear", "certainty", "calibrated") and "weighted" in fusion_rules
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (200,), generator=generator)
    hot = torch.nn.functional.one_hot(labels, 4)
    z = [s * (2 * hot + torch.randn(200, 4, generator=generator)) for s in (1.0, 8.0)]
    logits, both = {m: {"val": x, "test": x} for m, x in zip("ab", z, strict=True)}, {"val": labels, "test": labels}
    metrics, _ = fuse("auto", logits, both)
    stacked = torch.stack(z)
    assert metrics["log_likelihood"] == {name: cross_validated(name, stacked, labels) for name in AUTO}
    assert metrics["rule"] in ("loglinear", "calibrated")
    assert metrics["log_likelihood"]["sum"] < metrics["log_likelihood"][metrics["rule"]] - 0.5


def test_auto_takes_what_select_says():
    """By scores of predictions that the rule was not fitted on; here another rule by each."""
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(150, generator=generator) < 0.2).long()
    hot = torch.nn.functional.one_hot(labels, 2)
    z = [s * (hot + torch.randn(150, 2, generator=generator)) for s in (1.0, 6.0)]
    logits, both = {m: {"val": x, "test": x} for m, x in zip("ab", z, strict=True)}, {"val": labels, "test": labels}
    plain = fuse("auto", logits, both)[0]
    assert fuse("auto", logits, both, "nll")[0] == plain and "judged" not in plain
    for select, by, judge in ("acc", "accuracy", accuracy), ("macro-f1", "macro-F1", macro_f1):
        metrics, _ = fuse("auto", logits, both, select)
        wanted = {name: cross_validated(name, torch.stack(z), labels, judge) for name in AUTO}
        assert metrics["judged"] == {"by": by, "candidates": wanted}
        assert wanted[metrics["rule"]] == max(wanted.values()) > wanted[plain["rule"]]
        assert "judged" not in fuse("sum", logits, both, select)[0]


def test_samples_that_lack_a_modality_count_in_the_choice():
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(3, (60,), generator=generator)
    z = torch.nn.functional.one_hot(labels, 3) + torch.randn(2, 60, 3, generator=generator)
    z[0, ::3] = torch.nan
    expected = torch.empty(60)
    for k in range(5):
        held_out = torch.zeros(60, dtype=torch.bool)
        held_out[labels.argsort(stable=True)[k::5]] = True
        expected[held_out] = z.nan_to_num(0).sum(0)[held_out].log_softmax(-1)[range(12), labels[held_out]]
    assert cross_validated("sum", z, labels) == pytest.approx(expected.mean().item(), rel=1e-5)
