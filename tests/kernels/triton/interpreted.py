"""The Triton launchers against float64, and against the same formulas in plain torch of the same precision.

Without a GPU they run in Triton's interpreter, which must be chosen before Triton is first imported: `run_again` starts
a test file in a process of its own.  With a GPU they run there, in this process.
"""

import os
import subprocess
import sys

import pytest
import torch
from packaging.version import Version

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS_HERE = INTERPRETED or DEVICE == "cuda"
EPS = torch.finfo(torch.float32).eps
# Rounding of 16-bit results, relative and (subnormals) absolute.  The interpreter's conversion cuts off; a GPU rounds.
CUT = 2 if INTERPRETED else 1
ROUNDING = {torch.float32: (0, 0), torch.float16: (CUT * 2**-11, CUT * 2**-25), torch.bfloat16: (CUT * 2**-8, 0)}
NONE, SUM, MEAN = range(3)
REDUCTION = ("none", "sum", "mean")

if INTERPRETED:  # before Triton 3.8 tl.maximum and tl.minimum of a number and NaN are NaN there, compiled the number
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def assert_as_good(ours, plain, truth, dtype, slack=4, scale=None):
    """The largest error is at most twice that of plain float32 torch plus `slack` roundings of the largest value.

    Twice, because both are the largest of a few random roundings; 16-bit results have their own rounding on top.
    """
    assert ours.shape == truth.shape
    ours, plain, truth = (t.detach().cpu().double() for t in (ours, plain, truth))
    scale = truth.abs().max().item() if scale is None else scale
    relative, absolute = ROUNDING[dtype]
    theirs, error = (plain - truth).abs().max(), (ours - truth).abs()
    allowed = 2 * theirs + slack * EPS * scale + relative * truth.abs() + absolute
    assert torch.isfinite(ours).all()
    assert (error <= allowed).all(), f"error {error.max():.2e}, plain torch {theirs:.2e}, values to {scale:.2e}"


def autograd(function, inputs, grad, dtype, **options):
    """Value and gradients by autograd of the reference, in `dtype`."""
    leaves = [t.cpu().to(dtype, copy=True).requires_grad_() for t in inputs]
    value = function(*leaves, **options)
    return value.detach(), *torch.autograd.grad(value, leaves, grad.cpu().to(dtype).expand_as(value))


def on_device(*tensors):
    return tuple(t.to(DEVICE) if t is not None else None for t in tensors)


def far_apart(values):
    """These three numbers, 2^30 elements apart."""
    spread = torch.empty(2**31 + 1, dtype=torch.bfloat16, device=DEVICE)[:: 2**30]
    return spread.copy_(values)


def run_again(file, *options):
    """The tests of this file, interpreted."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    numpy = pytest.importorskip("numpy", reason="Triton's interpreter needs numpy")
    if triton.__version__.startswith("3.6.") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, file]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def assert_replays(step):
    """Without waiting for the GPU; replayed over poisoned outputs, the captured step gives the bits of an eager one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        for t in captured:
            t.zero_() if t.dtype == torch.bool else t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
