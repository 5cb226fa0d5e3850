import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason='needs the trainer\'s extra: pip install -e ".[train]"')
pytest.importorskip("matplotlib", reason='needs the trainer\'s extra: pip install -e ".[train]"')

from studies.command import studies
from studies.study import Study, Variant

ROOT = Path(__file__).parents[2]

# Replaces the trainer. Seed 1 hangs while the file "stuck" exists, and seed 2 fails while "broken" exists.
STUB = """
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("--seed", "--out", "--resume", "--skill"):
    parser.add_argument(name)
o = parser.parse_args()
seed, folder = int(o.seed), pathlib.Path(o.out or o.resume)
folder.mkdir(exist_ok=True)
(folder / "config.json").write_text("{}")
with open("started", "a") as file:
    file.write(f"{seed} {'resumed' if o.resume else 'new'}\\n")
while seed == 1 and pathlib.Path("stuck").exists():
    time.sleep(0.01)
if seed == 2 and pathlib.Path("broken").exists():
    sys.exit("first line\\nthe disk is full")
def scores(val, test):
    return {"val_acc": val, "test_acc": test, "test_macro_f1": test / 2}
test = float(o.skill) + 0.01 * seed**2
metrics = {
    "method": "udi", "anchor": "a", "fused": scores(0.9, test),
    "unimodal": {"a": scores(0.8, 0.5 + 0.01 * seed), "b": scores(0.5, 0.95)}, "baselines": {},
    "modalities": {"a": scores(0.8, 0.5), "b": scores(0.1, 0.1)},
    "collapsed": {"b": "it fell"} if seed == 0 else {},
}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture(autouse=True)
def stub(tmp_path, monkeypatch):
    """A temporary working directory, and a study with instant runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    Path("stub.py").write_text(STUB)

    @studies.register("stub")
    class Stub(Study):
        """Does it work?"""

        seeds, program = 3, tmp_path / "stub.py"
        variants = [Variant("ours", "--skill 0.6")]

        def resolve(self, argv):
            return dict(zip(argv[::2], argv[1::2], strict=True))

        def extra(self, argv, extra):
            return extra

    yield Stub
    del studies["stub"]


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, as in the runs of a study: on a busy machine more threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
