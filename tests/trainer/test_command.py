"""The command: what a run leaves behind and prints, what it refuses, what its help says."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from udi_trainer import Options, console
from udi_trainer.command import main, parse
from udi_trainer.data.dataset import Split
from udi_trainer.options import SCIKIT, all_fields, spelled
from udi_trainer.registry import datasets

from .helpers import METHODS, TRAIN, one_line, read_log, read_metrics, start


def test_plain_command(tmp_path):
    """No options but fewer epochs: a run folder under runs/, the table with joint training beside UDI."""
    process = start(TRAIN, "--epochs", "2")
    out, err = process.communicate()
    assert process.returncode == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    metrics = read_metrics(folder)
    for name in ("left alone", "right alone", "ensemble", "joint", "udi: right (follower)"):
        assert name in out
    assert f"{metrics['fused']['test_acc']:.4f}" in out
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "metrics.json", "predictions.csv", "report.png", "checkpoints",
    }  # fmt: skip
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "config.json").read_text())
    assert (config["epochs"], config["controller"], config["alpha"]) == (2, "dynamic", None)


def test_as_a_module_from_anywhere(tmp_path):
    process = start("-m", "udi_trainer", "--epochs", "1", "--method", "joint", "--out", "run")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"{read_metrics(tmp_path / 'run')['fused']['test_acc']:.4f}" in out


def test_console_script(tmp_path):
    """udi-train is python -m udi_trainer by another name."""
    script = shutil.which("udi-train", path=Path(sys.executable).parent)
    if script is None:
        pytest.skip("udi-train is not installed: pip install -e .")
    process = start(script, "--epochs", "1", "--method", "joint", "--out", "run")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"{read_metrics(tmp_path / 'run')['fused']['test_acc']:.4f}" in out
    process = start(script, "--nonsense")
    out, err = process.communicate()
    assert process.returncode == 2 and one_line(err).startswith("udi-train: ")


@pytest.mark.parametrize("method", METHODS)
def test_metrics(method):
    assert main(["--method", method, "--epochs", "2", "--baselines", "none", "--out", "run"]) == 0
    metrics = read_metrics("run")
    assert (metrics["method"], metrics["dataset"], metrics["seed"]) == (method, "fewdigits", 0)
    assert metrics["device"] in ("cpu", "cuda")
    for m in ("left", "right"):
        assert set(metrics["modalities"][m]) >= {"val_acc", "test_acc"}
        assert method not in ("udi", "ensemble") or 0 <= metrics["unimodal"][m]["test_acc"] <= 1
    assert set(metrics["fused"]) >= {"val_acc", "test_acc", "test_macro_f1", "rule"}
    assert set(metrics["seconds"]) >= {"anchor_phase", "follower_phase", "total"}
    stages = {"udi": 3, "ensemble": 2}.get(method, 1)
    rows = read_log("run")
    assert sorted(row["epoch"] for row in rows) == [1] * stages + [2] * stages
    if method == "ensemble":  # it has no anchor
        assert {row["phase"] for row in rows} == {"unimodal"}
    if method == "udi":
        follower = [row for row in rows if row["phase"] == "follower"]
        assert {row["modality"] for row in follower} == {"right"} and metrics["anchor"] == "left"
        assert set(follower[0]) >= {"cls", "con", "com", "alpha_con", "alpha_com", "val_acc"}
        assert metrics["modalities"]["left"] == metrics["unimodal"]["left"]  # the anchor stays as it was trained
        assert set(metrics["similarity"]) == {"right"} and 0 <= metrics["similarity"]["right"]["cka"] <= 1
        assert metrics["similarity"]["right"]["r2"] <= 1


def test_every_method_can_be_a_baseline(capsys):
    """And the ensemble, which UDI's anchor phase gives anyway, is listed once."""
    assert main(["--epochs", "1", "--baselines", "joint,joint-sum,ogm-ge,ensemble", "--out", "run"]) == 0
    metrics = read_metrics("run")
    assert list(metrics["baselines"]) == ["joint", "joint-sum", "ogm-ge", "ensemble", *SCIKIT]
    assert all(0 <= scores["test_acc"] <= 1 for scores in metrics["baselines"].values())
    assert metrics["baselines"]["ensemble"] == metrics["ensemble"]
    assert len(re.findall(r"^ensemble ", capsys.readouterr().out, re.MULTILINE)) == 1


def test_same_seed_same_metrics():
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main(["--epochs", "2", "--seed", str(seed), "--baselines", "none", "--out", folder]) == 0
    ours, again = read_metrics("a"), read_metrics("b")
    assert ours.pop("seconds") and again.pop("seconds") and ours == again
    assert read_log("a") == read_log("b") != read_log("c")


