"""Options: checked when they are made, the same for command, Python and resume."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from udi_trainer import Group, Options, UserError, option, reads
from udi_trainer.command import parse
from udi_trainer.data.cache import CacheOptions
from udi_trainer.data.dataset import DataRoot
from udi_trainer.data.digits import Resplit
from udi_trainer.data.manifest import ManifestFile
from udi_trainer.evaluation.fusion import FusionOptions
from udi_trainer.methods.follower import FollowerOptions
from udi_trainer.methods.self_training import SelfTrainingOptions
from udi_trainer.methods.udi import CoTrainingOptions, UDIOptions
from udi_trainer.options import RECIPES, SCIKIT, all_fields, fields_of, number, resumed
from udi_trainer.registry import datasets, methods


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"epochs": 0}, "epochs: 0 is not an integer of at least 1"),
        ({"epochs": 2.0}, "epochs: 2.0 is not an integer"),
        ({"epochs": True}, "epochs: True is not an integer"),
        ({"seed": None}, "seed: None is not an integer"),
        ({"epochs": 3, "steps": 100}, "--steps and --epochs both say how long to train"),
        ({"weight_decay": "some"}, "weight_decay: 'some' is not a number of at least 0"),
        ({"lr": float("nan")}, "lr: nan is not a number above 0"),
        ({"lr": "fast"}, "lr: 'fast' is not a number"),
        ({"lr": [0.1]}, r"lr: \[0.1\] is not a number"),
        ({"momentum": 1.0, "optimizer": "sgd"}, "momentum: 1.0 is not a number of at least 0 and below 1"),
        ({"noise": 0.3}, "noise: 0.3 is not two amounts INPUT,LABEL such as 0.5,0.5"),
        ({"noise": (0.3, 0.1, 0.2)}, "noise: .* is not two amounts"),
        ({"lr_step": (1.5, 0.1), "schedule": "step"}, "lr_step: 1.5 is not an integer"),
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
        ({"align_every": 3, "controller": "static"}, "--align-every needs --controller dynamic"),
        ({"align_every": 3, "alpha": (1, 1)}, "--align-every needs --controller dynamic"),
        ({"recipe": "few"}, "unknown recipe 'few': choose from all-labels, few-labels"),
        (
            {"recipe": "few-labels", "method": "udi"},
            "--recipe few-labels is for method co-training: leave out --method",
        ),
        ({"method": "co-training", "follower_loss": "residual"}, "--follower-loss has no effect .* method udi"),
        ({"race": 0.5, "anchor": "gray"}, "--race needs --anchor auto"),
        ({"labels": 0}, "labels: 0 is not an integer of at least 1"),
        ({"labels": 1.5}, "labels: 1.5 is not a number above 0"),
        ({"labels": "few"}, "labels: 'few' is not an integer"),
        ({"rho": 1.1, "dataset": "huedigits"}, "rho: 1.1 is not a number of at least 0"),
        ({"rounds": 2}, "--rounds needs --teacher fused"),
        ({"teacher": "fused", "anchor": "left"}, "--anchor needs --teacher anchor"),
        ({"teacher": "fused", "race": 0.5}, "--race needs --teacher anchor"),
        ({"teacher": "fused", "follower_loss": "residual"}, "--follower-loss needs --teacher anchor"),
        ({"lr_step": (5, 0.1)}, "--lr-step needs --schedule step"),
        ({"momentum": 0.5}, "--momentum needs --optimizer sgd"),
    ],
)
def test_what_is_refused(given, wanted):
    with pytest.raises(UserError, match=wanted):
        Options.make(**given)


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"method": "joint", "contrast_weight": 5.0}, "--contrast-weight has no effect .* belongs to method dimml"),
        ({"method": "joint", "q_width": 7}, "--q-width has no effect .* belongs to methods udi, co-training"),
        ({"dataset": "cgdigits", "rho": 0.2}, "--rho has no effect on this run: it belongs to data set huedigits"),
        ({"dataset": "cgdigits", "frames": 9}, "--frames has no effect .* data sets manifest, cremad, kinetics-sounds"),
        ({"method": "joint", "fusion": "sum"}, "--fusion has no effect .* methods .*ensemble, mla, .*udi"),
        ({"dataset": "cgdigits", "data_root": "x"}, "--data-root has no effect .* data sets cgmnist, splitdigits"),
        ({"method": "udi", "ogm_alpha": 0.5}, "--ogm-alpha has no effect on this run: it belongs to method ogm-ge"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(given, wanted):
    with pytest.raises(UserError, match=wanted):
        Options.make(**given)


def test_options_of_baselines_are_read():
    options = Options.make(method="joint", baselines="dimml,udi", contrast_weight=5.0, q_width=7)
    assert options.flat()["contrast_weight"] == 5 and options.of(FollowerOptions).q_width == 7
    assert "contrast_weight" not in Options.make().flat()


@dataclass(frozen=True, kw_only=True)
class Own(Group, title="my method"):
    my_alpha: float = option(0.1, number(float, 0), "a number of one's own")


@reads(Own)
def mine(run):
    raise NotImplementedError


def test_options_of_one_s_own():
    assert Options.make(method=mine, my_alpha="0.3").of(Own).my_alpha == 0.3
    assert Options.make(method=mine).of(Own) == Own() == Options.make().of(Own)
    with pytest.raises(UserError, match="my_alpha: -1 is not a number of at least 0"):
        Options.make(method=mine, my_alpha=-1)
    with pytest.raises(UserError, match="unknown option 'my_alpha'"):
        Options.make(my_alpha=1)


@pytest.mark.parametrize(
    "name, owner", [("lr", "every run"), ("q_width", "UDI: the followers' losses"), ("resume", "train")]
)
def test_a_name_that_is_taken_is_refused(name, owner):
    group = dataclasses.make_dataclass(
        "Clash", [(name, int, option(1, number(int), "taken"))], bases=(Group,), frozen=True, kw_only=True
    )
    with pytest.raises(UserError, match=f"option {name} of Clash is taken by {owner!r}: choose another name"):
        Options.make(method=reads(group)(lambda run: None))


def test_names_are_unique():
    """All registered groups together, so that any method goes with any data set."""
    groups = {group for registry in (methods, datasets) for f in registry.values() for group in getattr(f, "reads", ())}
    names = [field.name for group in groups | {Options} for field in dataclasses.fields(group)]
    assert len(names) == len(set(names)) > 60


def test_an_option_that_does_not_exist():
    with pytest.raises(UserError, match="unknown option 'epoch': .*did you mean 'epochs'?"):
        Options.make(epoch=3)


def test_values_are_of_the_option_s_type():
    """However they come: as text, as NumPy's numbers, as lists, as paths."""
    given = {"epochs": np.int64(3), "lr": 1, "noise": "0.1,0.2", "lr_step": [5, "0.5"], "out": Path("a")}
    options = Options.make(**given, schedule="step", baselines="joint")
    assert (options.epochs, options.lr, options.noise, options.lr_step) == (3, 1.0, (0.1, 0.2), (5, 0.5))
    assert type(options.epochs) is int and type(options.lr) is float
    assert options.baselines == ("joint",) and options.out == "a"
    assert json.loads(json.dumps(options.flat()))["epochs"] == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.epochs = 4


