"""Frozen encoders: parameters and the statistics of BatchNorm stand still, in the first epochs or in all."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from udi_trainer import Options, Run, train
from udi_trainer.methods.dimml import Detached
from udi_trainer.methods.joint import Joint
from udi_trainer.methods.unimodal import Alone, train_alone
from udi_trainer.models.encoders import make_encoder
from udi_trainer.registry import encoders
from udi_trainer.run_folder import RunFolder
from udi_trainer.training.loop import Stage, fit

from ..helpers import METHODS, make_run


class Normalized(nn.Sequential):
    """With BatchNorm, and a parameter that the user has frozen."""

    def __init__(self, shape):
        n = shape.numel()
        super().__init__(nn.Flatten(), nn.Linear(n, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        self[4].bias.requires_grad_(False)


def state(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


MAKE = {"alone": partial(Alone, modality="sensor"), "joint": Joint, "dimml": Detached}
ENCODER = {
    "alone": lambda model: model.encoder,
    "joint": lambda model: model.encoders["sensor"],
    "dimml": lambda model: next(m for m in model.alone["sensor"].modules() if isinstance(m, Normalized)),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("epochs", [2, "all"])
def test_frozen(kind, optimizer, epochs, mixed):
    mixed.modalities["sensor"].encoder = Normalized
    run = make_run(mixed, epochs=4, batch_size=20, optimizer=optimizer, freeze={"sensor": epochs}, contrast_weight=0,
                   method="dimml") if kind == "dimml" else make_run(
        mixed, epochs=4, batch_size=20, optimizer=optimizer, freeze={"sensor": epochs})  # fmt: skip
    task = MAKE[kind](run)
    encoder, stage = ENCODER[kind](task.model), Stage(task, run)
    stage.restore()
    own = {id(p) for p in encoder.parameters()}
    listed = own & {id(p) for p in task.parameters}
    assert len(listed) == (0 if epochs == "all" else 5)  # the user has frozen the sixth
    trained = {"1.weight", "1.bias", "2.weight", "2.bias", "2.running_mean", "2.running_var", "2.num_batches_tracked",
               "4.weight"}  # fmt: skip
    for epoch in range(4):
        before, whole = state(encoder), state(task.model)
        for _ in stage.epoch_steps():
            pass
        frozen = epochs == "all" or epoch < epochs
        assert changed(before, state(encoder)) == (set() if frozen else trained), epoch
        assert changed(whole, state(task.model)) - {n for n in whole if "encoder" in n}
        assert all(layer.training for m, layer in task.model.named_modules() if "sensor" not in m) or kind == "alone"
        stage.end(0.0, 1)
    assert not encoder[4].bias.requires_grad


@pytest.mark.parametrize("method", [*METHODS, "dimml", "self-training"])
def test_every_method(method, mixed):
    """A frozen encoder stays as it was initialized, its BatchNorm too; the others are trained."""
    start = {}

    def make(shape):
        encoder = Normalized(shape)
        start[len(start)] = state(encoder)
        return encoder

    options = {"labels": 60} if method == "self-training" else {"controller": "dynamic"} if method == "udi" else {}
    result = train(mixed, method, {"sensor": make, "audio": Normalized}, epochs=2, baselines=[], progress=False,
                   freeze={"sensor": "all"}, **options)  # fmt: skip
    models = list(result.models.values())
    found = [m for model in models for m in model.modules() if isinstance(m, Normalized)]
    assert len(found) == 2
    assert sum(any(not changed(state(m), s) for s in start.values()) for m in found if m[1].in_features == 5) == 1
    assert all(m[2].num_batches_tracked > 0 for m in found if m[1].in_features == 150)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resumes(optimizer, mixed):
    """To the figures of a run in one piece, before and after the encoder is trained."""
    mixed.modalities["sensor"].encoder = Normalized
    options, states = Options(epochs=4, batch_size=16, freeze={"sensor": 2}, optimizer=optimizer), []
    for folder, parts in ("whole", (4,)), ("early", (1, 4)), ("late", (3, 4)):
        Path(folder).mkdir()
        for epochs in parts:
            run = Run(options, mixed, torch.device("cpu"), RunFolder(Path(folder)))
            train_alone(run, ["sensor"], epochs)
        states.append(run.folder.checkpoint("anchor-sensor")["parts"]["model"])
    assert not changed(states[0], states[1]) and not changed(states[0], states[2])


@pytest.mark.parametrize("clip", [False, True])
def test_final_layer_that_a_file_lacks_is_trained(clip, mixed, tmp_path, register):
    """Of an image encoder, and of that within one for clips."""

    def make(shape, features):
        layers = nn.Conv2d(shape[0], 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(4, features))

    register(encoders, "normalized", make)
    if clip:
        for split in mixed.splits().values():
            split.stored["image"] = split.stored["image"][:, None].expand(-1, 2, -1, -1, -1)
    view = mixed.modalities["picture"]
    view.encoder = "normalized"
    encoder, _ = make_encoder("picture", view, mixed.train)
    given = {n.removeprefix("encoder."): t for n, t in encoder.state_dict().items() if "4." not in n}
    torch.save(given, tmp_path / "w.pt")
    view.weights = str(tmp_path / "w.pt")
    run = make_run(mixed, epochs=1, freeze={"picture": "all"})
    task = run.make(Alone, modality="picture")
    before = state(task.model)
    fit([task], run)
    at = "encoder.encoder" if clip else "encoder"
    assert changed(before, state(task.model)) == {f"{at}.4.weight", f"{at}.4.bias", "head.weight", "head.bias"}
