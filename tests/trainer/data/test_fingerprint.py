"""What a run was given: the same elsewhere, another after any change; compared on resume."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from udi_trainer import Split, UserError, train
from udi_trainer.data.fingerprint import difference, fingerprint


def changed_split(data, **parts):
    return replace(data, test=replace(data.test, **parts))


def swapped(t):
    t = t.clone()
    t[[0, 1]] = t[[1, 0]]
    return t


class Tanh(nn.Sequential):
    """Of the same shapes as the trainer's MLP."""

    def __init__(self, shape):
        n = shape.numel()
        super().__init__(nn.Flatten(), nn.Linear(n, 128), nn.Tanh(), nn.Linear(128, 64), nn.ReLU())


CHANGES = {
    "test labels": lambda data: changed_split(data, labels=swapped(data.test.labels)),
    "test image": lambda data: changed_split(data, stored=data.test.stored | {"image": data.test.stored["image"] + 1}),
    "test ids": lambda data: changed_split(data, ids=[f"sample {i}" for i in range(len(data.test))]),
    "classes": lambda data: replace(data, class_names=["a", "b"]),
    "encoder of sensor": lambda data: replace(
        data, modalities=data.modalities | {"sensor": replace(data.modalities["sensor"], encoder=Tanh)}
    ),
}


@pytest.mark.parametrize("part", CHANGES)
def test_each_change_shows_in_its_part(mixed, part):
    before = fingerprint(mixed)
    assert fingerprint(mixed) == before
    assert difference(fingerprint(CHANGES[part](mixed)), before) == [part]


def test_random_state_is_left_alone(mixed):
    before = torch.get_rng_state()
    fingerprint(mixed)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("part", CHANGES)
@pytest.mark.parametrize("finished", [True, False])
def test_resume_refuses_other_data(mixed, part, finished):
    """A training sample that became a test sample, permuted labels, other values, another encoder."""
    train(mixed, "ensemble", epochs=1, out="run", progress=False)
    before = Path("run/metrics.json").read_bytes()
    if not finished:
        Path("run/metrics.json").unlink()
    with pytest.raises(UserError, match=f"the data is not that of this run, it differs in {part}: give the same"):
        train(CHANGES[part](mixed), "ensemble", resume="run", progress=False)
    assert Path("run/metrics.json").exists() == finished
    train(mixed, "ensemble", resume="run", progress=False)
    if finished:
        assert Path("run/metrics.json").read_bytes() == before


def test_a_checkpoint_of_another_run(mixed):
    train(mixed, "ensemble", epochs=1, out="other", progress=False)
    train(CHANGES["test labels"](mixed), "ensemble", epochs=1, out="run", progress=False)
    Path("run/metrics.json").unlink()
    name = "checkpoints/anchor-audio.pt"
    Path("run", name).write_bytes(Path("other", name).read_bytes())
    with pytest.raises(UserError, match="anchor-audio.pt belongs to a run with other data or encoders: delete it"):
        train(CHANGES["test labels"](mixed), "ensemble", resume="run", progress=False)


def test_a_folder_of_an_older_version(mixed, caplog):
    train(mixed, "ensemble", epochs=1, out="run", progress=False)
    config = json.loads(Path("run/config.json").read_text())
    saved = config.pop("fingerprint")
    Path("run/config.json").write_text(json.dumps(config))
    train(mixed, "ensemble", resume="run", progress=False)
    assert "has no fingerprint of its data: it is added" in caplog.text
    assert json.loads(Path("run/config.json").read_text())["fingerprint"] == saved


@pytest.mark.parametrize(
    "split, wanted",
    [
        ({"ids": ["a"]}, "test ids has 1 names for 41 samples"),
        ({"ids": "abc"}, "test ids must be a list of str, got str"),
        ({"ids": range(41)}, "test ids must be a list of str, got range"),
        ({"stored": torch.zeros(41, 5).to_sparse()}, "test vector is sparse .*: give a dense tensor"),
        ({"stored": torch.zeros(41, 5, device="meta")}, "test vector is on the device meta"),
        ({"stored": torch.zeros(41, 5, dtype=torch.complex64)}, "test vector is of torch.complex64"),
        ({"stored": torch.zeros(41, 5).to(torch.float8_e4m3fn)}, "test vector is of torch.float8_e4m3fn"),
        ({"stored": torch.quantize_per_tensor(torch.zeros(41, 5), 1.0, 0, torch.qint8)}, "test vector is quantized"),
        ({"stored": torch.nested.nested_tensor([torch.zeros(5)] * 41)}, "test vector is nested"),
    ],
)
def test_what_no_training_can_use(mixed, split, wanted):
    if "stored" in split:
        split = {"stored": mixed.test.stored | {"vector": split["stored"]}}
    with pytest.raises(UserError, match=wanted):
        train(changed_split(mixed, **split), epochs=1, progress=False)


def test_class_names(mixed):
    with pytest.raises(UserError, match="class_names has 3 names for 2 classes"):
        train(replace(mixed, class_names=["a", "b", "c"]), epochs=1, progress=False)


def test_numpy_s_number_of_classes(mixed):
    numpy = pytest.importorskip("numpy")
    result = train(replace(mixed, classes=numpy.int64(2)), "joint", epochs=1, progress=False)
    assert result.predict(Split(mixed.test.labels, mixed.test.stored)).shape == (41, 2)


def fewer(rows):
    return rows[:-4]


def swapped_labels(rows):
    return [row | {"label": {"a": "b", "b": "a"}[row["label"]]} for row in rows]


def other_split(rows):
    return [row | {"split": "test" if i == 0 else row["split"]} for i, row in enumerate(rows)]


def other_value(rows):
    return [row | ({"x": "99"} if i == 7 else {}) for i, row in enumerate(rows)]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change, wanted", [
    (fewer, "test ids, test labels"), (swapped_labels, "differs in test labels, train labels, val labels"),
    (other_split, "test ids"), (other_value, "differs in train table"),
])  # fmt: skip
def test_resume_refuses_a_manifest_that_has_changed(tmp_path, change, wanted, finished):
    """Rows gone, labels swapped, a row in another split, another number; the run's figures stay as they are."""
    splits = ("train", "val", "test")
    rows = [
        {"label": "ab"[i % 2], "x": f"{i % 7}", "text": f"word{i * i % 11}", "split": splits[i // 2 % 3]}
        for i in range(60)
    ]

    def written(rows):
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        Path("m.csv").write_text("\n".join(lines) + "\n")

    given = {"progress": False, "cache_dir": str(tmp_path / "cache")}
    written(rows)
    train("manifest", "ensemble", manifest="m.csv", epochs=1, out="run", **given)
    before = Path("run/metrics.json").read_bytes()
    if not finished:
        Path("run/metrics.json").unlink()
    written(change(rows))
    with pytest.raises(UserError, match=f"the data is not that of this run, it .*{wanted}.*: give the same data"):
        train("manifest", resume="run", **given)
    assert Path("run/metrics.json").exists() == finished
    written(rows)
    train("manifest", resume="run", **given)
    again = json.loads(Path("run/metrics.json").read_bytes())
    assert again["fused"] == json.loads(before)["fused"]
