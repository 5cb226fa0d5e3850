"""Data sets from OpenML, with scikit-learn's download replaced."""

import numpy as np
import pytest
import sklearn.datasets
from sklearn.utils import Bunch

from udi_trainer import Options, UserError
from udi_trainer.data import openml
from udi_trainer.registry import datasets


def fetch(monkeypatch, columns, rows=60):
    def replaced(data_id, **kwargs):
        numbers = np.arange(rows * columns, dtype=float).reshape(rows, columns)
        return Bunch(data=numbers, target=np.array([str(i % 3 + 1) for i in range(rows)]), asked=asked.append(data_id))

    asked = []
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", replaced)
    return asked


@pytest.mark.parametrize(
    ("name", "number", "widths"),
    [
        ("har", 1478, {"time": 265, "frequency": 289, "angle": 7}),
        ("gas-drift", 1476, {"steady": 32, "transient": 96}),
        ("satimage", 182, {"visible": 18, "infrared": 18}),
    ],
)
def test_columns_are_grouped(name, number, widths, monkeypatch):
    asked, columns = fetch(monkeypatch, sum(widths.values())), sum(widths.values())
    data = datasets["openml"](Options.make(dataset="openml", openml=name))
    assert asked == [number] and data.class_names == ["1", "2", "3"] and data.name == name
    assert {m: t.shape[1] for m, t in data.train.stored.items()} == widths
    sample = sorted(x for t in data.train.stored.values() for x in t[0].tolist())
    first = int(data.train.ids[0]) * columns
    assert sample == list(range(first, first + columns))  # each column once


def test_of_the_known_shape(monkeypatch):
    fetch(monkeypatch, 35)
    with pytest.raises(UserError, match="has 35 columns, but satimage has 36"):
        datasets["openml"](Options.make(dataset="openml", openml="satimage"))


def test_without_network(monkeypatch):
    def failing(**kwargs):
        raise OSError("no route")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", failing)
    with pytest.raises(UserError, match="har cannot be had from OpenML .*no route"):
        datasets["openml"](Options.make(dataset="openml"))


def test_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    assert not openml.downloaded("har")
    file = tmp_path / "openml/openml.org/api/v1/json/data/1478.gz"
    file.parent.mkdir(parents=True)
    file.touch()
    assert openml.downloaded("har") and not openml.downloaded("satimage")
