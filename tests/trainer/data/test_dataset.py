"""Splits and modalities."""

from dataclasses import replace

import torch
from torch.nn.functional import dropout

from udi_trainer import Dataset, Modality, Split
from udi_trainer.data.dataset import presence


def test_batch_has_labels_index_and_the_tensors_asked_for():
    split = Split(torch.arange(5), {"a": torch.arange(10.0).view(5, 2), "b": torch.zeros(5)})
    batch = split.batch(torch.tensor([3, 0]), ["a"])
    assert list(batch) == ["index", "labels", "a"] and batch["labels"].tolist() == [3, 0]
    assert batch["a"].tolist() == [[6, 7], [0, 1]] and len(split) == 5 and split.nbytes() == 5 * 8 + 40 + 20


def test_input_is_made_of_what_is_read():
    """By default the single tensor as float32; images in channels-last format."""
    split = Split(torch.zeros(4), {"a": torch.arange(4), "image": torch.rand(4, 3, 5, 5)})
    assert Modality("mlp", ("a",)).sample(split, 3).tolist() == [0.0, 1.0, 2.0]
    image = Modality("cnn", ("image", "a"), lambda image, a: image + a[:, None, None, None]).sample(split, 2)
    assert image.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(image[1], split.stored["image"][1] + 1)


def test_augmentation_is_for_training():
    split = Split(torch.zeros(4), {"a": torch.ones(4, 100)})
    view, batch = Modality("mlp", ("a",), augment=dropout), split.batch(torch.arange(4), ["a"])
    assert torch.equal(view.input(batch), batch["a"])
    assert not torch.equal(view.input(batch, training=True), batch["a"])


def test_joined_samples():
    """Hidden labels, masks that one split lacks, other dtypes, tensors that nothing reads, ids."""
    views = {m: Modality("mlp", (f"{m} data",)) for m in "ab"}
    train_split = Split(
        torch.tensor([0, -1, 1]),
        {"a data": torch.arange(6.0).view(3, 2), "b data": torch.ones(3, 1), "unread": torch.zeros(3)},
        ["x", "y", "z"],
    )
    val = Split(
        torch.tensor([1, 0]),
        {
            "a data": torch.tensor([[7, 8], [9, 10]]),
            "b data": torch.zeros(2, 1),
            presence("b"): torch.tensor([True, False]),
        },
        ["v", "w"],
    )
    data = Dataset(2, views, train_split, val, val)
    joined = data.joined()
    assert joined.train.labels.tolist() == [0, -1, 1, 1, 0] and joined.train.ids == ["x", "y", "z", "v", "w"]
    assert joined.train.stored["a data"].tolist() == [[0, 1], [2, 3], [4, 5], [7, 8], [9, 10]]
    assert joined.train.stored["a data"].dtype == torch.float32
    assert joined.train.stored[presence("b")].tolist() == [True, True, True, True, False]
    assert set(joined.train.stored) == {"a data", "b data", presence("b")}
    assert joined.val is val and joined.test is val and len(data.train) == 3
    assert replace(data, val=Split(val.labels, val.stored)).joined().train.ids is None
