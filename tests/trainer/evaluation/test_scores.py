"""Scores against scikit-learn."""

import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, recall_score
from torch.nn.functional import one_hot

from udi_trainer.evaluation.predictions import details
from udi_trainer.evaluation.scores import accuracy, macro_f1


def drawn(present, predicted, missing=0.0, count=200):
    """Labels of some classes and outputs that predict some, of five; rows of NaN where the modality is missing."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(present)[torch.randint(len(present), (count,), generator=generator)]
    chosen = torch.tensor(predicted)[torch.randint(len(predicted), (count,), generator=generator)]
    outputs = (one_hot(chosen, 5) + 0.5 * torch.rand(count, 5, generator=generator)).double()
    outputs[torch.rand(count, generator=generator) < missing] = torch.nan
    return outputs, labels


CASES = {
    "all classes": ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
    "absent and not predicted": ([0, 1, 3], [0, 1, 3]),
    "absent but predicted": ([0, 1], [0, 1, 4]),
    "present but never predicted": ([0, 1, 2], [0, 2]),
    "one class": ([2], [2]),
    "one class, predicted as others too": ([2], [1, 2]),
    "one prediction": ([0, 1, 2], [3]),
}


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("present, predicted", CASES.values(), ids=CASES)
def test_scores_agree_with_sklearn(present, predicted, missing):
    outputs, labels = drawn(present, predicted, missing)
    kept = ~outputs.isnan().any(1)
    y, p = labels[kept].numpy(), outputs[kept].argmax(1).numpy()
    assert accuracy(outputs, labels) == pytest.approx(accuracy_score(y, p))
    assert macro_f1(outputs, labels) == pytest.approx(f1_score(y, p, average="macro"))


@pytest.mark.parametrize("present, predicted", CASES.values(), ids=CASES)
def test_details_of_the_classes_that_are_present(present, predicted):
    outputs, labels = drawn(present, predicted)
    figures = details(outputs.softmax(1), labels)
    recalls = recall_score(labels, outputs.argmax(1), average=None, labels=present)
    assert [figures["test_acc_by_class"][c] for c in present] == pytest.approx(list(recalls))
    assert [c for c, value in enumerate(figures["test_acc_by_class"]) if value is not None] == present
    precisions = [average_precision_score(labels == c, outputs.softmax(1)[:, c]) for c in present]
    assert figures["test_map"] == pytest.approx(sum(precisions) / len(present))


def test_perfect_predictions_without_a_class():
    labels = torch.arange(15) % 3
    assert macro_f1(one_hot(labels, 4).float(), labels) == 1.0