def test_defaults_that_follow_others():
    assert Options().baselines == ("joint", *SCIKIT) and Options.make(method="joint").baselines == SCIKIT
    assert Options.make(baselines="none").baselines == Options.make(baselines=[]).baselines == ()
    assert FollowerOptions().controller == "dynamic" and FollowerOptions().alpha is None
    assert FollowerOptions(controller="static").alpha == (1, 1)
    implied = Options.make(alpha="1,0").of(FollowerOptions)
    assert (implied.controller, implied.alpha) == ("static", (1, 0))
    assert Options().weight_decay == 0.01 and Options.make(optimizer="sgd").weight_decay == 1e-4
    assert Options.make(optimizer="sgd", weight_decay=0).weight_decay == 0


def test_published_protocols_can_be_said():
    """SGD with momentum, a learning rate cut to a tenth after 70 epochs; a modality trained until it has converged."""
    options = Options.make(
        optimizer="sgd", lr=1e-3, momentum=0.9, weight_decay=1e-4, schedule="step", lr_step=(70, 0.1)
    )
    assert (options.momentum, options.lr_step) == (0.9, (70, 0.1))
    assert Options.make(schedule="constant", epochs=1000, patience=20).patience == 20


@pytest.mark.parametrize(
    "count, given, wanted",
    [  # samples, options, (batch size, epochs)
        (1077, {}, (64, 30)),  # digits: 16 steps an epoch, 480 in all
        (55_000, {}, (64, 30)),
        (120, {}, (8, 30)),
        (300, {}, (16, 30)),
        (40, {}, (8, 80)),
        (5, {}, (8, 400)),
        (120, {"batch_size": 64}, (64, 400)),
        (120, {"steps": 100}, (8, 7)),
        (1077, {"steps": 1}, (64, 1)),
        (40, {"epochs": 3}, (8, 3)),
    ],
)
def test_batches_and_epochs_follow_the_number_of_samples(count, given, wanted):
    sized = Options.make(**given).sized(count)
    assert (sized.batch_size, sized.epochs) == wanted and sized.sized(count) == sized


