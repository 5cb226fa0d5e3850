"""train() leaves torch, and the process, as it found them."""

import contextlib
import dataclasses
import logging
import random
import signal

import numpy as np
import pytest
import torch

from udi_trainer import UserError, train
from udi_trainer.api import tf32
from udi_trainer.console import console, log

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def precision():
    """All that torch says of it; it refuses to tell some where its old and new flags disagree."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    state = [part.fp32_precision for part in (matmul, cudnn.conv, cudnn.rnn, torch.backends.mkldnn.matmul)]
    for tell in (lambda: matmul.allow_tf32, lambda: cudnn.allow_tf32, torch.get_float32_matmul_precision):
        with contextlib.suppress(RuntimeError):
            state.append(tell())
    return state


@contextlib.contextmanager
def another_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, another_device])
def test_the_caller_s_modes_do_not_matter(mixed, around):
    wanted = train(mixed, epochs=2, progress=False).metrics["fused"]
    with around():
        before = torch.is_grad_enabled(), torch.get_default_device()
        ours = train(mixed, epochs=2, progress=False).metrics["fused"]
        assert (torch.is_grad_enabled(), torch.get_default_device()) == before
    assert ours == wanted


def test_another_default_dtype(mixed):
    """Encoders and heads have it; inputs of another are refused in words."""
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(UserError, match="parameters are torch.float64 by default, the inputs torch.float32"):
            train(mixed, epochs=1, progress=False)
        modalities = {m: dataclasses.replace(view, make=torch.Tensor.double) for m, view in mixed.modalities.items()}
        result = train(dataclasses.replace(mixed, modalities=modalities), epochs=1, progress=False)
        assert result.models["audio"].head.weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_data_made_under_inference_mode(mixed):
    wanted = train(mixed, epochs=2, progress=False).metrics["fused"]
    with torch.inference_mode():
        copies = {name: split.cloned() for name, split in mixed.splits().items()}
        assert copies["train"].labels.is_inference()
    assert train(dataclasses.replace(mixed, **copies), epochs=2, progress=False).metrics["fused"] == wanted


def process_state():
    return {
        "threads": torch.get_num_threads(),
        "precision": precision(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "signals": [signal.getsignal(s) for s in SIGNALS],
        "logger": (log.level, log.propagate, list(log.handlers), logging.getLogger().handlers[:]),
        "modes": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.mark.parametrize("method", ["udi", "ogm-ge"])
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_is_changed(mixed, method, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(123)
    before = process_state()
    train(mixed, method, epochs=1)
    assert process_state() == before


def test_nothing_is_changed_by_an_error(mixed):
    torch.set_num_threads(2)
    before = process_state()
    with pytest.raises(UserError, match="not finite"):
        train(mixed, "joint", epochs=1, batch_size=8, lr=1e30)
    assert process_state() == before


def test_the_state_of_torch_does_not_enter_the_figures(mixed):
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        losses.append(train(mixed, "ogm-ge", epochs=1, progress=False).history["ogm-ge"][0]["loss"])
    assert losses[0] == losses[1]


@pytest.fixture
def precision_as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for part in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        part.fp32_precision = "none"


def set_new_flag():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def set_old_flag():
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize(
    "chosen",
    [
        lambda: None,
        set_new_flag,
        set_old_flag,
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
    ],
    ids=["default", "new flag", "old flag", "high", "medium"],
)
def test_tf32(allowed, chosen, precision_as_it_was):
    """Set for a run on a GPU, whatever was chosen before and however; then as it was."""
    chosen()
    before = precision()
    with tf32(allowed):
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
    assert precision()[:4] == before[:4]
    assert precision() == before or chosen is set_new_flag  # of which the old flags tell nothing


def test_console_is_for_the_length_of_a_run(capsys):
    with pytest.raises(KeyError), console():
        log.info("inside")
        raise KeyError
    log.info("outside")
    assert capsys.readouterr().out == "inside\n"
