"""Manifests: all kinds of files can be trained on, splits follow their rules, damage is reported before training."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason='needs the extra of files: pip install -e ".[data]"')
pytest.importorskip("soundfile", reason='needs the extra of files: pip install -e ".[data]"')

from udi_trainer import UserError, load, train
from udi_trainer.data.kinds import natural_sort_key
from udi_trainer.data.manifest import build
from udi_trainer.data.rows import read
from udi_trainer.options import Options


def dataset(path, options, **more):
    given = {name: value for name, value in options.items() if name != "progress"} | more
    return build(read(path), Options.make(dataset="manifest", **given))


def test_pairs_of_images_and_sounds_out_of_the_box(folder, options, tmp_path):
    """Recordings of different lengths, with no option but the manifest. Only both modalities reveal the label."""
    path = folder.manifest(folder.pairs(120))
    result = train("manifest", "ensemble", manifest=path, epochs=12, batch_size=16, out=tmp_path / "run", **options)
    alone = [figures["test_acc"] for figures in result.metrics["unimodal"].values()]
    assert result.metrics["fused"]["test_acc"] > max(alone) + 0.2
    data = dataset(path, options)
    assert torch.equal(load(tmp_path / "run", device="cpu").predict(data.test), result.predict(data.test))


def test_all_kinds_in_one_manifest(folder, options):
    rows = []
    for i in range(30):
        c = i % 3
        rows.append({
            "photo": folder.image(f"p/{i}.jpg", c, size=(14 + i % 3, 11)),
            "scan": folder.gray(f"s/{i}.png", 60 * c),
            "clip": folder.clip(f"c/{i}", c, 3 + i % 3),
            "list": ";".join(folder.image(f"l/{i}-{k}.png", c) for k in range(2)),
            "motion": folder.flow(f"m/{i}", c),
            "sound": folder.sound(f"a/{i}.flac", c, 0.1 + 0.01 * i, rate=(4000, 8000)[i % 2]),
            "vector": folder.array(f"v/{i}.npy", np.full(5, c) + folder.random.normal(size=5)),
            "sequence": folder.array(f"q/{i}.npy", c + folder.random.normal(size=(8 + i % 4, 3))),
            "title": ["red fish soup", "green leaf salad", "Brown bread, baked"][c],
            "pulse": 60 + c, "age": 30 + i, "label": c,
        })  # fmt: skip
    path = folder.manifest(rows)
    data = dataset(path, options, frames=2, tables={"vitals": "pulse"})
    shapes = {m: tuple(view.sample(data.train).shape[1:]) for m, view in data.modalities.items()}
    assert shapes == {
        "photo": (3, 16, 16), "scan": (1, 12, 12), "clip": (2, 3, 12, 12), "list": (2, 3, 12, 12),
        "motion": (2, 2, 12, 12), "sound": (1, 47, 25), "vector": (5,), "sequence": (11, 3), "title": (3,),
        "vitals": (1,), "table": (1,),
    }  # fmt: skip
    result = train(
        "manifest", manifest=path, frames=2, tables={"vitals": "pulse"}, epochs=2, batch_size=8, baselines=["joint"],
        anchor="title", augment=["crop", "flip", "spec"], encoder={"photo": "resnet18"}, features=32, **options,
    )  # fmt: skip
    assert result.metrics["modalities"].keys() == shapes.keys()
    assert result.models["photo"].head.in_features == 32


def test_class_names_and_ids(folder, options):
    rows = [row | {"id": f"take {i}"} for i, row in enumerate(folder.pairs(24))]
    data = dataset(folder.manifest(rows), options)
    assert data.class_names == ["a", "b", "c", "d"]
    for split in data.splits().values():
        for name, label in zip(split.ids, split.labels.tolist(), strict=True):
            assert int(name.split()[1]) % 4 == label


def test_labels_of_numbers_in_their_order(folder, options):
    rows = [row | {"label": 5 + i % 8} for i, row in enumerate(folder.pairs(40))]
    assert dataset(folder.manifest(rows), options).class_names == ["5", "6", "7", "8", "9", "10", "11", "12"]


@pytest.mark.parametrize("nothing", ["-1", "nan", ""])
def test_labels_that_mean_none(folder, options, nothing):
    """As from Python; they are no class, and training has the samples."""
    parts = ("train", "train", "val", "test")
    rows = [row | {"split": parts[i // 4 % 4], "label": "0123"[i % 4]} for i, row in enumerate(folder.pairs(48))]
    for row in rows[:4]:
        row["label"] = nothing
    data = dataset(folder.manifest(rows), options)
    assert data.class_names == ["0", "1", "2", "3"] and data.train.labels.tolist()[:8] == [-1, -1, -1, -1, 0, 1, 2, 3]


# --- splits ---


def test_given_splits_are_kept_and_an_absent_one_drawn(folder, options):
    rows = [row | {"split": "test" if i < 12 else "train"} for i, row in enumerate(folder.pairs(48))]
    data = dataset(folder.manifest(rows), options)
    assert len(data.test) == 12 and len(data.val) in (6, 7, 8) and len(data.train) + len(data.val) == 36
    assert data.test.ids == [str(line) for line in range(2, 14)]


def test_a_group_in_two_splits_is_refused(folder, options):
    rows = [
        row | {"split": ("train", "val", "test")[i // 4 % 3], "group": "anna" if i in (0, 5) else f"g{i}"}
        for i, row in enumerate(folder.pairs(24))
    ]
    with pytest.raises(UserError, match=r"line 7: group 'anna' is in val, and in train \(.*line 2\)"):
        dataset(folder.manifest(rows), options)


# --- damage ---


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def test_one_line_that_names_row_and_file(folder, options):
    """Each kind of damage, one at a time; --skip-bad leaves exactly that sample out."""
    rows = folder.pairs(48)
    images, sounds = folder.path / "images", folder.path / "sounds"
    damages = {
        "no image": (lambda: cut(images / "5.png", 100), "line 7: column image: .*5.png: a damaged image"),
        "not an image": (
            lambda: (images / "5.png").write_text("hello"),
            "line 7: column image: .*5.png: not a readable image",
        ),
        "missing": (lambda: (images / "5.png").unlink(), "line 7: column image: .*5.png: No such file"),
        "truncated": (lambda: cut(sounds / "5.wav", 300), "line 7: column sound: .*5.wav: truncated, 300 bytes of"),
        "empty": (lambda: cut(sounds / "5.wav", 0), "line 7: column sound: .*5.wav: not readable as sound"),
        "folder": (lambda: ((images / "5.png").unlink(), (images / "5.png").mkdir()), "line 7: column image: .*5.png"),
    }
    for damage, wanted in damages.values():
        for name, level in (("image", 5 % 4 // 2), ("sound", 1)):
            path = folder.path / rows[5][name]
            if path.is_dir():
                path.rmdir()
            getattr(folder, name)(rows[5][name], level)
        path = folder.manifest(rows)
        damage()
        with pytest.raises(UserError, match=wanted) as caught:
            dataset(path, options)
        assert "\n" not in str(caught.value) and "--skip-bad" in str(caught.value)
        data = dataset(path, options, skip_bad=True)
        assert sum(map(len, data.splits().values())) == 47
        assert "7" not in [name for split in data.splits().values() for name in split.ids]


@pytest.mark.parametrize("change, wanted", [
    ({"label": "", "split": "val"}, "line 7: no label"),
    ({"label": "-1", "split": "val"}, "line 7: label -1 means no label .only training rows may lack one"),
    ({"label": "NaN", "split": "test"}, "line 7: label NaN means no label"),
    ({"split": "tset"}, "line 7: split 'tset' is not train"),
    ({"sound": "", "split": "train"}, "line 7: column sound is empty .--allow-missing"),
    ({"sound": "", "image": "", "number": ""}, "line 7: all modalities are empty"),
    ({"id": "3"}, r"line 7: id '3' is also used in .*line 5"),
    ({"number": "nan"}, "line 7: column number contains 'nan', which is not a finite number"),
    ({"number": "1e39"}, "line 7: column number contains '1e39'"),
    ({"number": "unknown"}, "line 7: column number contains 'unknown'"),
    ({"label": "new", "split": "val"}, "line 7: label 'new' is in val, but no training sample has it"),
    ({"number": ""}, "line 7: column table is empty"),
])  # fmt: skip
def test_damaged_rows(folder, options, change, wanted):
    rows = [
        row | {"split": ("train", "train", "val", "test")[i // 4 % 4], "id": i, "number": i}
        for i, row in enumerate(folder.pairs(48))
    ]
    rows[5] |= change
    path = folder.manifest(rows)
    with pytest.raises(UserError, match=wanted):
        dataset(path, options)
    assert sum(map(len, dataset(path, options, skip_bad=True).splits().values())) == 47


def test_nan_feature_and_wrong_shape(folder, options):
    rows = [row | {"f": folder.array(f"f/{i}.npy", np.ones(4) * i)} for i, row in enumerate(folder.pairs(24))]
    path = folder.manifest(rows)
    folder.array("f/3.npy", np.array([1, np.nan, 0, 0]))
    with pytest.raises(UserError, match="line 5: column f: .*3.npy: NaN or inf"):
        dataset(path, options)
    folder.array("f/3.npy", np.array([1, 1e39, 0, 0]))
    with pytest.raises(UserError, match="line 5: column f: .*3.npy: NaN or inf as float32"):
        dataset(path, options)
    folder.array("f/3.npy", np.ones(5))
    with pytest.raises(UserError, match=r"line 5: column f: .*3.npy: has shape \(5,\), the others have \(4,\)"):
        dataset(path, options)


def test_empty_frame_folder_and_uneven_flow(folder, options):
    rows = [row | {"clip": folder.clip(f"c/{i}", 1, 2), "flow": folder.flow(f"w/{i}", 1, 2)}
            for i, row in enumerate(folder.pairs(24))]  # fmt: skip
    path = folder.manifest(rows)
    (folder.path / "w/2/v/f2.jpg").unlink()
    for frame in (folder.path / "c/4").iterdir():
        frame.unlink()
    with pytest.raises(UserError, match="line 4: column flow: .*2 frames of u, 1 of v; and 1 more"):
        dataset(path, options)
    folder.flow("w/2", 1, 2)
    with pytest.raises(UserError, match="line 6: column clip: .*c/4: a folder without images"):
        dataset(path, options)
    shutil.rmtree(folder.path / "w/2/v")
    with pytest.raises(UserError, match="line 4: column flow: .*w/2/v: No such file or directory"):
        dataset(path, options)


def test_tensors_of_a_file(folder, options):
    rows = folder.pairs(24)
    for i, row in enumerate(rows):
        row["f"] = f"{i}.pt"
        torch.save(torch.full((3,), float(i), requires_grad=True), folder.path / row["f"])
    path = folder.manifest(rows)
    assert dataset(path, options).train.stored["f"].shape[1:] == (3,)
    torch.save({"x": 1}, folder.path / "4.pt")
    with pytest.raises(UserError, match="line 6: column f: .*4.pt: .*not a tensor, but dict"):
        dataset(path, options)
    (folder.path / "4.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="line 6: column f: .*4.pt: not a tensor") as caught:
        dataset(path, options)
    assert "weights_only" not in str(caught.value)


def test_class_absent_from_training(folder, options):
    rows = [row | {"split": ("train", "val", "test")[i // 4 % 3]} for i, row in enumerate(folder.pairs(24))]
    rows[9]["label"] = "new"
    with pytest.raises(UserError, match="line 11: label 'new' is in test, but no training sample has it"):
        dataset(folder.manifest(rows), options)
    data = dataset(folder.manifest(rows), options, skip_bad=True)
    assert len(data.test) == 7 and data.class_names == ["a", "b", "c", "d"]


@pytest.mark.parametrize("allow_missing, wanted", [(False, "is left for train"), (True, "is left that has sound")])
def test_nothing_that_can_be_read_is_left(folder, options, allow_missing, wanted):
    rows = folder.pairs(24)
    shutil.rmtree(folder.path / "sounds")
    for row in rows[12:] if allow_missing else []:
        row["sound"] = ""
    with pytest.raises(UserError, match=wanted):
        dataset(folder.manifest(rows), options, skip_bad=True, allow_missing=allow_missing)


@pytest.mark.parametrize("text", ["long words " * 50, "~ about; twenty", "~unknown/name of a dish"])
def test_text_that_is_no_path(folder, options, caplog, text):
    rows = [row | {"title": text} for row in folder.pairs(24)]
    with caplog.at_level("WARNING", logger="udi_trainer"):
        data = dataset(folder.manifest(rows), options)
    assert data.train.stored["title"].dtype == torch.int32 and not caplog.text


@pytest.mark.parametrize("text, wanted", [
    ("", "needs a header"),
    ("image,sound\na.png,b.wav\n", "needs a header with a column label"),
    ("image,label,label\na.png,1,1\n", "duplicate or empty column names"),
    ("image,label\na.png,1,2\n", "line 2 has 3 cells, the header has 2"),
    ("image,label\n,1\n", "column image is empty"),
    ("film,label\na.xyz,1\n", "contains .a.xyz., and there is no such file: give --kinds film=KIND, one of image"),
    ('image,label\n"a.png,1\n', "not a UTF-8 CSV"),
])  # fmt: skip
def test_manifest_that_is_none(tmp_path, options, text, wanted):
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=wanted):
        dataset(path, options)


def test_the_same_file_in_training_and_test_is_told(folder, options, caplog):
    rows = [row | {"split": ("train", "val", "test")[i // 4 % 3]} for i, row in enumerate(folder.pairs(24))]
    rows[8]["sound"] = rows[0]["sound"]
    with caplog.at_level("WARNING", logger="udi_trainer"):
        dataset(folder.manifest(rows), options)
    assert "line 10: sound is the same as that of a training sample" in caplog.text


# --- paths ---


def test_odd_paths(folder, options, tmp_path, monkeypatch):
    """Spaces, semicolons, non-ASCII names, links, a relative manifest, a read-only folder."""
    rows = folder.pairs(24)
    for i, name in enumerate(("bild mit platz.png", "ä;ö.png", "图像.png")):
        os.rename(folder.path / rows[i]["image"], folder.path / "images" / name)
        rows[i]["image"] = f"images/{name}"
    (folder.path / "linked.wav").symlink_to(folder.path / rows[3]["sound"])
    rows[3]["sound"] = "linked.wav"
    rows[4]["sound"] = str(folder.path / rows[4]["sound"])
    path = folder.manifest(rows, "mein manifest.csv")
    for place in (folder.path, folder.path / "images"):
        place.chmod(0o555)
    monkeypatch.chdir(tmp_path)
    try:
        data = dataset(Path("files") / path.name, options)
    finally:
        for place in (folder.path, folder.path / "images"):
            place.chmod(0o755)
    assert sum(map(len, data.splits().values())) == 24


def test_paths_of_windows(folder, options):
    rows = [row | {"image": row["image"].replace("/", "\\")} for row in folder.pairs(24)]
    with pytest.raises(UserError, match=r"line 2: .*images\\0.png: No such file or directory: separate folders by /"):
        dataset(folder.manifest(rows), options)


# --- missing modalities ---


def test_missing_modalities(folder, options, tmp_path):
    rows = [row | {"split": ("train", "train", "val", "test")[i // 4 % 4]} for i, row in enumerate(folder.pairs(96))]
    for i in (0, 4, 16, 18, 33):
        rows[i]["sound"] = ""
    rows[21]["image"] = ""
    for i in (12, 13, 30):
        rows[i]["sound"] = ""  # in test
    rows[14]["image"] = ""
    path = folder.manifest(rows)
    given = {"manifest": path, "epochs": 6, "batch_size": 8, "baselines": ["joint"], **options}
    with pytest.raises(UserError, match="line 2: column sound is empty"):
        train("manifest", **given)
    for anchor in ("image", "sound"):
        result = train("manifest", allow_missing=True, anchor=anchor, out=tmp_path / anchor, **given)
        assert result.metrics["fused"]["without"].keys() == {"image", "sound"}
        data = dataset(path, options, allow_missing=True)
        fused = result.predict(data.test)
        assert fused.isfinite().all()
        lines = (tmp_path / anchor / "predictions.csv").read_text().splitlines()
        assert len(lines) == 25 and lines[0].startswith("id,label,")


def test_a_nul_character(tmp_path):
    (tmp_path / "m.csv").write_text("label,x,y\n0,a\0b,1\n1,c,2\n")
    with pytest.raises(UserError, match="NUL"):
        read(tmp_path / "m.csv")


def test_a_file_whose_name_ends_like_a_row(tmp_path, options):
    """² is a digit to Python, but no number."""
    np.save(tmp_path / "x.npy", np.ones((4, 3)))
    rows = ["label,x,y"] + [f"{i % 2},x.npy#²,{i}" for i in range(12)]
    (tmp_path / "m.csv").write_text("\n".join(rows))
    with pytest.raises(UserError, match="x.npy#²"):
        dataset(tmp_path / "m.csv", options, kinds="x=array")


def test_words_that_are_names_of_folders(folder, options):
    """Such as a word that one of the folders of clips has as its name."""
    rows = [row | {"place": ["images", "street", "home"][i % 3]} for i, row in enumerate(folder.pairs(24))]
    assert dataset(folder.manifest(rows), options).modalities["place"].encoder == "words"


# --- what is no data ---


def test_hidden_files_are_no_frames(folder, options):
    """As macOS, Windows and notebooks leave them; and frames whose names hold digits that are no numbers."""
    rows = [row | {"clip": folder.clip(f"c/{i}", i % 2, 2)} for i, row in enumerate(folder.pairs(24))]
    for row in rows:
        clip = folder.path / row["clip"]
        for name in ("._frame1.jpg", ".DS_Store", "Thumbs.db"):
            (clip / name).write_bytes(b"no picture")
        folder.image(f"{row['clip']}/.ipynb_checkpoints/frame1-checkpoint.jpg", 0)
    data = dataset(folder.manifest(rows), options)
    assert data.train.stored["clip"].shape[1] == 3  # two frames, one of them repeated
    names = [Path(name) for name in ("1²10.png", "1²2.png", "1.png", "٣.png")]
    assert [path.name for path in sorted(names, key=natural_sort_key)] == ["1.png", "1²2.png", "1²10.png", "٣.png"]


def test_a_pointer_of_git_lfs(folder, options):
    rows = [row | {"f": folder.array(f"f/{i}.npy", np.ones(4) * i)} for i, row in enumerate(folder.pairs(24))]
    path = folder.manifest(rows)
    for name in ("images/5.png", "sounds/5.wav", "f/5.npy"):
        saved = (folder.path / name).read_bytes()
        (folder.path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:c6f94\nsize 72862\n")
        with pytest.raises(UserError, match=f"line 7: .*{name}: a Git LFS pointer, .* run git lfs pull"):
            dataset(path, options)
        (folder.path / name).write_bytes(saved)
    assert len(dataset(path, options).train)


def test_arrays_that_are_none(folder, options):
    """The message says what to do, and not to load Python objects, which would run code."""
    rows = [row | {"f": folder.array(f"f/{i}.npy", np.ones(4) * i)} for i, row in enumerate(folder.pairs(24))]
    (folder.path / "f/3.h5").write_bytes(b"\x89HDF")
    (folder.path / "f/3.csv").write_text("1,2,3,4\n")
    for name in ("f/3.h5", "f/3.csv"):
        path = folder.manifest([row | ({"f": name} if i == 3 else {}) for i, row in enumerate(rows)])
        with pytest.raises(UserError, match=f"line 5: column f: .*{name}: arrays are read from .npy, .npz, .pt"):
            dataset(path, options, kinds="f=array")
    np.save(folder.path / "f/3.npy", np.array([1, "a", None], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="3.npy: not a readable array .it holds Python objects") as caught:
        dataset(folder.manifest(rows), options)
    assert "pickle" not in str(caught.value)
    (folder.path / "f/3.npy").write_text("1,2,3,4\n")
    with pytest.raises(UserError, match="3.npy: not a readable array .it holds Python objects, or is no such file"):
        dataset(folder.manifest(rows), options)


def test_sequences_along_the_second_axis(folder, options):
    """As librosa makes them: (coefficients, times)."""
    rows = [
        row | {"f": folder.array(f"f/{i}.npy", np.ones((13, 40 - (i == 3))))} for i, row in enumerate(folder.pairs(24))
    ]
    with pytest.raises(UserError, match=r"shape \(13, 39\), .*differ along their first axis, so save them as \(steps,"):
        dataset(folder.manifest(rows), options)
