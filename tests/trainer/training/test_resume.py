"""Interrupted runs end with the figures of uninterrupted ones."""

import signal
import sys
import time

import pytest
import torch

from udi_trainer.command import main
from udi_trainer.methods.follower import Follower
from udi_trainer.registry import datasets

from ..helpers import TRAIN, log_by_stage, read_log, read_metrics, start, without_times


def stop_at(process, folder, lines, how):
    """Stops the process once its log has this many lines."""
    path = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.002)
    process.send_signal(how)
    out, err = process.communicate()
    assert not (folder / "metrics.json").exists(), "ended before it could be stopped"
    return process.returncode, err


def test_killed_and_resumed(tmp_path):
    """kill -9 in the anchor and the follower phase, then Ctrl-C: the figures of an uninterrupted run."""
    options = ["--epochs", "8", "--batch-size", "16"]
    assert main([*options, "--out", "whole"]) == 0
    folder = tmp_path / "cut"
    stop_at(start(TRAIN, *options, "--out", folder), folder, 3, signal.SIGKILL)
    assert [row["phase"] for row in read_log(folder)] == ["anchor"] * len(read_log(folder))
    stop_at(start(TRAIN, "--resume", folder), folder, 19, signal.SIGKILL)
    assert read_log(folder)[-1]["phase"] == "follower"
    (folder / "metrics.jsonl").open("a").write('{"phase": "follower", "mod')  # as a kill in mid-write would leave it
    code, err = stop_at(start(TRAIN, "--resume", folder), folder, 26, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err and err.strip().endswith(f"train.py --resume {folder}")
    assert main(["--resume", str(folder)]) == 0
    ended = without_times(read_metrics(folder))
    assert ended == without_times(read_metrics("whole"))
    assert read_log(folder) == read_log("whole")
    assert main(["--resume", str(folder)]) == 0  # nothing left to do
    assert without_times(read_metrics(folder)) == ended


def test_augmentation_depends_on_seed_and_step_alone(three_views, register, monkeypatch, device):
    """A resumed run draws the same."""

    def noisy(options):
        dataset = datasets[three_views](options)
        dataset.modalities["clean"].augment = lambda x: x + torch.randn_like(x)
        return dataset

    register(datasets, "noisy", noisy)
    options = ["--dataset", "noisy", "--epochs", "4", "--baselines", "none", "--device", device, "--out"]
    assert main([*options, "whole"]) == 0
    logits = Follower.logits
    with monkeypatch.context() as patch:
        patch.setattr(Follower, "logits", lambda *args: len(read_log("cut")) == 16 and sys.exit() or logits(*args))
        with pytest.raises(SystemExit):
            main([*options, "cut"])
    assert main(["--resume", "cut"]) == 0
    assert log_by_stage("cut") == log_by_stage("whole")
    assert without_times(read_metrics("cut")) == without_times(read_metrics("whole"))


@pytest.mark.parametrize(
    "options", ["--q-depth 2 --q-width 16 --q-lr 3 --q-steps 2", "--optimizer sgd --lr 0.01 --q-lr 3 --q-warmup 7"]
)
def test_settings_of_q_and_optimizer_resume(options, monkeypatch):
    """q's own learning rate, its shape and its steps are those of an uninterrupted run, and so are the alphas."""
    options = f"--epochs 4 --anchor left --baselines none --controller dynamic --align-every 7 {options}".split()
    assert main([*options, "--out", "whole"]) == 0
    logits = Follower.logits
    with monkeypatch.context() as patch:
        patch.setattr(Follower, "logits", lambda *args: len(read_log("cut")) == 6 and sys.exit() or logits(*args))
        with pytest.raises(SystemExit):
            main([*options, "--out", "cut"])
    assert len(read_log("cut")) == 6
    assert main(["--resume", "cut"]) == 0
    assert without_times(read_metrics("cut")) == without_times(read_metrics("whole"))
    assert read_log("cut") == read_log("whole")
    saved = torch.load("cut/checkpoints/follower-right.pt", weights_only=True)["parts"]["optimizer"]
    follower, q = (float(group["lr"]) for group in saved["param_groups"])
    assert q == pytest.approx(3 * follower) and follower > 0
