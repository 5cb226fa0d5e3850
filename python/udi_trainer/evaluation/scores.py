"""How good predictions (N, C) are."""

import torch


def scores(outputs: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        "val_acc": accuracy(outputs["val"], labels["val"]),
        "test_acc": accuracy(outputs["test"], labels["test"]),
        "test_macro_f1": macro_f1(outputs["test"], labels["test"]),
    }


def accuracy(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    return (outputs.argmax(-1) == labels).double().mean().item()


def macro_f1(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over the classes of 2 tp / (2 tp + fp + fn); a class neither present nor predicted counts 0."""
    classes = outputs.shape[-1]
    confusion = torch.bincount(labels * classes + outputs.argmax(-1), minlength=classes**2).view(classes, classes)
    hits = confusion.diagonal().double()
    return (2 * hits / (confusion.sum(0) + confusion.sum(1)).clamp_min(1)).mean().item()
