"""Fusion of the modalities' outputs without trained parameters, chosen on validation; and the scores.

A rule is fitted on validation logits (M, N, C) and labels (N,). It returns a function from logits (M, N, C) to
probabilities (N, C), and the modalities' weights if it has such.
"""

import torch

from common import Registry

rules = Registry("fusion rule")


@rules.register("mean")
def mean(logits, labels):
    """Mean of the probabilities: the plain ensemble."""
    return lambda z: z.softmax(-1).mean(0), None


@rules.register("sum")
def logit_sum(logits, labels):
    """Sum of the logits: a product of experts, in which a confident modality counts for more."""
    return lambda z: z.sum(0).softmax(-1), None


@rules.register("weighted")
def weighted(logits, labels):
    """Convex weights of the probabilities, of the greatest likelihood on validation.

    Expectation maximisation of a mixture with fixed components: concave, so any number of modalities needs no grid.
    """
    likelihood = logits.double().softmax(-1)[:, torch.arange(len(labels)), labels].clamp_min(1e-12)
    weights = torch.full((len(logits),), 1 / len(logits), dtype=torch.float64)
    for _ in range(500):
        share = weights[:, None] * likelihood
        weights = (share / share.sum(0)).mean(1)
    return lambda z: torch.einsum("m,mnc->nc", weights, z.double().softmax(-1)), weights.tolist()


def fuse(option, logits, labels):
    """The figures of a fused prediction, ``option`` a rule or "auto": the rule that is best on validation.

    ``logits``: {modality: {"val": (N, C), "test": (N, C)}}; labels likewise. Ties go to the likelier rule.
    """
    stacked = {split: torch.stack([z[split] for z in logits.values()]) for split in ("val", "test")}
    fitted = {name: rule(stacked["val"], labels["val"]) for name, rule in rules.items()}
    probabilities = {name: {s: rule(stacked[s]) for s in stacked} for name, (rule, _) in fitted.items()}

    def merit(name):
        p = probabilities[name]["val"]
        return accuracy(p, labels["val"]), p[torch.arange(len(p)), labels["val"]].clamp_min(1e-12).log().mean().item()

    best = max(rules, key=merit) if option == "auto" else option
    weights = fitted[best][1]
    return {
        "rule": best,
        "weights": weights and dict(zip(logits, weights, strict=True)),
        **scores(probabilities[best], labels),
        "by_rule": {name: scores(p, labels) for name, p in probabilities.items()},
    }


def scores(outputs, labels):
    return {
        "val_acc": accuracy(outputs["val"], labels["val"]),
        "test_acc": accuracy(outputs["test"], labels["test"]),
        "test_macro_f1": macro_f1(outputs["test"], labels["test"]),
    }


def accuracy(outputs, labels):
    return (outputs.argmax(-1) == labels).double().mean().item()


def macro_f1(outputs, labels):
    """Mean over the classes of 2 tp / (2 tp + fp + fn); a class neither present nor predicted counts 0."""
    classes = outputs.shape[-1]
    confusion = torch.bincount(labels * classes + outputs.argmax(-1), minlength=classes**2).view(classes, classes)
    hits = confusion.diagonal().double()
    return (2 * hits / (confusion.sum(0) + confusion.sum(1)).clamp_min(1)).mean().item()
