"""From Python: tensors in memory, encoders and methods of one's own, the figures of the command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from udi_trainer import Modality, Options, Outcome, Split, UserError, train
from udi_trainer.command import main
from udi_trainer.evaluation.fusion import combine
from udi_trainer.evaluation.scores import accuracy, scores
from udi_trainer.methods.unimodal import Alone, train_alone
from udi_trainer.options import SCIKIT
from udi_trainer.registry import datasets
from udi_trainer.training.inference import outputs

from .helpers import METHODS, read_log, read_metrics, without_times


class Recurrent(nn.Module):
    """From sequences (N, T, D) to features of a width of its own."""

    made = 0

    def __init__(self, shape):
        super().__init__()
        self.gru = nn.GRU(shape[1], 10, batch_first=True)
        Recurrent.made += 1

    def forward(self, x):
        return self.gru(x)[1][0]


ENCODERS = {"audio": Recurrent, "sensor": lambda shape: nn.Sequential(nn.Linear(*shape, 7), nn.ReLU())}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_data_and_encoders_of_one_s_own(mixed, method, tmp_path):
    """Three modalities of different kinds, two classes, sizes that no batch divides; encoders made anew each time."""
    Recurrent.made = 0
    baselines = ["joint", "ensemble"] if method == "udi" else None
    options = {"epochs": 12, "batch_size": 16, "lr": 0.01, "baselines": baselines, "progress": False}
    result = train(mixed, method, ENCODERS, **options)
    assert result.metrics["fused"]["test_acc"] > 0.8
    probabilities = result.predict(mixed.test)
    assert probabilities.shape == (41, 2) and probabilities.device.type == "cpu"
    torch.testing.assert_close(probabilities.sum(1), torch.ones(41, dtype=probabilities.dtype))
    assert accuracy(probabilities, mixed.test.labels) == result.metrics["fused"]["test_acc"]
    assert torch.equal(result.predict(mixed.test.stored), probabilities)
    assert method in result.table()
    assert not list(tmp_path.iterdir()) and result.folder is None
    if method in ("udi", "ensemble"):
        assert set(result.models) == set(mixed.modalities)
        features, logits = result.models["audio"](mixed.test.stored["sound"])
        assert features.shape == (41, 10) and logits.shape == (41, 2)
        assert not torch.equal(result.models["audio"].encoder.gru.weight_ih_l0, Recurrent((50, 3)).gru.weight_ih_l0)
    if method == "udi":
        assert set(result.metrics["baselines"]) == {"joint", "ensemble", *SCIKIT} and "ensemble" in result.table()
        followed = result.metrics["anchor"] != "audio"
        assert Recurrent.made == 1 + followed + 2 + 1  # alone, as a follower, the two baselines; ours above
        assert {row["phase"] for row in result.history["anchor-audio"]} == {"anchor"}  # the ensemble has it from there


@pytest.mark.parametrize("method", ["joint", "dimml"])
def test_a_model_of_all_modalities_is_judged_without_each(three_views, method):
    """Features of what is missing are 0; DI-MML's own head of it says nothing, and its fusion head less."""
    result = train(three_views, method, epochs=2, baselines=[], progress=False)
    test = datasets[three_views](Options()).test
    whole, inputs = result.predictor.logits(test), {name: x.float() for name, x in test.stored.items()}
    for i, m in enumerate(test.stored):
        with torch.no_grad():
            if method == "joint":
                features = result.models["joint"](inputs)[0]
            else:
                features = {name: result.models[name](x)[0] for name, x in inputs.items()}
            features = {name: f * (name != m) for name, f in features.items()}
            joint = result.models["joint"].fuse if method == "joint" else result.models["fusion head"]
            z = joint(features if method == "joint" else torch.cat(list(features.values()), dim=1))
        if method == "dimml":
            own = [whole[name] for name in test.stored]
            own[i] = torch.full_like(z, torch.nan)
            z = combine(result.predictor.rule, torch.stack([*own, z]))
        assert result.metrics["fused"]["without"][m] == accuracy(z, test.labels)
    assert result.metrics["fused"]["without"].keys() == test.stored.keys()


def test_the_same_figures_as_the_command(three_views):
    """By the name of a dataset or with its tensors, with a run folder or without; messages and bars or none."""
    text = "--epochs 2 --baselines joint,ensemble --controller dynamic --align-every 3 --seed 4".split()
    assert main(["--dataset", three_views, *text, "--out", "command"]) == 0
    options = {"epochs": 2, "baselines": ["joint", "ensemble"], "controller": "dynamic", "align_every": 3, "seed": 4}
    by_name = train(three_views, **options)
    in_memory = train(datasets[three_views](Options()), **options, out="python", progress=False)
    command = without_times(read_metrics("command"))
    for result in (by_name, in_memory):
        assert without_times(json.loads(json.dumps(result.metrics))) == command
        rows = [without_times(row) for rows in result.history.values() for row in rows]
        assert sorted(map(str, rows)) == sorted(map(str, read_log("command")))
    assert in_memory.folder == Path("python") and without_times(read_metrics("python")) == command
    assert read_log("python") == read_log("command")
    assert {path.name for path in Path("python").iterdir()} == {path.name for path in Path("command").iterdir()}


