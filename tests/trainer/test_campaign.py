"""Random and hostile input: each ends in a result, or in one line and exit code 2; minutes long, run by -m slow."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from udi_trainer import Dataset, Modality, Options, Split, UserError, load, train
from udi_trainer.command import main
from udi_trainer.options import all_fields, spelled

from .helpers import read_metrics

pytestmark = pytest.mark.slow

OPTIONS = "--dataset manifest --manifest m.csv --cache-dir cache --batch-size 16 --epochs 1 --device cpu".split()
METHODS = [
    "udi",
    "co-training",
    "dimml",
    "joint",
    "joint-sum",
    "ensemble",
    "ogm-ge",
    "self-training",
    "joint-self-training",
]
# compile takes seconds a run; the others choose what is run at all, or need several processes.
LEFT_OUT = {"compile", "dataset", "manifest", "cache_dir", "epochs", "device", "out", "shard", "resplit", "data_root"}
TEXTS = ["0", "1", "2", "3", "17", "-1", "0.5", "1e-3", "1e400", "nan", "inf", "", "x", "1,2", "0.2,0.1", "a=b", "none"]
TEXTS += ["auto", "array=mlp", "table=mlp", "array=x", "array=m.csv", "é", "💥", "0.5,0.5,0.5", "table"]
CHOICES = {
    "method": METHODS,
    "baselines": ["none", "joint", "udi,ensemble", "dimml", "joint,joint"],
    "fusion": ["mean", "sum", "weighted", "loglinear", "certainty"],
    "controller": ["dynamic", "static"],
    "anchor": ["array", "table", "auto"],
    "teacher": ["fused", "anchor"],
    "follower_loss": ["label", "residual"],
    "follower_init": ["scratch", "anchor-phase"],
    "optimizer": ["adamw", "sgd"],
    "schedule": ["cosine", "step", "constant"],
    "club": ["marginal", "given-label"],
    "club_norm": ["layer", "none"],
    "amp": ["bf16", "none"],
    "engine": ["eager", "graph", "auto"],
    "data": ["device", "host", "auto"],
    "contrast": ["duc", "full"],
    "augment": ["crop", "flip,spec", "none"],
    "kinds": ["array=array", "array=text", "array=image"],
    "tables": ["t=x", "t=x,u=y", "t=z"],
}


@pytest.fixture(autouse=True)
def samples():
    """A manifest of 60 samples, with an array and two numbers each."""
    generator, rows = np.random.default_rng(0), ["label,array,x,y"]
    for i in range(60):
        np.save(f"{i}.npy", (generator.normal(size=(4, 3)) + i % 2).astype(np.float32))
        rows.append(f"{i % 2},{i}.npy,{generator.normal() + i % 2:.4f},{generator.normal():.4f}")
    Path("m.csv").write_text("\n".join(rows) + "\n")


def outcome(argv, capsys):
    """The exit code; it is 0 or 2, and of 2 there is one line beside the warnings."""
    capsys.readouterr()
    code = main([str(a) for a in argv])
    err = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("warning: ")]
    assert (code, len(err)) in ((0, 0), (2, 1)), (argv, code, err)
    return code


def finite(value):
    """No NaN in a result without a word."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or value == value


def test_random_options(capsys):
    """Mostly of those that the run reads, and mostly of values that it takes."""
    draw, codes = random.Random(0), []
    for number in range(300):
        method = draw.choice(METHODS)
        argv = ["--method", method, *OPTIONS]
        read = Options.make(method=method, dataset="manifest").fields()
        names = sorted((read if draw.random() < 0.8 else all_fields()).keys() - LEFT_OUT)
        for name in draw.sample(names, draw.randint(1, 4)):
            usual = CHOICES.get(name, ["1", "2", "3", "0.5"])
            value = draw.choice(usual if draw.random() < 0.8 else TEXTS)
            flag = isinstance(all_fields()[name].default, bool)
            argv += [spelled(name)] if flag else [f"{spelled(name)}={value}"]
        out = f"run{number}"
        codes.append(outcome([*argv, "--out", out], capsys))
        if codes[-1] == 0:
            assert finite(read_metrics(out)), argv
        shutil.rmtree(out, ignore_errors=True)
    assert 30 < codes.count(0) < 270  # both are met


def kinds_of_files():
    """One file of each kind that a run and the cache leave."""
    checkpoints = Path("cut/checkpoints")
    files = [Path("cut/config.json"), Path("cut/metrics.jsonl"), *sorted(checkpoints.glob("*.pt"))]
    files += [next(Path("cache").rglob(pattern)) for pattern in ("*.bin", "*.keys", "statistics/*.json")]
    return files


