"""The trainer, end to end: what a run leaves behind, how it is resumed, what it refuses."""

import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("sklearn", reason='needs the trainer\'s extra: pip install -e ".[train]"')
pytest.importorskip("matplotlib", reason='needs the trainer\'s extra: pip install -e ".[train]"')

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "python" / "train.py"
sys.path[:0] = [str(TRAIN.parent), str(ROOT / "benchmarks")]

import common  # noqa: E402
import data  # noqa: E402
import fusion  # noqa: E402
import models  # noqa: E402
import run as run_module  # noqa: E402
import similarity  # noqa: E402
from methods import methods, ogm_ge, udi  # noqa: E402
from methods.gramian import Gramian  # noqa: E402
from methods.joint import Joint  # noqa: E402
from methods.joint_sum import JointSum  # noqa: E402
from methods.unimodal import Alone, train_alone  # noqa: E402

import eager_udi  # noqa: E402
import train  # noqa: E402
import udi_kernels  # noqa: E402

needs_torchjd = pytest.mark.skipif(
    not all(map(find_spec, ("torchjd", "qpsolvers", "quadprog"))),
    reason='needs TorchJD: pip install -e ".[experiments]"',
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, request):
    """Every test has a working directory of its own, runs on the CPU unless it is for a GPU, and leaves torch's
    threads as they were.
    """
    monkeypatch.chdir(tmp_path)
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def three_views():
    """A dataset of three modalities, the first the cleanest."""

    @data.datasets.register("three")
    def three(data_root):
        generator = torch.Generator().manual_seed(0)
        centers = torch.randn(4, 6, generator=generator)
        noise = {"clean": 0.3, "noisy": 1.0, "worse": 2.0}

        def split(size):
            labels = torch.randint(4, (size,), generator=generator)
            views = {m: centers[labels] + s * torch.randn(size, 6, generator=generator) for m, s in noise.items()}
            return data.Split(labels, views)

        modalities = {name: data.Modality("mlp", (name,)) for name in noise}
        return data.Dataset(4, modalities, split(400), split(200), split(200))

    yield "three"
    del data.datasets["three"]


def result(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())


def figures(folder):
    """metrics.json without what may differ from run to run: times."""
    metrics = result(folder)
    del metrics["seconds"]
    return metrics


