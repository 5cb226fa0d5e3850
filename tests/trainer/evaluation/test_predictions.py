"""predictions.csv, and metrics beyond accuracy compared with scikit-learn's."""

import csv
import io

import pytest
import torch

from udi_trainer import Dataset, Split, UserError, train
from udi_trainer.evaluation.fusion import Mean, Sum, Weighted, combine, fuse
from udi_trainer.evaluation.predictions import details, predictions_csv
from udi_trainer.evaluation.scores import accuracy, average_precision


def test_details_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    p, labels = torch.randn(200, 4).softmax(1), torch.randint(3, (200,))
    p[:50] = p[50:100]  # ties
    figures = details(p, labels)
    wanted = [metrics.average_precision_score((labels == c).numpy(), p[:, c].numpy()) for c in range(3)]
    torch.testing.assert_close(average_precision(p, labels)[:3], torch.tensor(wanted, dtype=torch.float64))
    assert average_precision(p, labels)[3].isnan() and figures["test_acc_by_class"][3] is None
    assert figures["test_map"] == pytest.approx(sum(wanted) / 3)
    table = metrics.confusion_matrix(labels.numpy(), p.argmax(1).numpy(), labels=range(4))
    assert figures["test_confusion"] == table.tolist()


@pytest.mark.parametrize("rule", [Mean(), Sum(), Weighted([0.2, 0.3, 0.5]), Weighted([1.0, 0.0, 0.0])])
def test_what_is_missing_does_not_count(rule):
    z = torch.randn(3, 5, 4)
    whole = rule(z)
    z[0, 1], z[0, 2], z[1, 2], z[:, 3] = torch.nan, torch.nan, torch.nan, torch.nan
    fused = combine(rule, z)
    torch.testing.assert_close(fused[[0, 4]], whole[[0, 4]].double())
    torch.testing.assert_close(fused[2], z[2, 2].softmax(0).double())
    torch.testing.assert_close(fused[3], torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(fused.sum(1), torch.ones(5, dtype=torch.float64))
    pair = rule.subset(torch.tensor([False, True, True]))
    torch.testing.assert_close(fused[1], pair(z[1:, 1:2])[0].double())


def test_accuracy_without_each_modality():
    labels = torch.arange(40) % 4
    sure, blind = 10 * torch.eye(4)[labels], torch.zeros(40, 4)
    logits = {"sure": {"val": sure, "test": sure}, "blind": {"val": blind, "test": blind}}
    metrics, _ = fuse("sum", logits, {"val": labels, "test": labels})
    assert metrics["without"] == {"sure": 0.25, "blind": 1.0}
    sure = sure.clone()
    sure[:8] = torch.nan
    assert accuracy(sure, labels) == 1.0


def test_predictions_csv():
    split = Split(torch.tensor([0, 1]), {}, ["one", "two, three"])
    data = Dataset(2, {}, split, split, split, class_names=["no", "yes"])
    logits = {"a": torch.tensor([[2.0, 0], [torch.nan, torch.nan]]), "b": torch.tensor([[0, 1.0], [0, 1]])}
    text = predictions_csv(data, logits, torch.tensor([[0.75, 0.25], [0.1, 0.9]])).decode()
    assert list(csv.reader(io.StringIO(text))) == [
        ["id", "label", "fused", "probability", "a", "b", "missing"],
        ["one", "no", "no", "0.7500", "no", "yes", ""],
        ["two, three", "yes", "yes", "0.9000", "", "yes", "a"],
    ]


def test_no_tensorboard(monkeypatch):
    """Reported before any data is read."""
    monkeypatch.setattr("udi_trainer.api.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--tensorboard needs tensorboard: pip install"):
        train("manifest", manifest="none.csv", tensorboard=True, progress=False)


def test_tensorboard(mixed, tmp_path):
    pytest.importorskip("tensorboard", reason='needs tensorboard: pip install -e ".[tensorboard]"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(mixed, "ensemble", epochs=2, progress=False, tensorboard=True, out=tmp_path / "run", device="cpu")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for stage, rows in result.history.items():
        seen = [(event.step, event.value) for event in events.Scalars(f"val_acc/{stage}")]
        assert seen == [(row["epoch"], pytest.approx(row["val_acc"])) for row in rows]
    for name in ("test_acc", "test_macro_f1", "test_map"):
        (event,) = events.Scalars(f"{name}/fused")
        assert (event.step, event.value) == (2, pytest.approx(result.metrics["fused"][name]))
