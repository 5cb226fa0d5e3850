"""Ways to run the same steps: graphs, compiled encoders, samples on the host; they train the same."""

import contextlib

import pytest
import torch

from udi_trainer.command import main
from udi_trainer.methods.unimodal import Alone
from udi_trainer.registry import datasets
from udi_trainer.training.engine import Graphs
from udi_trainer.training.feed import Feed

from ..helpers import assert_same_training, losses, make_run, needs_torchjd, read_metrics


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_samples_from_the_host(three_views, device):
    """Prefetched in a thread: bit for bit what samples on the device give."""
    options = ["--dataset", three_views, "--epochs", "2", "--device", device]
    for place in ("device", "host"):
        assert main([*options, "--data", place, "--out", place]) == 0
    assert losses("host") == losses("device")


@pytest.mark.parametrize("method", ["joint", "udi"])
def test_compiled_encoders(monkeypatch, method):
    """By a quick backend: what a slow one would make of the same graphs is torch's affair.

    The dynamic controller takes the gradients of several losses from one compiled graph.
    """
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend="aot_eager"))
    options = ["--epochs", "1", "--method", method, "--baselines", "none"]
    options += ["--controller", "dynamic"] if method == "udi" else []
    assert main([*options, "--out", "plain"]) == 0
    torch._dynamo.utils.counters.clear()
    assert main([*options, "--compile", "--out", "compiled"]) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # training and validation
    assert_same_training("compiled", "plain", 1e-3)


def test_graphs_need_a_gpu(capsys):
    options = ["--epochs", "1", "--method", "joint", "--device", "cpu", "--engine", "graph"]
    assert main([*options, "--out", "run"]) == 0
    assert capsys.readouterr().out.count("CUDA graphs need a GPU") == 1


def test_order_of_eager_and_captured_steps(three_views, monkeypatch):
    """The first step of all may wait for the GPU, the first one of a kind shows whether that does, others replay."""
    seen = []

    @contextlib.contextmanager
    def no_waiting():
        seen.append("watched")
        yield

    class Graph:
        def replay(self):
            seen.append("replayed")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr("udi_trainer.training.engine.no_waiting", no_waiting)
    monkeypatch.setattr(Graphs, "capture", lambda self, batch, *_: seen.append("captured") or (Graph(), batch))
    run = make_run(three_views)
    task = run.make(Alone, modality="clean")
    task.flags = lambda number: {"odd": number % 2}
    task.step = lambda batch, odd: seen.append("eager") or {"loss": torch.zeros(())}
    graphs = Graphs(task, Feed(run, run.data.train, task.reads), 0)
    for number in (0, 0, 0, 1, 1, 0, 1):
        graphs.step({"index": torch.arange(4)}, number)
    watched, replayed = ["watched", "eager"], ["captured", "replayed"]
    assert seen == ["eager", *watched, *replayed, *watched, *replayed, "replayed", "replayed"]


def test_frozen_encoders_have_graphs_of_their_own(three_views, monkeypatch):
    captured = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr("udi_trainer.training.engine.no_waiting", contextlib.nullcontext)
    replay = type("Graph", (), {"replay": lambda self: None})()

    def capture(self, batch, number, flags):
        captured.append(number)
        return replay, batch

    monkeypatch.setattr(Graphs, "capture", capture)
    run = make_run(three_views, freeze={"clean": 2})
    task = run.make(Alone, modality="clean")
    graphs = Graphs(task, Feed(run, run.data.train, task.reads), 0)
    for number in range(12):  # 3 steps an epoch
        task.train_mode(number // 3)
        graphs.step({"index": torch.arange(4)}, number)
    assert captured == [2, 7]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", ["--amp fp16", "--clip-grad 0.5 --warmup 2 --freeze gray=3 --class-weights balanced"]
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_graphs_with_training_options(options, optimizer):
    options = (
        f"--dataset cgdigits --epochs 6 --controller dynamic --device cuda --optimizer {optimizer} {options}".split()
    )
    for engine in ("eager", "graph"):
        assert main([*options, "--engine", engine, "--out", engine]) == 0
    assert_same_training("graph", "eager", 5e-2 if "fp16" in options else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_graphs(amp):
    """Whole-step CUDA graphs train as eager steps do."""
    options = "--epochs 9 --controller dynamic --align-every 7 --q-steps 2 --device cuda --amp".split() + [amp]
    for engine in ("eager", "graph"):
        assert main([*options, "--engine", engine, "--out", engine]) == 0
    assert_same_training("graph", "eager", 1e-2 if amp == "none" else 5e-2)


@pytest.mark.gpu
def test_graphs_with_sgd():
    options = "--epochs 4 --optimizer sgd --lr 0.01 --schedule step --lr-step 2,0.1 --device cuda".split()
    for engine in ("eager", "graph"):
        assert main([*options, "--engine", engine, "--out", engine]) == 0
    assert_same_training("graph", "eager", 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["joint-sum", "ogm-ge"])
def test_graphs_of_joint_methods(method, capsys):
    """Captured as a whole, the noise of OGM-GE too."""
    for engine in ("eager", "graph"):
        options = ["--method", method, "--epochs", "4", "--device", "cuda", "--engine", engine, "--out", engine]
        assert main(options) == 0
    assert "cannot be captured" not in capsys.readouterr().out
    assert_same_training("graph", "eager", 1e-3)


@pytest.mark.gpu
@needs_torchjd
def test_gramian_on_a_gpu(capsys):
    """Its steps are not captured, nor is that tried."""
    assert main(["--method", "gramian", "--epochs", "2", "--device", "cuda", "--out", "run"]) == 0
    assert "cannot be captured" not in capsys.readouterr().out


@pytest.mark.gpu
def test_defaults_on_a_gpu(capsys):
    """Both phases, side by side and as graphs; no step falls back."""
    assert main(["--device", "cuda", "--out", "run"]) == 0
    assert "eager" not in capsys.readouterr().out
    metrics = read_metrics("run")
    assert metrics["anchor"] == "left" and metrics["fused"]["test_acc"] >= 0.75


@pytest.mark.gpu
def test_step_that_cannot_be_captured(three_views, register, capsys):
    """A step that waits for the GPU falls back to eager steps, with a line of reason."""

    def waiting(options):
        dataset = datasets[three_views](options)
        dataset.modalities["clean"].augment = lambda x: x + 0 * x.sum().item()
        return dataset

    register(datasets, "waiting", waiting)
    options = ["--dataset", "waiting", "--epochs", "2", "--device", "cuda"]
    assert main([*options, "--out", "graph"]) == 0
    assert "anchor-clean: eager steps" in capsys.readouterr().out
    assert main([*options, "--engine", "eager", "--out", "eager"]) == 0
    assert_same_training("graph", "eager", 1e-3)
