"""UDI: its two phases, the anchor's choice, the warm-up of q, and what it warns of."""

import functools
import json
from pathlib import Path

import pytest
import torch

import udi_kernels
from udi_kernels import alignment_weights
from udi_trainer import Options, UserError, train
from udi_trainer.command import main
from udi_trainer.data.dataset import presence
from udi_trainer.data.labels import hide
from udi_trainer.evaluation.fusion import LogLinear
from udi_trainer.methods import follower as follower_module
from udi_trainer.methods import udi
from udi_trainer.methods.follower import Follower, q_warmup
from udi_trainer.methods.frozen import Frozen
from udi_trainer.methods.unimodal import Alone, train_alone
from udi_trainer.options import SCIKIT
from udi_trainer.registry import datasets
from udi_trainer.training.loop import best_epoch

from ..helpers import (
    ROOT,
    assert_same_training,
    make_run,
    read_log,
    read_metrics,
    training_batch,
    without_times,
)


def test_defaults_reach_what_they_promise():
    """In the mean of 5 seeds UDI is ahead of joint training and of either modality, and not behind the ensemble."""
    committed = json.loads((ROOT / "python" / "results" / "quickstart" / "results.json").read_text())
    theirs = {run["seed"]: run["metrics"] for run in committed["runs"] if run["variant"] == "udi"}
    reached = {}
    for seed in range(100, 105):
        assert main(["--seed", str(seed), "--out", str(seed)]) == 0
        metrics = read_metrics(str(seed))
        assert metrics["collapsed"] == {}
        paths = {"udi": ("fused",), "joint": ("baselines", "joint"), "ensemble": ("ensemble",)}
        for name, path in (paths | {m: ("unimodal", m) for m in ("left", "right")}).items():
            ours, there = (functools.reduce(dict.get, path, m)["test_acc"] for m in (metrics, theirs[seed]))
            # The same run as committed: equal on the same torch and processor, elsewhere rounding moves a few samples.
            assert ours == pytest.approx(there, abs=0.05)
            reached.setdefault(name, []).append(ours)
    mean = {name: sum(accuracies) / len(accuracies) for name, accuracies in reached.items()}
    assert mean["udi"] > mean["joint"] + 0.02 and mean["udi"] > mean["left"] + 0.02 and mean["udi"] >= mean["ensemble"]


def test_figures_of_cgdigits_stay():
    assert main(["--dataset", "cgdigits", "--out", "run"]) == 0
    metrics = read_metrics("run")
    assert metrics["anchor"] == "gray" and metrics["collapsed"] == {}
    committed = json.loads((ROOT / "python" / "results" / "cgdigits" / "results.json").read_text())
    runs = {(run["variant"], run["seed"]): run["metrics"] for run in committed["runs"]}
    for path in (("fused",), ("unimodal", "gray"), ("baselines", "joint"), ("modalities", "color")):
        ours, theirs = (functools.reduce(dict.get, path, m)["test_acc"] for m in (metrics, runs["udi", 0]))
        assert ours == pytest.approx(theirs, abs=0.01 if theirs > 0.9 else 0.05)


@pytest.mark.parametrize("options", [[], ["--controller", "dynamic", "--align-every", "3"], ["--alpha", "0.5,2"]])
def test_three_modalities(three_views, options):
    assert main(["--dataset", three_views, "--epochs", "3", "--out", "run", *options]) == 0
    metrics = read_metrics("run")
    assert metrics["anchor"] == "clean"
    assert {row["modality"] for row in read_log("run") if row["phase"] == "follower"} == {"noisy", "worse"}
    assert set(metrics["modalities"]) == {"clean", "noisy", "worse"}
    assert Path("run/report.png").stat().st_size > 10_000


def test_uncached_anchor(register):
    """An anchor whose input is augmented runs in every step; where augmenting changes nothing, so must that."""
    options = ["--dataset", "cgdigits", "--epochs", "4", "--baselines", "none"]
    options += ["--controller", "dynamic", "--align-every", "1"]
    assert main([*options, "--out", "cached"]) == 0
    runs = []

    def augmented(options):
        digits = datasets["cgdigits"](options)
        digits.modalities["gray"].augment = lambda x: runs.append(len(x)) or x
        return digits

    register(datasets, "augmented", augmented)
    assert main([*options, "--dataset", "augmented", "--out", "uncached"]) == 0
    assert len(runs) == 2 * 4 * 16  # in the anchor's own training, and for the follower
    assert_same_training("cached", "uncached", 1e-4)


