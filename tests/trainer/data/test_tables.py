"""Tables: empty numbers, words as categories, and cells that only a person reads as numbers."""

import math

import pytest
import torch

from udi_trainer import UserError, train
from udi_trainer.data.manifest import build
from udi_trainer.data.recipe import samples
from udi_trainer.data.rows import Rows
from udi_trainer.options import Options


def rows(count=40, **extra):
    """Two classes, with drawn features; three fifths are for training."""
    kept = []
    for i in range(count):
        split = ("train", "train", "train", "val", "test")[i // 2 % 5]
        kept.append({"label": "ab"[i % 2], "split": split, "title": f"text {i * i % 11}", "x": f"{i % 7}"})
    return [row | {name: str(cell(i)) for name, cell in extra.items()} for i, row in enumerate(kept)]


def built(tmp_path, table, **options):
    given = Options.make(dataset="manifest", cache_dir=tmp_path / "cache", **options)
    return build(Rows("m.csv", tmp_path, table), given)


def test_empty_numbers_are_the_median_of_training(tmp_path):
    """With an indicator, as training has some too; where it has none, empty cells elsewhere are its median alone."""
    table = rows(pulse=lambda i: "" if i % 10 in (1, 6) else i, age=lambda i: "" if i == 8 else 2 * i)
    data = built(tmp_path, table)  # of each ten samples, the first six train: 1 lacks its pulse; 6 validates
    training = [i for i, row in enumerate(table) if row["split"] == "train"]
    known = sorted(float(table[i]["pulse"]) for i in training if table[i]["pulse"])
    middle = known[len(known) // 2 - 1 : len(known) // 2 + 1]
    median = sum(middle) / 2 if len(known) % 2 == 0 else known[len(known) // 2]
    x = data.train.stored["table"]  # x, pulse, whether it was empty, age
    assert x.shape == (24, 4)
    wanted = [[float(i % 7), float(i % 10 != 1 and i or median), float(i % 10 == 1), 2.0 * i] for i in training]
    wanted[0][1] = 0.0
    assert x.tolist() == wanted
    assert data.val.stored["table"][0].tolist() == [6.0, median, 1.0, 12.0]
    ages = sorted(2.0 * i for i in training)
    assert data.test.stored["table"][0].tolist() == [1.0, 8.0, 0.0, (ages[11] + ages[12]) / 2]
    made = data.modalities["table"].input({"table": x})
    assert torch.equal(made[:, 2], x[:, 2])  # the indicator stays 0 and 1
    torch.testing.assert_close(made[:, [0, 1, 3]].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(made[:, [0, 1, 3]].std(0, correction=0), torch.ones(3))


def test_empty_numbers_are_refused_by_option(tmp_path):
    table = rows(pulse=lambda i: "" if i == 3 else i)
    with pytest.raises(UserError, match="sample 3: column pulse is empty .--empty-numbers impute"):
        built(tmp_path, table, empty_numbers="refuse")
    assert len(built(tmp_path, table, empty_numbers="refuse", skip_bad=True).train) == 23
    with pytest.raises(UserError, match="column pulse is empty in training .--ignore 'pulse'"):
        built(tmp_path, rows(pulse=lambda i: i if i // 2 % 5 > 2 else ""))


def test_new_rows_take_the_medians_of_the_run(tmp_path):
    """Or are refused where the run refused empty numbers."""
    table = rows(pulse=lambda i: i)
    new = Rows("new.csv", tmp_path, [{"x": "5", "pulse": "", "title": "text 1"}, {"x": "", "pulse": "9", "title": "a"}])
    for empty_numbers in ("impute", "refuse"):
        data = built(tmp_path, table, empty_numbers=empty_numbers)
        medians = [float(data.train.stored["table"][:, k].double().quantile(0.5)) for k in (0, 1)]
        if empty_numbers == "impute":
            stored = samples(new, data.recipe, data.class_names, cache_dir=str(tmp_path / "cache")).stored
            assert stored["table"].tolist() == [[5.0, medians[1]], [medians[0], 9.0]]
        else:
            with pytest.raises(UserError, match="new.csv, sample 0: column pulse is empty"):
                samples(new, data.recipe, data.class_names)


def test_words_are_categories_of_a_table(tmp_path):
    """Known from training; a word that it lacks has a position of its own, and so has an empty cell if it has one."""
    table = rows(sex=lambda i: ["f", "m", ""][i % 3], site=lambda i: "new" if i == 6 else ["x", "y"][i // 2 % 2])
    data = built(tmp_path, table, tables={"person": "sex+x", "place": "site"})
    assert data.modalities.keys() == {"title", "person", "place"}
    training = [i for i, row in enumerate(table) if row["split"] == "train"]
    one_hot = {"": [1, 0, 0, 0], "f": [0, 1, 0, 0], "m": [0, 0, 1, 0]}
    assert data.train.stored["person"].tolist() == [[*one_hot[table[i]["sex"]], i % 7] for i in training]
    assert data.val.stored["place"][:2].tolist() == [[0, 0, 1], [0, 1, 0]]
    made = data.modalities["place"].sample(data.val, 2)
    assert made.tolist() == [[0, 0, 1], [0, 1, 0]]  # not standardised


def test_tables_by_pattern(tmp_path):
    extra = {f"rna{k}": lambda i, k=k: i * k % 13 for k in range(1, 4)} | {
        f"cg{k}": lambda i, k=k: i + k for k in (1, 2)
    }
    data = built(tmp_path, rows(**extra), tables="genes=rna*,sites=cg?+x")
    shapes = {m: data.train.stored[m].shape[1] for m in data.modalities}
    assert shapes == {"title": shapes["title"], "genes": 3, "sites": 3}
    with pytest.raises(UserError, match="unknown column of numbers or words 'dna[*]'"):
        built(tmp_path, rows(**extra), tables={"genes": "dna*"})


def test_one_modality_is_named(tmp_path):
    table = [{name: cell for name, cell in row.items() if name != "title"} for row in rows(y=lambda i: i)]
    wanted = "m.csv has one modality, table of the columns x, y, and two or more are needed: --tables a=x,b=..."
    with pytest.raises(UserError, match=wanted):
        built(tmp_path, table)


def test_a_text_of_few_values_is_told(tmp_path, caplog):
    with caplog.at_level("INFO", logger="udi_trainer"):
        built(tmp_path, rows(sex=lambda i: "mf"[i % 3 % 2]))
    wanted = "column sex is read as text and has 2 values in training (f, m): --tables NAME=sex makes them categories"
    assert wanted in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="udi_trainer"):
        built(tmp_path, rows(200, notes=lambda i: f"note {i % 21}"))
    assert "column notes" not in caplog.text


@pytest.mark.parametrize("cell, wanted", [
    ("3,14", "no number: write decimals with a point"),
    ("1.234,5", "no number: write decimals with a point"),
    ("[0.1, 0.2]", "a list: give each of its numbers a column"),
    ("(1 2 3)", "a list"),
])  # fmt: skip
def test_cells_that_look_like_numbers(tmp_path, cell, wanted):
    with pytest.raises(UserError, match=f"column f contains .*{wanted}.*--kinds f=text"):
        built(tmp_path, rows(f=lambda i: cell if i else 7))
    with pytest.raises(UserError, match=f"sample 3: column f contains .*{wanted}"):
        built(tmp_path, rows(f=lambda i: cell if i == 3 else i))
    assert built(tmp_path, rows(f=lambda i: cell), kinds="f=text").modalities["f"].encoder == "words"


def test_an_underscore_is_no_part_of_a_number(tmp_path):
    """Python reads 1_2 as 12."""
    assert built(tmp_path, rows(take=lambda i: f"{i}_{i % 3}")).modalities.keys() == {"title", "take", "table"}


def test_categories_and_empty_numbers_train(tmp_path):
    table = rows(200, sex=lambda i: "fm"[(i + i // 20) % 2], pulse=lambda i: "" if i % 4 == 0 else i % 2 + i % 3)
    data = built(tmp_path, table, tables="person=sex+pulse")
    result = train(data, "ensemble", epochs=8, progress=False)
    assert result.metrics["unimodal"]["person"]["test_acc"] > 0.7 and math.isfinite(result.metrics["seconds"]["total"])
