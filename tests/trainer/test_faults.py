"""What users and machines do to a run: damaged files, signals, closed pipes, losses that explode, no memory."""

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from udi_trainer import UserError, api, run_folder, train
from udi_trainer.command import main
from udi_trainer.methods.joint import Joint
from udi_trainer.run_folder import load_tensors

from .helpers import ROOT, TRAIN, one_line, read_log, read_metrics, start, without_times

JOINT = ["--epochs", "2", "--method", "joint", "--device", "cpu"]


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory):
    """A run that has ended."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    assert main([*JOINT, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def ended(joint_run, capsys):
    """A copy of it, to be damaged."""
    capsys.readouterr()
    return Path(shutil.copytree(joint_run, "run"))


@pytest.fixture
def cut(ended):
    """The same as if it had been killed."""
    for name in ("metrics.json", "report.png", "checkpoints/model.pt"):
        (ended / name).unlink()
    return ended


def refused(capsys, *command):
    """The one line with which the command ends."""
    capsys.readouterr()
    assert main(list(map(str, command))) == 2
    return one_line(capsys.readouterr().err)


# --- checkpoints ---


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def with_code(path):
    torch.save({"parts": Evil()}, path)


def change(name, value):
    """As in a file without a seal, which older versions wrote; with one, any change is refused alike."""

    def do(path):
        saved = torch.load(path, weights_only=True)
        del saved["seal"]
        saved[name] = value(saved[name]) if callable(value) else value
        torch.save(saved, path)

    return do


def narrower(parts):
    return parts | {"model": {name: t[..., :1] for name, t in parts["model"].items()}}


@pytest.mark.parametrize(
    "damage, wanted",
    [
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is damaged (truncated"),
        (lambda path: path.write_text("no checkpoint"), "is damaged"),
        (lambda path: torch.save([1, 2], path), "not a checkpoint"),
        (lambda path: torch.save({"weights": torch.ones(2)}, path), "is not a checkpoint of joint"),
        (change("stage", "anchor-gray"), "is not a checkpoint of joint"),
        (change("parts", narrower), "does not fit the model of joint"),
        (change("parts", {}), "does not fit the model of joint"),
        (change("options", {"epochs": 9}), "to a run with other options"),
    ],
)
def test_damaged_checkpoints(cut, capsys, damage, wanted):
    path = cut / "checkpoints" / "joint.pt"
    damage(path)
    before = path.read_bytes()
    message = refused(capsys, "--resume", cut)
    assert wanted in message and str(path) in message and "delete it" in message
    assert path.read_bytes() == before
    path.unlink()
    assert main(["--resume", str(cut)]) == 0


def test_code_in_a_checkpoint_is_not_run(cut, capsys):
    """Nor is torch's advice passed on to load it all the same."""
    with_code(cut / "checkpoints" / "joint.pt")
    message = refused(capsys, "--resume", cut)
    assert "code, which is not run" in message and "weights_only" not in message and "still be loaded" not in message
    assert not Path("evil").exists()


def test_flipped_bits(tmp_path):
    """Wherever one flips: an error, or the tensors as they were."""
    path, state = tmp_path / "x.pt", {"parts": {"weight": torch.randn(700)}, "rows": [{"epoch": 1}]}
    run_folder.write_atomically(path, run_folder.serialized(state))
    whole, found = path.read_bytes(), 0
    places = random.Random(0).sample(range(len(whole)), 300)
    inside = whole.index(state["parts"]["weight"].numpy().tobytes())
    for place in [inside, inside + 2799, *places]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            loaded = load_tensors(path, "repeat")
        except UserError as error:
            assert "repeat" in str(error)
            found += 1
        else:
            assert inside > place or place >= inside + 2800
            assert torch.equal(loaded["parts"]["weight"], state["parts"]["weight"]) and loaded["rows"] == state["rows"]
    assert found > 100


def test_flipped_bit_in_weights(cut, capsys):
    path = cut / "checkpoints" / "joint.pt"
    with zipfile.ZipFile(path) as records:
        largest = max(records.infolist(), key=lambda record: record.file_size)
    raw = bytearray(path.read_bytes())
    raw[largest.header_offset + 200 + largest.file_size // 2] ^= 16
    path.write_bytes(raw)
    assert "checksum" in refused(capsys, "--resume", cut)


# --- config.json ---


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("[1,2]", "missing or damaged"),
        ("null", "missing or damaged"),
        ("", "missing or damaged"),
        ("\udcff", "missing or damaged"),
        ("{}", "config.json is damaged: it lacks method"),
        ({"epochs": [4]}, "config.json is damaged: epochs"),
        ({"epochs": None}, "to a run with other options (epochs 2, in config.json 30)"),
        ({"method": "no"}, "unknown method 'no'"),
        ({"dataset": 3}, "config.json is damaged: dataset"),
        ({"epochs": 4}, "to a run with other options (epochs 2, in config.json 4)"),
        ({"seed": 1}, "the data is not that of this run"),  # which the seed draws
    ],
)
def test_damaged_config(cut, capsys, text, wanted):
    path = cut / "config.json"
    if isinstance(text, dict):
        text = json.dumps(json.loads(path.read_text()) | text)
    path.write_bytes(text.encode(errors="surrogateescape"))
    before = {p: p.read_bytes() for p in cut.rglob("*") if p.is_file()}
    assert wanted in refused(capsys, "--resume", cut)
    assert {p: p.read_bytes() for p in cut.rglob("*") if p.is_file()} == before