def log(folder):
    """metrics.jsonl without times."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def start(*options, **kwargs):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, TRAIN, *options], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path}, **kwargs,
    )  # fmt: skip


def test_plain_command(tmp_path):
    """No options but fewer epochs: a run folder under runs/, the table with joint training beside UDI."""
    process = start("--epochs", "2")
    out, err = process.communicate()
    assert process.returncode == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    metrics = result(folder)
    for name in ("gray alone", "color alone", "ensemble", "joint", "udi: color (follower)"):
        assert name in out
    assert f"{metrics['fused']['test_acc']:.4f}" in out
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "metrics.json", "report.png", "checkpoints",
    }  # fmt: skip
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "config.json").read_text())
    assert (config["epochs"], config["controller"], config["alpha"]) == (2, "static", [1, 1])


def test_defaults_reach_what_they_promise():
    assert train.main(["--out", "run"]) == 0
    metrics = result("run")
    assert metrics["anchor"] == "gray"
    assert metrics["fused"]["test_acc"] >= 0.95
    assert metrics["fused"]["test_acc"] > metrics["baselines"]["joint"]["test_acc"] + 0.2
    assert metrics["collapsed"] == {}
    assert metrics["seconds"]["total"] < 60

    # The same run as committed: equal on the same torch and processor, elsewhere rounding may move a few samples.
    committed = json.loads((ROOT / "python" / "results" / "cgdigits" / "results.json").read_text())
    runs = {(run["variant"], run["seed"]): run["metrics"] for run in committed["runs"]}
    for path in (("fused",), ("unimodal", "gray"), ("baselines", "joint"), ("modalities", "color")):
        ours, theirs = (functools.reduce(dict.get, path, m)["test_acc"] for m in (metrics, runs["udi", 0]))
        assert ours == pytest.approx(theirs, abs=0.01 if theirs > 0.9 else 0.05)


def make_run(*options):
    """A run of these options on the CPU, that writes nothing."""
    options, _ = train.parse(options)
    return run_module.Run(Path("unused"), options, data.datasets[options.dataset](None), torch.device("cpu"))


@pytest.mark.parametrize(
    "method", ["udi", "joint", "joint-sum", "ogm-ge", pytest.param("gramian", marks=needs_torchjd), "ensemble"]
)
def test_metrics(method):
    assert train.main(["--method", method, "--epochs", "2", "--baselines", "none", "--out", "run"]) == 0
    metrics = result("run")
    assert (metrics["method"], metrics["dataset"], metrics["seed"]) == (method, "cgdigits", 0)
    assert metrics["device"] in ("cpu", "cuda")
    for m in ("gray", "color"):
        assert set(metrics["modalities"][m]) >= {"val_acc", "test_acc"}
        assert method not in ("udi", "ensemble") or 0 <= metrics["unimodal"][m]["test_acc"] <= 1
    assert set(metrics["fused"]) >= {"val_acc", "test_acc", "test_macro_f1", "rule"}
    assert set(metrics["seconds"]) >= {"anchor_phase", "follower_phase", "total"}
    stages = {"udi": 3, "ensemble": 2}.get(method, 1)
    rows = log("run")
    assert sorted(row["epoch"] for row in rows) == [1] * stages + [2] * stages
    if method == "udi":
        follower = [row for row in rows if row["phase"] == "follower"]
        assert {row["modality"] for row in follower} == {"color"} and metrics["anchor"] == "gray"
        assert set(follower[0]) >= {"cls", "con", "com", "alpha_con", "alpha_com", "val_acc"}
        assert metrics["modalities"]["gray"] == metrics["unimodal"]["gray"]  # the anchor stays as it was trained
        assert set(metrics["similarity"]) == {"color"} and 0 <= metrics["similarity"]["color"]["cka"] <= 1
        assert metrics["similarity"]["color"]["r2"] <= 1


def test_every_method_can_be_a_baseline():
    assert train.main(["--epochs", "1", "--baselines", "joint,joint-sum,ogm-ge,ensemble", "--out", "run"]) == 0
    baselines = result("run")["baselines"]
    assert list(baselines) == ["joint", "joint-sum", "ogm-ge", "ensemble"]
    assert all(0 <= figures["test_acc"] <= 1 for figures in baselines.values())


@pytest.mark.parametrize("options", [[], ["--controller", "dynamic", "--align-every", "3"], ["--alpha", "0.5,2"]])
def test_three_modalities(three_views, options):
    assert train.main(["--dataset", three_views, "--epochs", "3", "--out", "run", *options]) == 0
    metrics = result("run")
    assert metrics["anchor"] == "clean"
    assert {row["modality"] for row in log("run") if row["phase"] == "follower"} == {"noisy", "worse"}
    assert set(metrics["modalities"]) == {"clean", "noisy", "worse"}
    assert Path("run/report.png").stat().st_size > 10_000


def test_same_seed_same_figures():
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train.main(["--epochs", "2", "--seed", str(seed), "--baselines", "none", "--out", folder]) == 0
    assert figures("a") == figures("b") and log("a") == log("b")
    assert log("a") != log("c")


# --- ways to run ---


def losses(folder):
    return [{n: row[n] for n in ("loss", "val_loss", "com", "alpha_com") if n in row} for row in log(folder)]


def assert_same_training(a, b, rtol):
    """The same losses, epoch by epoch, to the rounding that differs between two ways to compute them."""
    assert len(losses(a)) == len(losses(b)) > 0
    for ours, theirs in zip(losses(a), losses(b), strict=True):
        assert ours == pytest.approx(theirs, rel=rtol, abs=rtol)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_samples_from_the_host(three_views, device):
    """Prefetched in a thread: bit for bit what samples on the device give."""
    options = ["--dataset", three_views, "--epochs", "2", "--device", device]
    for place in ("device", "host"):
        assert train.main([*options, "--data", place, "--out", place]) == 0
    assert losses("host") == losses("device")


def test_uncached_anchor(monkeypatch):
    """An anchor whose input is augmented runs in every step; where augmenting changes nothing, so must that."""
    options = ["--epochs", "4", "--controller", "dynamic", "--align-every", "1", "--baselines", "none"]
    assert train.main([*options, "--out", "cached"]) == 0
    runs = []

    @data.datasets.register("augmented")
    def augmented(data_root):
        digits = data.cgdigits(data_root)
        digits.modalities["gray"].augment = lambda x: runs.append(len(x)) or x
        return digits

    try:
        assert train.main([*options, "--dataset", "augmented", "--out", "uncached"]) == 0
    finally:
        del data.datasets["augmented"]
    assert len(runs) == 2 * 4 * 16  # in the anchor's own training, and for the follower
    assert_same_training("cached", "uncached", 1e-4)


@pytest.mark.parametrize("augment", [None, torch.nn.functional.dropout])
def test_side_by_side_in_threads(three_views, augment):
    """Modalities trained at the same time train as they do one by one, also if they draw random numbers."""
    options, _ = train.parse(["--epochs", "3", "--batch-size", "8", "--dataset", three_views])

    def losses(folder, threads, *groups):
        dataset = data.datasets[three_views](None)
        dataset.modalities["clean"].augment = dataset.modalities["worse"].augment = augment
        run = run_module.Run(Path(folder), options, dataset, torch.device("cpu"))
        run.folder.mkdir()
        torch.set_num_threads(threads)
        for modalities in groups:
            train_alone(run, modalities)
        return {(stage, row["epoch"]): row["loss"] for stage, rows in run.rows.items() for row in rows}

    together = losses("together", 6, ["clean", "noisy", "worse"])
    assert len(together) == 9
    assert together == losses("again", 6, ["clean", "noisy", "worse"])
    assert together == pytest.approx(losses("apart", 1, ["worse"], ["clean"], ["noisy"]), rel=1e-5)


def test_threads_do_not_depend_on_who_else_is_left(three_views, monkeypatch):
    """A stage that lags behind after a resume is trained with the threads that it has beside others."""
    seen = []
    step = Alone.step
    monkeypatch.setattr(Alone, "step", lambda *args: seen.append(torch.get_num_threads()) or step(*args))
    options, _ = train.parse(["--epochs", "2", "--dataset", three_views])
    run = run_module.Run(Path("run"), options, data.datasets[three_views](None), torch.device("cpu"))
    run.folder.mkdir()
    torch.set_num_threads(4)
    train_alone(run, ["clean"], epochs=1)
    assert seen == [4] * run.steps
    seen.clear()
    train_alone(run, ["clean", "noisy"])
    assert len(seen) == 3 * run.steps and set(seen[1 : run.steps]) == {2}


def test_error_beside_another_stage(three_views, monkeypatch):
    """What goes wrong in one thread ends the others too, and the run."""
    torch.set_num_threads(2)
    step, steps = Alone.step, []

    def failing(self, batch):
        steps.append(self.modality)
        if self.modality == "noisy" and steps.count("noisy") == 3:
            raise RuntimeError("lost")
        return step(self, batch)

    monkeypatch.setattr(Alone, "step", failing)
    options, _ = train.parse(["--batch-size", "1", "--dataset", three_views])
    run = run_module.Run(Path("run"), options, data.datasets[three_views](None), torch.device("cpu"))
    run.folder.mkdir()
    with pytest.raises(RuntimeError, match="lost"):
        train_alone(run, ["noisy", "clean"])
    assert steps.count("clean") < 400


def test_augmentation_is_for_training_and_resumes(three_views):
    """Random changes depend on seed and step alone: a resumed run draws the same; validation sees none."""
    views = data.datasets[three_views]

    @data.datasets.register("noisy")
    def noisy(data_root):
        dataset = views(data_root)
        dataset.modalities["clean"].augment = lambda x: x + torch.randn_like(x)
        return dataset

    try:
        options = ["--dataset", "noisy", "--method", "ensemble", "--out"]
        assert train.main([*options, "whole", "--epochs", "4"]) == 0
        assert train.main([*options, "again", "--epochs", "4"]) == 0
        assert log("again") == log("whole")
        digits = noisy(None)
        batch = digits.train.rows(torch.arange(9), ["clean"])
        assert torch.equal(digits.modalities["clean"].input(batch), batch["clean"])
        assert not torch.equal(digits.modalities["clean"].input(batch, training=True), batch["clean"])
    finally:
        del data.datasets["noisy"]


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_graphs(amp):
    """Whole-step CUDA graphs train as eager steps do."""
    options = "--epochs 9 --controller dynamic --align-every 7 --q-steps 2 --device cuda --amp".split() + [amp]
    for engine in ("eager", "graph"):
        assert train.main([*options, "--engine", engine, "--out", engine]) == 0
    assert_same_training("graph", "eager", 1e-2 if amp == "none" else 5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["joint-sum", "ogm-ge"])
def test_graphs_of_joint_methods(method, capsys):
    """Captured as a whole, the noise of OGM-GE too."""
    for engine in ("eager", "graph"):
        options = ["--method", method, "--epochs", "4", "--device", "cuda", "--engine", engine, "--out", engine]
        assert train.main(options) == 0
    assert "cannot be captured" not in capsys.readouterr().out
    assert_same_training("graph", "eager", 1e-3)


@pytest.mark.gpu
@needs_torchjd
def test_gramian_on_a_gpu(capsys):
    """Its steps are not captured, nor is that tried."""
    assert train.main(["--method", "gramian", "--epochs", "2", "--device", "cuda", "--out", "run"]) == 0
    assert "cannot be captured" not in capsys.readouterr().out


@pytest.mark.gpu
def test_defaults_on_a_gpu(capsys):
    """Both phases, side by side and as graphs; no step falls back."""
    assert train.main(["--device", "cuda", "--out", "run"]) == 0
    assert "eager" not in capsys.readouterr().out
    metrics = result("run")
    assert metrics["anchor"] == "gray" and metrics["fused"]["test_acc"] >= 0.95


@pytest.mark.gpu
def test_step_that_cannot_be_captured(three_views, capsys):
    """A step that waits for the GPU falls back to eager steps, with a line of reason."""
    views = data.datasets[three_views]

    @data.datasets.register("waiting")
    def waiting(data_root):
        dataset = views(data_root)
        dataset.modalities["clean"].augment = lambda x: x + 0 * x.sum().item()
        return dataset

    try:
        options = ["--dataset", "waiting", "--epochs", "2", "--device", "cuda"]
        assert train.main([*options, "--out", "graph"]) == 0
        assert "anchor-clean: eager steps" in capsys.readouterr().out
        assert train.main([*options, "--engine", "eager", "--out", "eager"]) == 0
    finally:
        del data.datasets["waiting"]
    assert_same_training("graph", "eager", 1e-3)


def test_compiled_encoders():
    options = ["--epochs", "1", "--method", "joint"]
    assert train.main([*options, "--out", "plain"]) == 0
    torch._dynamo.utils.counters.clear()
    assert train.main([*options, "--compile", "--out", "compiled"]) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # training and validation
    assert_same_training("compiled", "plain", 1e-3)


def test_graphs_need_a_gpu(capsys):
    options = ["--epochs", "1", "--method", "joint", "--device", "cpu", "--engine", "graph"]
    assert train.main([*options, "--out", "run"]) == 0
    assert capsys.readouterr().out.count("CUDA graphs need a GPU") == 1


def test_named_anchor_trains_no_other_modality(three_views):
    options = ["--dataset", three_views, "--epochs", "2", "--anchor", "noisy", "--baselines", "none"]
    assert train.main([*options, "--out", "run"]) == 0
    metrics = result("run")
    assert metrics["anchor"] == "noisy" and metrics["anchor_selection"]["by"] == "option"
    assert set(metrics["unimodal"]) == {"noisy"} and "ensemble" not in metrics
    assert list(metrics["modalities"]) == ["clean", "noisy", "worse"]
    rows = [(row["phase"], row["modality"]) for row in log("run")]
    assert sorted(rows) == [("anchor", "noisy")] * 2 + [("follower", "clean")] * 2 + [("follower", "worse")] * 2
    assert train.main([*options, "--follower-init", "anchor-phase", "--out", "warm"]) == 0
    assert set(result("warm")["unimodal"]) == {"clean", "noisy", "worse"}


def test_race(three_views, tmp_path):
    """The anchor is chosen after a fraction of the epochs; only the winner is trained to the end."""
    options = ["--dataset", three_views, "--epochs", "6", "--race", "0.3", "--baselines", "none"]
    assert train.main([*options, "--out", "run"]) == 0
    metrics = result("run")
    rows = [row["modality"] for row in log("run") if row["phase"] == "anchor"]
    assert metrics["anchor"] == "clean" and rows == ["clean"] * 6 + ["noisy"] * 2 + ["worse"] * 2
    assert {m: figures.get("epochs") for m, figures in metrics["unimodal"].items()} == {
        "clean": None, "noisy": 2, "worse": 2,
    }  # fmt: skip
    assert metrics["anchor_selection"]["margin"] > 0 and "ensemble" not in metrics
    assert train.main(["--resume", "run"]) == 0  # the winner's later epochs do not enter the choice
    assert result("run")["anchor_selection"] == metrics["anchor_selection"]


def test_follower_starts_from_its_own_anchor_phase():
    run = make_run()
    gray, color = (Alone(run, modality) for modality in ("gray", "color"))
    follower = udi.Follower(run, "color", udi.Anchor(run, gray), color)
    for a, b in zip(follower.model.parameters(), color.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("align", ["epoch", "3"])
def test_plain_pytorch_trains_the_same(monkeypatch, align):
    """Both phases against UDI in plain torch: all pairs, concatenated gradients, the anchor run in every step."""
    monkeypatch.setattr(udi, "Q_WARMUP", 5)
    monkeypatch.setattr(eager_udi, "Q_WARMUP", 5)
    argv = ["--epochs", "3", "--controller", "dynamic", "--align-every", align, "--baselines", "none", "--out", "run"]
    assert train.main(argv) == 0
    plain = eager_udi.EagerUDI(make_run(*argv))
    plain.fit()
    ours = [row["loss"] for row in log("run")]
    assert len(ours) == 9
    assert ours == pytest.approx([row["loss"] for rows in plain.rows.values() for row in rows], rel=1e-3)
    assert any(row.get("alpha_con", 0) > 0 for row in log("run"))
    assert align == "epoch" or any(row.get("alpha_com", 0) > 0 for row in log("run"))


def test_memory_does_not_grow():
    """Of the process, over epochs of UDI: what it needed at most is the same after 4 epochs and after 24."""
    code = "import resource, train; train.main(); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for epochs in ("4", "24"):
        options = f"--controller dynamic --align-every 2 --baselines none --epochs {epochs} --out {epochs}".split()
        path = os.pathsep.join((str(ROOT), str(TRAIN.parent)))
        end = subprocess.run([sys.executable, "-c", code, *options], text=True, capture_output=True,
                             env=os.environ | {"PYTHONPATH": path})  # fmt: skip
        assert end.returncode == 0, end.stderr
        peaks.append(int(end.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 30, f"{peaks} MiB"


# --- resume ---


def stop_at(process, folder, lines, how):
    """Stops the process once its log has this many lines."""
    path = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.002)
    process.send_signal(how)
    out, err = process.communicate()
    assert not (folder / "metrics.json").exists(), "ended before it could be stopped"
    return process.returncode, err


def test_killed_and_resumed(tmp_path):
    """kill -9 in the anchor and the follower phase, then Ctrl-C: the figures of an uninterrupted run."""
    options = ["--epochs", "8", "--batch-size", "16"]
    assert train.main([*options, "--out", "whole"]) == 0
    folder = tmp_path / "cut"
    stop_at(start(*options, "--out", str(folder)), folder, 3, signal.SIGKILL)
    assert [row["phase"] for row in log(folder)] == ["anchor"] * len(log(folder))
    stop_at(start("--resume", str(folder)), folder, 19, signal.SIGKILL)
    assert log(folder)[-1]["phase"] == "follower"
    (folder / "metrics.jsonl").open("a").write('{"phase": "follower", "mod')  # as a kill in mid-write would leave it
    code, err = stop_at(start("--resume", str(folder)), folder, 26, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err and err.strip().endswith(f"train.py --resume {folder}")
    assert train.main(["--resume", str(folder)]) == 0
    assert figures(folder) == figures("whole")
    assert log(folder) == log("whole")
    again = figures(folder)
    assert train.main(["--resume", str(folder)]) == 0 and figures(folder) == again  # nothing left to do


def test_full_disk_keeps_the_last_checkpoint(monkeypatch, capsys):
    options = ["--epochs", "3", "--method", "ensemble"]
    assert train.main([*options, "--out", "whole"]) == 0
    replace, calls = os.replace, []

    def full(*args):
        calls.append(args)
        if len(calls) == 8:
            raise OSError(28, "No space left on device")
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.os, "replace", full)
        assert train.main([*options, "--out", "cut"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "No space left on device" in message and "--resume" in message
    assert not list(Path("cut").rglob("*.tmp"))
    assert train.main(["--resume", "cut"]) == 0
    assert figures("cut") == figures("whole")


def test_settings_of_q_resume(monkeypatch):
    """q's own learning rate, its shape and its steps are those of an uninterrupted run, and so are the weights."""
    options = "--epochs 4 --anchor gray --baselines none --controller dynamic --align-every 7".split()
    options += "--q-depth 2 --q-width 16 --q-lr 3 --q-steps 2".split()
    assert train.main([*options, "--out", "whole"]) == 0
    logits = udi.Follower.logits
    with monkeypatch.context() as patch:
        patch.setattr(udi.Follower, "logits", lambda *args: len(log("cut")) == 6 and sys.exit() or logits(*args))
        with pytest.raises(SystemExit):
            train.main([*options, "--out", "cut"])
    assert len(log("cut")) == 6
    assert train.main(["--resume", "cut"]) == 0
    assert figures("cut") == figures("whole") and log("cut") == log("whole")
    saved = torch.load("cut/checkpoints/follower-color.pt", weights_only=True)["parts"]["optimizer"]
    follower, q = (float(group["lr"]) for group in saved["param_groups"])
    assert q == pytest.approx(3 * follower) and follower > 0


