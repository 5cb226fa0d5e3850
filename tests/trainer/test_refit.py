"""The final fit on training and validation together (--refit)."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from udi_trainer import Dataset, Modality, Outcome, Split, UserError, api, load, train
from udi_trainer.command import main
from udi_trainer.data.dataset import presence
from udi_trainer.evaluation.fusion import combine
from udi_trainer.evaluation.scores import accuracy, scores
from udi_trainer.methods.unimodal import Alone, train_alone
from udi_trainer.registry import datasets, methods
from udi_trainer.training.inference import outputs
from udi_trainer.training.loop import best_epoch, fit

from .helpers import interrupted, log_by_stage, make_run, needs_torchjd, read_log, read_metrics, without_times

NAMES = [pytest.param(name, marks=needs_torchjd) if name == "gramian" else name for name in methods]
QUICK = {"epochs": 3, "batch_size": 32, "baselines": [], "progress": False}


@pytest.fixture
def little():
    """Three noisy views of 4 classes: 160 samples of training, 60 of validation, 80 of test."""
    generator = torch.Generator().manual_seed(0)
    centers, noise = torch.randn(4, 6, generator=generator), {"a": 0.7, "b": 1.0, "c": 2.0}

    def split(size):
        labels = torch.randint(4, (size,), generator=generator)
        views = {m: centers[labels] + s * torch.randn(size, 6, generator=generator) for m, s in noise.items()}
        return Split(labels, views)

    return Dataset(4, {m: Modality("mlp", (m,)) for m in noise}, split(160), split(60), split(80), "little")


def names_in(value):
    """All names of a nested dict."""
    return {n for name, part in value.items() for n in {name} | (names_in(part) if isinstance(part, dict) else set())}


@pytest.mark.parametrize("method", NAMES)
def test_every_method(method, little):
    """The first run is as without it. The predictor is the final fit's, which has no validation scores."""
    result, plain = (train(little, method, refit=refit, **QUICK) for refit in (True, False))
    final = result.metrics["refit"]
    metrics = {name: value for name, value in without_times(result.metrics).items() if name != "refit"}
    assert metrics == without_times(plain.metrics)
    assert final["fused"].keys() <= metrics["fused"].keys() and list(final["modalities"]) == list(metrics["modalities"])
    assert not [name for name in names_in(final) if "val" in name]
    assert final["fused"] != metrics["fused"] and final["fused"]["test_acc"] > 0.7
    if result.models:
        predicted = result.predict(little.test)
        assert accuracy(predicted, little.test.labels) == final["fused"]["test_acc"]
        assert not torch.equal(predicted, plain.predict(little.test))


