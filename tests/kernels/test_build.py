"""Building and loading: what a user meets on machines that lack something. Each case is a process of its own."""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

import udi_kernels
from udi_kernels import _build

HEAD = """
import warnings
from pathlib import Path
from udi_kernels import _build
_build.PREBUILT = Path("nowhere")
"""
USE = """
import torch, udi_kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.randn(3, 4, requires_grad=True)
    for _ in range(2):
        udi_kernels.js_div(x, x.detach().roll(1)).backward()
        udi_kernels.gramian([[x.detach()], [x.detach()]])
print(len(caught), caught[0].message if caught else "")
"""


@pytest.fixture
def python(tmp_path):
    def run(code, **env):
        env = {**os.environ, "UDI_KERNELS_CACHE": str(tmp_path / "cache"), **env}
        return subprocess.run([sys.executable, "-c", HEAD + code], env=env, capture_output=True, text=True, timeout=300)

    return run


def warning(run):
    assert run.returncode == 0, run.stderr
    count, message = run.stdout.split(" ", 1)
    assert count == "1", "one warning, not one a call"
    return message


def test_import_compiles_nothing_and_brings_nothing_slow(python, tmp_path):
    slow = {"triton", "torch._dynamo", "torch._inductor", "udi_kernels.triton", "pybind11"}
    code = (
        f"import sys, torch; before = set(sys.modules); import udi_kernels; print({slow} & set(sys.modules) - before)"
    )
    run = python(code)
    assert run.stdout == "set()\n", run.stdout + run.stderr
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_plain_torch_serves(python):
    message = warning(python(USE, CXX="/nonexistent/c++"))
    assert "plain torch is used instead: no C++ compiler; install one" in message


def test_compiler_error_is_shown(python, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: this compiler is broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    message = warning(python(USE, CXX=str(compiler)))
    assert "compiling failed" in message and "this compiler is broken" in message
    assert "this compiler is broken" in next((tmp_path / "cache").rglob("log.txt")).read_text()


def test_unwritable_cache_names_the_remedy(python, tmp_path):
    (tmp_path / "file").write_text("")
    message = warning(python(USE, UDI_KERNELS_CACHE=str(tmp_path / "file")))
    assert "set UDI_KERNELS_CACHE to a writable folder" in message


PUT = """
path = _build.cache() / _build.library("cpu")
path.parent.mkdir(parents=True)
"""


def test_a_library_that_does_not_load_is_no_disaster(python, tmp_path):
    code = PUT + "work = path.with_name('work'); work.write_text('?'); _build._publish(work, path)\n"
    assert "delete it to have it built anew" in warning(python(code + USE))


def test_a_library_cut_short_is_built_anew(python):
    """Loading it would end the process with SIGBUS."""
    code = f"""
import os, shutil
whole = Path({os.fspath(_build.load("cpu").__file__)!r})
def compile(kind, tools, target):
    print("compiled", end=" ")
    _build._publish(shutil.copy(whole, target.with_name("work")), target)
_build._compile = compile
{PUT}
_build._publish(shutil.copy(whole, path.with_name("work")), path)
os.truncate(path, 100_000)
"""
    run = python(code + USE)
    assert run.returncode == 0 and run.stdout.split()[:2] == ["compiled", "0"], run.stdout + run.stderr


def test_compiler_behind_a_command(python, tmp_path):
    launcher = tmp_path / "ccache"
    launcher.write_text("#!/bin/sh\necho 'error: called with' $1 >&2\nexit 1\n")
    launcher.chmod(0o755)
    assert "error: called with g++" in warning(python(USE, CXX=f"{launcher} g++"))


@pytest.mark.parametrize("home", ["", "relative"])
def test_cache_where_there_is_no_home(python, home):
    run = python("print(_build.cache())", HOME=home, UDI_KERNELS_CACHE="", XDG_CACHE_HOME="")
    assert run.stdout.startswith(tempfile.gettempdir()), run.stdout + run.stderr


def test_processes_that_start_together_build_once(python, tmp_path):
    code = """
import time
def compile(kind, tools, target):
    with open(target.parent / "log", "a") as log:
        log.write("compiled\\n")
    time.sleep(1)
    work = target.with_name("work")
    work.write_text("")
    _build._publish(work, target)
_build._compile = compile
_build.build("cpu", _build.cache())
"""
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda _: python(code), range(3)))
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert (tmp_path / "cache" / "udi_kernels" / "log").read_text() == "compiled\n"


def test_report():
    run = subprocess.run([sys.executable, "-m", "udi_kernels"], capture_output=True, text=True)
    assert run.returncode == 0 and "js_div" in run.stdout and "cpu float32" in run.stdout


def test_compile_without_an_eager_call_before(python):
    run = python(
        """
import torch, udi_kernels
f = torch.compile(udi_kernels.js_div, fullgraph=True, backend="aot_eager")
x = torch.randn(3, 4, requires_grad=True)
f(x, x.detach().roll(1)).backward()
""",
        UDI_KERNELS_CACHE=os.environ.get("UDI_KERNELS_CACHE", ""),
    )
    assert run.returncode == 0, run.stderr


def test_info_has_every_op():
    """By name: what is public but no class, nor arithmetic on a few numbers."""
    backends = udi_kernels.build_info()["backends"]
    public = {name for name in udi_kernels.__all__ if not isinstance(getattr(udi_kernels, name), type)}
    assert backends.keys() == public - {"build_info", "alignment_weights"}
    assert {by for served in backends.values() for by in served.values()} <= {"C++", "CUDA", "Triton", "reference"}
