"""The command: options, errors and output."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from studies.command import main

from .helpers import ROOT, line, results, table


def test_report_from_results_alone(stub):
    assert main(["stub", "--seeds", "0,2"]) == 0
    before, plot = table(), Path("results/stub/accuracy.png")
    shutil.rmtree("results/stub/runs")
    Path("results/stub/table.md").unlink(), plot.unlink()
    stub.variants = []  # the study may have changed
    assert main(["stub", "--report"]) == 0
    assert table() == before and plot.read_bytes().startswith(b"\x89PNG")


def test_results_say_where_they_come_from(monkeypatch):
    monkeypatch.setattr("studies.command.git_version", lambda: "abc")
    assert main(["stub", "--seeds", "2", "--jobs", "1"]) == 0
    found = results()
    assert found["command"] == "python python/experiments.py stub --seeds 2 --jobs 1"
    assert (found["seeds"], found["commit"], found["failed"]) == ([0, 1], "abc", [])
    assert found["hardware"]["cores"] >= 1 and found["torch"]
    assert [(r["seed"], r["commits"], r["metrics"]["fused"]["val_acc"]) for r in found["runs"]] == [
        (0, ["abc"], 0.9), (1, ["abc"], 0.9),
    ]  # fmt: skip
    assert found["command"] in table() and "Commit abc" in table()


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
    assert main(options.split()) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("experiments.py: ")
    for part in wanted:
        assert part in message
    assert not Path("results").exists()


def test_real_runs():
    """One epoch of the trainer, one process per core. The table has a line for everything that was trained."""
    argv = ["cgdigits", "--seeds", "2", "--epochs", "1", "--baselines", "joint", "--out", "out"]
    assert main(argv) == 0
    for name in ("gray alone", "color alone", "ensemble", "joint", "udi"):
        assert line(table("out"), name)[4] == "2"
    written = json.loads(Path("out/runs/udi-seed0/run/metrics.json").read_text())
    kept = results("out")["runs"][0]["metrics"]
    assert kept["anchor"] == written["anchor"]
    for of in (kept, written):
        of["parts"] = of["modalities"] | of["unimodal"] | of["baselines"] | {"fused": of["fused"]}
    for name, scores in kept["parts"].items():
        assert scores == {score: written["parts"][name][score] for score in ("val_acc", "test_acc", "test_macro_f1")}


def test_command_from_another_folder(tmp_path):
    """The script runs from any working directory."""
    command = [sys.executable, ROOT / "python" / "experiments.py", "estimator"]
    command += ["--seeds", "1", "--steps", "2", "--dims", "2", "--out", "here"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "here" / "table.md").exists()
