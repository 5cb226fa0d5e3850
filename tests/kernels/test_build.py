"""Building and loading on machines that lack something. Most cases run in a process of their own."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import udi_kernels
from udi_kernels import _build, _cache

HEAD = """
import warnings
from pathlib import Path
from udi_kernels import _build, _cache
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
    def run(code, *options, stderr=subprocess.PIPE, **env):
        env = {**os.environ, "UDI_KERNELS_CACHE": str(tmp_path / "cache"), **env}
        command = [sys.executable, *options, "-c", HEAD + code]
        return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=300)

    return run


ODD = """it's an "odd" $HOME: folder"""


@pytest.fixture
def tiny(tmp_path):
    """Code that replaces csrc by an empty module in a folder with an odd name, which compiles in a second."""
    folder = tmp_path / ODD / "csrc"
    (folder / "cpu").mkdir(parents=True)
    (folder / "ops.cpp").write_text('#include "ops.h"')
    (folder / "ops.h").write_text("")
    (folder / "cpu" / "kernel.cpp").write_text("#include <torch/headeronly/macros/Macros.h>")
    (folder / "python.cpp").write_text("""
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
""")
    return f"_build.SOURCES = Path({os.fspath(folder)!r})\n"


def test_every_capability_has_its_library_and_what_they_share_is_compiled_once(python, tiny, tmp_path):
    run = python(f"""{tiny}
run = _build._run
def log(command, **options):
    code, output = run(command, **options)
    print(output[output.rfind("[") :])
    return code, output
_build._run = log
_build.capabilities = lambda kind: ["DEFAULT", *_build.CPU_FLAGS]
folder = Path({os.fspath(tmp_path)!r}, "wheel")
_build.build("cpu", folder, _build.capabilities("cpu"))
_build.PREBUILT, _build._tools = folder, None
for capability in _build.capabilities("cpu"):
    _build._capability = lambda: capability
    print(_build._load_or_build.__wrapped__("cpu").__file__ == str(folder / _build.library("cpu")))
""")
    assert run.stdout.splitlines().count("True") == 3, run.stdout + run.stderr
    assert "[8/8]" in run.stdout, "two files for all, one kernel and one library for each"


@pytest.mark.parametrize("compiler", [True, False])
def test_wheel(tmp_path, compiler):
    """Of a compiler that writes empty files: what is in the wheel counts."""
    pytest.importorskip("setuptools", minversion="77")
    cxx = script(tmp_path / "c++", 'case "$*" in *fsyntax-only*) ;; *) for last; do :; done; : > "$last"; esac')
    env = {**os.environ, "CXX": cxx if compiler else "/nonexistent"}
    options = ["egg_info", "-e", tmp_path, "build", "-b", tmp_path / "build", "bdist_wheel", "-d", tmp_path]
    root = _build.PACKAGE.parent
    subprocess.run([sys.executable, "setup.py", "-q", *options], cwd=root, env=env, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    local = f"{udi_kernels.__version__}+torch{_build.torch_version()}"
    assert wheel.name.startswith(f"udi_kernels-{local}-")
    assert wheel.name.endswith("-py3-none-any.whl") != compiler
    names = zipfile.ZipFile(wheel).namelist()
    wanted = [_build.library("cpu", capability) for capability in _build.capabilities("cpu")] if compiler else []
    assert {f"udi_kernels/_lib/{name}" for name in wanted} == {
        n for n in names if "_lib/_cpu" in n and n.endswith("so")
    }
    assert {"udi_kernels/__init__.py", "udi_kernels/csrc/ops.cpp", "udi_trainer/__main__.py"} <= set(names)


LOAD = "print(_build.load('cpu') is not None)\n"


def warning(run):
    assert run.returncode == 0, run.stderr
    count, message = run.stdout.split(" ", 1)
    assert count == "1", "one warning, not one a call"
    return message


def script(path, code):
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    return os.fspath(path)


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
    fails = 'case "$*" in *fsyntax-only*) ;; *) echo "error: this compiler is broken" >&2; exit 1; esac'
    message = warning(python(USE, CXX=script(tmp_path / "c++", fails)))
    assert "compiling failed" in message and "this compiler is broken" in message
    assert "this compiler is broken" in next((tmp_path / "cache").rglob("log.txt")).read_text()


def test_unwritable_cache_names_the_remedy(python, tmp_path):
    (tmp_path / "file").write_text("")
    message = warning(python(USE, UDI_KERNELS_CACHE=str(tmp_path / "file")))
    assert "set UDI_KERNELS_CACHE to a writable folder" in message


PUT = """
path = _cache.folder() / _build.library("cpu")
"""
COPY = f"""
import os, shutil
native = Path({os.fspath(_build.load("cpu").__file__)!r})
def compile(kind, tools, targets):
    print("compiled", end=" ")
    for target in targets:
        _cache.publish(shutil.copy(native, target.with_name("work")), target)
_build._compile = compile
"""


def test_a_library_that_does_not_load_is_no_disaster(python, tmp_path):
    code = PUT + "work = path.with_name('work'); work.write_text('?'); _cache.publish(work, path)\n"
    assert "delete it to compile it again" in warning(python(code + USE))


def test_a_library_cut_short_is_built_anew(python):
    """Loading it would end the process with SIGBUS."""
    code = f"""
{COPY}{PUT}
_cache.publish(shutil.copy(native, path.with_name("work")), path)
os.truncate(path, 100_000)
"""
    run = python(code + USE)
    assert run.returncode == 0 and run.stdout.split()[:2] == ["compiled", "0"], run.stdout + run.stderr


def test_compiler_behind_a_command(python, tmp_path):
    launcher = script(tmp_path / "ccache", "echo 'error: called with' $1 >&2; exit 1")
    assert "called with g++" in warning(python(USE, CXX=f"{launcher} g++"))


def test_processes_that_start_together_build_once(python, tmp_path):
    code = """
import time
def compile(kind, tools, targets):
    [target] = targets
    with open(target.parent / "log", "a") as log:
        log.write("compiled\\n")
    time.sleep(1)
    work = target.with_name("work")
    work.write_text("")
    _cache.publish(work, target)
_build._compile = compile
_build.build("cpu", _cache.folder())
"""
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda _: python(code), range(3)))
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert (tmp_path / "cache" / "udi_kernels" / "log").read_text() == "compiled\n"


