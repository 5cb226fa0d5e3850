"""Studies: what their tables say, how they go on, what they refuse; and CLUB where the truth is known."""

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import scipy.stats

pytest.importorskip("sklearn", reason='needs the trainer\'s extra: pip install -e ".[train]"')
pytest.importorskip("matplotlib", reason='needs the trainer\'s extra: pip install -e ".[train]"')

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "python"))

import experiments  # noqa: E402
from studies import Study, Variant, gaussian, studies, summary  # noqa: E402
from studies.features import follower_features  # noqa: E402

# Stands for the trainer: seed 1 takes forever while the file "stuck" exists, seed 2 fails while "broken" does.
STUB = """
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("--seed", "--out", "--resume", "--skill"):
    parser.add_argument(name)
o = parser.parse_args()
seed, folder = int(o.seed), pathlib.Path(o.out or o.resume)
folder.mkdir(exist_ok=True)
(folder / "config.json").write_text("{}")
with open("started", "a") as file:
    file.write(f"{seed} {'resumed' if o.resume else 'new'}\\n")
while seed == 1 and pathlib.Path("stuck").exists():
    time.sleep(0.01)
if seed == 2 and pathlib.Path("broken").exists():
    sys.exit("first line\\nthe disk is full")
def scores(val, test):
    return {"val_acc": val, "test_acc": test, "test_macro_f1": test / 2}
test = float(o.skill) + 0.01 * seed**2
metrics = {
    "method": "udi", "anchor": "a", "fused": scores(0.9, test),
    "unimodal": {"a": scores(0.8, 0.5 + 0.01 * seed), "b": scores(0.5, 0.95)}, "baselines": {},
    "modalities": {"a": scores(0.8, 0.5), "b": scores(0.1, 0.1)},
    "collapsed": {"b": "it fell"} if seed == 0 else {},
}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture(autouse=True)
def stub(tmp_path, monkeypatch):
    """A working directory of its own, with a study whose runs take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("stub.py").write_text(STUB)

    @studies.register("stub")
    class Stub(Study):
        """Does it work?"""

        seeds, program = 3, tmp_path / "stub.py"
        variants = [Variant("ours", "--skill 0.6")]

        def settle(self, argv):
            return dict(zip(argv[::2], argv[1::2], strict=True))

    yield Stub
    del studies["stub"]


def results(folder="results/stub"):
    return json.loads((Path(folder) / "results.json").read_text())


def table(folder="results/stub"):
    return (Path(folder) / "table.md").read_text()


def line(text, name):
    """The cells of a table's line."""
    return next([c.strip() for c in x.split("|")[2:-1]] for x in text.splitlines() if x.startswith(f"| {name} "))


# --- tables ---


def test_table_against_scipy():
    assert experiments.main(["stub"]) == 0
    ours, baseline = [0.6, 0.61, 0.64], [0.5, 0.51, 0.52]
    cells = line(table(), "ours")
    assert cells[1] == f"{100 * sum(ours) / 3:.2f} ± {100 * scipy.stats.tstd(ours):.2f}"
    low, high = scipy.stats.ttest_rel(ours, baseline).confidence_interval(0.95)
    gain = sum(ours) / 3 - sum(baseline) / 3
    assert cells[3] == f"{100 * gain:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    assert cells[4] == "3"


def test_best_baseline_is_chosen_on_validation():
    """b is far better on test, but a on validation."""
    assert experiments.main(["stub"]) == 0
    assert line(table(), "a alone")[3] == "best baseline"
    assert line(table(), "b alone")[3].startswith("+44.00")


def test_collapse_is_counted_and_named():
    assert experiments.main(["stub"]) == 0
    assert line(table(), "ours")[5] == "1" and line(table().split("### follower b")[1], "ours")[5] == "1"
    assert "Collapsed: ours, seed 0: follower b: it fell." in table()


