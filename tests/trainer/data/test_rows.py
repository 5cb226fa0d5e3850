"""The rows of a CSV file: its forms, its header and its labels mean what their author means."""

import pytest

from udi_trainer import UserError
from udi_trainer.data.rows import RESERVED, find_labels, read

CELLS = [["s1", "a", "x.png", "train"], ["s2", "b", "y.png", "test"]]


def written(path, lines, separator=",", **how):
    path.write_text("\n".join(separator.join(line) for line in lines) + "\n", **how)
    return path


def labels_of(path, labels):
    return find_labels(read(written(path / "m.csv", [["label", "x"], *([label, "1"] for label in labels)])))


@pytest.mark.parametrize("header", [
    "id,label,image,split", "ID,Label,image,SPLIT", " id , LABEL,image, Split ", "\ufeffid,label,image,split",
])  # fmt: skip
def test_reserved_names_in_any_case(tmp_path, header):
    rows = read(written(tmp_path / "m.csv", [[header], *CELLS]))
    assert [list(row) for row in rows.rows] == [["id", "label", "image", "split"]] * 2
    assert rows.rows[1] == {"id": "s2", "label": "b", "image": "y.png", "split": "test"}
    assert rows.location(1).endswith("m.csv, line 3") and rows.id(1) == "s2"


def test_a_reserved_name_twice(tmp_path):
    with pytest.raises(UserError, match=r"duplicate or empty column names: \['split', 'Split'\]"):
        read(written(tmp_path / "m.csv", [["split", "label", "x", "Split"], *CELLS]))


@pytest.mark.parametrize("name", ["Group", "Id", "GROUP"])
def test_every_reserved_name(tmp_path, name):
    assert name.lower() in read(written(tmp_path / "m.csv", [[name, "label"], ["1", "a"]])).rows[0]
    assert name.lower() in RESERVED


@pytest.mark.parametrize("header, wanted", [
    ("id;label;image", "separated by semicolons, so save it with commas"),
    ("id\tlabel\timage", "separated by tabs, so save it with commas or as .tsv"),
    ('[{"label": "a"}]', "looks like JSON"),
    ("version https://git-lfs.github.com/spec/v1", "a Git LFS pointer, not the file itself, so run git lfs pull"),
    ("id,lable,image", "did you mean 'lable'"),
])  # fmt: skip
def test_what_the_file_is_instead(tmp_path, header, wanted):
    (tmp_path / "m.csv").write_text(f"{header}\n{header}\n")
    with pytest.raises(UserError, match=wanted):
        read(tmp_path / "m.csv")


def test_a_header_of_any_length(tmp_path):
    (tmp_path / "m.csv").write_text("[" + '{"label": 1} ' * 100_000 + "]")
    with pytest.raises(UserError, match="JSON") as caught:
        read(tmp_path / "m.csv")
    assert len(str(caught.value)) < 1000


def test_a_column_that_counts_the_rows(tmp_path, caplog):
    with caplog.at_level("INFO", logger="udi_trainer"):
        rows = read(written(tmp_path / "m.csv", [["", "label", "x"], ["0", "a", "1"], ["1", "b", "1"]]))
    assert rows.rows[1] == {"label": "b", "x": "1"} and "column 1 has no name and counts the rows" in caplog.text
    with pytest.raises(UserError, match="duplicate or empty column names"):
        read(written(tmp_path / "m.csv", [["", "label", "x"], ["0", "a", "1"], ["5", "b", "1"]]))


def test_trailing_commas(tmp_path):
    rows = read(written(tmp_path / "m.csv", [["label", "x", "", ""], ["a", "1", "", ""], ["b", "2", "", ""]]))
    assert rows.rows == [{"label": "a", "x": "1"}, {"label": "b", "x": "2"}]


def test_a_long_cell(tmp_path):
    import csv

    limit = csv.field_size_limit()
    rows = read(written(tmp_path / "m.csv", [["label", "notes"], ["a", "word " * 40_000]]))
    assert len(rows.rows[0]["notes"]) == 199_999 and csv.field_size_limit() == limit


def test_a_stray_quote_names_its_line(tmp_path):
    with pytest.raises(UserError, match="after line 2"):
        read(written(tmp_path / "m.tsv", [["label", "x"], ["a", "b"], ["a", '"5 inch" screen']], "\t"))


def test_rows_without_labels(tmp_path):
    path = written(tmp_path / "m.csv", [["image"], ["x.png"]])
    assert read(path, labelled=False).rows == [{"image": "x.png"}]
    with pytest.raises(UserError, match="needs a header with a column label"):
        read(path)


# --- labels ---


@pytest.mark.parametrize("nothing", ["-1", "-1.0", "nan", "NaN", ""])
def test_labels_that_mean_none(tmp_path, caplog, nothing):
    assert labels_of(tmp_path, ["0", nothing, "1", nothing]) == ["0", "", "1", ""]
    assert ("means no label: 2 rows have it" in caplog.text) == bool(nothing)
    assert ("if this is a class, give it another name" in caplog.text) == nothing.startswith("-1")


def test_equal_numbers_are_one_label(tmp_path):
    assert labels_of(tmp_path, ["1", "1.0", "2.0", "10", "10.00", "2.50", "2.5"]) == [
        "1", "1", "2.0", "10", "10", "2.5", "2.5",
    ]  # fmt: skip
    assert labels_of(tmp_path, ["01", "1", "v1.0", "-2"]) == ["01", "1", "v1.0", "-2"]


def test_labels_that_differ_in_case(tmp_path, caplog):
    assert labels_of(tmp_path, ["Happy", "happy", "sad"]) == ["Happy", "happy", "sad"]
    assert "labels ['Happy', 'happy'] differ in case or spaces only" in caplog.text and "sad" not in caplog.text