def test_named_anchor_trains_no_other_modality(three_views):
    options = ["--dataset", three_views, "--epochs", "2", "--anchor", "noisy", "--baselines", "none"]
    assert main([*options, "--out", "run"]) == 0
    metrics = read_metrics("run")
    assert metrics["anchor"] == "noisy" and metrics["anchor_selection"]["by"] == "option"
    assert set(metrics["unimodal"]) == {"noisy"} and "ensemble" not in metrics
    assert list(metrics["modalities"]) == ["clean", "noisy", "worse"]
    rows = [(row["phase"], row["modality"]) for row in read_log("run")]
    assert sorted(rows) == [("anchor", "noisy")] * 2 + [("follower", "clean")] * 2 + [("follower", "worse")] * 2
    assert main([*options, "--follower-init", "anchor-phase", "--out", "warm"]) == 0
    assert set(read_metrics("warm")["unimodal"]) == {"clean", "noisy", "worse"}


def test_race(three_views):
    """The anchor is chosen after a fraction of the epochs; only the winner is trained to the end."""
    options = ["--dataset", three_views, "--epochs", "6", "--race", "0.3", "--baselines", "none"]
    assert main([*options, "--out", "run"]) == 0
    metrics = read_metrics("run")
    rows = [row["modality"] for row in read_log("run") if row["phase"] == "anchor"]
    assert metrics["anchor"] == "clean" and rows == ["clean"] * 6 + ["noisy"] * 2 + ["worse"] * 2
    assert {m: scores.get("epochs") for m, scores in metrics["unimodal"].items()} == {
        "clean": None, "noisy": 2, "worse": 2,
    }  # fmt: skip
    assert metrics["anchor_selection"]["margin"] > 0 and "ensemble" not in metrics
    assert main(["--resume", "run"]) == 0  # the winner's later epochs do not enter the choice
    assert read_metrics("run")["anchor_selection"] == metrics["anchor_selection"]


def test_race_beside_the_ensemble(three_views):
    """The ensemble trains the losers to the end. A resumed run still reports them as they were after the race."""
    options = ["--dataset", three_views, "--epochs", "6", "--race", "0.3", "--baselines", "ensemble"]
    assert main([*options, "--out", "run"]) == 0
    metrics, alone = read_metrics("run"), ("anchor", "unimodal")
    rows = [row["modality"] for row in read_log("run") if row["phase"] in alone]
    assert {m: rows.count(m) for m in rows} == {"clean": 6, "noisy": 6, "worse": 6}
    assert metrics["unimodal"]["noisy"]["epochs"] == 2
    Path("run", "metrics.json").unlink()  # as if it had been interrupted at its end
    assert main(["--resume", "run"]) == 0
    assert without_times(read_metrics("run")) == without_times(metrics)


