"""What a run folder predicts, in whatever process."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from udi_trainer import Modality, Options, Outcome, Split, UserError, load, train
from udi_trainer.command import main
from udi_trainer.methods.unimodal import train_alone
from udi_trainer.registry import datasets
from udi_trainer.run_folder import SEAL, serialized

from .helpers import run_python

MINE = """
import torch
from torch import nn

def halved(vector):
    return vector / 2

class Flat(nn.Sequential):
    def __init__(self, shape):
        super().__init__(nn.Flatten(), nn.Dropout(), nn.Linear(shape.numel(), 5))
"""

FIXTURES = ["tests.trainer.conftest"]  # where the function that makes the pictures' input is
LOAD = """
import sys, torch
from udi_trainer import load

for folder in sys.argv[1:]:
    stored = torch.load(f"{folder}/stored.pt")
    torch.save(load(folder, trust=["mine", "tests.trainer.conftest"]).predict(stored), f"{folder}/again.pt")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of one's own, which other processes here can import."""
    Path("mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    return mine


def test_the_same_probabilities_in_another_process(mixed, mine):
    """Of encoders and functions of one's own in a module, of a joint model, of a dataset of the trainer."""
    modalities = mixed.modalities | {"sensor": Modality("mlp", ("vector",), mine.halved)}
    data, encoders = replace(mixed, modalities=modalities), {"audio": mine.Flat, "sensor": mine.Flat}
    digits = datasets["cgdigits"](Options())
    options = {"epochs": 2, "baselines": [], "progress": False}
    for folder, dataset, method, own in [
        ("udi", data, "udi", encoders),
        ("sum", data, "joint-sum", encoders),
        ("digits", "cgdigits", "joint", None),
    ]:
        fusion = {"fusion": "weighted"} if method == "udi" else {}
        result = train(dataset, method, own, out=folder, **fusion, **options)
        split = (digits if dataset == "cgdigits" else data).test
        torch.save(split.stored, f"{folder}/stored.pt")
        torch.save(result.predict(split), f"{folder}/ours.pt")
        assert torch.equal(load(folder, trust=["mine", "tests.trainer.conftest"]).predict(split), result.predict(split))
    run_python(LOAD, "udi", "sum", "digits")
    for folder in ("udi", "sum", "digits"):
        assert torch.equal(torch.load(f"{folder}/again.pt"), torch.load(f"{folder}/ours.pt"))


@pytest.mark.parametrize("where", ["make", "encoder"])
def test_a_folder_runs_no_code(mixed, where):
    """It may come from a stranger, who seals it anew: what it names is imported if the caller trusts the module."""
    train(mixed, "ensemble", epochs=1, baselines=[], out="run", progress=False)
    saved = torch.load("run/checkpoints/model.pt", weights_only=True)
    for spec in saved["modalities"].values():
        spec[where] = {"class": "os:mkdir", "fields": {"path": "ran"}} if where == "make" else "os:mkdir"
    del saved[SEAL]
    Path("run/checkpoints/model.pt").write_bytes(serialized(saved))
    with pytest.raises(UserError, match="run names os:mkdir, which is not trusted: give .* or trust it .--trust os,"):
        load("run")
    assert not Path("ran").exists()
    assert load("run", dataset=mixed, encoders=dict(zip(mixed.modalities, ["mlp", "cnn", "mlp"], strict=True)))


def test_encoders_without_a_name_are_given_again(mixed):
    def make(shape):
        return nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), 4))

    for number, encoder in enumerate((make, functools.partial(make))):
        result = train(mixed, "ensemble", {"sensor": encoder}, epochs=1, out=str(number), progress=False)
        with pytest.raises(UserError, match=r"not trusted: give it again: load\(folder, encoders={'sensor': \.\.\.}\)"):
            load(str(number), trust=FIXTURES)
        again = load(str(number), encoders={"sensor": encoder}, trust=FIXTURES)
        assert torch.equal(again.predict(mixed.test), result.predict(mixed.test))


@pytest.mark.parametrize("make", [lambda x: x / 2, functools.partial(torch.mul, torch.ones(1)), torch.Tensor.sin])
def test_functions_without_a_name_are_given_again(mixed, make):
    data = replace(mixed, modalities=mixed.modalities | {"sensor": Modality("mlp", ("vector",), make)})
    result = train(data, "joint", epochs=1, out="run", progress=False)
    with pytest.raises(UserError, match=r"not trusted: give the data again: load\(folder, dataset=\.\.\.\)"):
        load("run")
    assert torch.equal(load("run", dataset=data).predict(data.test), result.predict(data.test))


def test_what_cannot_be_loaded(mixed):
    with pytest.raises(UserError, match="nowhere has no .*model.pt: no run has finished there"):
        load("nowhere")

    def own(run):
        task = train_alone(run, ["audio"])["audio"]
        model = nn.Module()
        model.part, model.forward = task.model, task.model.forward
        return Outcome({"fused": {"val_acc": 0, "test_acc": 0, "test_macro_f1": 0}}, {"audio": model})

    train(mixed, own, epochs=1, out="own", progress=False)
    with pytest.raises(UserError, match="model audio is of a class of your own: build it"):
        load("own", trust=FIXTURES)
    train(mixed, "joint", epochs=1, out="run", progress=False)
    with pytest.raises(UserError, match="the encoders are not those of"):
        load("run", encoders={"sensor": lambda shape: nn.Linear(5, 9)}, trust=FIXTURES)
    with pytest.raises(UserError, match="unknown modality 'sound': choose from audio, picture, sensor"):
        load("run", encoders={"sound": "mlp"}, trust=FIXTURES)
    with pytest.raises(UserError, match="unknown modality 'audio': choose from gray, color"):
        load("run", dataset=datasets["cgdigits"](Options()))
    file = Path("run/checkpoints/model.pt")
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match="model.pt is damaged .*: delete it"):
        load("run")


def test_predict_takes_what_the_modalities_read(mixed):
    predict = train(mixed, "ensemble", epochs=1, progress=False).predict
    whole = predict(mixed.test)
    stored = mixed.test.stored
    torch.testing.assert_close(predict({n: t[:5] for n, t in stored.items()}), whole[:5])
    assert torch.equal(predict(stored | {"other": torch.ones(3)}), whole)
    assert predict({n: t[:0] for n, t in stored.items()}).shape == (0, 2)
    unlabelled = Split(torch.full((41,), -1), stored)
    assert torch.equal(predict(unlabelled), whole)
    with pytest.raises(UserError, match="picture reads image, which is missing: got sound, vector"):
        predict({n: stored[n] for n in ("sound", "vector")})
    with pytest.raises(UserError, match="differ in their number of samples: .*'sound': 41, 'image': 40"):
        predict(stored | {"image": stored["image"][:40]})


def test_many_samples_are_predicted_in_pieces(mixed):
    predict = train(mixed, "joint", epochs=1, progress=False).predict
    many = {n: t.repeat(60, *[1] * (t.dim() - 1)) for n, t in mixed.test.stored.items()}
    torch.testing.assert_close(predict(many), predict(mixed.test).repeat(60, 1))


def test_a_finished_folder_of_the_command():
    assert main(["--dataset", "cgdigits", "--epochs", "1", "--method", "ensemble", "--amp", "--out", "run"]) == 0
    test = datasets["cgdigits"](Options()).test
    scored = (load("run").predict(test).argmax(1) == test.labels).double().mean().item()
    assert scored == json.loads(Path("run/metrics.json").read_text())["fused"]["test_acc"]
