"""Several processes (gloo, CPU) against one with the same global batch; what becomes of them when one is killed."""

import json
import os
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from udi_trainer import UserError, distributed
from udi_trainer.command import main
from udi_trainer.run import Run

from .helpers import ROOT, TRAIN, make_run, read_log, read_metrics, start, without_times

PROCESSES = ROOT / "tests" / "trainer" / "processes.py"
UDI = "--epochs 4 --batch-size 32 --controller dynamic --align-every 4 --baselines joint --device cpu".split()


def torchrun(count, *command, options=(), **kwargs):
    """This many processes that train together, not through a shell: signals reach torchrun itself."""
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, *options, *command]
    return start(*arguments, **kwargs)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def trained(count, dtype, methods, *shard):
    """By method: what every step of a training measured, in the order of its stages, and the run's metrics."""
    command = [PROCESSES, dtype, ",".join(methods), "20", f"{count}.pt", *shard]
    finish(torchrun(count, *command) if count > 1 else start(*command))
    return torch.load(f"{count}.pt", weights_only=True)


DIFFERENT = """
import os, sys
from udi_trainer.command import main

rank = os.environ["RANK"]
sys.exit(main([*"--epochs 1 --batch-size 32 --device cpu --method ensemble --dataset".split(), *{
    "seed": ["cgdigits", "--seed", rank],
    "option": ["cgdigits", "--lr", f"0.0{1 + int(rank)}"],
    "data": ["manifest", "--manifest", f"{rank}.csv", "--tables", "x=x,y=y"],
}[sys.argv[1]]]))
"""


@pytest.mark.parametrize("what, wanted", [("seed", "--seed"), ("option", "--lr"), ("data", "here, unlike")])
def test_processes_that_were_given_different_things(what, wanted):
    """A rank whose shell set another seed, option or file: refused in words, before anything is trained."""
    Path("different.py").write_text(DIFFERENT)
    for rank in range(2):
        rows = [f"{i % 2},{i + rank * (i == 3)},{i % 5}" for i in range(64)]
        Path(f"{rank}.csv").write_text("\n".join(["label,split,x,y", *(f"{r[0]},train{r[1:]}" for r in rows)]))
    process = torchrun(2, "different.py", what)
    _, err = process.communicate(timeout=300)
    assert process.returncode and err.count("all processes must be given the same, but") == 2 and wanted in err


FIELD = ["mmpareto", "dgl", "g2d", "reconboost", "pdmp", "pmr", "g-blending"]
UPGRAD = ["gramian"] if find_spec("torchjd") else []


@pytest.mark.parametrize(
    "dtype, tolerance, counts, methods",
    [
        ("float64", 1e-12, (2, 4), ["udi"]),
        ("float32", 1e-5, (2,), ["udi", "joint", "joint-sum", "ogm-ge", "ensemble", "dimml", "mla", *FIELD, *UPGRAD]),
    ],
)
def test_same_as_one_process(dtype, tolerance, counts, methods):
    """Losses and weights of 20 steps of each stage, and the accuracy at the end."""
    compare(dtype, tolerance, counts, methods)


@pytest.mark.parametrize(
    "dtype, tolerance, methods",
    [("float64", 1e-12, ["udi"]), ("float32", 1e-5, ["udi", "joint", "ogm-ge", "dimml", *FIELD, *UPGRAD])],
)
def test_sharded_same_as_one_process(dtype, tolerance, methods):
    compare(dtype, tolerance, (2,), methods, "shard")


TRAINING = {"class_weights": "balanced", "clip_grad": 0.5, "warmup": 2.5, "freeze": {"image": 2}, "select": "nll"}


@pytest.mark.parametrize("shard", ["", "shard"])
def test_training_options_same_as_one_process(shard):
    """Clipped gradients, class weights, an encoder that is frozen at first, and the warm-up."""
    compare("float64", 1e-12, (2,), ["udi", "joint"], shard, json.dumps(TRAINING))


@pytest.mark.parametrize("shard", ["", "shard"])
def test_final_fit_same_as_one_process(shard):
    one, two = (trained(count, "float64", ["udi"], shard, '{"refit": true}')["udi"] for count in (1, 2))
    assert len(one["steps"]) > 60  # of the first run
    assert_same_steps(one, two, 1e-12)
    ours, theirs = (each["metrics"]["refit"]["fused"] for each in (one, two))
    assert ours["rule"] == theirs["rule"] and ours["test_acc"] == theirs["test_acc"] > 0.5


def assert_same_steps(ours, theirs, tolerance):
    for row, other in zip(ours["steps"], theirs["steps"], strict=True):
        assert row.keys() == other.keys() and row["stage"] == other["stage"]
        for name, x in row.items():
            if name != "stage":
                what = f"{row['stage']}, {name}: ".__add__
                torch.testing.assert_close(other[name], x, rtol=tolerance, atol=tolerance, msg=what)


