"""Metrics of predictions (N, C)."""

import torch


def scores(outputs: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scores on test, and on validation if there are labels of it."""
    return {
        **({"val_acc": accuracy(outputs["val"], labels["val"])} if "val" in labels else {}),
        "test_acc": accuracy(outputs["test"], labels["test"]),
        "test_macro_f1": macro_f1(outputs["test"], labels["test"]),
    }


def accuracy(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy over the samples that have a prediction; a row of NaN means that the sample lacks the modality."""
    outputs, labels = drop_missing(outputs, labels)
    return (outputs.argmax(-1) == labels).double().mean().item()


def macro_f1(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean of 2 tp / (2 tp + fp + fn) over the classes that are present or predicted, as scikit-learn computes it."""
    table = confusion(*drop_missing(outputs, labels))
    total = table.sum(0) + table.sum(1)
    return (2 * table.diagonal()[total > 0].double() / total[total > 0]).mean().item()


def confusion(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The confusion matrix (C, C): labels in rows, predictions in columns."""
    classes = outputs.shape[-1]
    return torch.bincount(labels * classes + outputs.argmax(-1), minlength=classes**2).view(classes, classes)


def average_precision(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Average precision of each class (C,): the mean over its samples of the precision at their rank.

    Equal outputs share a rank. A class without samples has NaN.
    """
    values = []
    for c in range(outputs.shape[-1]):
        hit = (labels == c).double()
        order = outputs[:, c].argsort(descending=True)
        ranked, relevant = outputs[order, c], hit[order]
        last = torch.searchsorted(-ranked, -ranked, right=True) - 1  # the last of equal outputs
        precision = relevant.cumsum(0)[last] / (last + 1)
        values.append((precision * relevant).sum() / hit.sum() if hit.any() else torch.tensor(torch.nan))
    return torch.stack([value.double() for value in values])


def drop_missing(outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Drops the samples whose outputs are NaN."""
    kept = ~outputs.isnan().any(-1)
    return outputs[kept], labels[kept]
