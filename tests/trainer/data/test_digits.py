"""The digits: what colors and halves reveal, and MNIST's files, intact and damaged."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from udi_trainer import Options, UserError
from udi_trainer.command import main
from udi_trainer.data.digits import (
    COLORS,
    HALVES,
    cgdigits,
    cgmnist,
    fewdigits,
    huedigits,
    scikit_digits,
    split_off,
    splitdigits,
)

from ..helpers import one_line, read_metrics, write_idx


def test_digits_are_scikit_learns():
    """Read and split without importing it, to the same samples in the same order."""
    columns, (x, y) = scikit_digits(), load_digits(return_X_y=True)
    assert np.array_equal(columns[:, :-1], x) and np.array_equal(columns[:, -1], y)
    generator = np.random.RandomState(5)
    for classes in (2, 3, 10) * 10:
        labels = np.concatenate([np.arange(classes), generator.randint(classes, size=generator.randint(50, 300))])
        count = generator.randint(classes, len(labels) - classes)
        _, counts = np.unique(labels, return_counts=True)
        labels = np.concatenate([labels, np.flatnonzero(counts < 2)])  # it wants two of each class
        wanted = train_test_split(np.arange(len(labels)), test_size=int(count), stratify=labels, random_state=0)
        assert all(map(np.array_equal, split_off(labels, int(count)), wanted))


def test_cgmnist(little_mnist):
    options = ["--dataset", "cgmnist", "--data-root", str(little_mnist), "--epochs", "1", "--amp"]
    assert main([*options, "--out", "run"]) == 0
    assert set(read_metrics("run")["modalities"]) == {"gray", "color"}


@pytest.mark.parametrize("damage", ["cut", "short", "kind", "lengths"])
def test_damaged_mnist(little_mnist, damage, capsys):
    images, labels = (little_mnist / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    if damage == "cut":
        images.write_bytes(images.read_bytes()[:5000])
    elif damage == "short":
        images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes())[:-1]))
    elif damage == "kind":
        images.write_bytes(labels.read_bytes())
    else:
        write_idx(labels, torch.zeros(239, dtype=torch.uint8))
    assert main(["--dataset", "cgmnist", "--data-root", str(little_mnist)]) == 2
    message = one_line(capsys.readouterr().err)
    assert "download" in message and str(little_mnist) in message


@pytest.mark.skipif("UDI_DATA" not in os.environ, reason="set UDI_DATA to a folder with MNIST's files in mnist/")
def test_real_mnist():
    mnist = cgmnist(Options.make(dataset="cgmnist", data_root=Path(os.environ["UDI_DATA"]) / "mnist"))
    assert [len(split) for split in mnist.splits().values()] == [55_000, 5_000, 10_000]
    assert all(split.stored["pixels"].dtype == torch.uint8 for split in mnist.splits().values())
    gray = mnist.modalities["gray"].input(mnist.train.batch(torch.arange(55_000), ["pixels"]))
    assert gray.shape == (55_000, 1, 28, 28) and abs(gray.mean()) < 0.01 and abs(gray.std() - 1) < 0.01


def test_colors_tell_the_digit_in_training_only():
    digits = cgdigits(Options())
    assert [len(split) for split in digits.splits().values()] == [1077, 360, 360]

    def nearest(split):
        guess = torch.cdist(split.stored["color"], COLORS).argmin(1)
        return (guess == split.labels).double().mean()

    assert nearest(digits.train) > 0.6 > 0.2 > max(nearest(digits.val), nearest(digits.test))
    batch = digits.modalities["color"].sample(digits.train, 5)
    assert batch.shape == (5, 3, 8, 8) and 0 <= batch.min() and batch.max() <= 1


def test_splitdigits(little_mnist):
    """Two halves of the same digit, apart from noise; also for 28x28 digits, including training."""
    split, whole = splitdigits(Options()), cgdigits(Options())
    assert list(split.modalities) == ["left", "right"]
    for part in ("train", "val", "test"):
        ours, theirs = getattr(split, part), getattr(whole, part)
        assert torch.equal(ours.labels, theirs.labels)
        spread = {}
        for name, clean in zip(("left", "right"), theirs.stored["pixels"].chunk(2, dim=2), strict=True):
            half = ours.stored[name]
            assert half.dtype == torch.uint8 and half.shape == clean.shape == (len(ours), 8, 4)
            inner = (clean > 100) & (clean < 155)  # where clipping has almost no effect
            spread[name] = ((half.float() - clean)[inner] / 255).std()
        assert spread["left"] == pytest.approx(HALVES["left"], rel=0.1)
        assert spread["right"] == pytest.approx(HALVES["right"], rel=0.15)
        again = splitdigits(Options())
        assert all(torch.equal(x, getattr(again, part).stored[name]) for name, x in ours.stored.items())
    left, right = (split.train.stored[name] - whole.train.stored["pixels"][..., :4] for name in ("left", "right"))
    assert not torch.equal(left, right)

    options = ["--dataset", "splitdigits", "--data-root", str(little_mnist), "--epochs", "1", "--baselines", "none"]
    assert main([*options, "--out", "run"]) == 0
    assert set(read_metrics("run")["modalities"]) == {"left", "right"}
    mnist = splitdigits(Options.make(dataset="splitdigits", data_root=little_mnist))
    assert mnist.modalities["left"].sample(mnist.train).shape == (1, 1, 28, 14)


def test_huedigits(little_mnist):
    """The hue is the label's own with probability rho; in the shifted split it is independent of the label."""
    digits = huedigits(Options.make(dataset="huedigits", rho=0.8))

    def own(split):
        nearest = torch.cdist(split.stored["hue"], COLORS).argmin(1)
        return (nearest == split.labels).double().mean().item()

    hues = [huedigits(Options.make(dataset="huedigits", rho=rho)) for rho in (1, 0)]
    always, never = (own(data.train) for data in hues)  # jitter blurs hues
    for split in (digits.train, digits.val, digits.test):
        assert own(split) == pytest.approx(0.8 * always + 0.2 * never, abs=0.06)
    assert own(digits.shifted) == pytest.approx(0.1, abs=0.06)
    assert torch.equal(digits.shifted.stored["pixels"], digits.test.stored["pixels"])
    assert digits.modalities["digit"].sample(digits.train).shape == (1, 3, 8, 8)
    mnist = huedigits(Options.make(dataset="huedigits", data_root=little_mnist))
    assert mnist.modalities["digit"].sample(digits.test).shape[1] == 3
    given = huedigits(Options.make(dataset="huedigits", rho=0.95))
    assert torch.equal(huedigits(Options()).train.stored["hue"], given.train.stored["hue"])


def test_resplit():
    """Each seed has another stratified split, in which every digit occurs once."""
    options = Options.make(dataset="splitdigits", resplit=100, seed=3)
    split = splitdigits(options)
    assert [len(part) for part in split.splits().values()] == [1077, 100, 620]
    assert all(part.labels.bincount().min() >= len(part) // 10 - 4 for part in split.splits().values())
    whole = torch.cat([part.labels for part in splitdigits(Options()).splits().values()])
    assert torch.equal(torch.cat([part.labels for part in split.splits().values()]).bincount(), whole.bincount())
    again, other = splitdigits(options), splitdigits(options.replace(seed=4))
    assert torch.equal(split.train.stored["left"], again.train.stored["left"])
    assert not torch.equal(split.train.stored["left"], other.train.stored["left"])
    assert torch.equal(fewdigits(options).train.stored["left"], split.train.stored["left"])
    with pytest.raises(UserError, match="--resplit 720: training takes 1077 of 1797"):
        splitdigits(Options.make(dataset="splitdigits", resplit=720))