def test_counts_and_fractions():
    kinds = [Options.make(labels=x).labels for x in ("100", "0.1", "1", "1.0", np.int64(5), 1.0)]
    assert kinds == [100, 0.1, 1, 1.0, 5, 1.0] and [type(x) for x in kinds] == [int, float, int, float, int, float]


def test_what_a_dataset_recommends():
    """It yields to what the user says, concerns no other data set, and reaches only what reads it."""
    few = Options.make(dataset="fewdigits")
    assert (few.labels, few.of(Resplit).resplit, few.of(FollowerOptions).controller) == (100, 100, "dynamic")
    assert few.of(FusionOptions).fusion == "auto"
    assert Options.make(dataset="fewdigits", labels=50, alpha=(1, 1)).of(FollowerOptions).alpha == (1, 1)
    assert Options.make(dataset="fewdigits", controller="dynamic").of(FollowerOptions).alpha is None
    assert Options.make(dataset="fewdigits", method="joint").labels == 100
    for given, anchor in ({}, "hue"), ({"teacher": "fused"}, "auto"), ({"race": 0.2}, "auto"):
        assert Options.make(dataset="huedigits", **given).of(UDIOptions).anchor == anchor
    assert Options.make(dataset="splitdigits").of(Resplit).resplit is None
    assert resumed("run", saved(dataset="fewdigits", labels=50), {}).labels == 50


def test_a_recipe_is_named_options_that_yield_to_those_given():
    recipe = Options.make(recipe="few-labels", dataset="splitdigits")
    assert (recipe.method, recipe.recipe) == ("co-training", "few-labels")
    assert (recipe.of(FollowerOptions).controller, recipe.of(FollowerOptions).alpha) == ("static", (1, 0))
    assert recipe.of(CoTrainingOptions).rounds == 2 and recipe.baselines == ("joint", *SCIKIT)
    given = Options.make(recipe="few-labels", rounds=3, controller="dynamic")
    assert given.of(CoTrainingOptions).rounds == 3 and given.of(FollowerOptions).controller == "dynamic"
    shortcut = Options.make(recipe="shortcut", method="udi", anchor="hue", dataset="huedigits")
    assert shortcut.of(UDIOptions).follower_loss == "residual" and shortcut.of(FollowerOptions).alpha == (0, 0)
    for name, each in RECIPES.items():
        assert each.evidence and Options.make(recipe=name).method == each.options["method"]
        assert parse(["--recipe", name])[0].flat() == Options.make(recipe=name).flat()
    assert resumed("run", saved(recipe="few-labels"), {"recipe": "few-labels"}).recipe == "few-labels"


