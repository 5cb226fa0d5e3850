"""Registries: additions in one place each, errors that list the names."""

import pytest
import torch

from udi_trainer import UserError
from udi_trainer.command import main
from udi_trainer.registry import Registry, datasets, encoders, methods

from .helpers import read_metrics


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
