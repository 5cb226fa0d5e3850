"""New files are predicted as the run predicts its own."""

import csv
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason='needs the extra of files: pip install -e ".[data]"')
pytest.importorskip("soundfile", reason='needs the extra of files: pip install -e ".[data]"')

from udi_trainer import UserError, load, train
from udi_trainer.command import main

from .data.files import write_video
from .helpers import one_line


def lines(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def every_kind(folder, count=60):
    """Rows of every kind; the second half of the samples has other sizes than the first, and fewer categories."""
    rows = []
    for i in range(count):
        c, late = i % 3, i >= count // 2
        rows.append({
            "id": f"s{i}", "label": "abc"[c],
            "photo": folder.image(f"p/{i}.jpg", c, size=(40 if late else 14 + i % 3, 11)),
            "clip": folder.clip(f"c/{i}", c, 9 if late else 3 + i % 3),
            "motion": folder.flow(f"motion/{i}", c),
            "sound": folder.sound(f"a/{i}.wav", c, 0.3 if late else 0.1, rate=(4000, 8000)[i % 2]),
            "vector": folder.array(f"v/{i}.npy", np.full(5, c) + folder.random.normal(size=5)),
            "sequence": folder.array(f"q/{i}.npy", c + folder.random.normal(size=(8 + i % 4, 3))),
            "title": ["red fish soup", "green leaf salad today", "Brown bread, baked"][c],
            "pulse": "" if i % 7 == 0 else 60 + i % 5, "sex": "fmx"[i % 3 if late else i % 2],
            "split": ("train", "train", "val", "test")[i // 3 % 4],
        })  # fmt: skip
    return rows


@pytest.mark.parametrize("method, refit", [("ensemble", False), ("joint", False), ("ensemble", True)])
def test_figures_of_the_run_for_the_same_files(folder, options, method, refit):
    """Without labels and splits, and in another order. The run's other files are not read, and may be gone."""
    rows = every_kind(folder)
    tables = "vitals=pulse+sex"
    train("manifest", method, manifest=folder.manifest(rows), tables=tables, augment="crop", epochs=2, batch_size=8,
          baselines=[], refit=refit, out="run", **options)  # fmt: skip
    for row in rows:
        if row["split"] != "test":
            shutil.rmtree(folder.path / row["clip"])
    new = [{n: x for n, x in row.items() if n not in ("label", "split")} for row in rows if row["split"] == "test"]
    path = folder.manifest(new[::-1], "new.csv")
    given = ["predict", "run", path, "--out", "p.csv", "--device", "cpu", "--cache-dir", options["cache_dir"]]
    assert main([str(word) for word in given]) == 0
    predicted, wanted = lines("p.csv"), lines("run/predictions.csv")
    assert [row["id"] for row in predicted] == [row["id"] for row in wanted[::-1]]
    for ours, theirs in zip(predicted[::-1], wanted, strict=True):
        assert {n: ours[n] for n in theirs if n != "label"} == {n: x for n, x in theirs.items() if n != "label"}
        classes = {name: float(ours[f"p_{name}"]) for name in "abc"}
        assert sum(classes.values()) == pytest.approx(1, abs=1e-5) and ours["label"] == ""
        assert ours["fused"] == max(classes, key=classes.get)
        assert float(ours["probability"]) == pytest.approx(max(classes.values()), abs=1e-4)


def test_videos(folder, options):
    """Their frames and their sound tracks; the new clips have another length, size and format."""
    pytest.importorskip("av", reason='needs PyAV: pip install -e ".[video]"')
    rows = []
    for i in range(18):
        name, late = f"{i}.{'mkv' if i > 15 else 'mp4'}", i > 15
        sound = 0.4 * np.sin(np.arange(16000 if late else 8000) * (0.2 + 0.2 * (i % 2)))
        write_video(
            folder.path / name, [60 + 100 * (i % 2)] * (12 if late else 5), sound=sound, size=(64 if late else 32, 16)
        )
        split = ("train", "train", "val", "test")[i // 2 % 4]
        rows.append({"id": name, "film": name, "track": name, "label": "ab"[i % 2], "split": split})
    kinds = {"film": "video", "track": "videosound"}
    path = folder.manifest(rows[:16])
    train(
        "manifest", "ensemble", manifest=path, kinds=kinds, epochs=1, batch_size=4, baselines=[], out="run", **options
    )
    assert predicted(folder, options, rows[6:]) == 0
    wanted = {row["id"]: row for row in lines("run/predictions.csv")}
    ours = {row["id"]: row for row in lines("p.csv")}
    assert len(wanted) == 4 and len(ours) == 12
    for name, row in wanted.items():
        assert {n: ours[name][n] for n in row} == row


def test_sizes_that_differ_are_handled_as_in_training(folder, options):
    """Larger pictures, longer sound and text, an unknown word, empty cells: stored in the shapes of the run."""
    rows = every_kind(folder, 36)[:18]
    tables = "vitals=pulse+sex"
    train("manifest", "ensemble", manifest=folder.manifest(rows), tables=tables, epochs=1, batch_size=4,
          baselines=[], out="run", **options)  # fmt: skip
    new = [row | {"title": "soup " * 30, "pulse": ""} for row in every_kind(folder, 36)[18:]]
    new[0] |= {"photo": "", "pulse": "", "sex": ""}
    new[1]["sequence"] = folder.array("q/long.npy", np.ones((40, 3)))
    predictor = load("run", device="cpu")
    split = predictor.read(folder.manifest(new, "new.csv"), cache_dir=options["cache_dir"])
    saved = torch.load("run/checkpoints/model.pt", weights_only=True)["modalities"]
    assert {m: t.shape[1:] for m, t in split.stored.items() if t.dim() > 1} == {
        m: spec["sample"][m].shape[1:] for m, spec in saved.items()
    }
    words = sorted({row["sex"] for row in rows if row["split"] == "train"})
    assert split.stored["vitals"][2, -len(words) - 1 :].tolist() == [0.0] * len(words) + [1.0]  # x
    assert not split.stored["photo present"][0] and split.stored["photo present"][1:].all()
    assert not split.stored["vitals present"][0]
    assert [predictor.class_names[c] for c in split.labels] == [row["label"] for row in new]
    assert predictor.predict(split).sum(1) == pytest.approx(1)


@pytest.fixture
def finished(folder, options):
    """The rows of a manifest that the folder "run" was trained on."""
    rows = [row | {"id": f"s{i}"} for i, row in enumerate(folder.pairs(48))]
    train("manifest", "ensemble", manifest=folder.manifest(rows), epochs=1, batch_size=8, baselines=[], out="run",
          **options)  # fmt: skip
    return rows


def predicted(folder, options, rows, *more):
    path = folder.manifest(rows, "new.csv")
    given = ["predict", "run", path, "--out", "p.csv", "--device", "cpu", "--cache-dir", options["cache_dir"], *more]
    return main([str(word) for word in given])


def test_damaged_new_files(folder, options, finished, capsys):
    (folder.path / finished[3]["image"]).write_bytes(b"no picture")
    (folder.path / finished[5]["sound"]).unlink()
    assert predicted(folder, options, finished) == 2
    assert "line 5: column image" in one_line(capsys.readouterr().err)
    assert predicted(folder, options, finished, "--skip-bad") == 0
    assert "left out" in capsys.readouterr().err
    assert [row["id"] for row in lines("p.csv")] == [f"s{i}" for i in range(48) if i not in (3, 5)]


def test_columns_of_a_new_manifest(folder, options, finished, capsys):
    assert predicted(folder, options, [row | {"notes": "kept"} for row in finished]) == 0
    assert "columns that the run does not read: notes" in capsys.readouterr().out
    assert [row["label"] for row in lines("p.csv")] == [row["label"] for row in finished]
    assert predicted(folder, options, [{n: x for n, x in row.items() if n != "sound"} for row in finished]) == 2
    assert "new.csv lacks the column sound, which the run reads" in one_line(capsys.readouterr().err)
    assert predicted(folder, options, [row | {"sound": ""} for row in finished]) == 0
    assert {row["missing"] for row in lines("p.csv")} == {"sound"}
    assert predicted(folder, options, [row | {"sound": "", "image": ""} for row in finished]) == 2
    assert "line 2: all modalities are empty; and 47 more" in one_line(capsys.readouterr().err)


def test_runs_that_read_no_files(mixed, folder, options):
    train(mixed, "joint", epochs=1, out="run", progress=False)
    with pytest.raises(UserError, match="has not read its data from files by columns"):
        load("run", dataset=mixed).read(folder.manifest(folder.pairs(4)))


def test_an_output_that_cannot_be_written(folder, options, finished, capsys):
    given = ["predict", "run", str(folder.path / "data.csv"), "--out", "none/p.csv", "--device", "cpu"]
    assert main([*given, "--cache-dir", str(options["cache_dir"])]) == 2
    assert "none/p.csv cannot be written (No such file or directory)" in one_line(capsys.readouterr().err)