def test_follower_starts_from_its_own_anchor_phase():
    run = make_run()
    gray, color = (Alone(run, modality) for modality in ("gray", "color"))
    follower = Follower(run, "color", Frozen(run, "gray", gray.model, gray.width), color)
    for a, b in zip(follower.model.parameters(), color.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("schedule, steps", [("epoch", [0, 16, 32]), ("12", [0, 12, 24, 36])])
def test_controller_measures_on_schedule(monkeypatch, schedule, steps):
    """Once an epoch of 16 full batches, or every N steps; through the library's op."""
    calls = []
    monkeypatch.setattr(
        follower_module, "gramian", lambda grads: calls.append(len(grads)) or udi_kernels.gramian(grads)
    )
    options = ["--epochs", "3", "--controller", "dynamic", "--align-every", schedule, "--baselines", "none"]
    assert main([*options, "--out", "run"]) == 0
    assert calls == [3] * len(steps)


# --- the warm-up of q ---


@pytest.mark.parametrize(
    "options, warmup",
    [
        ({"epochs": 30}, 100),  # 480 steps
        ({"epochs": 25}, 100),  # 400
        ({"epochs": 24}, 96),  # 384: a quarter
        ({"epochs": 1}, 4),
        ({"epochs": 1, "batch_size": 1077}, 0),  # a single step
        ({"epochs": 30, "q_warmup": 0}, 0),
        ({"epochs": 1, "q_warmup": 300}, 300),
    ],
)
def test_warmup_follows_the_length_of_the_run(options, warmup):
    assert q_warmup(make_run(**options)) == warmup


def test_no_complementary_weight_before_q_is_fitted(capsys):
    """Not in the epochs of the warm-up, which metrics.json names; a warning where there are no others."""
    options = "--epochs 3 --controller dynamic --align-every 1 --baselines none --anchor left".split()
    for warmup in ("32", "48"):
        assert main([*options, "--q-warmup", warmup, "--out", warmup]) == 0
        rows = [row for row in read_log(warmup) if row["phase"] == "follower"]
        assert read_metrics(warmup)["q_warmup"] == int(warmup)
        assert rows[0]["alpha_com"] == rows[1]["alpha_com"] == 0 and (rows[2]["alpha_com"] > 0) == (warmup == "32")
        assert any(row["alpha_con"] > 0 for row in rows)
        warned = "q is fitted in all 48 steps of a follower, so L_com never counts" in capsys.readouterr().err
        assert warned == (warmup == "48")


def test_short_runs_train_with_the_complementary_loss(mixed):
    """With few samples and epochs too the alphas of config.json are those that count."""
    from udi_trainer import train

    result = train(mixed, epochs=8, batch_size=64, baselines=[], anchor="audio", controller="static", progress=False)
    rows = result.history["follower-picture"]
    assert result.metrics["q_warmup"] == 2 and [row["alpha_com"] for row in rows] == [0, 0] + [1] * 6


# --- the anchor's choice, and collapses ---


def test_anchor_near_tie_goes_to_the_surer():
    def log(*epochs):
        names = ("epoch", "val_acc", "val_loss", "val_entropy")
        return [dict(zip(names, (i, *row), strict=True)) for i, row in enumerate(epochs, start=1)]

    vague, sure = log((0.9, 0.5, 0.8), (0.8, 0.6, 0.7)), log((0.5, 0.4, 0.1), (0.897, 0.5, 0.2))
    anchor, selection = udi.choose_anchor("auto", {"vague": vague, "sure": sure})
    assert (anchor, selection["by"]) == ("sure", "predictive entropy")
    assert selection["margin"] == pytest.approx(-0.003) and selection["modalities"]["vague"]["epoch"] == 1
    anchor, selection = udi.choose_anchor("auto", {"vague": vague, "sure": sure[:1]})
    assert (anchor, selection["by"]) == ("vague", "validation accuracy")
    assert udi.choose_anchor("vague", {"vague": vague, "sure": sure})[0] == "vague"


@pytest.mark.parametrize(
    "select, wanted, by", [("acc", "a", "accuracy"), ("macro-f1", "b", "macro-F1"), ("nll", "c", "likelihood")]
)
def test_choice_of_the_anchor_by_select(select, wanted, by):
    names = ("val_acc", "val_macro_f1", "val_loss", "val_entropy")
    figures = {"a": (0.9, 0.5, 0.8, 0.1), "b": (0.8, 0.7, 0.7, 0.1), "c": (0.7, 0.6, 0.5, 0.1)}
    histories = {m: [dict(zip(("epoch", *names), (1, *row), strict=True))] for m, row in figures.items()}
    anchor, selection = udi.choose_anchor("auto", histories, select)
    assert (anchor, selection["by"]) == (wanted, f"validation {by}")
    assert selection["margin"] == pytest.approx({"acc": 0.1, "macro-f1": 0.1, "nll": 0.2}[select])


def test_collapse_is_reported(monkeypatch, capsys):
    """A follower at chance, here because its logits are never trained, is named in the table and in metrics.json."""
    monkeypatch.setattr(follower_module, "weighted_sum", lambda grads, alpha: [torch.zeros_like(g) for g in grads[0]])
    options = (
        "--dataset cgdigits --controller dynamic --align-every 1 --epochs 3 --baselines none --anchor color --out run"
    )
    assert main(options.split()) == 0
    out, err = capsys.readouterr()
    reason = read_metrics("run")["collapsed"]["gray"]
    assert f"collapsed: gray: {reason}" in out and f"warning: follower gray collapsed: {reason}" in err
    assert reason.endswith("no better than chance")


def row(val_acc, epoch=1):
    return {"epoch": epoch, "val_acc": val_acc, "val_loss": 1.0}


@pytest.mark.parametrize(
    "history, alone, wanted",
    [
        ([row(0.1)], 0.9, "its validation accuracy ended at 0.100, alone it reaches 0.900"),
        ([row(0.8), row(0.2, 2)], None, "its validation accuracy ended at 0.200, it had reached 0.800"),
        ([row(0.7)], 0.9, None),
        ([row(0.1)], 0.1, None),  # as little as alone: nothing was lost
        ([row(0.1)], 0.05, None),
        ([row(0.1), row(0.1, 2)], None, "its validation accuracy ended at 0.100, no better than chance"),
        ([row(0.12)], None, None),
    ],
)
def test_what_counts_as_a_collapse(history, alone, wanted):
    assert udi.collapsed(history, alone, 10) == wanted


# --- few labels, fused teachers, residual followers ---

FEW = ["--dataset", "splitdigits", "--labels", "60", "--epochs", "4", "--batch-size", "32"]


def test_few_labels():
    """All methods train on few labels; followers on the other samples too, and better for it."""
    assert main([*FEW, "--epochs", "8", "--alpha", "1,0", "--baselines", "joint,ogm-ge,dimml", "--out", "run"]) == 0
    metrics = read_metrics("run")
    assert metrics["modalities"]["right"]["test_acc"] > metrics["unimodal"]["right"]["test_acc"]
    assert set(metrics["baselines"]) == {"joint", "ogm-ge", "dimml", *SCIKIT}
    rows = [row for row in read_log("run") if row["phase"] == "follower"]
    assert rows[-1]["con"] < rows[0]["con"]


@pytest.mark.parametrize("controller", ["static", "dynamic"])
def test_co_training(controller):
    """All modalities follow the fused prediction, again and again; none is the anchor."""
    options = [*FEW, "--teacher", "fused", "--rounds", "2", "--controller", controller, "--baselines", "none"]
    assert main([*options, "--out", "run"]) == 0
    metrics = read_metrics("run")
    assert metrics["anchor"] is None and metrics["part"] == "follower"
    rows = [(row["modality"], row["epoch"]) for row in read_log("run") if row["phase"] == "follower"]
    assert sorted(rows) == sorted([(m, epoch) for m in ("left", "right") for epoch in (1, 2, 3, 4)] * 2)
    assert sorted(path.stem for path in Path("run/checkpoints").iterdir() if "follower" in path.stem) == [
        "follower-left", "follower-left-2", "follower-right", "follower-right-2",
    ]  # fmt: skip
    assert main(["--resume", "run"]) == 0 and without_times(read_metrics("run")) == without_times(metrics)


def test_co_training_by_its_own_name():
    """It has the figures of --teacher fused, and checkpoints of its own: UDI may train beside it."""
    options = [*FEW, "--controller", "static", "--alpha", "1,0"]
    assert main([*options, "--teacher", "fused", "--rounds", "2", "--baselines", "none", "--out", "fused"]) == 0
    assert main([*options, "--method", "co-training", "--baselines", "udi", "--out", "run"]) == 0
    assert main([*options, "--baselines", "none", "--out", "udi"]) == 0
    fused, run, alone = map(read_metrics, ("fused", "run", "udi"))
    for name in ("modalities", "unimodal", "fused", "ensemble", "anchor", "similarity", "controller"):
        assert run[name] == fused[name], name
    assert run["method"] == "co-training" and run["baselines"]["udi"] == {
        name: value for name, value in alone["fused"].items() if name in run["baselines"]["udi"]
    }
    stages = {path.stem for path in Path("run/checkpoints").iterdir()}
    assert stages >= {"co-trained-left", "co-trained-left-2", "co-trained-right-2", "follower-right"}
    assert main(["--resume", "run"]) == 0 and without_times(read_metrics("run")) == without_times(run)


def test_the_controller_s_measurements_are_shown_by_epoch(capsys):
    """The last row's weights follow from its Gramian; an older state of the controller, without one, loads."""
    assert main([*FEW, "--baselines", "none", "--out", "run"]) == 0
    (follower,) = {row["modality"] for row in read_log("run") if row["phase"] == "follower"}
    rows = [row for row in read_log("run") if row["phase"] == "follower"]
    for row in rows:
        gram = torch.tensor(row["gramian"])
        assert torch.equal(gram, gram.T) and (gram.diagonal() >= 0).all() and gram[0, 0] > 0
        wanted = alignment_weights(gram).tolist()
        assert row["alpha_con"] == pytest.approx(wanted[1], abs=1e-6)
    assert any(row["gramian"][2][2] > 0 for row in rows)
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"follower {follower}: losses"))
    for line, row in zip(lines[start + 2 :], rows, strict=False):
        values = [float(x) for x in line.split()]
        shown = [row["epoch"], row["con"], row["com"], row["alpha_con"], row["alpha_com"], row["gramian"][0][0]]
        assert values[:6] == pytest.approx(shown, rel=6e-3, abs=6e-5) and len(values) == 11
    assert main([*FEW, "--baselines", "none", "--alpha", "1,0", "--out", "static"]) == 0
    assert not any("gramian" in row for row in read_log("static")) and "Gramian" not in capsys.readouterr().out
    controller = follower_module.Controller(make_run())
    controller.load_state_dict({"alpha": torch.tensor([1.0, 0.5, 0.5])})
    assert controller.alpha.tolist() == [1.0, 0.5, 0.5] and not controller.gram.any()


