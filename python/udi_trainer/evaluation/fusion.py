"""Late fusion of the modalities' logits by rules that are fitted and chosen on validation.

A rule is a dataclass. ``fit`` creates one from validation logits (M, N, C) and labels (N,). Calling it turns logits
(M, N, C) into probabilities (N, C). ``weights`` has one number per modality, or is None. Where a sample lacks a
modality, its logits are NaN, and :func:`combine` fuses the other modalities.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from udi_kernels import certainty_fusion

from ..errors import choose
from ..optimizers import LBFGS
from ..options import Group, option, text
from ..registry import fusion_rules
from .scores import accuracy, macro_f1, scores


@dataclass(frozen=True, kw_only=True)
class FusionOptions(Group, title="fusion"):
    fusion: str = option(
        "auto",
        text,
        "fusion rule: {fusion_rules}; auto: certainty for dimml, entropy for mla, loglinear for residual followers,"
        " else what the data set recommends, else the one of sum, loglinear, certainty and calibrated with the highest"
        " cross-validated likelihood on validation, or what --select says",
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

    def subset(self, kept: torch.Tensor) -> "Rule":
        """The rule for a subset of the modalities, bool (M,)."""
        weights = [w for w, k in zip(self.weights, kept.tolist(), strict=True) if k] if self.weights else None
        return replace(self, weights=weights)


@fusion_rules.register("mean")
class Mean(Rule):
    """Mean of the probabilities: the plain ensemble."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1).mean(0)


@fusion_rules.register("sum")
class Sum(Rule):
    """Sum of the logits: a product of experts, in which confident modalities count more."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sum(0).softmax(-1)


@fusion_rules.register("weighted")
class Weighted(Rule):
    """Convex combination of the probabilities with maximum-likelihood weights.

    Expectation maximisation of a mixture with fixed components. The problem is concave, so it needs no grid search.
    """

    @classmethod
    def fit(cls, logits: torch.Tensor, labels: torch.Tensor) -> "Rule":
        likelihood = logits.double().softmax(-1)[:, torch.arange(len(labels)), labels].clamp_min(1e-12)
        weights = torch.full((len(logits),), 1 / len(logits), dtype=torch.float64)
        for _ in range(500):
            joint = weights[:, None] * likelihood
            weights = (joint / joint.sum(0)).mean(1)
        return cls(weights.tolist())

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return torch.einsum("m,mnc->nc", weights, logits.double().softmax(-1))

    def subset(self, kept):
        weights = torch.tensor(self.weights, dtype=torch.float64)[kept]
        total = weights.sum()
        return Weighted((weights / total if total > 1e-6 else torch.full_like(weights, 1 / len(weights))).tolist())


@fusion_rules.register("loglinear")
class LogLinear(Rule):
    """Softmax of the weighted sum of the logits, with positive maximum-likelihood weights."""

    @classmethod
    def fit(cls, logits: torch.Tensor, labels: torch.Tensor) -> "Rule":
        logits, exponents = logits.double(), torch.zeros(len(logits), dtype=torch.float64, requires_grad=True)
        optimizer = LBFGS([exponents], max_iter=100, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            # A modality without errors on validation would get an infinite weight, so weights are bounded.
            nll = cross_entropy(torch.einsum("m,mnc->nc", exponents.clamp(*LOG_WEIGHT_BOUNDS).exp(), logits), labels)
            nll.backward()
            return nll

        with torch.enable_grad():
            optimizer.step(loss)
        return cls(exponents.detach().clamp(*LOG_WEIGHT_BOUNDS).exp().tolist())

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return torch.einsum("m,mnc->nc", weights, logits.double()).softmax(-1)


LOG_WEIGHT_BOUNDS = (-7.0, 3.0)


def temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The maximum-likelihood temperature of logits (N, C): above 1 if they are overconfident (arXiv 1706.04599)."""
    kept = ~logits.isnan().any(-1)
    (weight,) = LogLinear.fit(logits[None, kept], labels[kept]).weights or (1.0,)
    return 1 / weight


@fusion_rules.register("calibrated")
class Calibrated(LogLinear):
    """Sum of the logits after temperature scaling of each modality by itself."""

    @classmethod
    def fit(cls, logits: torch.Tensor, labels: torch.Tensor) -> "Rule":
        return cls([1 / temperature(z, labels) for z in logits])


def combine(rule: Rule, logits: torch.Tensor) -> torch.Tensor:
    """The rule's probabilities (N, C) of logits (M, N, C); each sample is predicted from the modalities that it has."""
    present = ~logits.isnan().any(-1)
    if present.all():
        return rule(logits)
    fused = torch.full(logits.shape[1:], 1 / logits.shape[-1], dtype=torch.float64)  # uniform without any modality
    for kept in present.T.unique(dim=0):
        if kept.any():
            rows = (present.T == kept).all(1)
            fused[rows] = rule.subset(kept)(logits[kept][:, rows]).double()
    return fused