def test_number_as_text_in_config(cut, joint_run):
    """It is the number that it spells."""
    path = cut / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epochs": "2"}))
    assert main(["--resume", str(cut)]) == 0
    assert without_times(read_metrics(cut)) == without_times(read_metrics(joint_run))


# --- the folder ---


def test_two_processes_on_one_folder(cut, capsys):
    """The second leaves it alone; when the first is gone, however it went, the folder is free."""
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, os, sys, time\nf = os.open(sys.argv[1], os.O_RDONLY)\n"
         "fcntl.flock(f, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(600)", cut], stdout=subprocess.PIPE
    )  # fmt: skip
    try:
        assert holder.stdout.readline()
        before = {p: p.read_bytes() for p in cut.rglob("*") if p.is_file()}
        assert "another process is using run" in refused(capsys, "--resume", cut)
        assert {p: p.read_bytes() for p in cut.rglob("*") if p.is_file()} == before
    finally:
        holder.kill()
        holder.wait()
    assert main(["--resume", str(cut)]) == 0
    assert [row["epoch"] for row in read_log(cut)] == [1, 2]


def test_a_run_holds_its_folder(monkeypatch):
    """A new one too, from its first step on."""
    refusals, step = [], Joint.step

    def second(*args):
        if not refusals:
            handle = os.open("run", os.O_RDONLY)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                pytest.fail("the folder is free")
            os.close(handle)
            refusals.append(1)
        return step(*args)

    monkeypatch.setattr(Joint, "step", second)
    assert main([*JOINT, "--out", "run"]) == 0 and refusals


def read_only(monkeypatch):
    """As on a file system that is mounted so: the tests' user may be one whom no permissions stop."""

    def refuse(path, mode="r", *args):
        if set(mode) & set("wax+"):
            raise OSError(30, "Read-only file system")
        return open(path, mode, *args)

    monkeypatch.setattr(run_folder, "open", refuse, raising=False)


def test_ended_run_in_a_read_only_folder(ended, monkeypatch, capsys):
    before = read_metrics(ended)
    read_only(monkeypatch)
    assert main(["--resume", str(ended)]) == 0
    out, err = capsys.readouterr()
    assert f"{before['fused']['test_acc']:.4f}" in out and not err
    assert read_metrics(ended) == before
    assert without_times(train(resume=ended, progress=False).metrics) == without_times(before)


def test_unended_run_in_a_read_only_folder(cut, monkeypatch, capsys):
    read_only(monkeypatch)
    assert "Read-only file system" in refused(capsys, "--resume", cut)


def test_report_that_cannot_be_written(cut, capsys):
    """Everything else is there."""
    (cut / "report.png").mkdir()
    assert main(["--resume", str(cut)]) == 0
    message = one_line(capsys.readouterr().err)
    assert message.startswith("warning: ") and "report.png cannot be written" in message
    assert read_metrics(cut)["fused"]
    (cut / "report.png").rmdir()
    assert main(["--resume", str(cut)]) == 0
    assert (cut / "report.png").read_bytes().startswith(b"\x89PNG")


# --- the process ---


def begin(*options):
    """The command in a process of its own, as soon as it trains, and its folder."""
    process = start(TRAIN, "--out", "cut", "--batch-size", "8", *options)
    log = Path("cut") / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_saves_and_says_how_to_go_on(number):
    """In the midst of an epoch, with stages side by side: what they have is kept, and the figures are the same."""
    options = ["--epochs", "30", "--method", "ensemble"]
    assert main([*options, "--batch-size", "8", "--out", "whole"]) == 0
    process = begin(*options)
    process.send_signal(number)
    asked = time.monotonic()
    out, err = process.communicate()
    assert process.returncode == 128 + number and time.monotonic() - asked < 30
    assert one_line(err.lstrip()).endswith(f"interrupted; continue with: python {TRAIN} --resume cut")
    steps = [torch.load(path, weights_only=True)["under_way"][0] for path in Path("cut/checkpoints").glob("*.pt")]
    assert any(steps) and not Path("cut/metrics.json").exists()
    assert main(["--resume", "cut"]) == 0
    assert without_times(read_metrics("cut")) == without_times(read_metrics("whole"))
    by_stage = [
        sorted(read_log(folder), key=lambda row: (row["modality"], row["epoch"])) for folder in ("cut", "whole")
    ]
    assert by_stage[0] == by_stage[1]


