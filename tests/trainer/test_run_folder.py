"""The run folder: made once, written all or nothing, never taken over; which options it is resumed with."""

import json
import os
from pathlib import Path

import pytest
import torch

from udi_trainer import UserError, run_folder
from udi_trainer.command import main
from udi_trainer.run_folder import RunFolder

from .helpers import log_by_stage, one_line, read_metrics, without_times


def test_full_disk_keeps_the_last_checkpoint(monkeypatch, capsys):
    options = ["--epochs", "3", "--method", "ensemble"]
    assert main([*options, "--out", "whole"]) == 0
    replace, calls = os.replace, []

    def full(*args):
        calls.append(args)
        if len(calls) == 8:
            raise OSError(28, "No space left on device")
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "replace", full)
        assert main([*options, "--out", "cut"]) == 2
    message = one_line(capsys.readouterr().err)
    assert "No space left on device" in message and "--resume" in message
    assert not list(Path("cut").rglob("*.tmp"))
    assert main(["--resume", "cut"]) == 0
    assert without_times(read_metrics("cut")) == without_times(read_metrics("whole"))
    assert log_by_stage("cut") == log_by_stage("whole")


def test_damaged_checkpoint(capsys):
    assert main(["--epochs", "1", "--method", "joint", "--out", "run"]) == 0
    checkpoint = Path("run/checkpoints/joint.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert main(["--resume", "run"]) == 2
    assert "joint.pt is damaged" in one_line(capsys.readouterr().err)


def test_damaged_config(capsys):
    Path("run").mkdir()
    for text, wanted in [
        ('{"method": "udi", "dataset": "cgdigits", "epochs": 0}', "config.json is damaged: epochs"),
        ("[1]", "missing or damaged"),
        ("{", "missing or damaged"),
    ]:
        Path("run/config.json").write_text(text)
        assert main(["--resume", "run"]) == 2
        assert wanted in one_line(capsys.readouterr().err)


def test_resume_with_other_options(capsys):
    assert main(["--epochs", "1", "--method", "joint", "--out", "run"]) == 0
    for options in ("--epochs 2", "--seed 1", "--method udi", "--baselines ensemble", "--out other", "--patience 3"):
        assert main(["--resume", "run", *options.split()]) == 2
        message = one_line(capsys.readouterr().err)
        assert options.split()[0] in message and "leave it out" in message
    assert main(["--resume", "run", "--epochs", "1", "--device", "cpu"]) == 0


def test_older_folders_are_resumed():
    """Options that config.json lacks, since it is older than these, have their defaults."""
    assert main(["--epochs", "1", "--method", "joint", "--out", "run"]) == 0
    config = json.loads(Path("run/config.json").read_text())
    for name in ("optimizer", "patience", "schedule"):
        del config[name]
    Path("run/config.json").write_text(json.dumps(config))
    before = without_times(read_metrics("run"))
    assert main(["--resume", "run"]) == 0
    assert without_times(read_metrics("run")) == before


def test_default_folders_are_unique():
    for _ in range(2):
        assert main(["--epochs", "1", "--method", "joint"]) == 0
    assert len(list(Path("runs").iterdir())) == 2


def test_without_a_path_checkpoints_are_in_memory(tmp_path):
    """As they were when they were saved, as often as they are asked for."""
    folder, weight = RunFolder(None), torch.ones(2)
    folder.save("stage", weight=weight, rows=[{"epoch": 1}])
    weight.zero_()
    folder.write_log([{"epoch": 1}])
    folder.append_log({"epoch": 2})
    for _ in range(2):
        saved = folder.checkpoint("stage")
        assert saved["weight"].tolist() == [1, 1] and saved["rows"] == [{"epoch": 1}]
    assert folder.checkpoint("other") is None and not list(tmp_path.iterdir())


def test_log_that_cannot_be_written(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl cannot be written"):
        RunFolder(tmp_path).append_log({"epoch": 1})
