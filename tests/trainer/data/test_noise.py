"""Noise in the training split."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from udi_trainer import Options, Split, UserError
from udi_trainer.command import main
from udi_trainer.data.noise import corrupt
from udi_trainer.registry import datasets

from ..helpers import read_log


@pytest.mark.parametrize("name", ["cgdigits", "splitdigits", "three"])
def test_noise_is_in_the_training_split_only(name, three_views):
    clean = datasets[name](Options())
    noisy, again, more = (corrupt(clean, inputs, 0.2) for inputs in (0.3, 0.3, 0.6))
    assert noisy.val is clean.val and noisy.test is clean.test
    wrong = noisy.train.labels != clean.train.labels
    assert wrong.sum() == round(0.2 * len(clean.train))
    assert 0 <= noisy.train.labels.min() and noisy.train.labels.max() < clean.classes
    assert torch.equal(noisy.train.labels, again.train.labels)
    for key, x in clean.train.stored.items():
        ours, same, further = (d.train.stored[key] for d in (noisy, again, more))
        assert torch.equal(ours, same) and ours.dtype == x.dtype
        change, larger = (z.float() - x.float() for z in (ours, further))
        assert 0 < change.std() < larger.std()
        if x.dtype == torch.float32:
            assert change.std() / x.std() == pytest.approx(0.3, rel=0.05)
    half, none = corrupt(clean, 0, 0.1), corrupt(clean, 0, 0)
    assert not (half.train.labels != clean.train.labels)[~wrong].any()
    assert torch.equal(none.train.labels, clean.train.labels)
    assert all(torch.equal(none.train.stored[key], x) for key, x in clean.train.stored.items())


def test_label_noise_takes_every_other_class():
    clean = datasets["cgdigits"](Options())
    labels, noisy = clean.train.labels, corrupt(clean, 0, 0.9).train.labels
    pairs = torch.bincount(labels * 10 + noisy, minlength=100).view(10, 10).double()
    others = pairs[~torch.eye(10, dtype=torch.bool)]
    assert others.min() > 0 and others.std() < 1.5 * others.mean().sqrt()


def test_unlabelled_samples_stay_so(mixed):
    labels = mixed.train.labels.clone()
    labels[::3] = -1
    noisy = corrupt(replace(mixed, train=Split(labels, mixed.train.stored)), 0.1, 0.5)
    assert torch.equal(noisy.train.labels < 0, labels < 0)
    assert (noisy.train.labels != labels).any()


def test_only_pixels_and_floats_take_noise(mixed):
    mixed.train.stored["vector"] = torch.ones(101, 5, dtype=torch.int64)
    with pytest.raises(UserError, match="'vector' is neither uint8 pixels nor floating point, but torch.int64"):
        corrupt(mixed, 0.1, 0)


def test_noise_option():
    """The same noise for all seeds, also in a resumed run."""
    joint = ["--dataset", "cgdigits", "--method", "joint", "--epochs", "2"]
    for seed in ("0", "1"):
        options = ["--noise", "0.2,0.4", "--seed", seed, "--out", seed]
        assert main([*joint, *options]) == 0
    assert main([*joint, "--out", "clean"]) == 0
    assert read_log("0")[-1]["loss"] > read_log("clean")[-1]["loss"] + 0.1
    assert json.loads(Path("0/config.json").read_text())["noise"] == [0.2, 0.4]
    assert main(["--resume", "0", "--noise", "0.2,0.4"]) == 0
    assert main(["--resume", "0", "--noise", "0.2,0.3"]) == 2
