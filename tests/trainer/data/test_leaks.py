"""Columns that tell the label are named, and can be left out."""

import random

import pytest

from udi_trainer import UserError
from udi_trainer.data.leaks import determines
from udi_trainer.data.manifest import build
from udi_trainer.data.rows import Rows
from udi_trainer.options import Options


def rows(extra, count=60):
    """Two columns that say nothing, and these cells by column."""
    pick = random.Random(0)
    kept = [{"label": "abc"[i % 3], "x": f"{pick.random()}", "y": f"word{pick.randrange(9)}"} for i in range(count)]
    return [row | {name: str(cell(i)) for name, cell in extra.items()} for i, row in enumerate(kept)]


def built(tmp_path, extra, **options):
    given = Options.make(dataset="manifest", cache_dir=tmp_path / "cache", **options)
    return build(Rows("m.csv", tmp_path, rows(extra)), given)


@pytest.mark.parametrize("name, cell, wanted", [
    ("Unnamed: 0", lambda i: i * 7 % 60, "column Unnamed: 0 looks like an index of the rows: --ignore 'Unnamed: 0'"),
    ("number", lambda i: i + 1, "column number looks like an index"),
    ("label_id", lambda i: i % 3, "column label_id alone determines the label (each of its 3 values has one)"),
    ("speaker", lambda i: f"anna{i % 6}", "column speaker alone determines the label (each of its 6 values has one)"),
    ("labels", lambda i: i % 5, "column labels is read as a modality, not as label: rename it"),
    ("spilt", lambda i: i % 5, "column spilt is read as a modality, not as split: rename it"),
])  # fmt: skip
def test_columns_that_are_told(tmp_path, caplog, name, cell, wanted):
    built(tmp_path, {name: cell})
    assert wanted in caplog.text
    caplog.clear()
    for options in ({"ignore": (name,)}, {"columns": "x,y"}):
        data = built(tmp_path, {name: cell}, **options)
        assert data.modalities.keys() == {"table", "y"} and not caplog.text
        assert data.train.stored["table"].shape[1] == 1
    data = built(tmp_path, {name: cell}, columns=(name, "x", "y"))  # chosen by name
    assert not caplog.text


def test_innocent_columns(tmp_path, caplog):
    built(tmp_path, {"age": lambda i: 20 + i % 7, "height": lambda i: i * i % 97, "speaker": lambda i: f"p{i % 10}"})
    assert not caplog.text


def test_values_that_occur_once_say_nothing():
    assert determines(list("abcdef"), list("xyxyxy")) == 0
    assert determines(list("aabbcd"), list("xxyyxy")) == 4
    assert determines(list("aabbcd"), list("xxyxxy")) == 0
    assert determines(["a", "a", "b", "b", "", "b"], ["x", "x", "y", "y", "y", ""]) == 2
    assert determines(["a"] * 4, ["x"] * 4) == 0


@pytest.mark.parametrize("options, wanted", [
    ({"ignore": "lable"}, "unknown column 'lable': choose from label, x, y; did you mean 'label'"),
    ({"ignore": "label"}, "training needs the labels"),
    ({"columns": "x,z*"}, "unknown column 'z[*]': choose from x, y"),
    ({"columns": "x"}, "m.csv has one modality, table, and two or more are needed"),
])  # fmt: skip
def test_columns_that_are_not_there(tmp_path, options, wanted):
    with pytest.raises(UserError, match=wanted):
        built(tmp_path, {}, **options)


def test_patterns_and_reserved_columns(tmp_path):
    extra = {"rna1": lambda i: i % 7, "rna2": lambda i: i % 5, "split": lambda i: "train"}
    data = built(tmp_path, extra, ignore="rna*,split")
    assert data.modalities.keys() == {"table", "y"} and len(data.test) == 9
    assert built(tmp_path, extra, columns="y,rna*").train.stored["table"].shape == (42, 2)
