"""What the tests of the trainer share."""

import contextlib
import gzip
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from udi_trainer import Options, Run
from udi_trainer.registry import datasets
from udi_trainer.run_folder import RunFolder
from udi_trainer.training.engine import Eager

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "python" / "train.py"

needs_torchjd = pytest.mark.skipif(
    not all(map(find_spec, ("torchjd", "qpsolvers", "quadprog"))),
    reason='needs TorchJD: pip install -e ".[experiments]"',
)
METHODS = ["udi", "joint", "joint-sum", "ogm-ge", pytest.param("gramian", marks=needs_torchjd), "ensemble"]


def read_metrics(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())


def without_times(metrics):
    """All that must be the same from run to run."""
    return {name: value for name, value in metrics.items() if name != "seconds"}


def read_log(folder):
    """metrics.jsonl without times."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


def log_by_stage(folder):
    """A resumed run may log stages that are trained side by side one after the other."""
    return sorted(read_log(folder), key=lambda row: (row["phase"], row["modality"] or "", row["epoch"]))


def losses(folder):
    return [{n: row[n] for n in ("loss", "val_loss", "com", "alpha_com") if n in row} for row in read_log(folder)]


def assert_same_training(a, b, rtol):
    """The same losses, epoch by epoch, to the rounding that differs between two ways to compute them."""
    assert len(losses(a)) == len(losses(b)) > 0
    for ours, theirs in zip(losses(a), losses(b), strict=True):
        assert ours == pytest.approx(theirs, rel=rtol, abs=rtol)


def start(*command, **kwargs):
    """A process of this Python that finds the packages as they are here, and sees no GPU."""
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, *map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": paths}, **kwargs,
    )  # fmt: skip


def run_python(code, *arguments):
    """What a new process prints that runs this code."""
    process = start("-c", code, *arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def one_line(text):
    """The one line that the text is, without its end."""
    assert text.count("\n") == 1 and text.endswith("\n"), text
    return text[:-1]


def make_run(dataset="cgdigits", **options):
    """A run of these options on the CPU, that writes nothing. ``dataset``: its name, or itself."""
    options = Options.make(dataset=dataset, **options)
    data = datasets[dataset](options) if isinstance(dataset, str) else dataset
    return Run(options, data, torch.device("cpu"), RunFolder(None))


def training_batch(task, size=32, seed=0):
    split = task.run.data.train
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.batch(order[:size], list(split.stored))


def freeze(task):
    """Lets a step set the gradients, and leave the parameters where a plain formula finds them."""
    for group in task.optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)


def write_idx(path, tensor):
    header = bytes((0, 0, 8, tensor.dim())) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    path.write_bytes(gzip.compress(header + bytes(tensor.flatten().tolist())))


@contextlib.contextmanager
def interrupted(at, how):
    """Training in it ends by KeyboardInterrupt, in the step for which ``at(task, number)`` is true.

    ``how``: killed before that step, or else asked to end after it.
    """
    step = Eager.step

    def ending(self, batch, number):
        if at(self.task, number):
            if how == "killed":
                raise KeyboardInterrupt
            self.task.run.stop.request(2)
        return step(self, batch, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Eager, "step", ending)
        yield