def test_rounds_are_read_by_co_training_beside_udi():
    options = Options.make(method="co-training", baselines="udi", rounds=3)
    assert options.of(CoTrainingOptions).rounds == 3 and options.of(UDIOptions).teacher == "anchor"


# --- resume ---


def saved(**options):
    return json.loads(json.dumps(Options.make(**options).flat() | {"environment": {"torch": "9"}}))


def test_a_run_is_resumed_with_its_own_options():
    options = Options.make(epochs=3, noise=(0.1, 0.2), alpha=(0.5, 2), baselines=["joint", "ensemble"], patience=4)
    config = saved(epochs=3, noise=(0.1, 0.2), alpha=(0.5, 2), baselines=["joint", "ensemble"], patience=4)
    assert resumed("run", config, {}) == options
    same = {"epochs": 3, "noise": "0.1,0.2", "alpha": [0.5, 2], "baselines": "joint,ensemble", "race": None}
    assert resumed("run", config, same) == options


def test_it_may_have_moved_to_another_machine():
    moved = {"device": "cpu", "data": "host", "engine": "eager", "compile": True, "tensorboard": True, "shard": False}
    moved |= {"manifest": "elsewhere.csv", "cache_dir": "cache"}
    options = resumed("run", saved(dataset="manifest", manifest="here.csv", shard=True), moved)
    assert {name: options.flat()[name] for name in moved} == moved
    options = resumed("run", saved(data_root="here"), {"data_root": "elsewhere"})
    assert options.of(DataRoot).data_root == "elsewhere"
    movable = {name for group in (Options, DataRoot, ManifestFile, CacheOptions, FollowerOptions)
               for name, field in fields_of(group).items() if field.metadata["movable"]}  # fmt: skip
    assert movable == {*moved, "data_root"}


def test_a_run_of_an_older_version_is_resumed():
    """Its config.json has all options there were, and lacks younger ones."""
    older = saved(method="self-training") | {"alpha": [3.0, 1.0], "q_width": 7, "rho": 0.5, "noise": None}
    del older["self_training_weight"]
    options = resumed("run", older, {})
    assert options.of(SelfTrainingOptions).self_training_weight == 3 and "q_width" not in options.flat()
    older = saved(controller="static") | {"rounds": 1}
    del older["recipe"]
    options = resumed("run", older, {})
    assert (options.of(FollowerOptions).controller, options.of(FollowerOptions).alpha) == ("static", (1, 1))


def test_nothing_is_imported_because_a_folder_names_it(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("open('ran', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for named in {"method": "hostile:run"}, {"encoder": {"left": "hostile:run"}}:
        with pytest.raises(UserError, match="config.json names hostile, which is not trusted: give it again, or trust"):
            resumed("run", saved() | named, {})
        assert not Path("ran").exists()
    named = {"encoder": {"left": "hostile:run"}}
    for given, trust in (named, ()), ({}, ["hostile"]):
        assert resumed("run", saved() | named, given, trust=trust).encoder == named["encoder"]


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


ODD = [
    None,
    True,
    0,
    -1,
    10**400,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1,2",
    "a=b",
    "1e400",
    "\0",
    [],
    [1],
]
ODD += [["a"], [[1]], [10**400, 1], [1, 2, 3], (1, 2), {}, {"a": 1}, {"a": [1]}, {1: 2}, b"x", 1j, object()]


@pytest.mark.parametrize("name", sorted(all_fields()))
def test_odd_values_get_words(name):
    """From Python and from a config.json: a value, or a UserError; nothing else."""
    config = Options.make().flat()
    for value in ODD:
        for call in (
            lambda value=value: Options.make(**{"dataset": "cremad", "baselines": "udi,dimml,ogm-ge", name: value}),
            lambda value=value: resumed("run", config | {name: value}, {}),
        ):
            with contextlib.suppress(UserError):
                assert isinstance(call(), Options)


def test_a_path_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert Options.make(out="~/x").out == "/home/me/x"
    with pytest.raises(UserError, match=r"out: 'a\\x00b' is not a path"):
        Options.make(out="a\0b")
