"""Predictions on test: predictions.csv, and metrics by class."""

import csv
import io

import torch

from ..data.dataset import Dataset
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
    names = data.class_names or [str(c) for c in range(data.classes)]
    ids = data.test.ids or [str(i) for i in range(len(data.test))]
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["id", "label", "fused", "probability", *logits, "missing"])
    probabilities, predicted = fused.max(-1)
    by_modality = {m: z.nan_to_num(0).argmax(-1).tolist() for m, z in logits.items()}
    absent = {m: z.isnan().any(-1).tolist() for m, z in logits.items()}
    labels = data.test.labels.tolist()
    for i, (name, label, c, p) in enumerate(zip(ids, labels, predicted.tolist(), probabilities.tolist(), strict=True)):
        own = ["" if absent[m][i] else names[by_modality[m][i]] for m in logits]
        missing = ";".join(m for m in logits if absent[m][i])
        rows.writerow([name, names[label], names[c], f"{p:.4f}", *own, missing])
    return text.getvalue().encode()