@pytest.mark.parametrize("cxx", ["", " ", "path", "quoted", "command"])
def test_odd_paths_and_compiler_commands(python, tiny, tmp_path, cxx):
    compiler = tmp_path / ODD / "my c++"
    script(compiler, f'exec {shlex.quote(shutil.which("c++"))} "$@"')
    given = {
        "path": str(compiler),
        "quoted": shlex.quote(str(compiler)),
        "command": f"env {shlex.quote(str(compiler))}",
    }
    code = f"{tiny}print(_build.load('cpu').__file__ == str(_cache.folder() / _build.library('cpu')))"
    run = python(code, CXX=given.get(cxx, cxx), UDI_KERNELS_CACHE=str(tmp_path / ODD))
    assert run.stdout == "True\n", run.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("-U__GNUC__ -D__GNUC__=9 -U__clang_major__ -D__clang_major__=9", "too old; install g++ 12"),
        ("-nostdinc++", "no C++20 standard library; install one"),
        ("-nostdinc++ -Iother", "torch needs libstdc++; remove -stdlib=libc++"),
    ],
)
def test_a_compiler_that_cannot_serve_is_named(monkeypatch, tmp_path, options, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for header in ("concepts", "cstddef"):
        (tmp_path / "other" / header).write_text("")
    monkeypatch.setenv("CXX", f"c++ {options}")
    with pytest.raises(_build.BuildError, match=rf"^c\+\+ {re.escape(options)} \(.*\d\.\d.*\) .*{re.escape(reason)}"):
        _build._compiler()


def test_a_command_that_cannot_run_is_an_error_in_words(monkeypatch, tmp_path):
    script(tmp_path / "c++", "")
    (tmp_path / "c++").write_bytes(b"\0")
    for cxx, reason in (("'", "CXX=' is not a command"), (str(tmp_path / "c++"), "cannot run .*Exec format error")):
        monkeypatch.setenv("CXX", cxx)
        with pytest.raises(_build.BuildError, match=reason):
            _build._compiler()


TWICE = """
import torch, udi_kernels
for _ in range(2):
    try:
        print(float(udi_kernels.js_div(torch.zeros(1, 2), torch.zeros(1, 2))), end=" ")
    except UserWarning as e:
        print(e)
"""


def test_where_warnings_are_errors_the_first_call_alone_fails(python):
    code = """
def compile(kind, tools, targets):
    print("compiled", end=" ")
    raise _build.BuildError("it failed")
_build._compile = compile
"""
    run = python(code + TWICE, "-W", "error")
    message, value = run.stdout.split("\n")
    assert message.startswith("compiled udi_kernels: ") and "plain torch is used instead: it failed" in message
    assert value == "0.0 ", "neither compiled again nor reported again"


def test_where_warnings_are_errors_native_kernels_are_not_lost(python, tmp_path):
    (tmp_path / "cache" / "udi_kernels").mkdir(parents=True)
    (tmp_path / "cache" / "udi_kernels").chmod(0o777)
    run = python(COPY + TWICE + LOAD, "-W", "error")
    message, values = run.stdout.split("\n")[:2]
    assert "others can write to it" in message and values == "compiled 0.0 True", run.stderr


@pytest.mark.parametrize("state", ["full", "closed", "missing"])
def test_unwritable_stderr_does_not_stop_a_build(python, tiny, state):
    code = {"full": "", "closed": "sys.stderr.close()", "missing": "sys.stderr = None"}[state]
    with open("/dev/full", "w") as full:
        run = python(f"import sys\n{code}\n{tiny}{LOAD}", stderr=full)
    assert run.stdout == "True\n"


def test_closed_stderr_does_not_stop_a_call(python):
    run = python(f"import sys\nsys.stderr.close()\n{TWICE}", CXX="/nonexistent/c++")
    assert run.stdout == "0.0 0.0 "


def test_the_line_comes_before_the_work(python, tiny):
    run = python(f"""{tiny}
import sys
run = _build._run
def log(command, **options):
    print(*command[1:], file=sys.stderr)
    return run(command, **options)
_build._run = log
{LOAD}""")
    line, work = (run.stderr.index(text) for text in ("compiling the cpu kernels", "-C "))
    assert line < work and run.stdout == "True\n"


def test_a_checksum_that_is_not_text_is_a_wrong_one(python):
    code = f"""{COPY}{PUT}
_cache.publish(shutil.copy(native, path.with_name("work")), path)
_cache._digest_file(path).write_bytes(b"\\xff\\xfe")
"""
    run = python(code + USE)
    assert run.returncode == 0 and run.stdout.split()[:2] == ["compiled", "0"], run.stdout + run.stderr


def test_a_noexec_cache_is_reported_before_compiling(python):
    code = """
import os, types
os.statvfs = lambda path: types.SimpleNamespace(f_flag=os.ST_NOEXEC)
_build._compile = None
"""
    assert "is mounted noexec" in warning(python(code + USE))


def test_key_holds_torch_major_minor(monkeypatch, tmp_path):
    def key(version):
        (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
        return _build._key.__wrapped__("cpu", "AVX2")

    monkeypatch.setattr(_build, "_torch", lambda: tmp_path)
    assert key("2.14.0+cu130") == key("2.14.1") == key("2.14.1+cpu") != key("2.15.0")
    nightlies = ["2.15.0", "2.15.0.dev20260101", "2.15.0.dev20260102", "2.15.0a0+git1234567", "2.15.0+git1234567"]
    assert len({key(version) for version in nightlies}) == 5, "a nightly build is compatible with itself only"


@pytest.mark.parametrize(
    ("torch", "reason"),
    [(None, "torch is not installed"), ("raise OSError('libc10.so')", "torch cannot be imported")],
)
def test_installation_needs_neither_torch_nor_site_packages(tmp_path, torch, reason):
    if torch:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(torch)
        (tmp_path / "torch" / "version.py").write_text("__version__ = '2.14.0'")
    code = f"""
import importlib, sys, types
sys.modules["recipe"] = package = types.ModuleType("recipe")
package.__path__ = [{os.fspath(_build.PACKAGE)!r}]
recipe = importlib.import_module("recipe._build")
try:
    recipe.build("cpu", {os.fspath(tmp_path / "_lib")!r})
except recipe.BuildError as e:
    print(e)
"""
    command = [sys.executable, "-S", "-c", code]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert reason in run.stdout, run.stderr


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(_cache, "_warned", set())
    monkeypatch.setenv("UDI_KERNELS_CACHE", str(tmp_path))
    (tmp_path / "udi_kernels" / "cubin").mkdir(parents=True)
    return tmp_path / "udi_kernels"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder that serves where there is no home."""
    monkeypatch.setattr(_cache, "_warned", set())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("UDI_KERNELS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / f"udi_kernels-{os.geteuid()}"


@pytest.fixture
def give_away(monkeypatch):
    """Makes a path another user's: it is chowned, or this process takes another user's identity."""

    def give(path):
        if os.geteuid() == 0:
            os.chown(path, 12345, -1, follow_symlinks=False)
        else:
            user = os.geteuid() + 1
            monkeypatch.setattr(os, "geteuid", lambda: user)

    return give


def plant(path, content=b"planted"):
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name("work")
    work.write_bytes(content)
    _cache.publish(work, path)


def assert_not_loaded(name, reason):
    with pytest.warns(UserWarning, match=f"is not trusted: .*{reason}.* temporary folder") as caught:
        assert _cache.once(name, lambda: b"made") == b"made"
        assert _cache.once(name, lambda: b"made again") == b"made", "kept for this process"
    assert len(caught) == 1
    assert _cache.path(name).parent.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("part", [".", "cubin", "cubin/code", "cubin/code.sha256"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_can_write_is_not_loaded(cache, part, mode):
    plant(cache / "cubin" / "code")
    (cache / part).chmod((cache / part).stat().st_mode | mode)
    assert_not_loaded("cubin/code", "others can write to it")


@pytest.mark.parametrize("part", [".", "cubin", "cubin/code", "cubin/code.sha256"])
def test_what_another_user_wrote_is_not_loaded(cache, give_away, part):
    plant(cache / "cubin" / "code")
    give_away(cache / part)
    assert_not_loaded("cubin/code", "belongs to user")


def test_of_a_link_the_target_counts(cache, tmp_path, give_away):
    plant(tmp_path / "elsewhere" / "code", b"made")
    (cache / "cubin").rmdir()
    (cache / "cubin").symlink_to(tmp_path / "elsewhere")
    assert _cache.once("cubin/code", None) == b"made"
    give_away(tmp_path / "elsewhere")
    assert_not_loaded("cubin/code", "belongs to user")


def test_temporary_folder_must_be_real_and_of_this_user(temporary, tmp_path, give_away):
    assert _cache.once("cubin/code", lambda: b"made") == b"made"
    assert temporary.stat().st_mode & 0o777 == (temporary / "cubin").stat().st_mode & 0o777 == 0o700
    temporary.rename(tmp_path / "real")
    temporary.symlink_to(tmp_path / "real")
    assert_not_loaded("cubin/code", "not a real folder")
    temporary.unlink()
    (tmp_path / "real").rename(temporary)
    assert _cache.once("cubin/code", None) == b"made"
    give_away(temporary)
    assert_not_loaded("cubin/code", "belongs to user")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a folder of root's")
def test_root_is_trusted_except_in_the_temporary_folder(cache, tmp_path, monkeypatch):
    plant(cache / "cubin" / "code", b"made")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert _cache.once("cubin/code", None) == b"made"
    cache.rename(tmp_path / "udi_kernels-12345")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("UDI_KERNELS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert_not_loaded("cubin/code", "belongs to user 0, not 12345")


def test_a_planted_library_is_not_loaded(python, tmp_path):
    code = f"""{COPY}{PUT}
path.with_name("work").write_text("planted")
_cache.publish(path.with_name("work"), path)
path.parent.chmod(0o777)
"""
    run = python(code + USE + "print(_build.load('cpu').__file__)", TMPDIR=str(tmp_path))
    compiled, message, path = run.stdout.split("\n")[:3]
    assert compiled.startswith("compiled 1 ") and "is not trusted" in compiled, run.stdout + run.stderr
    assert message.startswith(str(tmp_path)) and not path
    assert not Path(message).parent.exists(), "the private folder is gone"


@pytest.mark.parametrize("home", [None, "", "relative", "/dev/null"])
def test_cache_where_there_is_no_home(temporary, monkeypatch, home):
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert _cache.folder() == temporary


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to become another user")
def test_cache_of_a_user_without_an_entry(python):
    code = """
import os, pwd, tempfile, torch, udi_kernels
with tempfile.TemporaryDirectory() as tempfile.tempdir:
    os.chown(tempfile.tempdir, 54321, 54321)
    os.setuid(54321)
    try:
        pwd.getpwuid(54321)
    except KeyError:
        print(_cache.once("name", lambda: b"made"), oct(os.stat(_cache.folder()).st_mode), _cache.folder().name)
"""
    run = python(code, "-W", "error", HOME="/", UDI_KERNELS_CACHE="", XDG_CACHE_HOME="")
    assert run.stdout == "b'made' 0o40700 udi_kernels-54321\n", run.stderr


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
