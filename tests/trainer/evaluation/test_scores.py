"""Scores against scikit-learn."""

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from udi_trainer.evaluation.scores import accuracy, macro_f1


def test_scores_agree_with_sklearn():
    generator = torch.Generator().manual_seed(0)
    labels, outputs = torch.randint(5, (200,), generator=generator), torch.randn(200, 5, generator=generator)
    assert accuracy(outputs, labels) == pytest.approx(accuracy_score(labels, outputs.argmax(1)))
    assert macro_f1(outputs, labels) == pytest.approx(f1_score(labels, outputs.argmax(1), average="macro"))