@fusion_rules.register("certainty")
@dataclass(frozen=True)
class Certainty(Rule):
    """Logits weighted per sample by each modality's largest probability, as in DI-MML.

    The temperature of the weights is 1 or 3, as in the authors' experiments, whichever is more accurate on validation.
    """

    temperature: float = 1.0

    @classmethod
    def fit(cls, logits, labels):
        return max((cls(temperature=t) for t in (1.0, 3.0)), key=lambda rule: accuracy(rule(logits), labels))

    def __call__(self, logits):
        return certainty_fusion(logits, temperature=self.temperature).softmax(-1)


AUTO = ("sum", "loglinear", "certainty", "calibrated")  # the candidates of "auto"
FOLDS = 5  # of the validation samples


def fit_rule(name: str, logits: torch.Tensor, labels: torch.Tensor) -> Rule:
    """The rule fitted on the complete ones of these samples, if there are any."""
    complete = ~logits.isnan().any(-1).any(0)
    if not complete.any():
        return fusion_rules[name].fit(logits.nan_to_num(0), labels)
    return fusion_rules[name].fit(logits[:, complete], labels[complete])


def log_likelihood(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log p of each label (N,), not below that of a probability of 1e-12."""
    return probabilities[torch.arange(len(labels)), labels].double().clamp_min(1e-12).log()


def mean_log_likelihood(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    return log_likelihood(probabilities, labels).mean().item()


Judge = Callable[[torch.Tensor, torch.Tensor], float]
JUDGES: dict[str, Judge] = {"acc": accuracy, "macro-f1": macro_f1, "nll": mean_log_likelihood}  # by --select


def cross_validated(name: str, logits: torch.Tensor, labels: torch.Tensor, judge: Judge = mean_log_likelihood) -> float:
    """The judgement on predictions of samples that the rule was not fitted on, by folds stratified by class."""
    folds = min(FOLDS, len(labels))
    fold = torch.empty_like(labels)
    fold[labels.argsort(stable=True)] = torch.arange(len(labels)) % folds
    fused = torch.empty(logits.shape[1:], dtype=torch.float64)
    for k in range(folds):
        held_out = fold == k
        seen = ~held_out if folds > 1 else held_out  # a single sample cannot be held out
        rule = fit_rule(name, logits[:, seen], labels[seen])
        fused[held_out] = combine(rule, logits[:, held_out]).double()
    return judge(fused, labels)


def at_once(what: str, choose: Callable[[], Any]) -> Any:
    """Decides by choosing, see :meth:`Run.decide`."""
    return choose()


def fuse(
    option: str,
    logits: dict[str, dict],
    labels: dict[str, torch.Tensor],
    select: str | None = None,
    decide: Callable[[str, Callable[[], Any]], Any] = at_once,
) -> tuple[dict, Rule]:
    """The scores of the fused prediction and its rule.

    ``option``: its name, or "auto" for the candidate of the highest cross-validated log-likelihood on validation; with
    ``select`` acc or macro-f1, of the highest score of that kind, and ties go to the higher log-likelihood.
    ``logits``: {modality: {"val": (N, C), "test": (N, C)}}; labels likewise. ``decide``: :meth:`Run.decide`, whose
    final fit gives no validation.
    """
    stacked = {split: torch.stack([z[split] for z in logits.values()]) for split in labels}

    def choose() -> tuple[str, dict[str, Rule], dict]:
        fitted = {name: fit_rule(name, stacked["val"], labels["val"]) for name in fusion_rules}
        candidates = AUTO if option == "auto" else ()
        likelihoods = {name: cross_validated(name, stacked["val"], labels["val"]) for name in candidates}
        reasons: dict[str, Any] = {"log_likelihood": likelihoods}  # cross-validated, of the candidates of "auto"
        judged = {}
        if select in ("acc", "macro-f1"):
            judged = {name: cross_validated(name, stacked["val"], labels["val"], JUDGES[select]) for name in candidates}
        if judged:
            reasons["judged"] = {"by": {"acc": "accuracy"}.get(str(select), "macro-F1"), "candidates": judged}
        reasons["temperature"] = {m: temperature(z["val"], labels["val"]) for m, z in logits.items()}
        best = max(likelihoods, key=lambda name: (judged.get(name, 0), likelihoods[name]), default=option)
        return best, fitted, reasons

    best, fitted, reasons = decide("fusion rule", choose)
    probabilities = {name: {s: combine(rule, stacked[s]) for s in stacked} for name, rule in fitted.items()}
    weights = fitted[best].weights
    metrics = {
        "rule": best,
        "weights": dict(zip(logits, weights, strict=True)) if weights else None,
        **(reasons if "val" in labels else {}),
        **scores(probabilities[best], labels),
        "without": accuracy_without_each(fitted[best], dict(zip(logits, stacked["test"], strict=True)), labels["test"]),
        "by_rule": {name: scores(p, labels) for name, p in probabilities.items()},
    }
    return metrics, fitted[best]


def accuracy_without_each(rule: Rule, logits: dict[str, torch.Tensor], labels: torch.Tensor) -> dict[str, float]:
    """Accuracy of the fused prediction if each modality in turn is missing from all samples."""
    accuracies = {}
    for i, m in enumerate(logits):
        stacked = torch.stack(list(logits.values()))
        stacked[i] = torch.nan
        accuracies[m] = accuracy(combine(rule, stacked), labels)
    return accuracies
