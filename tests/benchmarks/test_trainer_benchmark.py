"""The trainer's benchmark: small runs, and the report of steps that ran eagerly."""

import argparse

import pytest

pytest.importorskip("sklearn", reason='needs the trainer\'s extra: pip install -e ".[train]"')
pytest.importorskip("matplotlib", reason='needs the trainer\'s extra: pip install -e ".[train]"')

import trainer
from udi_trainer.console import log

ARGUMENTS = argparse.Namespace(epochs=1, batch_size=32, amp="none", engine="auto", tf32=False, device="cpu")


@pytest.mark.parametrize("name", [trainer.PLAIN, "UDI, named anchor"])
def test_whole_run(name):
    run = trainer.new_run(ARGUMENTS, trainer.RUNS[name], trainer.dataset("cnn", 192))
    found = trainer.whole_run(name, run)
    assert set(found["epoch_seconds"]) >= {"anchor-gray"} and not run.folder.path.exists()
    assert found["eager"] == []


def test_steps():
    found = trainer.steps(trainer.new_run(ARGUMENTS, [], trainer.dataset("cnn", 384)), rounds=1)
    assert min(found[kind] for kind in ("encoder alone", "follower", "controller")) > 0
    assert found["operators"] > 50 and found["gpu_busy"] is None
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert min(found["shares"].values()) > 0 and found["shares"]["convolutions"] > found["shares"]["losses"]


def test_eager_steps_are_not_hidden(capsys):
    with trainer.eager_steps() as found:
        log.info("follower-color: eager steps, for these wait for the GPU: called a synchronizing operation")
        log.info("anchor: gray")
        print("a table")
    assert found == ["follower-color: eager steps, for these wait for the GPU: called a synchronizing operation"]
    assert capsys.readouterr().out == ""
    result = {"engine": "graph", "runs": {"UDI": {"eager": found}}, "step": {"eager": []}}
    assert "as CUDA graphs, but: follower-color: eager steps" in trainer.engine(result)
    assert trainer.engine(result | {"runs": {}}) == "Steps ran as CUDA graphs."
    assert trainer.engine({"engine": "eager"}) == "Steps ran eagerly."