def test_damaged_checkpoint(capsys):
    assert train.main(["--epochs", "1", "--method", "joint", "--out", "run"]) == 0
    checkpoint = Path("run/checkpoints/joint.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert train.main(["--resume", "run"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "joint.pt is damaged" in message


# --- bad input ---


@pytest.mark.parametrize(
    "options, wanted",
    [
        ("--dataset cgdigit", ["unknown dataset 'cgdigit'", "cgdigits", "cgmnist"]),
        ("--method foo", ["unknown method 'foo'", "udi", "joint", "ensemble"]),
        ("--anchor sound", ["unknown anchor 'sound'", "gray", "color"]),
        ("--fusion median", ["unknown fusion rule", "mean", "sum", "weighted"]),
        ("--baselines joint,foo", ["unknown baseline 'foo'"]),
        ("--follower-init warm", ["scratch", "anchor-phase"]),
        ("--controller fixed", ["dynamic", "static"]),
        ("--club-norm batch", ["layer", "none"]),
        ("--q-depth=-1", ["--q-depth", "at least 0"]),
        ("--q-width 0", ["--q-width", "at least 1"]),
        ("--q-lr 0", ["--q-lr", "above 0"]),
        ("--q-steps 0", ["--q-steps", "at least 1"]),
        ("--controller dynamic --alpha 1,1", ["--alpha", "--controller static"]),
        ("--align-every 3", ["--align-every", "--controller dynamic"]),
        ("--alpha 1", ["two weights"]),
        ("--alpha 1,-1", ["'-1'", "at least 0"]),
        ("--alpha 1,nan", ["'nan'"]),
        ("--noise 0.5", ["--noise", "two amounts INPUT,LABEL"]),
        ("--noise=-1,0", ["'-1'", "at least 0"]),
        ("--noise 0,1", ["'1'", "below 1"]),
        ("--align-every never", ["'never'", "integer"]),
        ("--align-every 0", ["'0'", "at least 1"]),
        ("--epochs 0", ["--epochs", "at least 1"]),
        ("--batch-size -3", ["--batch-size", "at least 1"]),
        ("--race 1", ["--race", "above 0 and below 1"]),
        ("--race 0.5 --anchor gray", ["--race", "--anchor auto"]),
        ("--engine fast", ["eager", "graph", "auto"]),
        ("--data disk", ["device", "host", "auto"]),
        ("--amp fp16", ["'fp16'", "bf16"]),
        ("--lr 0", ["--lr", "above 0"]),
        ("--lr inf", ["--lr", "'inf'"]),
        ("--seed x", ["--seed", "integer"]),
        ("--device tpu", ["'tpu'", "cpu"]),
        ("--device cuda:99", ["cuda:99", "--device cpu"]),
        ("--dataset cgmnist", ["--data-root"]),
        ("--dataset cgmnist --data-root nowhere", ["nowhere", "train-images-idx3-ubyte.gz", "t10k-labels"]),
        ("--out taken", ["taken", "--resume taken"]),
        ("--out taken/file/run", ["taken/file/run", "--out"]),
        ("--resume nowhere", ["nowhere", "no run to resume"]),
        ("--resume taken", ["no run to resume"]),
        ("--resume", ["--resume", "expected one argument"]),
        ("--nonsense", ["--nonsense", "--help"]),
    ],
)
def test_bad_input(options, wanted, capsys):
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    assert train.main(options.split()) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("train.py: ")
    for part in wanted:
        assert part in message
    assert Path("taken/file").read_text() == "mine" and not Path("runs").exists()


def test_bad_input_has_no_traceback():
    process = start("--out", str(TRAIN / "run"))
    out, err = process.communicate()
    assert process.returncode == 2 and err.count("\n") == 1 and str(TRAIN / "run") in err


def test_resume_with_other_options(capsys):
    assert train.main(["--epochs", "1", "--method", "joint", "--out", "run"]) == 0
    for options in ("--epochs 2", "--seed 1", "--method udi", "--baselines ensemble", "--out other"):
        assert train.main(["--resume", "run", *options.split()]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and options.split()[0] in message and "leave it out" in message
    assert train.main(["--resume", "run", "--epochs", "1", "--device", "cpu"]) == 0


def test_default_folders_are_unique():
    for _ in range(2):
        assert train.main(["--epochs", "1", "--method", "joint"]) == 0
    assert len(list(Path("runs").iterdir())) == 2


def test_loss_that_explodes(capsys):
    assert train.main(["--epochs", "1", "--method", "joint", "--lr", "1e30", "--out", "run"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "not finite" in message and "lower --lr" in message


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in ("method", "dataset", "data-root", "epochs", "batch-size", "lr", "seed", "anchor", "controller"):
        assert f"--{option} " in text
    for option in (
        "alpha",
        "align-every",
        "club-norm",
        "fusion",
        "follower-init",
        "baselines",
        "race",
        "device",
        "amp",
    ):
        assert f"--{option} " in text
    for option in ("engine", "data", "tf32", "compile", "out", "noise", "q-depth", "q-width", "q-lr", "q-steps"):
        assert f"--{option} " in text
    assert "default: 30" in text


# --- data ---


def write_idx(path, tensor):
    header = bytes((0, 0, 8, tensor.dim())) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    path.write_bytes(gzip.compress(header + bytes(tensor.flatten().tolist())))


@pytest.fixture
def little_mnist(tmp_path):
    generator = torch.Generator().manual_seed(0)
    root = tmp_path / "mnist"
    root.mkdir()
    for part, size in (("train", 240), ("t10k", 40)):
        pixels = torch.randint(256, (size, 28, 28), generator=generator, dtype=torch.uint8)
        write_idx(root / f"{part}-images-idx3-ubyte.gz", pixels)
        write_idx(root / f"{part}-labels-idx1-ubyte.gz", torch.arange(size, dtype=torch.uint8) % 10)
    return root


def test_cgmnist(little_mnist):
    options = ["--dataset", "cgmnist", "--data-root", str(little_mnist), "--epochs", "1", "--amp"]
    assert train.main([*options, "--out", "run"]) == 0
    assert set(result("run")["modalities"]) == {"gray", "color"}


@pytest.mark.parametrize("damage", ["cut", "short", "kind", "lengths"])
def test_damaged_mnist(little_mnist, damage, capsys):
    images, labels = (little_mnist / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    if damage == "cut":
        images.write_bytes(images.read_bytes()[:5000])
    elif damage == "short":
        images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes())[:-1]))
    elif damage == "kind":
        images.write_bytes(labels.read_bytes())
    else:
        write_idx(labels, torch.zeros(239, dtype=torch.uint8))
    assert train.main(["--dataset", "cgmnist", "--data-root", str(little_mnist)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "download" in message and str(little_mnist) in message


def test_real_mnist():
    root = Path(os.environ.get("UDI_MNIST", ROOT.parent / "shared" / "data" / "mnist"))
    if not root.is_dir():
        pytest.skip("MNIST's files are not here: set UDI_MNIST to their folder")
    mnist = data.cgmnist(root)
    assert [len(split) for split in (mnist.train, mnist.val, mnist.test)] == [55_000, 5_000, 10_000]
    assert all(split.stored["pixels"].dtype == torch.uint8 for split in (mnist.train, mnist.val, mnist.test))
    gray = mnist.modalities["gray"].input(mnist.train.rows(torch.arange(55_000), ["pixels"]))
    assert gray.shape == (55_000, 1, 28, 28) and abs(gray.mean()) < 0.01 and abs(gray.std() - 1) < 0.01


def test_colors_tell_the_digit_in_training_only():
    digits = data.cgdigits(None)
    assert [len(split) for split in (digits.train, digits.val, digits.test)] == [1077, 360, 360]

    def nearest(split):
        guess = torch.cdist(split.stored["color"], data.COLORS).argmin(1)
        return (guess == split.labels).double().mean()

    assert nearest(digits.train) > 0.6 > 0.2 > max(nearest(digits.val), nearest(digits.test))
    batch = digits.modalities["color"].input(digits.train.rows(torch.arange(5), ["pixels", "color"]))
    assert batch.shape == (5, 3, 8, 8) and 0 <= batch.min() and batch.max() <= 1


def test_splitdigits(little_mnist):
    """Two halves of the same digit, noise aside; of 28x28 digits too, which are trained on."""
    split, whole = data.splitdigits(None), data.cgdigits(None)
    assert list(split.modalities) == ["left", "right"]
    for part in ("train", "val", "test"):
        ours, theirs = getattr(split, part), getattr(whole, part)
        assert torch.equal(ours.labels, theirs.labels)
        spread = {}
        for name, clean in zip(("left", "right"), theirs.stored["pixels"].chunk(2, dim=2), strict=True):
            half = ours.stored[name]
            assert half.dtype == torch.uint8 and half.shape == clean.shape == (len(ours), 8, 4)
            inner = (clean > 100) & (clean < 155)  # where clipping cuts hardly anything off
            spread[name] = ((half.float() - clean)[inner] / 255).std()
        assert spread["left"] == pytest.approx(data.HALVES["left"], rel=0.1)
        assert spread["right"] == pytest.approx(data.HALVES["right"], rel=0.15)
        again = data.splitdigits(None)
        assert all(torch.equal(x, getattr(again, part).stored[name]) for name, x in ours.stored.items())
    left, right = (split.train.stored[name] - whole.train.stored["pixels"][..., :4] for name in ("left", "right"))
    assert not torch.equal(left, right)

    options = ["--dataset", "splitdigits", "--data-root", str(little_mnist), "--epochs", "1", "--baselines", "none"]
    assert train.main([*options, "--out", "run"]) == 0
    assert set(result("run")["modalities"]) == {"left", "right"}
    mnist = data.splitdigits(little_mnist)
    assert mnist.modalities["left"].shape(mnist.train) == (1, 28, 14)


@pytest.mark.parametrize("name", ["cgdigits", "splitdigits", "three"])
def test_noise_is_in_the_training_split_only(name, three_views):
    clean = data.datasets[name](None)
    noisy, again, more = (data.corrupt(clean, inputs, 0.2) for inputs in (0.3, 0.3, 0.6))
    assert noisy.val is clean.val and noisy.test is clean.test
    wrong = noisy.train.labels != clean.train.labels
    assert wrong.sum() == round(0.2 * len(clean.train))
    assert 0 <= noisy.train.labels.min() and noisy.train.labels.max() < clean.classes
    assert torch.equal(noisy.train.labels, again.train.labels)
    for key, x in clean.train.stored.items():
        ours, same, further = (d.train.stored[key] for d in (noisy, again, more))
        assert torch.equal(ours, same) and ours.dtype == x.dtype
        change, larger = (z.float() - x.float() for z in (ours, further))
        assert 0 < change.std() < larger.std()
        if x.dtype == torch.float32:
            assert change.std() / x.std() == pytest.approx(0.3, rel=0.05)
    half, none = data.corrupt(clean, 0, 0.1), data.corrupt(clean, 0, 0)
    assert not (half.train.labels != clean.train.labels)[~wrong].any()
    assert torch.equal(none.train.labels, clean.train.labels)
    assert all(torch.equal(none.train.stored[key], x) for key, x in clean.train.stored.items())


def test_label_noise_takes_every_other_class():
    labels = data.cgdigits(None).train.labels
    noisy = data.corrupt(data.cgdigits(None), 0, 0.9).train.labels
    pairs = torch.bincount(labels * 10 + noisy, minlength=100).view(10, 10).double()
    others = pairs[~torch.eye(10, dtype=torch.bool)]
    assert others.min() > 0 and others.std() < 1.5 * others.mean().sqrt()


def test_noise_option():
    """The same samples for all seeds; a resumed run has them too."""
    for seed in ("0", "1"):
        options = ["--noise", "0.2,0.4", "--method", "joint", "--epochs", "2", "--seed", seed, "--out", seed]
        assert train.main(options) == 0
    assert train.main(["--method", "joint", "--epochs", "2", "--out", "clean"]) == 0
    assert log("0")[-1]["loss"] > log("clean")[-1]["loss"] + 0.1
    assert json.loads(Path("0/config.json").read_text())["noise"] == [0.2, 0.4]
    assert train.main(["--resume", "0", "--noise", "0.2,0.4"]) == 0
    assert train.main(["--resume", "0", "--noise", "0.2,0.3"]) == 2


# --- the methods beside UDI ---


def training_batch(task, size=32):
    split = task.run.data.train
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return split.rows(order[:size], split.stored)


def freeze(task):
    """Lets a step set the gradients, and leave the weights where a plain formula finds them."""
    task.optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)


@pytest.mark.parametrize("dataset", ["cgdigits", "three"])
def test_shares_add_up(dataset, three_views):
    run = make_run("--dataset", dataset)
    for task in (Joint(run), JointSum(run)):
        features, logits = task.forward(training_batch(task))
        shares = task.model.shares(features)
        assert list(shares) == list(features) == list(run.data.modalities)
        torch.testing.assert_close(sum(shares.values()), logits)


def test_sum_fusion_is_a_head_for_each_modality():
    run = make_run()
    concat, summed = Joint(run), JointSum(run)
    classes, views = run.data.classes, len(run.data.modalities)
    extra = sum(w.numel() for w in summed.weights) - sum(w.numel() for w in concat.weights)
    assert extra == (views - 1) * classes  # a bias for each head
    batch = training_batch(summed)
    features, logits = summed.forward(batch)
    heads = [summed.model.heads[m](features[m]) for m in run.data.modalities]
    torch.testing.assert_close(logits, heads[0] + heads[1])

    # The same function class: with the heads side by side, and the biases added, concatenation gives the same logits.
    concat.model.encoders.load_state_dict(summed.model.encoders.state_dict())
    with torch.no_grad():
        concat.model.head.weight.copy_(torch.cat([head.weight for head in summed.model.heads.values()], dim=1))
        concat.model.head.bias.copy_(sum(head.bias for head in summed.model.heads.values()))
    torch.testing.assert_close(concat.forward(batch)[1], logits)


@pytest.mark.parametrize("dataset", ["cgdigits", "three"])
def test_ogm_ge_step_is_the_plain_formula(dataset, three_views):
    task = ogm_ge.OGMGE(make_run("--dataset", dataset))
    batch, names = training_batch(task), list(task.run.data.modalities)
    with torch.no_grad():  # one modality ahead of the others
        task.model.head.weight[:, : models.FEATURES] *= 3
    freeze(task)
    torch.manual_seed(1)
    figures = task.step(batch, modulate=True)

    features, logits = task.forward(batch)
    shares = task.model.shares(features)
    score = {m: sum(z.softmax(0)[y] for z, y in zip(shares[m], batch["labels"], strict=True)) for m in names}
    k = {}
    for m in names:
        others = [score[n] for n in names if n != m]
        ratio = score[m] / (sum(others) / len(others))
        k[m] = 1 - torch.tanh(ogm_ge.ALPHA * ratio) if ratio > 1 else torch.tensor(1.0)
        torch.testing.assert_close(figures[f"k_{m}"], k[m].detach())
    assert min(k.values()) < 0.5 and max(k.values()) == 1
    weights = dict(task.model.named_parameters())
    grads = torch.autograd.grad(cross_entropy(logits, batch["labels"]), list(weights.values()))
    torch.manual_seed(1)
    modulated = 0
    for (name, weight), grad in zip(weights.items(), grads, strict=True):
        place, modality = name.split(".")[:2]
        if place == "encoders" and weight.dim() > 1:
            grad = k[modality] * grad + grad.std() * torch.randn_like(grad)
            modulated += 1
        torch.testing.assert_close(weight.grad, grad)
    assert modulated == sum(w.dim() > 1 for w in task.model.encoders.parameters())

    figures = task.step(batch, modulate=False)
    assert all(figures[f"k_{m}"] == 1 for m in names)
    for weight, grad in zip(weights.values(), grads, strict=True):
        torch.testing.assert_close(weight.grad, grad)


def test_ogm_ge_modulates_the_first_half(monkeypatch):
    calls, step = [], ogm_ge.OGMGE.step
    monkeypatch.setattr(ogm_ge.OGMGE, "step", lambda *args, modulate: calls.append(modulate) or step(*args, modulate))
    assert train.main(["--method", "ogm-ge", "--epochs", "4", "--out", "run"]) == 0
    assert calls == [True] * 2 * 16 + [False] * 2 * 16
    rows = log("run")
    assert all(min(row["k_gray"], row["k_color"]) < 1 for row in rows[:2])
    assert all(row["k_gray"] == row["k_color"] == 1 for row in rows[2:])


@needs_torchjd
@pytest.mark.parametrize("dataset", ["cgdigits", "three"])
def test_gramian_step_is_torchjd(dataset, three_views):
    """Against TorchJD's own aggregation of the stacked, flattened gradients."""
    from torchjd.aggregation import UPGrad

    task = Gramian(make_run("--dataset", dataset))
    for _ in range(5):
        task.step(training_batch(task, 64))
    freeze(task)
    batch = training_batch(task)
    figures = task.step(batch)

    features, logits = task.forward(batch)
    predictions = [logits, *task.model.shares(features).values()]
    losses = [cross_entropy(z, batch["labels"]) for z in predictions]
    assert len(losses) == 1 + len(task.run.data.modalities)
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, task.weights, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    wanted = UPGrad()(torch.stack(rows))
    update = torch.cat([w.grad.flatten() for w in task.weights])
    assert (update - wanted).norm() < 1e-4 * wanted.norm()
    weights = torch.stack([figures[f"weight_{name}"] for name in ("joint", *features)])
    assert (weights >= 1 / len(losses) - 1e-6).all()


def test_gramian_without_torchjd(monkeypatch, capsys):
    """Refused before anything is trained, as a baseline too."""
    monkeypatch.setattr(common, "find_spec", lambda name: None if name == "torchjd" else find_spec(name))
    for options in (["--method", "gramian"], ["--baselines", "joint,gramian"]):
        assert train.main(options) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "torchjd" in message and 'pip install -e ".[experiments]"' in message
    assert not Path("runs").exists()


# --- similarity of features ---


def test_linear_cka():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 8, generator=generator), torch.randn(400, 5, generator=generator)
    assert similarity.linear_cka(x, x) == pytest.approx(1)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    assert similarity.linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert similarity.linear_cka(x, y) < 0.05
    mixed = torch.cat((x[:, :4], y), dim=1)
    center = torch.eye(400, dtype=torch.double) - 1 / 400
    a, b = (center @ z @ z.T @ center for z in (x.double(), mixed.double()))  # by the N x N kernels
    assert similarity.linear_cka(x, mixed) == pytest.approx(((a * b).sum() / (a.norm() * b.norm())).item())
    assert similarity.linear_cka(x, mixed) == pytest.approx(similarity.linear_cka(mixed, x))
    assert similarity.linear_cka(x, torch.ones(400, 3)) == 0


def test_cross_prediction():
    """Of a linear image with noise: 1 - noise / variance, on samples that were not fitted to."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 5, generator=generator)
    x = {split: torch.randn(4000, 8, generator=generator) + 2 for split in ("val", "test")}
    y = {split: z @ weight - 7 for split, z in x.items()}
    assert similarity.cross_prediction(x, y) == pytest.approx(1, abs=1e-3)
    scale = weight.square().sum(0).mean().sqrt()
    noisy = {split: z + scale * torch.randn(z.shape, generator=generator) for split, z in y.items()}
    assert similarity.cross_prediction(x, noisy) == pytest.approx(0.5, abs=0.03)
    other = {split: torch.randn(4000, 5, generator=generator) for split in x}
    assert -0.02 < similarity.cross_prediction(x, other) < 0.02
    constant = {split: torch.ones(4000, 3) for split in x}
    assert similarity.cross_prediction(x, constant) == 0
    assert similarity.cross_prediction(constant, other) == 0


# --- the parts ---


@pytest.fixture
def follower():
    """A follower after a few steps, and a batch that it has not seen."""
    run = make_run("--batch-size", "32")
    follower = udi.Follower(run, "color", udi.Anchor(run, Alone(run, "gray")))
    split = run.data.train
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    for number in range(1, 6):
        follower.step(split.rows(order[:32], split.stored), **follower.flags(number))
    return follower, split.rows(order[32:64], split.stored)


def plain_losses(follower, batch):
    """The three losses in plain torch, q as it is."""
    anchor = follower.anchor
    with torch.no_grad():
        x, z = anchor.model(anchor.view.input(batch))
        mu, logvar = follower.q(torch.nn.functional.layer_norm(x, x.shape[1:]))
    y, logits = follower.model(follower.view.input(batch))
    p, q = z.softmax(-1), logits.softmax(-1)
    m = (p + q) / 2
    con = (p * (p / m).log() + q * (q / m).log()).sum(-1).mean() / 2
    y = torch.nn.functional.layer_norm(y, y.shape[1:])
    negative = (y[None] - mu[:, None]).square().mean(1)
    com = ((negative - (y - mu).square()) / logvar.exp()).mean() / 2
    return [cross_entropy(logits, batch["labels"]), con, com]


@pytest.mark.parametrize("align", [True, False])
def test_follower_step_is_the_plain_formula(follower, align):
    """Losses, weights and update against flattened gradients in plain torch, on a controller step and on another."""
    follower, batch = follower
    follower.controller.alpha.copy_(torch.tensor([1.0, 0.3, 0.7]))
    for group in follower.optimizer.param_groups:
        group["lr"] = 0.0  # keeps the parameters where the plain formula needs them
    figures = follower.step(batch, align=align, fitted=True)

    losses = plain_losses(follower, batch)  # after the step, for q is fitted in it before it is used
    for name, loss in zip(("cls", "con", "com"), losses, strict=True):
        torch.testing.assert_close(figures[name], loss.detach())
    grads = [torch.autograd.grad(x, follower.weights, retain_graph=True, allow_unused=True) for x in losses]
    pairs = [zip(gs, follower.weights, strict=True) for gs in grads]
    flat = [torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in pair]) for pair in pairs]
    alpha = torch.tensor([1.0, 0.3, 0.7])
    if align:
        con, com = (flat[0] @ g for g in flat[1:])
        gain = torch.stack((con, com)).relu()
        alpha = torch.cat((torch.ones(1), gain / gain.sum() if gain.sum() > 0 else gain))
    torch.testing.assert_close(follower.controller.alpha, alpha, rtol=1e-3, atol=1e-4)
    update = torch.cat([w.grad.flatten() for w in follower.weights])
    torch.testing.assert_close(update, sum(a * g for a, g in zip(alpha, flat, strict=True)), rtol=1e-3, atol=1e-5)


def test_step_leaves_the_anchor_alone_and_fits_q(follower):
    follower, batch = follower
    anchor = [p.clone() for p in follower.anchor.model.parameters()]
    before = follower.step(batch, align=False, fitted=False)["q_nll"]
    for _ in range(20):
        after = follower.step(batch, align=False, fitted=False)["q_nll"]
    assert after < before
    assert all(torch.equal(a, b) for a, b in zip(anchor, follower.anchor.model.parameters(), strict=True))
    assert all(p.grad is None and not p.requires_grad for p in follower.anchor.model.parameters())


@pytest.mark.parametrize("depth, sizes", [(0, [64, 128]), (1, [64, 7, 128]), (2, [64, 7, 7, 128])])
def test_depth_and_width_of_q(depth, sizes):
    run = make_run("--q-depth", str(depth), "--q-width", "7")
    q = udi.Follower(run, "color", udi.Anchor(run, Alone(run, "gray"))).q
    assert [layer.weight.shape[::-1] for layer in q.layers[::2]] == list(zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize("align", [True, False])
def test_more_steps_of_q(align):
    """Each fits q further to the same batch; the follower takes its one step as ever."""
    followers, nll = [], []
    for steps in ("1", "4"):
        run = make_run("--q-steps", steps)
        follower = udi.Follower(run, "color", udi.Anchor(run, Alone(run, "gray")))
        batch = training_batch(follower)
        follower.step(batch, align=align, fitted=True)
        followers.append([p.clone() for p in follower.weights])
        nll.append(follower.step(batch, align=False, fitted=True)["q_nll"])
    assert all(torch.equal(a, b) for a, b in zip(*followers, strict=True))
    assert nll[1] < nll[0]


@pytest.mark.parametrize("schedule, steps", [("epoch", [0, 16, 32]), ("12", [0, 12, 24, 36])])
def test_controller_measures_on_schedule(monkeypatch, schedule, steps):
    """Once an epoch of 16 full batches, or every N steps; through the library's op."""
    calls = []
    monkeypatch.setattr(udi, "gramian", lambda grads: calls.append(len(grads)) or udi_kernels.gramian(grads))
    options = ["--epochs", "3", "--controller", "dynamic", "--align-every", schedule, "--baselines", "none"]
    assert train.main([*options, "--out", "run"]) == 0
    assert calls == [3] * len(steps)


def test_no_complementary_weight_before_q_is_fitted():
    options = "--epochs 3 --controller dynamic --align-every 1 --baselines none --out run"
    assert train.main(options.split()) == 0
    rows = [row for row in log("run") if row["phase"] == "follower"]
    assert 3 * 16 < udi.Q_WARMUP and all(row["alpha_com"] == 0 for row in rows)
    assert any(row["alpha_con"] > 0 for row in rows)


def test_anchor_near_tie_goes_to_the_surer():
    def log(*epochs):
        names = ("epoch", "val_acc", "val_loss", "val_entropy", "diverged")
        return [dict(zip(names, (i, *figures, False), strict=True)) for i, figures in enumerate(epochs, start=1)]

    vague, sure = log((0.9, 0.5, 0.8), (0.8, 0.6, 0.7)), log((0.5, 0.4, 0.1), (0.897, 0.5, 0.2))
    anchor, selection = udi.choose_anchor("auto", {"vague": vague, "sure": sure})
    assert (anchor, selection["by"]) == ("sure", "predictive entropy")
    assert selection["margin"] == pytest.approx(-0.003) and selection["modalities"]["vague"]["epoch"] == 1
    anchor, selection = udi.choose_anchor("auto", {"vague": vague, "sure": sure[:1]})
    assert (anchor, selection["by"]) == ("vague", "validation accuracy")
    assert udi.choose_anchor("vague", {"vague": vague, "sure": sure})[0] == "vague"


def test_collapse_is_reported(monkeypatch, capsys):
    """A follower at chance, here because its logits are never trained, is named in the table and in metrics.json."""
    monkeypatch.setattr(udi, "weighted_sum", lambda grads, alpha: [torch.zeros_like(g) for g in grads[0]])
    options = "--controller dynamic --align-every 1 --epochs 12 --baselines none --anchor color --out run"
    assert train.main(options.split()) == 0
    out, err = capsys.readouterr()
    assert "gray" in result("run")["collapsed"]
    assert "collapsed: gray" in out and "follower gray collapsed" in err


def test_fusion_rules():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (500,), generator=generator)
    good = 3 * torch.nn.functional.one_hot(labels, 3) + torch.randn(500, 3, generator=generator)
    bad = 6 * torch.randn(500, 3, generator=generator)
    z = torch.stack((good, bad))
    fitted = {name: rule(z, labels) for name, rule in fusion.rules.items()}
    for rule, _ in fitted.values():
        torch.testing.assert_close(rule(z).sum(-1), torch.ones(500, dtype=rule(z).dtype))
    weights = fitted["weighted"][1]
    assert abs(sum(weights) - 1) < 1e-9 and weights[0] > 0.8

    def nll(w):
        p = (w * good.softmax(-1) + (1 - w) * bad.softmax(-1)).double()
        return -p[torch.arange(500), labels].log().mean().item()

    assert nll(weights[0]) <= min(nll(w) for w in torch.linspace(0, 1, 101).tolist()) + 1e-6
    logits = {"a": {"val": good, "test": bad}, "b": {"val": bad, "test": good}}
    chosen = fusion.fuse("auto", logits, {"val": labels, "test": labels})
    assert chosen["rule"] == max(chosen["by_rule"], key=lambda name: chosen["by_rule"][name]["val_acc"])


def test_scores_agree_with_sklearn():
    from sklearn.metrics import accuracy_score, f1_score

    generator = torch.Generator().manual_seed(0)
    labels, outputs = torch.randint(5, (200,), generator=generator), torch.randn(200, 5, generator=generator)
    assert fusion.accuracy(outputs, labels) == pytest.approx(accuracy_score(labels, outputs.argmax(1)))
    assert fusion.macro_f1(outputs, labels) == pytest.approx(f1_score(labels, outputs.argmax(1), average="macro"))


def test_registries_take_additions():
    """A method and an encoder added in one place each are there for the command."""

    @methods.register("echo")
    def echo(run):
        return methods["ensemble"](run)

    @models.encoders.register("linear")
    def linear(shape):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(shape.numel(), models.FEATURES))

    @data.datasets.register("linear-digits")
    def linear_digits(data_root):
        digits = data.cgdigits(data_root)
        for modality in digits.modalities.values():
            modality.encoder = "linear"
        return digits

    try:
        assert train.main(["--method", "echo", "--dataset", "linear-digits", "--epochs", "1", "--out", "run"]) == 0
        assert result("run")["method"] == "echo"
    finally:
        del methods["echo"], models.encoders["linear"], data.datasets["linear-digits"]