def test_signals_that_are_ignored_stay_so():
    """As under nohup."""
    process = start(
        "-c", "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); from udi_trainer.command import main;"
        f"sys.exit(main({[*JOINT, '--out', 'cut', '--batch-size', '8']}))"
    )  # fmt: skip
    while process.poll() is None and not Path("cut/checkpoints").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0


def test_python_leaves_signals_alone(mixed):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    seen = []

    def method(run):
        seen.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        train(mixed, method, progress=False)
    assert seen == handlers
    assert main([*JOINT]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_closed_pipe():
    """Of a reader that has seen enough."""
    process = start(TRAIN, *JOINT, "--out", "run")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 128 + signal.SIGPIPE
    assert one_line(err.lstrip()).endswith("--resume run")


def test_python_without_docstrings():
    code = "from udi_trainer.command import main; main(['--epochs', '1']); main(['--help'])"
    process = start("-OO", "-c", code)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "left alone" in out and "--epochs N" in out


# --- losses and memory ---


def poison(monkeypatch, loss, step):
    """A NaN in this loss, in this step."""
    run, count = Joint.step, []

    def poisoned(*args):
        scalars = run(*args) | {"cls": torch.zeros(())}
        count.append(1)
        if len(count) >= step:
            scalars |= dict.fromkeys({"loss", loss}, torch.tensor(float("nan")))
        return scalars

    monkeypatch.setattr(Joint, "step", poisoned)


@pytest.mark.parametrize(
    "step, wanted", [(7, ["step 7,", "of epoch 1:"]), (20, ["step 20,", "of epoch 2:", "joint.pt, of epoch 1"])]
)
def test_loss_that_is_not_finite(monkeypatch, capsys, step, wanted):
    """The run stops at the end of the epoch, with step and loss; the last good checkpoint stays."""
    poison(monkeypatch, "cls", step)
    message = refused(capsys, *JOINT, "--out", "run")
    for part in ("joint: cls is not finite", "lower --lr", *wanted):
        assert part in message
    assert Path("run/checkpoints/joint.pt").exists() == (step == 20)
    assert not Path("run/metrics.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory(monkeypatch, capsys, error):
    def step(*args):
        raise error

    monkeypatch.setattr(Joint, "step", step)
    message = refused(capsys, *JOINT, "--batch-size", "48")
    for part in ("out of memory", "--batch-size 48", "a smaller one", "--amp bf16", "--data host"):
        assert part in message


# --- nothing is lost at the end ---


def test_names_that_are_formulas_to_matplotlib(mixed):
    """A $ in the name of a modality, a class or a data set."""
    modalities = {f"{m}$_{{": view for m, view in mixed.modalities.items()}
    data = replace(mixed, modalities=modalities, class_names=["$a", "b$$"], name="$\\data")
    result = train(data, epochs=1, out="run", progress=False)
    assert Path("run/report.png").read_bytes().startswith(b"\x89PNG")
    assert result.metrics["modalities"].keys() == modalities.keys() and "$_{" in Path("run/predictions.csv").read_text()


def test_a_picture_that_fails_ends_no_run(mixed, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(api, "draw", fail)
    train(mixed, epochs=1, out="run", progress=False)
    assert "no report.png: no font" in caplog.text
    assert {"metrics.json", "predictions.csv"} <= {path.name for path in Path("run").iterdir()}


OUTPUTS = {
    "full": ("> /dev/full", {}),
    "closed": (">&-", {}),
    "both closed": (">&- 2>&-", {}),
    "ascii": ("> out.txt", {"PYTHONIOENCODING": "ascii"}),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_output_that_cannot_be_written(output):
    """The files are there, and the command has ended well."""
    redirection, environment = OUTPUTS[output]
    Path("m.csv").write_text("label,größe,b\n" + "".join(f"é{i % 2},{i % 2 + i / 99},{i}\n" for i in range(40)))
    options = "--dataset manifest --manifest m.csv --tables größe=größe,b=b --epochs 1 --cache-dir cache --out run"
    paths = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    environment = os.environ | {"PYTHONPATH": paths} | environment
    code = subprocess.run(
        ["bash", "-c", f"{sys.executable} {TRAIN} {options} {redirection}"], env=environment, stderr=subprocess.DEVNULL
    ).returncode
    assert code == 0 and read_metrics("run")["fused"] and Path("run/report.png").exists()
