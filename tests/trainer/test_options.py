"""Options: checked when they are made, the same for command, Python and resume."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from udi_trainer import Options, UserError
from udi_trainer.options import MOVABLE, resumed


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"epochs": 0}, "epochs: 0 is not an integer of at least 1"),
        ({"epochs": 2.0}, "epochs: 2.0 is not an integer"),
        ({"epochs": True}, "epochs: True is not an integer"),
        ({"epochs": None}, "epochs: None is not an integer"),
        ({"lr": float("nan")}, "lr: nan is not a number above 0"),
        ({"lr": "fast"}, "lr: 'fast' is not a number"),
        ({"lr": [0.1]}, r"lr: \[0.1\] is not a number"),
        ({"momentum": 1.0}, "momentum: 1.0 is not a number of at least 0 and below 1"),
        ({"noise": 0.3}, "noise: 0.3 is not two amounts INPUT,LABEL such as 0.5,0.5"),
        ({"noise": (0.3, 0.1, 0.2)}, "noise: .* is not two amounts"),
        ({"lr_step": (1.5, 0.1)}, "lr_step: 1.5 is not an integer"),
        ({"align_every": 2.5, "controller": "dynamic"}, "align_every: 2.5 is not an integer"),
        ({"optimizer": "adam"}, "optimizer: unknown value 'adam': choose from adamw, sgd"),
        ({"schedule": 3}, "schedule: unknown value 3: choose from cosine, step, constant"),
        ({"amp": True}, "amp: unknown value True: choose from none, bf16"),
        ({"tf32": 1}, "tf32: 1 is neither True nor False"),
        ({"anchor": 0}, "anchor: 0 is not a name"),
        ({"baselines": 3}, "baselines: 3 is not a list of names"),
        ({"baselines": [3]}, "baselines: .* is not a list of names"),
        ({"baselines": ["jont"]}, "unknown baseline 'jont': .*; did you mean 'joint'?"),
        ({"fusion": "median"}, "unknown fusion rule 'median': choose from auto, mean, sum, weighted"),
        ({"controller": "dynamic", "alpha": (1, 1)}, "--alpha needs --controller static"),
        ({"align_every": 3}, "--align-every needs --controller dynamic"),
        ({"race": 0.5, "anchor": "gray"}, "--race chooses the anchor"),
        ({"labels": 0}, "labels: 0 is not an integer of at least 1"),
        ({"labels": 1.5}, "labels: 1.5 is not a number above 0"),
        ({"labels": "few"}, "labels: 'few' is not an integer"),
        ({"rho": 1.1}, "rho: 1.1 is not a number of at least 0"),
        ({"rounds": 2}, "--rounds needs --teacher fused"),
        ({"teacher": "fused", "anchor": "left"}, "--teacher fused trains all modalities"),
        ({"teacher": "fused", "race": 0.5}, "--teacher fused trains all modalities"),
        ({"teacher": "fused", "follower_loss": "residual"}, "--follower-loss residual needs --teacher anchor"),
    ],
)
def test_what_is_refused(given, wanted):
    with pytest.raises(UserError, match=wanted):
        Options(**given)


def test_an_option_that_does_not_exist():
    with pytest.raises(UserError, match="unknown option 'epoch': .*did you mean 'epochs'?"):
        Options.make(epoch=3)


def test_values_are_of_the_option_s_type():
    """However they come: as text, as NumPy's numbers, as lists, as paths."""
    options = Options(epochs=np.int64(3), lr=1, noise="0.1,0.2", lr_step=[5, "0.5"], baselines="joint", out=Path("a"))
    assert (options.epochs, options.lr, options.noise, options.lr_step) == (3, 1.0, (0.1, 0.2), (5, 0.5))
    assert type(options.epochs) is int and type(options.lr) is float
    assert options.baselines == ("joint",) and options.out == "a"
    assert json.loads(json.dumps(dataclasses.asdict(options)))["epochs"] == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.epochs = 4


