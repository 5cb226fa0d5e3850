"""Studies that are interrupted, fail or find earlier runs."""

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

from studies.command import main
from studies.study import Variant

from .helpers import line, results, table


def test_interrupted_study_goes_on(capfd):
    """After Ctrl-C in seed 1: no process remains, seed 0 is kept, seed 1 is resumed, and seed 2 is run."""
    Path("stuck").touch()

    def interrupt():
        while not Path("started").exists() or "1 new" not in Path("started").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["stub", "--jobs", "1"]) == 130
    assert "continue with the same command: python python/experiments.py stub --jobs 1" in capfd.readouterr().err
    with open("results/stub/runs/ours-seed1/stdout.txt") as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlocked: the process is gone
    Path("stuck").unlink()
    assert main(["stub"]) == 0
    assert sorted(Path("started").read_text().splitlines()) == ["0 new", "1 new", "1 resumed", "2 new"]
    assert main(["stub"]) == 0
    assert len(Path("started").read_text().splitlines()) == 4


def test_failed_run_is_reported_and_tried_again(capsys):
    Path("broken").touch()
    assert main(["stub"]) == 1
    err = capsys.readouterr().err
    assert "ours, seed 2 failed: exit code 1" in err and "the disk is full" in err
    assert line(table(), "ours")[4] == "2" and "Failed: ours, seed 2: the disk is full" in table()
    assert results()["failed"][0]["seed"] == 2
    Path("broken").unlink()
    assert main(["stub"]) == 0
    assert line(table(), "ours")[4] == "3" and "Failed" not in table()


def test_nothing_but_failures(capsys):
    Path("broken").touch()
    assert main(["stub", "--seeds", "2,"]) == 2
    assert "all runs of stub failed" in capsys.readouterr().err


def test_a_run_in_use_is_left_alone(capsys):
    folder = Path("results/stub/runs/ours-seed0")
    folder.mkdir(parents=True)
    with open(folder / "stdout.txt", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert main(["stub"]) == 2
    assert "ours-seed0 is in use by another process" in capsys.readouterr().err


def test_other_options_do_not_mix_with_finished_runs(stub, capsys):
    assert main(["stub"]) == 0
    stub.variants = [Variant("ours", "--skill 0.7")]
    assert main(["stub"]) == 2
    assert "0.6, now 0.7" in capsys.readouterr().err
