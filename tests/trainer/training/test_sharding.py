"""Sharded models (gloo, CPU): what each process holds of them, and that a run goes on with them or without.

That they train as one process does, tests/trainer/test_distributed.py shows.
"""

import signal
import time
from pathlib import Path

import pytest
from torch import nn

from udi_trainer import UserError, train
from udi_trainer.command import main
from udi_trainer.training.sharding import blocks

from ..helpers import TRAIN, log_by_stage, read_log
from ..test_distributed import finish, torchrun

WORKER = """
import torch, torch.distributed as dist
from tests.trainer.helpers import make_run
from torch.distributed.tensor import DTensor
from udi_trainer import UserError, distributed
from udi_trainer.methods.unimodal import Alone
from udi_trainer.training.loop import Stage
from udi_trainer.training.sharding import full_state, shard, unsharded

dist.init_process_group("gloo")
distributed.BUCKET = 2**14

def stage(shard, folder=None, **options):
    run = make_run(shard=shard, epochs=3, batch_size=32, **options)
    run.folder = folder or run.folder
    stage = Stage(run.make(Alone, modality="gray"), run)
    stage.restore()
    return stage

def states(stage):
    found = [full_state(part.state_dict()) for part in stage.task.parts.values()]
    return [*found[0].values(), *(t for kept in found[1]["state"].values() for t in kept.values())]

def same(*stages, tolerance=0.0):
    for a, b in zip(*map(states, stages), strict=True):
        if a is not None and b is not None:  # all processes but the first have none of sharded tensors
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)

def train(stage):
    for _ in stage.epoch_steps():
        pass

for options in {"optimizer": "adamw"}, {"optimizer": "sgd", "lr": 0.01}:
    first = stage(True, **options)
    train(first)
    parameters, optimizer = first.task.parameters, first.task.optimizer
    count = sum(p.numel() for p in parameters)
    kept = [t for kept in optimizer.state.values() for name, t in kept.items() if name != "step"]
    assert len(kept) == len(parameters) * (2 if options["optimizer"] == "adamw" else 1)
    for tensors in parameters, [p.grad for p in parameters], kept:
        assert all(type(t.detach() if t.is_leaf else t) is DTensor for t in tensors)
        local = sum(t.to_local().numel() for t in tensors) / (len(tensors) / len(parameters))
        assert 0.49 * count < local < 0.51 * count, (local, count)

    first.end(0.0, 1)
    plain = stage(False, first.run.folder, **options)  # goes on in whole tensors
    same(first, plain)
    train(first)
    train(plain)
    same(first, plain, tolerance=1e-6)
    plain.end(0.0, 1)
    again = stage(True, first.run.folder, **options)  # and in sharded ones again
    same(again, plain)
    train(again)
    train(plain)
    same(again, plain, tolerance=1e-6)
    again.end(0.0, 1)
    plain.end(0.0, 1)

    for s in again, plain:
        s.finish()
    models = [s.task.model for s in (again, plain)]
    assert type(models[0]) is type(models[1])
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert type(a) is torch.nn.Parameter and a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

class Scaled(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.scale = torch.nn.Parameter(torch.ones(()))

try:
    shard(Scaled(), torch.device("cpu"))
except UserError as error:
    assert "--shard: FSDP2 cannot shard this model" in str(error) and "scalar" in str(error)
else:
    raise AssertionError

torch.manual_seed(0)  # the same in both
tied = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.ReLU(), torch.nn.Linear(200, 200))
tied[2].weight = tied[0].weight
before = [p.detach().clone() for p in tied.parameters()]
shard(tied, torch.device("cpu"))
tied(torch.randn(2, 200)).sum().backward()
plain = unsharded(tied)
assert plain[2].weight is plain[0].weight
assert all(map(torch.equal, plain.parameters(), before))
dist.destroy_process_group()
distributed.exit_process(0)
"""


def test_a_half_in_each_and_checkpoints_of_both_kinds():
    Path("worker.py").write_text(WORKER)
    finish(torchrun(2, "worker.py"))


def test_goes_on_without_and_again():
    """The run of two processes goes on in one, and then in two, with the losses of a run that nobody stopped."""
    udi = "--epochs 4 --batch-size 32 --controller dynamic --align-every 4 --baselines none --device cpu".split()
    udi += ["--features", "1024"]  # slow enough to be stopped
    udi += ["--follower-init", "anchor-phase", "--race", "0.5"]  # the anchor is trained to an earlier end, then goes on
    assert main([*udi, "--out", "whole"]) == 0
    stopped([*udi, "--shard", "--out", "cut"], 2, lines=3)
    stopped(["--resume", "cut"], 1, lines=5)
    finish(torchrun(2, TRAIN, "--resume", "cut"))
    rows = [log_by_stage(folder) for folder in ("cut", "whole")]
    assert len(rows[0]) == len(rows[1]) == 2 + 4 + 4
    for ours, theirs in zip(*rows, strict=True):
        for name in ("loss", "val_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-3), ours


COMPILED = """
import sys
import torch

compile = torch.nn.Module.compile
torch.nn.Module.compile = lambda self: compile(self, backend="aot_eager")  # a quick one
from udi_trainer import distributed
from udi_trainer.command import main

distributed.exit_process(main(sys.argv[1:]))
"""


def test_compiled():
    Path("compiled.py").write_text(COMPILED)
    options = "--epochs 1 --batch-size 32 --controller dynamic --align-every 4 --baselines none --device cpu".split()
    assert main([*options, "--out", "plain"]) == 0
    finish(torchrun(2, "compiled.py", *options, "--shard", "--compile", "--out", "compiled"))
    for ours, theirs in zip(log_by_stage("compiled"), log_by_stage("plain"), strict=True):
        for name in ("loss", "val_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-3), ours


def stopped(options, count, lines):
    """Runs the command, and stops it when its log has so many lines."""
    process = torchrun(count, TRAIN, *options)
    while process.poll() is None and not (Path("cut/metrics.jsonl").exists() and len(read_log("cut")) >= lines):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert "--resume cut" in err, err
    assert not Path("cut/metrics.json").exists()


def test_one_process_shards_nothing(capsys):
    assert main(["--shard", "--out", "run"]) == 2
    assert capsys.readouterr().err.endswith(
        "train.py: --shard needs several processes to spread parameters over: start them by torchrun\n"
    )
    assert not Path("run").exists()
    with pytest.raises(UserError, match="--shard needs several processes"):
        train(shard=True, progress=False)


def test_blocks():
    """Members of sequences that fill a message, inner ones first; what is in one is not counted again."""
    layer = 2**20 * 25 // 4  # parameters

    def linear(parameters=9):
        return nn.Linear(1, parameters, bias=False, device="meta")

    class Pair(nn.Module):
        def __init__(self, *members):
            super().__init__()
            self.members = nn.ModuleList(members)

    big, pair = linear(layer), Pair(linear(), linear())
    model = nn.ModuleDict({"encoder": nn.Sequential(linear(), big, nn.Sequential(pair, linear())), "head": linear()})
    assert [*blocks(model)] == [big]
    outer = Pair(linear(layer // 2), linear(layer - layer // 2))
    assert [*blocks(nn.Sequential(linear(), outer))] == [outer]
    model["tied"] = linear(layer)
    model["tied"].weight = big.weight
    assert [*blocks(model)] == []
