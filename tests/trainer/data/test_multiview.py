"""Multi-view files: what is found in them, in every layout that the repositories use."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason='needs the trainer\'s extra: pip install -e ".[train]"')

from scipy import io as scipy_io
from scipy import sparse

from udi_trainer import Options, UserError, train
from udi_trainer.data import multiview
from udi_trainer.registry import datasets

N, WIDTHS = 40, {"a": 5, "b": 3, "c": 1}
RANDOM = np.random.default_rng(0)
ARRAYS = {m: RANDOM.normal(size=(N, width)) for m, width in WIDTHS.items()}
LABELS = np.arange(N) % 4
TRUE = {m: x for m, x in ARRAYS.items() if m != "c"}  # one column is no view


def cell(*items):
    made = np.empty((1, len(items)), object)
    made[0, :] = items
    return made


def save(tmp_path, **variables):
    path = tmp_path / "file.mat"
    scipy_io.savemat(path, variables)
    return path


def check(views, names, labels):
    assert list(views.arrays) == names and views.labels == labels
    for found, wanted in zip(views.arrays.values(), TRUE.values(), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("transposed", [False, True])
def test_variables_and_cells(tmp_path, transposed):
    made = {m: x.T if transposed else x for m, x in ARRAYS.items()}
    text = [str(y + 1) for y in LABELS]
    path = save(tmp_path, **made, gt=LABELS[:, None] + 1)
    check(multiview.read(path), ["a", "b"], text)
    path = save(tmp_path, X=cell(*made.values()), Y=np.uint8(LABELS + 1), classes=4)
    check(multiview.read(path), ["X1", "X2"], text)


def test_a_square_view_is_read_as_the_others_are(tmp_path):
    square = RANDOM.normal(size=(N, N))
    for transposed in (False, True):
        made = {m: x.T if transposed else x for m, x in (ARRAYS | {"square": square}).items()}
        views = multiview.read(save(tmp_path, **made, y=LABELS))
        np.testing.assert_array_equal(views.arrays["square"], square)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (LABELS, [str(y) for y in LABELS]),
        (np.float64(LABELS + 7), [str(y + 7) for y in LABELS]),
        (np.eye(4)[LABELS], [str(y + 1) for y in LABELS]),
        (np.eye(4)[LABELS].T, [str(y + 1) for y in LABELS]),
        (cell(*(f"class {y}" for y in LABELS)), [f"class {y}" for y in LABELS]),
        (cell(LABELS, LABELS), [str(y) for y in LABELS]),
    ],
    ids=["from 0", "from 7", "one-hot", "one-hot columns", "strings", "for each view"],
)
def test_labels(tmp_path, labels, text):
    assert multiview.read(save(tmp_path, **ARRAYS, truelabel=labels)).labels == text


def test_sparse(tmp_path):
    views = multiview.read(save(tmp_path, X=cell(*(sparse.csc_matrix(x) for x in TRUE.values())), Y=LABELS))
    check(views, ["X1", "X2"], [str(y) for y in LABELS])


def test_training_and_test_in_pairs(tmp_path):
    parts = {"train": slice(30), "test": slice(30, N)}
    made = {f"{m}_{part}": x[rows] for part, rows in parts.items() for m, x in ARRAYS.items()}
    path = save(tmp_path, **made, **{f"gt_{part}": LABELS[rows] for part, rows in parts.items()})
    views = multiview.read(path)
    check(views, ["a", "b"], [str(y) for y in LABELS])
    assert views.test.tolist() == [i >= 30 for i in range(N)]
    data = datasets["multiview"](Options.make(dataset="multiview", multiview=path))
    assert [int(i) for i in data.test.ids] == list(range(30, N))
    assert sorted(int(i) for i in (*data.train.ids, *data.val.ids)) == list(range(30))
    rows = list(map(int, data.train.ids))
    torch.testing.assert_close(data.train.stored["a"], torch.tensor(ARRAYS["a"][rows], dtype=torch.float32))
    x = data.modalities["a"].sample(data.train, len(data.train))
    torch.testing.assert_close(x.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(5))


def test_splits_are_drawn(tmp_path):
    path = save(tmp_path, **ARRAYS, y=LABELS)

    def split(**options):
        data = datasets["multiview"](Options.make(dataset="multiview", multiview=path, **options))
        ids = [list(map(int, part.ids)) for part in (data.train, data.val, data.test)]
        assert sorted(i for part in ids for i in part) == list(range(N))
        return ids

    assert [len(part) for part in split()] == [28, 6, 6] and split(seed=3) == split()
    drawn = split(resplit=8)
    assert [len(part) for part in drawn] == [28, 8, 4]
    assert drawn != split(resplit=8, seed=1) and drawn == split(resplit=8)


def test_version_7_3_is_told(tmp_path):
    path = tmp_path / "new.mat"
    path.write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512))
    with pytest.raises(UserError, match="7.3 .*-v7.*h5py.*savemat"):
        multiview.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"a": ARRAYS["a"]}, "one variable of labels"), ({**ARRAYS, "y": LABELS, "gt": LABELS}, "one variable of labels")],
)
def test_unclear_labels_are_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        multiview.read(save(tmp_path, **content))


def test_damaged_and_missing_files(tmp_path):
    path = save(tmp_path, **ARRAYS, y=LABELS)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="not a readable .mat file"):
        multiview.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        multiview.read(tmp_path / "none.mat")
    with pytest.raises(UserError, match="neither a .mat nor a .ts"):
        multiview.read(Path("file.csv"))


TS = "# a comment\n@problemName {name}\n@timeStamps false\n@classLabel true up down\n@data\n"


def series(tmp_path, name="Small"):
    for part, shift in (("TRAIN", 0), ("TEST", 10)):
        lines = [f"{shift + 1},2,3:4,5:{shift}.5,0,1:up", f"7,{shift + 8},9:1,2,3:0,0,1:down"]
        (tmp_path / f"{name}_{part}.ts").write_text(TS.format(name=name) + "\n".join(lines) + "\n")
    return tmp_path / f"{name}_TRAIN.ts"


def test_time_series(tmp_path):
    views = multiview.read(series(tmp_path))
    assert list(views.arrays) == ["channel1", "channel2", "channel3"]
    assert views.labels == ["up", "down"] * 2 and views.test.tolist() == [False, False, True, True]
    assert views.arrays["channel1"][:, :, 0].tolist() == [[1, 2, 3], [7, 8, 9], [11, 2, 3], [7, 18, 9]]
    assert views.arrays["channel2"][0, :, 0].tolist() == [4, 5, 0]
    data = datasets["multiview"](Options.make(dataset="multiview", multiview=series(tmp_path), resplit=1))
    assert [view.encoder for view in data.modalities.values()] == ["fcn"] * 3
    views = multiview.read(series(tmp_path), {"x": "1+3", "y": "2"})
    assert views.arrays["x"][2].tolist() == [[11, 10.5], [2, 0], [3, 1]] and views.arrays["y"].shape == (4, 3, 1)
    with pytest.raises(UserError, match="has the channels 1 to 3"):
        multiview.read(series(tmp_path), {"x": "1+4"})


def test_time_series_that_cannot_be_read(tmp_path):
    path = series(tmp_path)
    text = path.read_text()
    for old, new, message in (
        ("timeStamps false", "timeStamps true", "no time stamps"),
        ("classLabel true up down", "classLabel false", "@classLabel true"),
        ("1,2,3:", "?,2,3:", "line 6 has values that are not numbers"),
        ("1,2,3:", "", "number of channels"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            multiview.read(path)


REAL = {
    "handwritten_6views.mat": ({"x1": 240, "x2": 76, "x3": 216, "x4": 47, "x5": 64, "x6": 6}, 2000, 10, 400),
    "100Leaves.mat": ({"X1": 64, "X2": 64, "X3": 64}, 1600, 100, None),
    "BasicMotions_TRAIN.ts": ({"accelerometer": 3, "gyroscope": 3}, 80, 4, 40),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name):
    path = Path(os.environ.get("UDI_DATA", "")) / "multiview" / name
    if not path.exists():
        pytest.skip(f"needs {name} in multiview/ below UDI_DATA")
    widths, count, classes, tested = REAL[name]
    views = multiview.read(path)
    assert {m: x.shape[-1] for m, x in views.arrays.items()} == widths
    assert len(views.labels) == count and len(set(views.labels)) == classes
    assert (views.test is None) == (tested is None) and (tested is None or views.test.sum() == tested)
    options = dict(multiview=name, data_root=path.parent, epochs=6, batch_size=16, baselines=[], progress=False)
    metrics = train("multiview", "ensemble", **options).metrics
    assert metrics["fused"]["test_acc"] > 0.6
