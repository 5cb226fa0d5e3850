"""Predictions of samples as a CSV, and metrics by class."""

import csv
import io
from collections.abc import Sequence

import torch

from ..data.dataset import Dataset, Split
from .scores import average_precision, confusion


def details(probabilities: torch.Tensor, labels: torch.Tensor) -> dict:
    """Metrics of fused predictions (N, C): mAP, accuracy per class and the confusion matrix (labels x predictions).

    A class without samples is left out of the mAP, and its accuracy is None.
    """
    precision = average_precision(probabilities, labels)
    table = confusion(probabilities, labels)
    totals = table.sum(1)
    return {
        "test_map": precision.nanmean().item(),
        "test_acc_by_class": [
            hits / n if n else None for hits, n in zip(table.diagonal().tolist(), totals.tolist(), strict=True)
        ],
        "test_confusion": table.tolist(),
    }


def predictions_csv(data: Dataset, logits: dict[str, torch.Tensor], fused: torch.Tensor) -> bytes:
    """The content of predictions.csv, with one row per test sample.

    Columns: id, label, the fused prediction and its probability, each modality's prediction, and missing modalities.
    """
    return as_csv(data.test, data.named_classes(), logits, fused)


def as_csv(
    split: Split, names: Sequence[str], logits: dict[str, torch.Tensor], fused: torch.Tensor, every: bool = False
) -> bytes:
    """The predictions for a split as a CSV; ``every``: with columns of all fused probabilities, ``p_<class>``."""
    ids = split.ids or [str(i) for i in range(len(split))]
    text = io.StringIO()
    rows = csv.writer(text)
    all_classes = [f"p_{name}" for name in names] if every else []
    rows.writerow(["id", "label", "fused", "probability", *logits, "missing", *all_classes])
    probabilities, predicted = fused.max(-1)
    by_modality = {m: z.nan_to_num(0).argmax(-1).tolist() for m, z in logits.items()}
    absent = {m: z.isnan().any(-1).tolist() for m, z in logits.items()}
    labels = split.labels.tolist()
    for i, (name, label, c, p) in enumerate(zip(ids, labels, predicted.tolist(), probabilities.tolist(), strict=True)):
        own = ["" if absent[m][i] else names[by_modality[m][i]] for m in logits]
        missing = ";".join(m for m in logits if absent[m][i])
        known = names[label] if label >= 0 else ""
        each = [f"{x:.6f}" for x in fused[i].tolist()] if every else []
        rows.writerow([name, known, names[c], f"{p:.4f}", *own, missing, *each])
    return text.getvalue().encode()