def test_defaults_that_follow_others():
    assert Options().baselines == ("joint",) and Options(method="joint").baselines == ()
    assert Options(baselines="none").baselines == Options(baselines=[]).baselines == ()
    assert Options().alpha == (1, 1) and Options(controller="dynamic").alpha is None
    assert Options().weight_decay == 0.01 and Options(optimizer="sgd").weight_decay == 1e-4
    assert Options(optimizer="sgd", weight_decay=0).weight_decay == 0


def test_published_protocols_can_be_said():
    """SGD with momentum, a learning rate cut to a tenth after 70 epochs; a modality trained until it has converged."""
    options = Options(optimizer="sgd", lr=1e-3, momentum=0.9, weight_decay=1e-4, schedule="step", lr_step=(70, 0.1))
    assert (options.momentum, options.lr_step) == (0.9, (70, 0.1))
    assert Options(schedule="constant", epochs=1000, patience=20).patience == 20


def test_counts_and_fractions():
    kinds = [Options(labels=x).labels for x in ("100", "0.1", "1", "1.0", np.int64(5), 1.0)]
    assert kinds == [100, 0.1, 1, 1.0, 5, 1.0] and [type(x) for x in kinds] == [int, float, int, float, int, float]


def test_what_a_dataset_recommends():
    """It gives way to what the user says, and is no business of other datasets."""
    few = Options.make(dataset="fewdigits")
    assert (few.labels, few.resplit, few.alpha, few.fusion) == (100, 100, (1, 0), "auto")
    assert Options.make(dataset="fewdigits", labels=50, alpha=(1, 1)).alpha == (1, 1)
    assert Options.make(dataset="fewdigits", controller="dynamic").alpha is None
    assert Options.make(dataset="huedigits").anchor == "hue"
    assert Options.make(dataset="huedigits", teacher="fused").anchor == "auto"
    assert Options.make(dataset="huedigits", race=0.2).anchor == "auto"
    assert Options.make(dataset="splitdigits") == Options(dataset="splitdigits")
    assert resumed("run", saved(dataset="fewdigits", labels=50), {}).labels == 50


# --- resume ---


def saved(**options):
    return json.loads(json.dumps(dataclasses.asdict(Options(**options)) | {"environment": {"torch": "9"}}))


def test_a_run_is_resumed_with_its_own_options():
    options = Options(epochs=3, noise=(0.1, 0.2), alpha=(0.5, 2), baselines=["joint", "ensemble"], patience=4)
    config = saved(epochs=3, noise=(0.1, 0.2), alpha=(0.5, 2), baselines=["joint", "ensemble"], patience=4)
    assert resumed("run", config, {}) == options
    same = {"epochs": 3, "noise": "0.1,0.2", "alpha": [0.5, 2], "baselines": "joint,ensemble", "race": None}
    assert resumed("run", config, same) == options


def test_it_may_have_moved_to_another_machine():
    moved = {"device": "cpu", "data_root": "elsewhere", "data": "host", "engine": "eager", "compile": True}
    moved |= {"manifest": "elsewhere.csv", "cache_dir": "cache", "tensorboard": True, "shard": False}
    assert set(moved) == set(MOVABLE)
    options = resumed("run", saved(data_root="here", shard=True), moved)
    assert {name: getattr(options, name) for name in moved} == moved


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"epochs": 4}, r"--epochs 4 conflicts with --resume \(3 there\): leave it out"),
        ({"q_warmup": 10}, r"--q-warmup 10 conflicts with --resume \(None there\)"),
        ({"patience": None, "seed": 1}, "--seed 1 conflicts"),
        ({"epoch": 3}, "unknown option 'epoch'"),
        ({"epochs": "many"}, "epochs: 'many' is not an integer"),
        ({"engine": "fast"}, "engine: unknown value 'fast'"),
    ],
)
def test_what_conflicts_with_it(given, wanted):
    with pytest.raises(UserError, match=wanted):
        resumed("run", saved(epochs=3), given)


def test_damaged_options():
    with pytest.raises(UserError, match="--resume run: config.json is damaged: epochs: 0 is not"):
        resumed("run", saved() | {"epochs": 0}, {})