def test_memory_does_not_grow():
    """Of the process, over epochs of UDI: what it needed at most is the same after 4 epochs and after 24."""
    code = "import resource; from udi_trainer.command import main; main()"
    code += "; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for epochs in ("4", "24"):
        options = f"--controller dynamic --align-every 2 --baselines none --epochs {epochs} --out {epochs}".split()
        process = start("-c", code, *options)
        out, err = process.communicate()
        assert process.returncode == 0, err
        peaks.append(int(out.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 30, f"{peaks} MiB"


# --- what it prints on the way ---


def test_progress_where_there_is_no_terminal(monkeypatch, capsys):
    """A line now and then, with what validation says."""
    monkeypatch.setattr(console, "INTERVAL", 0)
    assert main(["--method", "joint", "--epochs", "2", "--out", "run"]) == 0
    lines = re.findall(r"^joint: step (\d+) of 32(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [int(step) for step, _ in lines] == list(range(1, 33))
    assert lines[0][1] == "" and re.fullmatch(r", val_acc \d\.\d{3}", lines[-1][1])


def test_no_line_of_progress_in_a_short_run(monkeypatch, capsys):
    monkeypatch.setattr(console, "INTERVAL", 3600)
    assert main(["--method", "joint", "--epochs", "1", "--out", "run"]) == 0
    assert "step" not in capsys.readouterr().out


# --- bad input ---


@pytest.mark.parametrize(
    "options, wanted",
    [
        ("--dataset cgdigit", ["unknown dataset 'cgdigit'", "cgdigits", "cgmnist"]),
        ("--method foo", ["unknown method 'foo'", "udi", "joint", "ensemble"]),
        ("--anchor sound", ["unknown anchor 'sound'", "left", "right"]),
        ("--fusion median", ["unknown fusion rule", "mean", "sum", "weighted"]),
        ("--baselines joint,foo", ["unknown baseline 'foo'"]),
        ("--follower-init warm", ["scratch", "anchor-phase"]),
        ("--controller fixed", ["dynamic", "static"]),
        ("--club-norm batch", ["layer", "none"]),
        ("--q-depth=-1", ["--q-depth", "at least 0"]),
        ("--q-width 0", ["--q-width", "at least 1"]),
        ("--q-lr 0", ["--q-lr", "above 0"]),
        ("--q-steps 0", ["--q-steps", "at least 1"]),
        ("--q-warmup=-1", ["--q-warmup", "at least 0"]),
        ("--controller dynamic --alpha 1,1", ["--alpha", "--controller static"]),
        ("--align-every 3 --controller static", ["--align-every", "--controller dynamic"]),
        ("--alpha 1", ["two weights"]),
        ("--alpha 1,-1", ["'-1'", "at least 0"]),
        ("--alpha 1,nan", ["'nan'"]),
        ("--noise 0.5", ["--noise", "two amounts INPUT,LABEL"]),
        ("--noise=-1,0", ["'-1'", "at least 0"]),
        ("--noise 0,1", ["'1'", "below 1"]),
        ("--align-every never", ["'never'", "integer"]),
        ("--align-every 0", ["'0'", "at least 1"]),
        ("--epochs 0", ["--epochs", "at least 1"]),
        ("--patience 0", ["--patience", "at least 1"]),
        ("--batch-size -3", ["--batch-size", "at least 1"]),
        ("--optimizer adam", ["--optimizer", "adamw", "sgd"]),
        ("--momentum 1", ["--momentum", "below 1"]),
        ("--weight-decay=-1", ["--weight-decay", "at least 0"]),
        ("--schedule linear", ["--schedule", "cosine", "step", "constant"]),
        ("--lr-step 70", ["--lr-step", "two numbers EPOCHS,FACTOR"]),
        ("--race 1", ["--race", "above 0 and below 1"]),
        ("--race 0.5 --anchor gray", ["--race", "--anchor auto"]),
        ("--engine fast", ["eager", "graph", "auto"]),
        ("--data disk", ["device", "host", "auto"]),
        ("--amp fp8", ["'fp8'", "bf16"]),
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
    assert main(options.split()) == 2
    message = one_line(capsys.readouterr().err)
    assert message.startswith("train.py: ")
    for part in wanted:
        assert part in message
    assert Path("taken/file").read_text() == "mine" and not Path("runs").exists()


def test_bad_input_has_no_traceback():
    process = start(TRAIN, "--out", TRAIN / "run")
    out, err = process.communicate()
    assert process.returncode == 2 and str(TRAIN / "run") in one_line(err)


def test_bad_data_is_refused_before_a_folder_is_made(register, capsys):
    """The check of the data is the command's too; see data/test_check.py for what it finds."""

    def damaged(options):
        data = datasets["cgdigits"](options)
        color = data.test.stored["color"].clone()
        color[7] = float("nan")
        data.test = Split(data.test.labels, data.test.stored | {"color": color})
        return data

    register(datasets, "damaged", damaged)
    assert main(["--dataset", "damaged", "--out", "run"]) == 2
    assert one_line(capsys.readouterr().err) == "train.py: test color has NaN or inf in sample 7"
    assert not Path("run").exists()


def test_loss_that_explodes(capsys):
    assert main(["--epochs", "1", "--method", "joint", "--lr", "1e30", "--out", "run"]) == 2
    message = one_line(capsys.readouterr().err)
    assert "not finite" in message and "lower --lr" in message


def help_of(argv, capsys):
    """Headings, flags and text."""
    with pytest.raises(SystemExit) as end:
        main([*argv, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    return re.findall(r"^(\S.*):$", text, re.MULTILINE), set(re.findall(r"^  (--\S+)", text, re.MULTILINE)), text


def test_help_shows_what_belongs_to_the_chosen_method(capsys):
    headings, flags, text = help_of([], capsys)
    own = ["UDI", "UDI and co-training", "UDI: the followers' losses", "fusion", "data"]
    assert headings == ["what to train", *own, "training", "machine", "resuming and help"]
    assert {"--q-width", "--anchor", "--resplit", "--epochs"} <= flags and "default: 30" in text
    assert not {"--contrast-weight", "--frames", "--rho"} & flags and "--help all" in text
    headings, flags, _ = help_of(["--method", "ogm-ge", "--dataset", "cremad", "--baselines", "self-training"], capsys)
    assert headings[:4] == ["what to train", "OGM-GE", "self-training", "fusion"] and "--anchor" not in flags
    assert {"--data-root", "--stft", "--fold", "--skip-bad"} <= flags


def test_help_all_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["--help", "all"])
    text = capsys.readouterr().out
    for name in all_fields():
        assert f"  {spelled(name)} " in text or f"  {spelled(name)}\n" in text


def test_options_of_one_s_own(capsys):
    """By --method module:function, from the working directory, in its help too."""
    Path("of_my_own.py").write_text(METHOD)
    argv = ["--method", "of_my_own:mine", "--dataset", "cgdigits", "--epochs", "1"]
    assert main([*argv, "--my-alpha", "0.3", "--out", "run"]) == 0
    assert read_metrics("run")["fused"]["alpha"] == 0.3
    assert json.loads(Path("run/config.json").read_text())["my_alpha"] == 0.3
    assert "--my-alpha" in help_of(argv, capsys)[1]
    assert main(["--resume", "run"]) == 2
    assert "names of_my_own, which is not trusted" in one_line(capsys.readouterr().err)
    assert main(["--resume", "run", "--method", "of_my_own:mine"]) == 0
    assert main(["--resume", "run", "--trust", "of_my_own"]) == 0
    capsys.readouterr()
    assert main(["--my-alpha", "0.3"]) == 2 and "unrecognized" in one_line(capsys.readouterr().err)


def test_an_interrupted_run_of_one_s_own_says_what_to_trust(capsys):
    Path("of_my_own_too.py").write_text("def mine(run):\n    raise KeyboardInterrupt\n")
    assert main(["--method", "of_my_own_too:mine", "--dataset", "cgdigits", "--out", "run"]) == 130
    assert capsys.readouterr().err.rstrip().endswith("--resume run --trust of_my_own_too")


METHOD = """
from dataclasses import dataclass

from udi_trainer import Group, option, reads
from udi_trainer.methods.joint import joint
from udi_trainer.options import number


@dataclass(frozen=True, kw_only=True)
class Mine(Group, title="mine"):
    my_alpha: float = option(0.1, number(float, 0), "a number")


@reads(Mine)
def mine(run):
    outcome = joint(run)
    outcome.metrics["fused"]["alpha"] = run.options.of(Mine).my_alpha
    return outcome
"""


def test_options_of_the_command_are_those_of_python():
    """The same values from text, commas and dashes as from Python."""
    text = "--epochs 3 --baselines joint,ensemble --noise 0.1,0.2 --schedule step --lr-step 5,0.5 --amp --q-warmup 0"
    options, folder = parse(text.split())
    assert folder is None and options == Options.make(
        epochs=3,
        baselines=["joint", "ensemble"],
        noise=(0.1, 0.2),
        schedule="step",
        lr_step=[5, 0.5],
        amp="bf16",
        q_warmup=0,
    )
    assert parse([])[0] == Options.make()