def test_flipped_bytes(capsys):
    """In an unfinished run, 100 of each kind of file: it is resumed to the same figures, or refused."""
    assert outcome([*OPTIONS, "--method", "joint", "--out", "whole"], capsys) == 0
    wanted = read_metrics("whole")["fused"]["test_acc"]
    shutil.copytree("whole", "cut")
    for name in ("metrics.json", "checkpoints/model.pt"):
        Path("cut", name).unlink()
    draw = random.Random(1)
    for file in kinds_of_files():
        for _ in range(100):
            shutil.rmtree("run", ignore_errors=True)
            shutil.copytree("cut", "run")
            target = Path("run") / file.relative_to("cut") if file.is_relative_to("cut") else file
            before = target.read_bytes()
            raw = bytearray(before)
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            target.write_bytes(raw)
            if outcome(["--resume", "run"], capsys) == 0:
                assert read_metrics("run")["fused"]["test_acc"] == wanted, file
            if not file.is_relative_to("cut"):
                target.write_bytes(before)


def test_flipped_bytes_of_a_model(capsys):
    assert outcome([*OPTIONS, "--method", "ensemble", "--out", "run"], capsys) == 0
    path, draw = Path("run/checkpoints/model.pt"), random.Random(2)
    before = path.read_bytes()
    stored = {"array": torch.ones(5, 4, 3), "table": torch.ones(5, 2)}
    wanted = load("run").predict(stored)
    for _ in range(100):
        raw = bytearray(before)
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(raw)
        try:
            assert torch.equal(load("run").predict(stored), wanted)
        except UserError:
            pass


def edited(value, draw):
    """The value with one thing in it of another type."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        return value | {name: edited(value[name], draw)}
    return draw.choice([None, 3, -1.5, "x", [], {}, torch.ones(2), True, [1, "a"], {"a": 1}])


def test_edited_checkpoints(capsys):
    """Of other types than a run writes, checksums and all."""
    assert outcome([*OPTIONS, "--method", "joint", "--out", "cut"], capsys) == 0
    Path("cut/metrics.json").unlink()
    saved, draw = torch.load("cut/checkpoints/joint.pt", weights_only=True), random.Random(3)
    model = torch.load("cut/checkpoints/model.pt", weights_only=True)
    for _ in range(100):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree("cut", "run")
        torch.save(edited(saved, draw), "run/checkpoints/joint.pt")
        outcome(["--resume", "run"], capsys)
        torch.save(edited(model, draw), "run/checkpoints/model.pt")
        try:
            load("run").predict({"array": torch.ones(5, 4, 3), "table": torch.ones(5, 2)})
        except UserError:
            pass


def test_edited_config(capsys):
    assert outcome([*OPTIONS, "--method", "joint", "--out", "cut"], capsys) == 0
    Path("cut/metrics.json").unlink()
    config, draw = json.loads(Path("cut/config.json").read_text()), random.Random(4)
    values = [None, 3, -1.5, "x", "", [], {}, True, [1, "a"], {"a": 1}, 1e308, 10**400, [[1]], {"a": ["b"]}]
    for name in list(config) * 2:
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree("cut", "run")
        Path("run/config.json").write_text(json.dumps(config | {name: draw.choice(values)}))
        outcome(["--resume", "run"], capsys)


def hostile_tensors(n):
    x = torch.randn(n, 5)
    nan = x.clone()
    nan[1, 2] = torch.nan
    inf = x.clone()
    inf[0, 0] = torch.inf
    plain = [x, x.double(), x.half(), x.bfloat16(), x.bool(), x.int(), x.to(torch.uint8), x.to(torch.int8), x.short()]
    plain += [
        x * 1e30,
        x * 1e38,
        x * 0,
        x[:, :0],
        x[:, :1],
        x.T.contiguous().T,
        x[:, ::2],
        x[:1].expand(n, 5),
        nan,
        inf,
    ]
    plain += [x.view(n, 5, 1, 1, 1), x.to_sparse(), x.to("meta"), x.to(torch.complex64), x.to(torch.float8_e4m3fn)]
    plain += [
        torch.tensor(3.0),
        x[: n - 1],
        x[:0],
        x.long() * 2**60,
        x.requires_grad_(),
        -x.conj(),
        [1.0] * n,
        None,
        "x",
    ]
    return plain


def test_hostile_tensors():
    labels = torch.arange(60) % 2
    for method in ("udi", "joint", "dimml"):
        for t in hostile_tensors(60):
            splits = [Split(labels, {"a": torch.randn(60, 4), "b": t}) for _ in range(3)]
            data = Dataset(2, {m: Modality("mlp", (m,)) for m in "ab"}, *splits)
            try:
                result = train(data, method, epochs=1, batch_size=16, baselines=[], progress=False)
                assert finite(dataclasses.asdict(result)["metrics"]), t
            except UserError as error:
                assert "\n" not in str(error)
