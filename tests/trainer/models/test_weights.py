"""Files of initial weights: what fits is loaded by name, what does not is refused, and what was done is said."""

import argparse
import logging

import pytest
import torch

from udi_trainer import Modality, Split, UserError, train
from udi_trainer.command import main
from udi_trainer.models.encoders import make_encoder


def torchvision_names():
    """The names of torchvision's ResNet-18 without its head, in its order."""

    def norm(name):
        return [f"{name}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    names = ["conv1.weight", *norm("bn1")]
    for layer in range(1, 5):
        for block in range(2):
            at = f"layer{layer}.{block}"
            names += [f"{at}.conv1.weight", *norm(f"{at}.bn1"), f"{at}.conv2.weight", *norm(f"{at}.bn2")]
            if layer > 1 and block == 0:
                names += [f"{at}.downsample.0.weight", *norm(f"{at}.downsample.1")]
    return names


def images(channels=3):
    return Split(torch.zeros(2), {"x": torch.randn(2, channels, 32, 32)})


@pytest.fixture(scope="module")
def source():
    """Weights of a ResNet-18 under torchvision's names, with its head."""
    torch.manual_seed(1)
    encoder, _ = make_encoder("x", Modality("resnet18", ("x",)), images())
    values = list(encoder.state_dict().values())[:-2]
    given = {n: t + 1 if "running" in n else t for n, t in zip(torchvision_names(), values, strict=True)}
    return given | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


def loaded(path, channels=3, name="resnet18"):
    torch.manual_seed(2)
    return make_encoder("x", Modality(name, ("x",), weights=str(path)), images(channels))[0].state_dict()


def assert_loaded(own, source):
    """All but the head and the counters are those of the source."""
    pairs = list(zip(torchvision_names(), own.items(), strict=False))
    assert len(pairs) == 120 and [name for name in own if name.startswith("13.")] == list(own)[-2:]
    for theirs, (name, t) in pairs:
        assert theirs.endswith("tracked") or torch.equal(t, source[theirs]), name


FORMS = {
    "as it is": lambda w: w,
    "scrambled": lambda w: dict(sorted(w.items(), key=lambda item: item[0][::-1])),
    "no counters": lambda w: {n: t for n, t in w.items() if not n.endswith("num_batches_tracked")},
    "no head": lambda w: {n: t for n, t in w.items() if not n.startswith("fc.")},
    "model": lambda w: {"model": w, "optimizer": {"state": {0: {"step": 3}}}, "epoch": 7},
    "state_dict": lambda w: {"state_dict": w, "best_acc": 0.5, "arch": "resnet18"},
    "module": lambda w: {f"module.{n}": t for n, t in w.items()},
    "all": lambda w: {"epoch": 1, "state_dict": {"model": {f"module.{n}": t for n, t in w.items()}}},
    "half precision": lambda w: {n: t.half().float() if t.is_floating_point() else t for n, t in w.items()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_people_have(form, zipped, source, tmp_path):
    """Each form, in torch's format of today and in that before 1.6."""
    source = FORMS["half precision"](source) if form == "half precision" else source
    torch.save(FORMS[form](source), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert_loaded(loaded(tmp_path / "w.pt"), source)


def test_other_channels(source, tmp_path):
    """The first convolution gets the mean over the channels, scaled as its outputs."""
    torch.save(source, tmp_path / "w.pt")
    wanted = source["conv1.weight"].mean(1, keepdim=True).expand(-1, 2, -1, -1) * 1.5
    torch.testing.assert_close(loaded(tmp_path / "w.pt", 2)["0.0.weight"], wanted)


@pytest.mark.parametrize("name", ["cnn", "mlp", "resnet18"])
def test_own_names(name, tmp_path):
    """The trainer's own names, the final layer included; where that has another width, it keeps its initialization."""
    torch.manual_seed(1)
    encoder, _ = make_encoder("x", Modality(name, ("x",)), images())
    torch.save(encoder.state_dict(), tmp_path / "w.pt")
    own, source = loaded(tmp_path / "w.pt", name=name), encoder.state_dict()
    assert all(torch.equal(own[n], source[n]) for n in source)
    view = Modality(name, ("x",), weights=str(tmp_path / "w.pt"), width=24)
    other = make_encoder("x", view, images())[0].state_dict()
    *rest, weight, bias = own
    assert other[weight].shape[0] == 24 and other[bias].shape == (24,)
    assert all(torch.equal(other[n], source[n]) for n in rest)


BAD = {
    "empty": (lambda w: {}, "holds no weights: it has nothing"),
    "empty model": (lambda w: {"model": {}}, "holds no weights: it has model"),
    "no tensors": (lambda w: {"epoch": 3}, "holds no weights: it has epoch"),
    "5 of 20 convolutions": (
        lambda w: {n: w[n] for n in [n for n in torchvision_names() if w[n].dim() == 4][:5]},
        r"lacks 95 of the encoder's 122 tensors \(0.1.weight, 0.1.bias, 0.1.running_mean and 92 more\); it has conv1",
    ),
    "one lacks": (
        lambda w: {n: t for n, t in w.items() if n != "layer3.1.conv2.weight"},
        r"lacks 1 of the encoder's 122 tensors \(8.body.2.0.weight\)",
    ),
    "unknown names": (
        lambda w: {f"layer.{i}": t for i, t in enumerate(w.values())},
        r"lacks 100 of .* it has layer.0, layer.1, layer.2 and 119 more",
    ),
    "another shape": (
        lambda w: w | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)},
        r"layer1.0.conv1.weight has shape \(64, 64, 1, 1\), the encoder needs \(64, 64, 3, 3\)",
    ),
    "code": (lambda w: w | {"args": argparse.Namespace(lr=1)}, "contains code, which is not run.*state_dict alone"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_refused(kind, zipped, source, tmp_path):
    change, wanted = BAD[kind]
    torch.save(change(source), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=wanted) as error:
        loaded(tmp_path / "w.pt")
    assert "\n" not in str(error.value) and str(tmp_path / "w.pt") in str(error.value)


@pytest.mark.parametrize("cut", [0, 1, 100, 5000])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated(cut, zipped, tmp_path):
    torch.save({"0.weight": torch.randn(100, 100)}, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "w.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:cut])
    with pytest.raises(UserError, match=r"w.pt is damaged"):
        loaded(tmp_path / "w.pt", name="mlp")


def test_said_once(mixed, tmp_path, caplog):
    encoder, _ = make_encoder("picture", mixed.modalities["picture"], mixed.train)
    torch.save(encoder.state_dict() | {"head.weight": torch.zeros(2, 64)}, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, "udi_trainer"):
        train(mixed, epochs=1, progress=False, features=32, encoder_weights={"picture": str(tmp_path / "w.pt")})
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("encoder of")]
    assert said == (
        f"encoder of picture: 4 of 6 tensors loaded from {tmp_path / 'w.pt'}, 7.weight, 7.bias (the final layer) as"
        " initialized, not used: 7.weight, 7.bias, head.weight"
    )


def test_weights_reach_the_model(mixed, tmp_path):
    """A learning rate of almost 0 leaves them."""
    encoder, _ = make_encoder("picture", mixed.modalities["picture"], mixed.train)
    torch.save(encoder.state_dict(), tmp_path / "w.pt")
    given = {"lr": 1e-30, "encoder_weights": {"picture": str(tmp_path / "w.pt")}}
    result = train(mixed, "joint", epochs=1, progress=False, weight_decay=0.0, **given)
    own = result.models["joint"].encoders["picture"].state_dict()
    assert all(torch.equal(own[name], t) for name, t in encoder.state_dict().items())


@pytest.mark.parametrize(
    "given, wanted",
    [
        (["--encoder-weights", "gray=w.pt"], "w.pt holds no weights"),
        (["--encoder-weights", "sound=w.pt"], "unknown modality 'sound'"),
        (["--encoder-weights", "gray=none.pt"], "none.pt cannot be read"),
        (["--freeze", "sound=2"], "unknown modality 'sound'"),
        (["--freeze", "gray=0"], "not an integer of at least 1"),
        (["--freeze", ""], "not a list such as audio,image=5"),
        (["--amp", "fp16"], "--amp fp16 does not work on a CPU: use --amp bf16"),
        (["--warmup", "-1"], "not a number of at least 0"),
        (["--clip-grad", "0"], "not a number above 0"),
        (["--select", "accuracy"], "unknown value 'accuracy': choose from acc, macro-f1, nll"),
        (["--class-weights", "inverse"], "unknown value 'inverse': choose from balanced, none"),
    ],
)
def test_no_run_folder_before_the_arguments_are_good(given, wanted, tmp_path, capsys):
    torch.save({}, tmp_path / "w.pt")
    assert main(["--dataset", "cgdigits", "--epochs", "1", "--out", "run", *given]) == 2
    assert wanted in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "method, given, wanted",
    [
        ("dimml", {}, "method dimml trains all modalities together, and samples lack sensor"),
        ("udi", {"teacher": "fused"}, "co-training fuses all modalities, and samples lack sensor"),
    ],
)
def test_no_run_folder_where_the_data_does_not_fit_the_method(mixed, method, given, wanted, tmp_path):
    mixed.train.stored["sensor present"] = torch.arange(101) % 3 > 0
    with pytest.raises(UserError, match=wanted):
        train(mixed, method, epochs=1, progress=False, out=str(tmp_path / "run"), baselines=[], **given)
    assert not (tmp_path / "run").exists()