def compare(dtype, tolerance, counts, methods, *shard):
    one = trained(1, dtype, methods, *shard)
    for count in counts:
        many = trained(count, dtype, methods, *shard)
        for method in methods:
            ours, theirs = one[method], many[method]
            assert ours["steps"] and len(ours["steps"]) % 20 == 0
            assert_same_steps(ours, theirs, tolerance)
            accuracies = (result["metrics"]["fused"]["test_acc"] for result in (ours, theirs))
            assert next(accuracies) == pytest.approx(next(accuracies), abs=0.006), method


def test_command_and_another_number_of_processes():
    """One writes and tells; stopped by SIGTERM, the run goes on in one process, to the same end."""
    assert main([*UDI, "--out", "whole"]) == 0
    process = torchrun(2, TRAIN, *UDI, "--out", "cut")
    log = Path("cut") / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    out, err = process.communicate(timeout=100)
    assert time.monotonic() - asked < 30
    assert err.count("--resume cut") == 1 and f"torchrun --nproc-per-node 2 {TRAIN}" in err
    assert out.count("2 processes") == 1 and not Path("cut/metrics.json").exists()
    assert main(["--resume", "cut"]) == 0
    ours, theirs = (read_metrics(folder) for folder in ("cut", "whole"))
    for name in ("fused", "ensemble"):
        assert ours[name]["test_acc"] == pytest.approx(theirs[name]["test_acc"], abs=0.006)
    assert [row["epoch"] for row in read_log("cut")].count(1) == 4  # nothing twice: three modalities' stages, and joint


def test_killed_process_is_replaced():
    """torchrun starts all anew, and they go on from the last checkpoint to the figures of an uninterrupted run."""
    finish(torchrun(2, TRAIN, *UDI, "--out", "whole"))
    process = torchrun(2, TRAIN, *UDI, "--out", "cut", options=["--max-restarts", "2"])
    log = Path("cut") / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.01)
    workers = [int(p) for p in os.popen(f"ps -o pid= --ppid {process.pid}").read().split()]
    os.kill(workers[-1], signal.SIGKILL)
    finish(process)
    assert without_times(read_metrics("cut")) == without_times(read_metrics("whole"))


def test_store_that_dead_processes_have_written(monkeypatch):
    """torchrun keeps it over restarts: the processes of now find each other all the same."""
    store, parts = HashStore(), {}
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda backend, store, rank, world_size: parts.update({rank: store})
    )
    for _ in range(3):
        threads = [threading.Thread(target=distributed.initialize, args=(store, rank, 3)) for rank in (0, 2, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(parts) == [0, 1, 2]
        assert not any(part.check(["address"]) for part in parts.values())  # none is one of before
        parts.pop(2).set("address", "here")
        assert all(part.check(["address"]) for part in parts.values())
        parts.clear()


@pytest.mark.parametrize("count, rest", [(1, "done\nPython's end\n"), (2, "done\n")])
def test_leaves_without_the_end_of_python(count, rest, monkeypatch):
    """In which gloo's threads may abort the process; but what was printed is printed."""
    monkeypatch.setenv("WORLD_SIZE", str(count))
    code = """import atexit
from udi_trainer import distributed
atexit.register(print, "Python's end")
print("done")
distributed.exit_process(3)"""
    process = start("-c", code)
    assert process.communicate() == (rest, "") and process.returncode == 3


def test_restarts_need_a_folder(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main(["--epochs", "1"]) == 2
    assert "needs --out DIR" in capsys.readouterr().err


def test_batch_that_cannot_be_shared(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(UserError, match="--batch-size: 64 samples have no equal parts for 3 processes"):
        make_run()
    assert isinstance(make_run(batch_size=63), Run)


def test_shares_and_parts(monkeypatch):
    """The shares of a batch are the batch; the parts of a split are the split, and few samples are seen twice."""
    order = torch.randperm(5 * 12)
    shares, parts = [], []
    monkeypatch.setattr(distributed, "world", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share(order, 12))
        parts.append(distributed.local_indices(9))
    batches = torch.stack([share.view(5, 3) for share in shares], dim=1).flatten()
    assert torch.equal(batches, order)
    assert torch.cat(parts)[:9].tolist() == list(range(9)) and {len(part) for part in parts} == {3}


def test_buckets(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 40)
    tensors = [torch.zeros(5), None, torch.zeros(6), torch.zeros(2).double(), torch.zeros(100), torch.zeros(1)]
    assert list(distributed.buckets(tensors)) == [[0, 2], [4], [5], [3]]


def test_one_process_sends_nothing(monkeypatch):
    """All is as it was, the same objects."""
    tensors = [torch.ones(2), None]
    assert distributed.average(tensors) is tensors and distributed.gather(tensors[0], 2) is tensors[0]
    assert distributed.local_indices(5).tolist() == [0, 1, 2, 3, 4] and distributed.group() is None
    assert sys.modules["torch.distributed"].is_initialized() is False