def test_differences_pair_seeds():
    assert summary.differences({0: 3.0, 1: 5.0, 4: 9.0}, {1: 1.0, 4: 2.0, 7: 0.0}) == [4.0, 7.0]
    values = [0.1, 0.4, -0.2, 0.3]
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert summary.interval(values) == pytest.approx((high - low) / 2)
    assert summary.interval([0.5]) is None


def test_one_seed_has_no_spread():
    assert experiments.main(["stub", "--seeds", "1,"]) == 0
    assert line(table(), "ours")[1] == "61.00" and line(table(), "ours")[3] == "+10.00"


def test_report_from_results_alone(stub):
    assert experiments.main(["stub", "--seeds", "0,2"]) == 0
    before, plot = table(), Path("results/stub/accuracy.png")
    shutil.rmtree("results/stub/runs")
    Path("results/stub/table.md").unlink(), plot.unlink()
    stub.variants = []  # nor does it need the study as it was
    assert experiments.main(["stub", "--report"]) == 0
    assert table() == before and plot.read_bytes().startswith(b"\x89PNG")


def test_results_say_where_they_come_from(monkeypatch):
    monkeypatch.setattr(experiments, "describe", lambda: "abc")
    assert experiments.main(["stub", "--seeds", "2", "--jobs", "1"]) == 0
    found = results()
    assert found["command"] == "python python/experiments.py stub --seeds 2 --jobs 1"
    assert (found["seeds"], found["commit"], found["failed"]) == ([0, 1], "abc", [])
    assert found["hardware"]["cores"] >= 1 and found["torch"]
    assert [(r["seed"], r["commits"], r["metrics"]["fused"]["val_acc"]) for r in found["runs"]] == [
        (0, ["abc"], 0.9), (1, ["abc"], 0.9),
    ]  # fmt: skip
    assert found["command"] in table() and "Commit abc" in table()


def test_conditions_have_baselines_of_their_own(stub):
    stub.variants = [Variant("ours", "--skill 0.6", condition=c) for c in ("clean", "noisy")]
    assert experiments.main(["stub", "--seeds", "2"]) == 0
    assert "### clean: prediction" in table() and "### noisy: prediction" in table()
    assert table().count("| a alone ") == 2


# --- going on ---


def test_interrupted_study_goes_on(capfd):
    """Ctrl-C while seed 1 runs: no process is left, seed 0 is kept, seed 1 resumed, seed 2 run for the first time."""
    Path("stuck").touch()

    def interrupt():
        while not Path("started").exists() or "1 new" not in Path("started").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert experiments.main(["stub", "--jobs", "1"]) == 130
    assert "go on with the same command: python python/experiments.py stub --jobs 1" in capfd.readouterr().err
    with open("results/stub/runs/ours-seed1/stdout.txt") as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free: its process is gone
    Path("stuck").unlink()
    assert experiments.main(["stub"]) == 0
    assert sorted(Path("started").read_text().splitlines()) == ["0 new", "1 new", "1 resumed", "2 new"]
    assert experiments.main(["stub"]) == 0
    assert len(Path("started").read_text().splitlines()) == 4


def test_failed_run_is_reported_and_tried_again(capsys):
    Path("broken").touch()
    assert experiments.main(["stub"]) == 1
    err = capsys.readouterr().err
    assert "ours, seed 2 failed: exit code 1" in err and "the disk is full" in err
    assert line(table(), "ours")[4] == "2" and "Failed: ours, seed 2: the disk is full" in table()
    assert results()["failed"][0]["seed"] == 2
    Path("broken").unlink()
    assert experiments.main(["stub"]) == 0
    assert line(table(), "ours")[4] == "3" and "Failed" not in table()


def test_nothing_but_failures(capsys):
    Path("broken").touch()
    assert experiments.main(["stub", "--seeds", "2,"]) == 2
    assert "no run of stub ended well" in capsys.readouterr().err