@pytest.mark.parametrize("decay", [0.01, "auto"])
def test_it_is_training_on_both_up_to_the_kept_epochs(little, decay):
    """By hand: the joined samples, the schedule of all epochs, and as many of them as the first run kept."""
    options = {"epochs": 6, "batch_size": 16, "weight_decay": decay, "fusion": "loglinear"}
    result = train(little, "ensemble", refit=True, baselines=[], progress=False, **options)
    stored = {m: torch.cat((little.train.stored[m], little.val.stored[m])) for m in little.modalities}
    both = Split(torch.cat((little.train.labels, little.val.labels)), stored)
    run, logits, kept = make_run(replace(little, train=both), method="ensemble", **options), [], set()
    for m in little.modalities:
        stages = [name for name in result.history if name.startswith(f"anchor-{m}")]
        best = best_epoch([best_epoch(result.history[name]) for name in stages])
        (name,) = [name for name in stages if best in result.history[name]]
        task = run.make(Alone, modality=m, decay=float(name.partition("-decay-")[2] or 0.01))
        fit([task], run, best["epoch"])
        task.model.load_state_dict(run.folder.checkpoint(task.name)["parts"]["model"])  # the last, not the best
        logits.append(outputs(task, run)["test"])
        kept.add(best["epoch"])
    assert len(kept) > 1
    fitted = train(little, "ensemble", baselines=[], progress=False, **options).predictor.rule
    assert result.predictor.rule == fitted
    assert result.metrics["refit"]["fused"]["weights"] == result.metrics["fused"]["weights"]
    torch.testing.assert_close(result.predict(little.test), combine(fitted, torch.stack(logits)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "method, options",
    [
        ("udi", {"labels": 60, "baselines": ["ensemble", "co-training", "self-training", "joint"], "epochs": 4}),
        ("udi", {"race": 0.5, "baselines": ["ensemble"], "weight_decay": "auto", "patience": 2, "epochs": 4}),
        ("udi", {"follower_loss": "residual", "alpha": (0.0, 0.0), "baselines": ["pdmp", "g-blending"]}),
        ("dimml", {"baselines": ["mla", "udi"], "select": "macro-f1"}),
    ],
)
def test_nothing_is_decided_again(method, options, little, monkeypatch):
    """Validation with other samples and labels in the final fit changes nothing of it."""
    little.train.stored[presence("c")] = torch.arange(160) % 3 > 0
    little.val.stored[presence("c")] = torch.arange(60) % 4 > 0
    if {method, *options["baselines"]} & {"co-training", "dimml", "mla"}:
        del little.train.stored[presence("c")], little.val.stored[presence("c")]
    wanted, joined = train(little, method, refit=True, **QUICK | options), Dataset.joined

    def poisoned(self):
        both, order = joined(self), torch.arange(len(self.val)).flip(0)
        poison = {name: t[order] if t.dtype == torch.bool else t + 5 for name, t in both.val.stored.items()}
        return replace(both, val=Split((self.val.labels + 1) % 4, poison))

    monkeypatch.setattr(Dataset, "joined", poisoned)
    found = train(little, method, refit=True, **QUICK | options)
    assert without_times(found.metrics) == without_times(wanted.metrics)
    assert torch.equal(found.predict(little.test), wanted.predict(little.test))


@pytest.mark.parametrize("how", ["killed", "asked"])
@pytest.mark.parametrize("final", [False, True])
def test_ended_in_either_run_and_resumed(final, how, three_views, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "picture", lambda *args: None)  # which takes longer than the rest
    options = {"epochs": 3, "batch_size": 64, "baselines": [], "refit": True, "progress": False}
    whole = train(three_views, "udi", out=tmp_path / "whole", **options)
    last = len(read_log(tmp_path / "whole/refit")), whole.metrics["refit"]["fused"]["test_acc"]

    def at(task, number):
        return task.key == "follower" and number == 2 and bool(task.run.first) == final

    with interrupted(at, how):
        train(three_views, "udi", out=tmp_path / "cut", **options)
    assert (tmp_path / "cut/refit").exists() == final and not (tmp_path / "cut/metrics.json").exists()
    resumed = train(three_views, "udi", resume=tmp_path / "cut", progress=False)
    assert without_times(resumed.metrics) == without_times(whole.metrics)
    assert torch.equal(*(r.predict(datasets[three_views](None).test) for r in (resumed, whole)))
    for folder in (".", "refit"):
        assert log_by_stage(tmp_path / "cut" / folder) == log_by_stage(tmp_path / "whole" / folder)
    again = train(three_views, "udi", resume=tmp_path / "cut", progress=False)  # nothing is left to do
    assert without_times(again.metrics) == without_times(whole.metrics)
    assert (len(read_log(tmp_path / "cut/refit")), again.metrics["refit"]["fused"]["test_acc"]) == last


def test_what_is_written_is_of_the_final_fit(little, tmp_path, caplog):
    """The saved predictor and predictions.csv; the first run's figures stay where they are; a line says so."""
    with caplog.at_level(logging.INFO):
        result = train(little, "udi", refit=True, out=tmp_path / "run", **QUICK)
    assert "final fit on 160 samples of training and 60 of validation" in caplog.text
    fused = result.predict(little.test)
    torch.testing.assert_close(load(tmp_path / "run", dataset=little).predict(little.test), fused, rtol=0, atol=0)
    rows = (tmp_path / "run/predictions.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[2]) for row in rows] == fused.argmax(1).tolist()
    metrics = read_metrics(tmp_path / "run")
    assert metrics["refit"] == json.loads(json.dumps(result.metrics["refit"]))
    assert metrics["seconds"]["total"] > metrics["seconds"]["refit"] > 0
    assert {row["phase"] for row in read_log(tmp_path / "run/refit")} == {"anchor", "follower"}
    assert not any("val_acc" in row for row in read_log(tmp_path / "run/refit"))
    heading, *lines = result.table().partition("final fit on training and validation together:")[2].splitlines()
    assert not heading
    shown = [f"{metrics['refit']['fused'][name]:.4f}" for name in ("test_acc", "test_macro_f1")]
    assert lines[-1].split()[:3] == ["udi", *shown]


def test_samples_that_cannot_be_joined_are_refused_at_once(little):
    """Inputs may have one shape where stored samples have two."""
    little.modalities["a"].make = lambda x: x.float()[:, :6]
    little.val.stored["a"] = torch.cat((little.val.stored["a"], little.val.stored["a"]), 1)
    assert train(little, "ensemble", **QUICK)
    with pytest.raises(UserError, match=r"cannot be joined: samples of a have shapes \(6,\) and \(12,\)"):
        train(little, "ensemble", refit=True, **QUICK | {"epochs": 10**6})


def test_scikit_learn_is_fitted_again(little):
    """The classifier that validation chose in the first run, on the joined samples, standardised by these."""
    result = train(little, "sklearn-concat", refit=True, **QUICK)
    rule = result.metrics["fused"]["rule"]
    assert rule.startswith("logistic regression") and result.metrics["refit"]["fused"]["rule"] == rule
    x = {s: torch.cat([split.stored[m] for m in "abc"], 1) for s, split in little.splits().items()}
    both = torch.cat((x["train"], x["val"]))
    std, mean = torch.std_mean(both, 0, correction=0)
    made = LogisticRegression(C=float(rule.partition("C=")[2]), max_iter=300)
    made.fit(((both - mean) / std).numpy(), torch.cat((little.train.labels, little.val.labels)).numpy())
    score = made.score(((x["test"] - mean) / std).numpy(), little.test.labels.numpy())
    assert result.metrics["refit"]["fused"]["test_acc"] == pytest.approx(score)


def test_small_splits_keep_the_size_of_a_batch(little):
    """A batch of all 160 samples stays one of 160 where there are 220."""
    steps = []

    def counting(run):
        steps.append((run.batch_size, run.steps, len(run.data.train)))
        return methods["ensemble"](run)

    train(little, counting, refit=True, **QUICK | {"batch_size": 500})
    assert steps == [(160, 1, 160), (160, 1, 220)]


def test_methods_of_one_s_own(little):
    """One that reads validation outside of `Run.decide`, or decides otherwise in the final fit, is refused in words."""

    def own(run):
        task = train_alone(run, [run.decide("modality", lambda: "ab"[run.labels["val"][0] % 2])])
        ((m, task),) = task.items()
        return Outcome({"fused": scores(outputs(task, run), run.labels)}, {m: task.model})

    assert train(little, own, refit=True, **QUICK).metrics["refit"]["fused"]["test_acc"] > 0.5

    def reading(run):
        return own(run) if run.labels["val"][0] < 9 else None

    with pytest.raises(UserError, match="no validation, and a method reads it outside of Run.decide"):
        train(little, reading, refit=True, **QUICK)

    def wavering(run):
        run.decide(f"first run: {run.first is None}", lambda: 0)

    with pytest.raises(UserError, match="decides first run: False, where the first run decided"):
        train(little, lambda run: (own(run), wavering(run))[0], refit=True, **QUICK)


def test_command(capsys):
    """The option, its help, and a finished run resumed; a run goes on with the options that it began with."""
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--refit" in capsys.readouterr().out
    options = "--dataset splitdigits --labels 60 --epochs 1 --method ensemble --baselines none --out run".split()
    assert main([*options, "--refit"]) == 0
    assert "final fit on training and validation together:" in capsys.readouterr().out
    metrics = read_metrics("run")
    assert main(["--resume", "run", "--refit"]) == 0 and read_metrics("run") == metrics
    assert main([*options[:-1], "plain"]) == 0 and "refit" not in read_metrics("plain")
    assert main(["--resume", "plain", "--refit"]) == 2
    assert "--refit True conflicts with --resume" in capsys.readouterr().err
