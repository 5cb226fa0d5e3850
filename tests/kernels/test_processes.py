"""The ops in other processes, with other numbers of threads, and built for other CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OPS = """
import hashlib, json, multiprocessing, sys
import torch
import udi_kernels as u

g = torch.Generator().manual_seed(0)
a, b = torch.randn(512, 1000, generator=g), torch.randn(512, 1000, generator=g)
grads = [[torch.randn(300, 301, generator=g) for _ in range(3)] for _ in range(3)]


def results():
    x, y = a.clone().requires_grad_(), a[:64].clone().requires_grad_()
    u.js_div(x, b).backward()
    bound = u.club_mi(b[:64], a[:64].tanh(), y)
    bound.backward()
    fused = u.certainty_fusion(torch.stack((a, b)))
    lists = u.gramian(grads), *u.weighted_sum(grads, torch.tensor([1.0, 0.5, -2.0]))
    return [u.js_div(a, b), x.grad, bound.detach(), y.grad, fused, *lists]


def bits(threads=None):
    if threads:
        torch.set_num_threads(threads)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in results())).hexdigest()
"""


def run(code, **environment):
    """What a process prints that runs this after the ops above are defined."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    Path("ops_in_process.py").write_text(OPS)
    code = f"from ops_in_process import *\nif __name__ == '__main__':\n    {code}"
    Path("program.py").write_text(code)
    process = subprocess.run(
        [sys.executable, "program.py"], text=True, capture_output=True, timeout=300,
        env=os.environ | {"PYTHONPATH": paths} | environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_any_number_of_threads():
    found = [run(f"print(bits({n}))", OMP_NUM_THREADS=str(n)) for n in (1, 2, 16)]
    assert found[0] == found[1] == found[2] and len(found[0]) == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_after_use(method):
    """A forked child uses one thread: with more, OpenMP waits for threads that a fork does not copy, as torch does."""
    pool = f"multiprocessing.get_context('{method}').Pool(2)"
    ours, *theirs = run(f"print(bits(2)); print(*{pool}.map(bits, [1, 1], chunksize=1))")
    assert theirs == [ours, ours]


def test_workers_of_a_dataloader():
    """They are forked, with one thread each."""
    code = (
        "print(bits(2)); print(*(x for [x] in torch.utils.data.DataLoader([0, 1], num_workers=2, collate_fn=collate)))"
    )
    ours, *theirs = run(f"collate = lambda batch: [bits()]\n    {code}")
    assert theirs == [ours, ours]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_cpus(capability):
    """Built for another instruction set, half a minute: the same values to float32's rounding."""
    code = "print(json.dumps([t.double().flatten()[:1000].tolist() for t in results()]))"
    here, there = (json.loads(" ".join(run(code, **e))) for e in ({}, {"ATEN_CPU_CAPABILITY": capability}))
    for x, y in zip(here, there, strict=True):
        scale = max(map(abs, x))
        assert y == pytest.approx(x, rel=1e-5, abs=1e-6 * scale)