def test_progress_can_be_off(mixed, capfd):
    train(mixed, "joint", epochs=1, progress=False)
    out, err = capfd.readouterr()
    assert not out and not err
    train(mixed, "joint", epochs=1)
    assert "joint on mixed" in capfd.readouterr().out


def alone_or_not(run):
    """A method of one's own: the sound alone."""
    task = train_alone(run, ["audio"])["audio"]
    return Outcome({"fused": scores(outputs(task, run), run.labels)}, {"audio": task.model})


class Averaging(nn.Module):
    """A model of all modalities, of a class of its own."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, inputs):
        both = [self.parts[m](x) for m, x in inputs.items()]
        return [features for features, _ in both], torch.stack([logits for _, logits in both]).mean(0)


def test_a_method_of_one_s_own(mixed):
    """A function; what it leaves out of the metrics is empty."""
    result = train(mixed, alone_or_not, ENCODERS, epochs=2, out="run", baselines=["joint"], progress=False)
    assert result.metrics["method"] == "alone_or_not" and set(result.metrics["baselines"]) == {"joint", *SCIKIT}
    assert result.metrics["modalities"] == {} and "alone_or_not" in result.table()
    assert accuracy(result.predict(mixed.test), mixed.test.labels) == result.metrics["fused"]["test_acc"]
    assert Path("run/report.png").stat().st_size > 10_000
    again = train(mixed, alone_or_not, ENCODERS, resume="run", progress=False)
    assert without_times(again.metrics) == without_times(result.metrics)
    with pytest.raises(UserError, match="--method joint conflicts with --resume"):
        train(mixed, "joint", ENCODERS, resume="run", progress=False)


def test_a_model_of_one_s_own_reads_all_modalities(mixed):
    class Both:  # a callable without a name of its own
        def __call__(self, run):
            tasks = train_alone(run)
            fused = Averaging({m: task.model for m, task in tasks.items()})
            return Outcome({"fused": {"val_acc": 0.5, "test_acc": 0.5, "test_macro_f1": 0.5}}, {"both": fused})

    result = train(mixed, Both(), epochs=1, progress=False)
    each = [result.models["both"].parts[m](v.sample(mixed.test, 41))[1] for m, v in mixed.modalities.items()]
    torch.testing.assert_close(result.predict(mixed.test), torch.stack(each).mean(0).softmax(-1))
    assert "without" not in result.metrics["fused"]  # it may not know what is missing


class Pretrained(nn.Module):
    """With a frozen part, and one that nothing uses."""

    def __init__(self, shape):
        super().__init__()
        self.frozen, self.head = nn.Linear(shape.numel(), 8), nn.Linear(8, 6)
        self.unused = nn.Linear(3, 3)
        nn.init.constant_(self.frozen.weight, 0.1)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.head(self.frozen(x.flatten(1)))


def whole_frozen(shape):
    return Pretrained(shape).requires_grad_(False)


@pytest.mark.parametrize("method", [*METHODS, "dimml", "self-training"])
def test_frozen_encoders(mixed, method):
    """Their heads are trained; losses of their features alone count for nothing."""
    options = {"controller": "dynamic", "align_every": 2, "q_warmup": 1} if method == "udi" else {}
    result = train(mixed, method, {"audio": whole_frozen}, epochs=2, baselines=[], progress=False, **options)
    frozen = [m for model in result.models.values() for m in model.modules() if isinstance(m, Pretrained)]
    assert len(frozen) == 1 and (frozen[0].frozen.weight == 0.1).all()
    assert not any(p.requires_grad for p in frozen[0].parameters())


@pytest.mark.parametrize("method", METHODS)
def test_encoders_with_frozen_and_unused_parts(mixed, method):
    encoders = dict.fromkeys(mixed.modalities, Pretrained)
    options = {"controller": "dynamic", "align_every": 2} if method == "udi" else {}
    options |= {"q_warmup": 1} if method == "udi" else {}
    result = train(mixed, method, encoders, epochs=2, baselines=[], progress=False, **options)
    for model in result.models.values():
        for name, parameter in model.named_parameters():
            assert "frozen.weight" not in name or (parameter == 0.1).all()


def test_unlabelled_samples(mixed, capsys):
    """They change nothing for a method that needs labels, whatever they hold; followers learn from them."""
    labels = mixed.train.labels.clone()
    labels[::5] = -1
    other = {n: t.where((labels >= 0).view(-1, *[1] * (t.dim() - 1)), t.flip(0)) for n, t in mixed.train.stored.items()}
    pair = [replace(mixed, train=Split(labels, stored)) for stored in (mixed.train.stored, other)]
    for method, same in (("joint", True), ("ensemble", True), ("udi", False)):
        a, b = (train(data, method, epochs=2, batch_size=16, baselines=[]).history for data in pair)
        losses = [[row["loss"] for rows in log.values() for row in rows] for log in (a, b)]
        assert (losses[0] == losses[1]) == same
    assert capsys.readouterr().out.count("train: 21 of 101 samples have no label") == 6


def test_resumes_where_it_was_interrupted(mixed, monkeypatch):
    whole = train(mixed, "ensemble", ENCODERS, epochs=4, batch_size=16, progress=False)
    step, steps = Alone.step, []

    def failing(self, batch):
        steps.append(self)
        if len(steps) == 40:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Alone, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            train(mixed, "ensemble", ENCODERS, epochs=4, batch_size=16, out="run", progress=False)
    assert len(read_log("run")) == 6
    resumed = train(mixed, encoders=ENCODERS, resume="run", progress=False)
    assert without_times(resumed.metrics) == without_times(whole.metrics)
    assert torch.equal(resumed.predict(mixed.test), whole.predict(mixed.test))


def test_a_dataset_of_the_trainer_need_not_be_named_again():
    options = {"epochs": 1, "progress": False}
    result = train("splitdigits", "joint", out="run", **options)
    assert without_times(train(resume="run", progress=False).metrics) == without_times(result.metrics)
    with pytest.raises(UserError, match=r"--epochs 2 conflicts with --resume \(1 there\)"):
        train(resume="run", epochs=2)


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"epoch": 2}, "unknown option 'epoch': .*did you mean 'epochs'"),
        ({"epochs": 0}, "epochs: 0 is not an integer of at least 1"),
        ({"method": "jont"}, "unknown method 'jont': .*did you mean 'joint'"),
        ({"encoders": {"sound": Recurrent}}, "unknown modality 'sound': choose from audio, picture, sensor"),
        ({"encoders": {"audio": Recurrent((50, 3))}}, "the encoder of audio is a module"),
        ({"anchor": "sound"}, "unknown anchor 'sound': choose from audio"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"resume": "nowhere"}, "no run to resume"),
    ],
)
def test_what_is_refused(mixed, given, wanted):
    with pytest.raises(UserError, match=wanted):
        train(mixed, **given, progress=False)


def test_losses_are_finite_and_fall(mixed):
    """The history is that of a training: a row an epoch of each stage."""
    history = train(mixed, "ensemble", epochs=6, lr=0.01, progress=False).history
    assert list(history) == ["anchor-audio", "anchor-picture", "anchor-sensor"]
    for rows in history.values():
        values = [row["loss"] for row in rows]
        assert len(values) == 6 and all(map(math.isfinite, values)) and values[-1] < values[0]


@pytest.mark.parametrize("leaks", [True, False])
def test_a_warning_of_features_that_saw_the_labels(mixed, leaks, capsys):
    """Nearly all right in training and on validation; one sample in ten wrong is enough for silence."""
    for split in mixed.splits().values():
        wrong = 0.0 if leaks else (torch.arange(len(split)) % 10 == 0)[:, None]
        split.stored["vector"] = 10 * (2.0 * split.labels[:, None] - 1) * (1 - 2.0 * wrong) * torch.ones(1, 5)
    train(mixed, "ensemble", epochs=3, baselines=[])
    told = [line for line in capsys.readouterr().err.splitlines() if "that saw these labels" in line]
    assert any(line.startswith("warning: sensor is right on nearly all samples") for line in told) == leaks


def test_a_run_with_the_earlier_default_encoder_is_resumed_with_it(mixed, tmp_path):
    """Only where the other encoder is the default; data of another kind is refused as before."""
    before = replace(mixed, modalities=mixed.modalities | {"audio": Modality("cnn1d", ("sound",))})
    now = replace(mixed, modalities=mixed.modalities | {"audio": Modality("fcn", ("sound",))})
    began = train(before, "ensemble", epochs=1, baselines=[], out=tmp_path / "run")
    resumed = train(now, "ensemble", resume=tmp_path / "run")
    assert resumed.metrics["fused"] == began.metrics["fused"]
    assert [*resumed.models["audio"].state_dict()] == [*began.models["audio"].state_dict()]
    with pytest.raises(UserError, match="the data is not that of this run, it differs in encoder of audio"):
        train(mixed, "ensemble", resume=tmp_path / "run")