def test_a_run_in_use_is_left_alone(capsys):
    folder = Path("results/stub/runs/ours-seed0")
    folder.mkdir(parents=True)
    with open(folder / "stdout.txt", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert experiments.main(["stub"]) == 2
    assert "ours-seed0 is in use by another process" in capsys.readouterr().err


def test_other_options_do_not_mix_with_finished_runs(stub, capsys):
    assert experiments.main(["stub"]) == 0
    stub.variants = [Variant("ours", "--skill 0.7")]
    assert experiments.main(["stub"]) == 2
    assert "0.6, now 0.7" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, wanted",
    [
        ("cgdigit", ["unknown study 'cgdigit'", "cgdigits", "controller"]),
        ("", ["NAME"]),
        ("cgdigits --seeds 0", ["--seeds", "at least 1"]),
        ("cgdigits --seeds 1,x", ["--seeds", "'x'"]),
        ("cgdigits --jobs 0", ["--jobs", "at least 1"]),
        ("cgdigits --seed 3", ["--seeds"]),
        ("cgdigits --epoch 0", ["--epoch", "at least 1"]),
        ("cgdigits --device tpu", ["unknown device 'tpu'"]),
        ("cgdigits --nonsense", ["--nonsense"]),
        ("cgdigits --report", ["results.json", "cannot be read"]),
        ("cgdigits --report --epochs 3", ["--report", "--epochs 3"]),
        ("estimator --dims 0", ["--dims", "at least 1"]),
        ("estimator --rho2 1", ["below 1"]),
    ],
)
def test_bad_input(options, wanted, capsys):
    assert experiments.main(options.split()) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("experiments.py: ")
    for part in wanted:
        assert part in message
    assert not Path("results").exists()


