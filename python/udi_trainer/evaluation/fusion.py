"""Fusion of the modalities' outputs without trained parameters, chosen on validation.

A rule is a dataclass: ``fit`` makes one from validation logits (M, N, C) and labels (N,), a call turns logits
(M, N, C) into probabilities (N, C). ``weights`` are one for each of M, or None. A sample that lacks a modality has NaN
as its logits, and :func:`combine` fuses the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import cross_entropy

from udi_kernels import certainty_fusion

from ..errors import choose
from ..options import Group, option, text
from ..registry import fusion_rules
from .scores import accuracy, scores


@dataclass(frozen=True, kw_only=True)
class FusionOptions(Group, title="fusion"):
    fusion: str = option(
        "auto",
        text,
        "fusion rule: {fusion_rules}; auto: certainty for dimml, loglinear for residual followers, else what the"
        " data set recommends, else the best on validation of mean, sum, weighted",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("fusion rule", self.fusion, ("auto", *fusion_rules))


@dataclass(frozen=True)
class Rule:
    weights: Sequence[float] | None = None

    @classmethod
    def fit(cls, logits: torch.Tensor, labels: torch.Tensor) -> "Rule":
        return cls()

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def of(self, kept: torch.Tensor) -> "Rule":
        """The rule for these of the modalities alone, bool (M,)."""
        weights = [w for w, k in zip(self.weights, kept.tolist(), strict=True) if k] if self.weights else None
        return replace(self, weights=weights)


@fusion_rules.register("mean")
class Mean(Rule):
    """Mean of the probabilities: the plain ensemble."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1).mean(0)


@fusion_rules.register("sum")
class Sum(Rule):
    """Sum of the logits: a product of experts, in which a confident modality counts for more."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sum(0).softmax(-1)


@fusion_rules.register("weighted")
class Weighted(Rule):
    """Convex weights of the probabilities, of the greatest likelihood on validation.

    Expectation maximisation of a mixture with fixed components: concave, so any number of modalities needs no grid.
    """

    @classmethod
    def fit(cls, logits: torch.Tensor, labels: torch.Tensor) -> "Rule":
        likelihood = logits.double().softmax(-1)[:, torch.arange(len(labels)), labels].clamp_min(1e-12)
        weights = torch.full((len(logits),), 1 / len(logits), dtype=torch.float64)
        for _ in range(500):
            share = weights[:, None] * likelihood
            weights = (share / share.sum(0)).mean(1)
        return cls(weights.tolist())

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return torch.einsum("m,mnc->nc", weights, logits.double().softmax(-1))

    def of(self, kept):
        weights = torch.tensor(self.weights, dtype=torch.float64)[kept]
        total = weights.sum()
        return Weighted((weights / total if total > 1e-6 else torch.full_like(weights, 1 / len(weights))).tolist())


@fusion_rules.register("loglinear")
class LogLinear(Rule):
    """Softmax of the weighted sum of the logits, with weights >= 0 of the greatest likelihood on validation."""

    @classmethod
    def fit(cls, logits: torch.Tensor, labels: torch.Tensor) -> "Rule":
        logits, exponents = logits.double(), torch.zeros(len(logits), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([exponents], max_iter=100, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            # Of what is never wrong on validation the likeliest weight is infinite, so weights have bounds.
            nll = cross_entropy(torch.einsum("m,mnc->nc", exponents.clamp(*LOG_WEIGHTS).exp(), logits), labels)
            nll.backward()
            return nll

        with torch.enable_grad():
            optimizer.step(loss)
        return cls(exponents.detach().clamp(*LOG_WEIGHTS).exp().tolist())

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return torch.einsum("m,mnc->nc", weights, logits.double()).softmax(-1)


LOG_WEIGHTS = (-7.0, 3.0)


def temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """By which logits (N, C) are divided to be the likeliest: above 1 where they are too sure (arXiv 1706.04599)."""
    kept = ~logits.isnan().any(-1)
    (weight,) = LogLinear.fit(logits[None, kept], labels[kept]).weights or (1.0,)
    return 1 / weight


def combine(rule: Rule, logits: torch.Tensor) -> torch.Tensor:
    """The rule's probabilities (N, C) of logits (M, N, C), from those modalities that each sample has."""
    present = ~logits.isnan().any(-1)
    if present.all():
        return rule(logits)
    fused = torch.full(logits.shape[1:], 1 / logits.shape[-1], dtype=torch.float64)  # of a sample that has none
    for kept in present.T.unique(dim=0):
        if kept.any():
            rows = (present.T == kept).all(1)
            fused[rows] = rule.of(kept)(logits[kept][:, rows]).double()
    return fused


@fusion_rules.register("certainty")
@dataclass(frozen=True)
class Certainty(Rule):
    """Logits weighted sample by sample by the modalities' largest probabilities, as DI-MML predicts.

    The weights' temperature is 1 or 3, as in the authors' experiments: the more accurate on validation.
    """

    temperature: float = 1.0

    @classmethod
    def fit(cls, logits, labels):
        return max((cls(temperature=t) for t in (1.0, 3.0)), key=lambda rule: accuracy(rule(logits), labels))

    def __call__(self, logits):
        return certainty_fusion(logits, temperature=self.temperature).softmax(-1)


AUTO = ("mean", "sum", "weighted")  # that "auto" chooses from


def fuse(option: str, logits: dict[str, dict], labels: dict[str, torch.Tensor]) -> tuple[dict, Rule]:
    """The scores of a fused prediction, and its rule: ``option``, or for "auto" the one that is best on validation.

    ``logits``: {modality: {"val": (N, C), "test": (N, C)}}; labels likewise. Ties go to the likelier rule.
    """
    stacked = {split: torch.stack([z[split] for z in logits.values()]) for split in ("val", "test")}
    whole = ~stacked["val"].isnan().any(-1).any(0)  # rules are fitted where nothing is missing, if there is such
    seen = (
        (stacked["val"][:, whole], labels["val"][whole])
        if whole.any()
        else (stacked["val"].nan_to_num(0), labels["val"])
    )
    fitted = {name: rule.fit(*seen) for name, rule in fusion_rules.items()}
    probabilities = {name: {s: combine(rule, stacked[s]) for s in stacked} for name, rule in fitted.items()}

    def merit(name: str) -> tuple[float, float]:
        p = probabilities[name]["val"]
        return accuracy(p, labels["val"]), p[torch.arange(len(p)), labels["val"]].clamp_min(1e-12).log().mean().item()

    best = max(AUTO, key=merit) if option == "auto" else option
    weights = fitted[best].weights
    metrics = {
        "rule": best,
        "weights": dict(zip(logits, weights, strict=True)) if weights else None,
        "temperature": {m: temperature(z["val"], labels["val"]) for m, z in logits.items()},
        **scores(probabilities[best], labels),
        "without": without(fitted[best], dict(zip(logits, stacked["test"], strict=True)), labels["test"]),
        "by_rule": {name: scores(p, labels) for name, p in probabilities.items()},
    }
    return metrics, fitted[best]


def without(rule: Rule, logits: dict[str, torch.Tensor], labels: torch.Tensor) -> dict[str, float]:
    """Accuracy of the fused prediction where a modality, each in turn, is missing from all samples."""
    accuracies = {}
    for i, m in enumerate(logits):
        rest = torch.stack(list(logits.values()))
        rest[i] = torch.nan
        accuracies[m] = accuracy(combine(rule, rest), labels)
    return accuracies
