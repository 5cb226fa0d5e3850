"""Registries: additions in one place each, errors that list the names."""

import sys
from pathlib import Path

import pytest
import torch

from udi_trainer import UserError
from udi_trainer.command import main
from udi_trainer.registry import Registry, datasets, encoders, imported, methods

from .helpers import read_metrics, run_python


def test_additions_are_there_for_the_command(register):
    """A method, an encoder and a dataset."""

    def linear_digits(options):
        digits = datasets["cgdigits"](options)
        for modality in digits.modalities.values():
            modality.encoder = "linear"
        return digits

    def linear(shape):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(shape.numel(), 10))

    register(methods, "echo", lambda run: methods["ensemble"](run))
    register(encoders, "linear", linear)
    register(datasets, "linear-digits", linear_digits)
    assert main(["--method", "echo", "--dataset", "linear-digits", "--epochs", "1", "--out", "run"]) == 0
    assert read_metrics("run")["method"] == "echo"


def test_find():
    things = Registry("thing")
    things.register("one")(len)
    things.register("two", needs=("torch", "no_such_module"), extra="more")(max)
    assert things.find("one") is len
    with pytest.raises(UserError, match="unknown thing 'onee': choose from one, two; did you mean 'one'?"):
        things.find("onee")
    with pytest.raises(UserError, match=r'^thing two needs no_such_module: pip install -e "\.\[more\]"$'):
        things.find("two")


@pytest.mark.parametrize("text, wanted", [
    ("import no_such_package\n", r"\(ModuleNotFoundError: No module named 'no_such_package', in .*broken.py, line 1\)"),
    ("x = 1\ny = undefined\n", r"\(NameError: name 'undefined' is not defined, in .*broken.py, line 2\)"),
    ("def f(:\n", r"\(SyntaxError: invalid syntax .*line 1"),
    ("x = 1\n", r"\(AttributeError: .*no attribute 'Net'\)"),
])  # fmt: skip
def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, text, wanted):
    """In one line: the real reason, and where it is."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UserError, match=r"^broken:Net cannot be imported " + wanted) as caught:
        imported("broken:Net", "--encoder MODALITY=module:Class")
    assert "\n" not in str(caught.value)
    monkeypatch.delitem(sys.modules, "broken", raising=False)


def test_an_encoder_in_a_file_of_the_working_folder(capsys):
    layers = "nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), width))"
    lines = ["from own_width import width", "from torch import nn", "", "def Net(shape):", f"    return {layers}"]
    Path("own_net.py").write_text("\n".join(lines))
    Path("own_width.py").write_text("width = 7\n")
    code = "import sys; from udi_trainer.command import main; sys.path.remove(''); sys.exit(main(sys.argv[1:]))"
    run_python(code, "--method", "joint", "--epochs", "1", "--encoder", "left=own_net:Net", "--out", "run")
    state = torch.load("run/checkpoints/model.pt", weights_only=True)["models"]["joint"]["state"]
    assert state["encoders.left.1.weight"].shape[0] == 7
    assert main(["--method", "joint", "--encoder", "left=./own_net.py:Net", "--out", "other"]) == 2
    assert "names a file: give its module as own_net:Net" in capsys.readouterr().err