def test_slots(monkeypatch):
    monkeypatch.setattr(experiments.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(experiments.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = [slot["CUDA_VISIBLE_DEVICES"] for slot in experiments.find_slots("auto", 3)]
    assert gpus == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in experiments.find_slots("cuda", None)] == ["5", "7"]
    assert experiments.find_slots("cuda:1", None) == [{}]
    assert experiments.find_slots("cpu", None) == [{"OMP_NUM_THREADS": "1"}] * experiments.cores()


# --- the studies themselves ---


def test_options_of_all_studies():
    for study in (cls() for name, cls in studies.items() if name != "stub"):
        assert all(study.settle([*v.options.split(), "--seed", "0"]) for v in study.variants) and study.__doc__
        assert len({str(v) for v in study.variants}) == len(study.variants)


def test_real_runs():
    """One epoch of the trainer, one process a core; everything that it trained has its line."""
    argv = ["cgdigits", "--seeds", "2", "--epochs", "1", "--baselines", "joint", "--out", "out"]
    assert experiments.main(argv) == 0
    for name in ("gray alone", "color alone", "ensemble", "joint", "udi"):
        assert line(table("out"), name)[4] == "2"
    first = json.loads(Path("out/runs/udi-seed0/run/metrics.json").read_text())
    assert results("out")["runs"][0]["metrics"] == first


def metrics(anchor, fused):
    scores = {"val_acc": 0.5, "test_acc": 0.5, "test_macro_f1": 0.5}
    both = {"gray": scores, "color": scores}
    top = {"method": "udi", "anchor": anchor, "unimodal": both, "modalities": both, "baselines": {}, "collapsed": {}}
    return top | {"fused": scores | {"test_acc": fused}}


def record(variant, seed, condition="", **figures):
    return {"variant": variant, "condition": condition, "options": [], "seed": seed, "commits": []} | figures


def test_anchor_study():
    study = studies["anchor"]()
    runs = []
    for seed, (gray, color) in enumerate([(0.9, 0.8), (0.7, 0.8)]):
        for variant, anchor, fused in (("auto", "gray", gray), ("anchor gray", "gray", gray)):
            runs.append(record(variant, seed, "cgdigits", metrics=metrics(anchor, fused)))
        runs.append(record("anchor color", seed, "cgdigits", metrics=metrics("color", color)))
    (note,) = study.notes(runs)
    assert "gray 2" in note and "On 1 of 2 seeds" in note and "5.00 points" in note
    assert "auto" in study.tables(runs)


def test_controller_study(tmp_path):
    study = studies["controller"]()
    accuracies = [0.2, 0.5, 0.4, 0.6]
    log = [
        {"phase": "follower", "modality": "color", "epoch": i + 1, "val_acc": acc, "alpha_con": 0.5, "alpha_com": i / 4}
        for i, acc in enumerate(accuracies)
    ]
    figures = study.figures(metrics("gray", 0.9), [{"phase": "anchor"}, *log])
    runs = [record(variant, seed, **figures) for variant in ("each epoch", "static 1,0") for seed in (0, 1)]
    cells = line(study.tables(runs).split("### follower color")[1], "each epoch")
    assert cells[3:6] == ["0.50 ± 0.00", "0.38 ± 0.00", "10.00 ± 0.00"]
    assert study.draw(runs, tmp_path) == ["accuracy.png", "weights.png"] and (tmp_path / "weights.png").exists()


def test_defaults_study():
    """The gain over the paper's controller is of validation, a mean over conditions, paired by seed."""
    study, runs, gains = studies["defaults"](), [], [0.01, 0.03, 0.02]
    for seed, gain in enumerate(gains):
        for condition in ("clean", "noisy training"):
            for variant, val in (("dynamic", 0.5), ("static 1,1", 0.5 + gain + (0.02 if condition == "clean" else 0))):
                found = metrics("left", 0.9)
                found["fused"]["val_acc"] = val
                runs.append(record(variant, seed, condition, metrics=found))
    low, high = scipy.stats.ttest_1samp([100 * gain + 1 for gain in gains], 0).confidence_interval(0.95)
    assert study.notes(runs)[0].endswith(f"static 1,1: +3.00 [{low:+.2f}, {high:+.2f}].")
    assert study.notes(runs[:1]) == []


def test_q_study():
    study = studies["q"]()
    log = [{"phase": "follower", "modality": "color", "com": com, "q_nll": 2.0} for com in (0.3, 0.25)]
    found = metrics("gray", 0.9) | {"similarity": {"color": {"r2": 0.5}}}
    figures = study.figures(found, [{"phase": "anchor", "modality": "gray"}, *log])
    text = study.tables([record("default", seed, **figures) for seed in (0, 1)])
    cells = line(text.split("### follower color")[1], "default")
    assert cells[3:6] == ["16.00 ± 0.00", "2.00 ± 0.00", "0.50 ± 0.00"]  # 64 dimensions of 0.25


def test_features_study():
    """Trained for an epoch: the likeness of follower and anchor, and the follower's features as they were kept."""
    assert experiments.main(["features", "--seeds", "3,", "--epochs", "1", "--out", "out"]) == 0
    text = table("out")
    assert "CKA with anchor" in text and "![](features.png)" in text
    assert Path("out/features.png").stat().st_size > 20_000
    run = Path("out/runs/with-L_com-seed3/run")
    modality, features, labels = follower_features(run)
    assert features.shape == (360, 64) and len(labels) == 360
    assert modality != json.loads((run / "metrics.json").read_text())["anchor"]


def test_estimator_study(tmp_path):
    """Both of its programs in small, and what the study makes of them."""
    for name, options in (("default", "--dims 2,64 --rho2 0.1"), ("minimise", "--task minimise")):
        assert gaussian.main([*options.split(), "--steps", "20", "--out", name]) == 0
    runs = [record(n, 0, metrics=json.loads(Path(n, "metrics.json").read_text())) for n in ("default", "minimise")]
    study = studies["estimator"]()
    text = study.tables(runs)
    assert line(text, "64, 0.1")[1] == "7.111" and "R² of y from x" in text
    assert study.draw(runs, tmp_path) == ["error.png"] and (tmp_path / "error.png").exists()


@pytest.mark.parametrize("dim", [2, 16])
def test_fitted_club_is_right_on_gaussians(dim):
    options = gaussian.parse(["--steps", "1500", "--out", "unused"])
    cell = gaussian.estimate(dim, 0.3, options)
    assert cell["estimate"] == pytest.approx(cell["club"], rel=0.05)
    assert cell["estimate"] > cell["information"]