def test_fused_teacher():
    """Its logits are the log-linear rule's, its features those of the others."""
    run = make_run(hide(datasets["splitdigits"](Options()), 60, 0), epochs=1, teacher="fused")
    tasks = train_alone(run)
    _, logits = udi.predictions(tasks, run)
    teacher = udi.fused_teachers(run, tasks, logits)["left"]
    batch = training_batch(tasks["left"])
    features, fused = teacher.outputs(batch)
    rule = LogLinear.fit(torch.stack([z["val"] for z in logits.values()]), run.labels["val"])
    each = {m: task.forward(batch) for m, task in tasks.items()}
    torch.testing.assert_close(features, each["right"][0])
    torch.testing.assert_close(fused.softmax(-1), rule(torch.stack([z for _, z in each.values()])).float())


def test_fused_teacher_needs_all_modalities(mixed):
    for split in mixed.splits().values():
        split.stored[presence("audio")] = torch.arange(len(split)) % 3 > 0
    with pytest.raises(UserError, match="co-training fuses all modalities, and samples lack audio"):
        train(mixed, teacher="fused", epochs=1, baselines=[], progress=False)


def test_residual_followers(capsys):
    """Where both have the same shortcut, what follows relies on it less; an overfitted anchor is told of."""
    options = ["--dataset", "huedigits", "--rho", "0.99", "--epochs", "6"]
    assert main([*options, "--method", "ensemble", "--out", "alone"]) == 0
    assert main([*options, "--alpha", "0,0", "--follower-loss", "residual", "--out", "run"]) == 0
    alone, metrics = read_metrics("alone"), read_metrics("run")
    assert metrics["fused"]["rule"] == "loglinear" and metrics["fused"]["shifted_acc"] > 0.3
    assert metrics["modalities"]["digit"]["shifted_acc"] > alone["modalities"]["digit"]["shifted_acc"]
    judged = best_epoch([row for row in read_log("run") if row["phase"] == "follower"])["val_acc"]
    assert judged == pytest.approx(metrics["fused"]["val_acc"], abs=0.02)
    assert "joint" in metrics["baselines"] and "shifted_acc" in metrics["baselines"]["joint"]
    assert "overfitted" not in capsys.readouterr().err
    options = ["--dataset", "splitdigits", "--follower-loss", "residual", "--baselines", "none"]
    assert main([*options, "--out", "over"]) == 0
    assert "anchor left is overfitted, which ruins residual followers: its accuracy is 0.9" in capsys.readouterr().err


def test_club_given_the_label():
    assert main([*FEW, "--club", "given-label", "--baselines", "none", "--q-warmup", "3", "--out", "run"]) == 0
    assert read_metrics("run")["fused"]["test_acc"] > 0.3


def test_residual_followers_where_modalities_are_missing(mixed):
    """What the anchor lacks is learned alone; what the follower lacks is not judged."""
    for split in mixed.splits().values():
        split.stored[presence("audio")] = torch.arange(len(split)) % 3 > 0
        split.stored[presence("picture")] = torch.arange(len(split)) % 4 > 0
    options = {"anchor": "audio", "follower_loss": "residual", "club": "given-label", "labels": 40}
    metrics = train(mixed, epochs=2, baselines=[], progress=False, **options).metrics
    assert metrics["fused"]["rule"] == "loglinear" and 0 <= metrics["fused"]["test_acc"] <= 1
