"""Invalid data raises one clear error before training."""

import re
from dataclasses import replace

import pytest
import torch

from udi_trainer import Dataset, Modality, Split, UserError, train
from udi_trainer.data.check import check
from udi_trainer.data.pipelines import Features


def spoil(split, index, value):
    """Sets a label of the split."""

    def damage(data):
        getattr(data, split).labels[index] = value

    return damage


def replace_labels(split, change):
    def damage(data):
        part = getattr(data, split)
        part.labels = change(part.labels)

    return damage


def store(split, name, change):
    def damage(data):
        stored = getattr(data, split).stored
        stored[name] = change(stored[name])

    return damage


def put(index, value):
    def change(t):
        t[index] = value
        return t

    return change


def drop(split, name):
    return lambda data: getattr(data, split).stored.pop(name)


def rename(name):
    def damage(data):
        data.modalities[name] = data.modalities.pop("sensor")

    return damage


DAMAGES = [
    # lengths
    (store("train", "vector", lambda t: t[:-1]), "train vector has 100 samples, but there are 101 labels"),
    (store("val", "sound", lambda t: torch.cat((t, t))), "val sound has 74 samples, but there are 37 labels"),
    (replace_labels("test", lambda y: y[:40]), "test sound has 41 samples, but there are 40 labels"),
    (replace_labels("val", lambda y: y[:0]), "the val split is empty"),
    # labels
    (spoil("train", 5, 2), "train label 5 is 2: labels are 0 to 1, or -1 for unlabelled (1 of 101 are not)"),
    (spoil("train", 5, -100), "train label 5 is -100: labels are 0 to 1, or -1 for unlabelled (1 of 101 are not)"),
    (spoil("val", 3, -1), "val label 3 is -1: labels are 0 to 1 (1 of 37 are not)"),
    (spoil("test", slice(2, 4), 7), "test label 2 is 7: labels are 0 to 1 (2 of 41 are not)"),
    (replace_labels("train", torch.Tensor.float), "train labels must be int64 (N,), got torch.float32 (101,)"),
    (replace_labels("val", torch.Tensor.int), "val labels must be int64 (N,), got torch.int32 (37,)"),
    (replace_labels("test", lambda y: y[:, None]), "test labels must be int64 (N,), got torch.int64 (41, 1)"),
    (replace_labels("train", torch.Tensor.tolist), "train labels must be int64 (N,), got list"),
    (replace_labels("train", torch.zeros_like), "no training sample has label 1, of 2 classes"),
    (replace_labels("train", lambda y: y.where(y != 0, -1)), "no training sample has label 0, of 2 classes"),
    # values
    (store("train", "sound", put((100, 3, 1), float("nan"))), "train sound has NaN or inf in sample 100"),
    (store("val", "vector", put((0, 0), float("inf"))), "val vector has NaN or inf in sample 0"),
    (store("test", "vector", put((7, 4), -float("inf"))), "test vector has NaN or inf in sample 7"),
    (store("test", "sound", lambda t: t.numpy()), "test sound must be a tensor (N, ...), got ndarray"),
    (store("test", "sound", lambda t: t[:, 9:]), "audio differ in shape: train (50, 3), val (50, 3), test (41, 3)"),
    # modalities
    (drop("val", "image"), "picture reads 'image', which val lacks: it has sound, vector"),
    (lambda data: list(map(data.modalities.pop, ("audio", "picture"))), "modalities ['sensor']: two or more"),
    (rename("left.eye"), "a modality cannot be named 'left.eye'"),
    (rename("left/eye"), "a modality cannot be named 'left/eye'"),
    (rename(""), "a modality cannot be named ''"),
    (rename("forward"), "a modality cannot be named 'forward'"),
    (rename("training"), "a modality cannot be named 'training'"),
    (rename("joint"), "a modality cannot be named 'joint'"),
    (lambda data: setattr(data.modalities["sensor"], "reads", "vector"), "give a tuple of names, ('vector',)"),
    (lambda data: data.train.stored.update(index=data.train.labels), "a stored tensor cannot be named 'index'"),
    (lambda data: setattr(data, "classes", 1), "mixed has 1 classes: two or more are needed"),
    (lambda data: setattr(data, "classes", "2"), "mixed has '2' classes"),
]  # fmt: skip


@pytest.mark.parametrize("damage, wanted", DAMAGES, ids=[wanted for _, wanted in DAMAGES])
def test_what_is_refused(mixed, damage, wanted, tmp_path):
    check(mixed)
    damage(mixed)
    with pytest.raises(UserError, match=re.escape(wanted)):
        train(mixed, epochs=1, out="run", progress=False)
    assert not list(tmp_path.iterdir())


def test_values_are_searched_to_the_end():
    """The check works in chunks; this split has several."""
    x = torch.zeros(10_001, 2)
    labels = torch.arange(10_001) % 2
    fine = Split(labels[:10], {"x": x[:10]})
    data = Dataset(2, {"a": Modality("mlp", ("x",)), "b": Modality("mlp", ("x",))}, fine, fine, Split(labels, {"x": x}))
    check(data)
    x[10_000, 1] = float("nan")
    with pytest.raises(UserError, match="test x has NaN or inf in sample 10000"):
        check(data)


def test_tensors_of_any_kind_pass(mixed):
    """Zero dimensions, integers, booleans, half precision."""
    kinds = {"a": torch.float16, "b": torch.bool, "c": torch.int8}
    splits = {
        name: Split(split.labels, {n: torch.ones(len(split), dtype=kind) for n, kind in kinds.items()})
        for name, split in mixed.splits().items()
    }
    check(replace(mixed, modalities={n: Modality("mlp", (n,)) for n in kinds}, **splits))


@pytest.mark.parametrize("scale, told", [(1.0, False), (8.0, False), (1000.0, True), (0.001, True)])
def test_inputs_of_another_scale_are_told(mixed, caplog, scale, told):
    for split in mixed.splits().values():
        split.stored["vector"] = scale * split.stored["vector"]
    check(mixed)
    assert ("sensor is not standardised, its values are of size" in caplog.text) == told
    assert "audio" not in caplog.text and "picture" not in caplog.text
    caplog.clear()
    train_samples = mixed.train.stored["vector"]
    sensor = replace(mixed.modalities["sensor"], make=Features.of(train_samples))
    check(replace(mixed, modalities=mixed.modalities | {"sensor": sensor}))
    made = sensor.input({"vector": train_samples})
    torch.testing.assert_close(made.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.std(0, correction=0), torch.ones(5))
    assert not caplog.text


def test_integers_that_may_be_names_are_not_told(caplog):
    """Of words, or for an encoder of the user's own; raw pixels are told."""
    ids = torch.randint(8000, (40, 6), generator=torch.Generator().manual_seed(0))
    split = Split(torch.arange(40) % 2, {"x": ids.int(), "y": (ids % 256).byte()})
    views = {"a": Modality("words", ("x",)), "b": Modality(torch.nn.Embedding, ("x",)), "c": Modality("mlp", ("y",))}
    check(Dataset(2, views, split, split, split))
    assert "c is not standardised" in caplog.text
    assert "a is not" not in caplog.text and "b is not" not in caplog.text
