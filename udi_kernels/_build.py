"""Compiles csrc's host code and loads it: at installation where torch is importable, else at the first call.

One recipe for both moments. A library is named by a hash of sources, flags, torch and machine, so a stale one is never
loaded, and machines of several kinds can share a home directory. Importing this file compiles nothing and needs
nothing beyond the standard library (setup.py loads it by path).
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path

PACKAGE = Path(__file__).parent
SOURCES = PACKAGE / "csrc" if (PACKAGE / "csrc").exists() else PACKAGE.parent / "csrc"
PREBUILT = PACKAGE / "_lib"  # filled at installation

# What torch itself asks for at each of its CPU capabilities; compilers without a flag were never asked for it.
CPU_FLAGS = {
    "AVX512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mprefer-vector-width=512",
    "AVX2": "-mavx2 -mfma",
}
CXX_FLAGS = "-O3 -std=c++20 -fPIC -fvisibility=hidden -Wno-psabi -fno-math-errno -fno-trapping-math -ffp-contract=fast"


class BuildError(RuntimeError):
    """What is missing or went wrong, and the remedy, in one line."""


@functools.cache
def load(kind):
    """The extension module `_cpu` or `_cuda`, its ops registered; None where it cannot be had, with one warning."""
    try:
        module = _load(kind, _find(library(kind)) or build(kind, cache()))
        if kind == "cuda":
            from . import _nvrtc

            _nvrtc.serve(module)
        return module
    except BuildError as e:
        warnings.warn(f"udi_kernels: no native {kind} kernels, plain torch is used instead: {e}", stacklevel=3)
        return None


def cache():
    root = os.environ.get("UDI_KERNELS_CACHE") or os.environ.get("XDG_CACHE_HOME")
    if not root:
        home = Path(os.environ.get("HOME") or "nowhere")  # empty in some containers; / is nobody's home
        root = home / ".cache" if home.is_absolute() else Path(tempfile.gettempdir()) / f"udi_kernels-{os.getuid()}"
    return Path(root) / "udi_kernels"


def library(kind):
    """File name of the module for this machine."""
    return f"_{kind}-{_key(kind)}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _find(name):
    return next((folder / name for folder in (PREBUILT, cache()) if _whole(folder / name)), None)


def _whole(path):
    """Whether the file is there as it was written: loading a library that was cut short kills the process."""
    try:
        return _digest_file(path).read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return False


def _digest_file(path):
    return path.with_name(f"{path.name}.sha256")


def once(name, make):
    """Contents of a file of the cache, made if there is none; waits if another process is at it."""
    if path := _find(name):
        return path.read_bytes()
    target = cache() / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_suffix(".lock")):
            if not _whole(target):
                temporary = target.with_suffix(f".{os.getpid()}")
                temporary.write_bytes(make())
                _publish(temporary, target)
            return target.read_bytes()
    except OSError as e:
        warnings.warn(
            f"udi_kernels: cannot write to {cache()} ({e.strerror}), so each process compiles anew; "
            "set UDI_KERNELS_CACHE to a writable folder",
            stacklevel=2,
        )
        return make()


def build(kind, folder):
    """Compiles the module into `folder` and returns its path; waits if another process is at it."""
    tools = _tools(kind)
    target = Path(folder) / library(kind)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_suffix(".lock")):
            if not _whole(target):
                _compile(kind, tools, target)
    except OSError as e:
        raise BuildError(f"cannot write to {folder} ({e.strerror}); set UDI_KERNELS_CACHE to a writable folder") from e
    return target


def _compile(kind, tools, target):
    print(f"udi_kernels: compiling the {kind} kernels, once for this machine ...", file=sys.stderr, flush=True)
    work = target.parent / f"{target.stem}.build"
    work.mkdir(exist_ok=True)
    (work / "build.ninja").write_text(_ninja_file(kind, tools, target.name))
    run = subprocess.run([tools["ninja"], "-C", work], capture_output=True, text=True)
    if run.returncode:
        log = work / "log.txt"
        log.write_text(run.stdout + run.stderr)
        first = next((line for line in run.stdout.splitlines() if "error:" in line), "ninja failed").strip()
        raise BuildError(f"compiling failed: {first} (all of it in {log})")
    _publish(work / target.name, target)
    shutil.rmtree(work)


def _publish(temporary, target):
    """Whoever sees the target sees all of it, even after a power failure; its digest tells if not."""
    digest = _digest_file(target)
    digest.write_text(hashlib.sha256(Path(temporary).read_bytes()).hexdigest())
    for path in (temporary, digest):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, target)


def _ninja_file(kind, tools, output):
    torch = _torch()
    include = [f"-I{torch / 'include'}", f"-I{SOURCES}", f"-I{sysconfig.get_paths()['include']}"]
    include.append(f"-I{tools['pybind11']}")
    define = f"-DUDI_MODULE=_{kind}"
    flags = " ".join([CXX_FLAGS, define, *include])
    flags += " " + (CPU_FLAGS.get(_capability(), "") if kind == "cpu" else "-DUSE_CUDA")
    # torch's own libstdc++, by name: a compiler that finds only the static one would link a second, and std::ostream
    # of one with the locales of the other ends the process where a message holds a number.
    runtime = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-l:libstdc++.so.6"
    lines = [
        f"cxx = {tools['cxx']}",
        "rule cxx",
        f"  command = $cxx -MMD -MF $out.d {flags} -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx -shared $in -L{torch / 'lib'} -ltorch -ltorch_cpu -lc10 {runtime} -o $out",
    ]
    objects = []
    for source in _sources(kind):
        objects.append(f"{source.name}.o")
        lines.append(f"build {objects[-1]}: cxx {source}")
    lines.append(f"build {output}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _sources(kind):
    ops = [SOURCES / "ops.cpp"] if kind == "cpu" else []  # for all devices; the slowest to compile goes first
    return [*ops, *sorted((SOURCES / kind).glob("*.cpp")), SOURCES / "python.cpp"]


def _tools(kind):
    """Paths of what the build needs, or an error that names the remedy."""
    if sys.platform == "win32":
        raise BuildError("the native build supports Linux and macOS; use WSL on Windows")
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not cxx or not shutil.which(shlex.split(cxx)[0]):  # it may be a command: CXX="ccache g++"
        raise BuildError("no C++ compiler; install one (`apt install g++` or the like, or set CXX)")
    ninja, pybind11 = shutil.which("ninja"), importlib.util.find_spec("pybind11")
    if not ninja:  # the package's command is not on PATH where an environment is used without being activated
        ninja = shutil.which("ninja", path=str(Path(sys.executable).parent))
    if not ninja or not pybind11:
        raise BuildError("ninja and pybind11 are needed; `pip install ninja pybind11`")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        raise BuildError("no Python headers; install them (`apt install python3-dev` or the like)")
    tools = {"cxx": cxx, "ninja": ninja, "pybind11": Path(pybind11.origin).parent / "include"}
    if kind == "cuda" and not any((_torch() / "lib").glob("libtorch_cuda.*")):
        raise BuildError("this torch was built without CUDA; install a CUDA build of torch")
    return tools


@functools.cache
def _torch():
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed; `pip install torch`")
    return Path(spec.origin).parent


@functools.cache
def _capability():
    """torch's name of what this CPU can do (ATEN_CPU_CAPABILITY lowers it)."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


@functools.cache
def _key(kind):
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file() and path.parent.name in (kind, "ops", SOURCES.name):
            digest.update(path.name.encode() + path.read_bytes())
    version = re.search(r"__version__ = '(.+)'", (_torch() / "version.py").read_text())
    for part in (CXX_FLAGS, CPU_FLAGS.get(_capability(), ""), platform.machine(), version[1]):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _lock(path):
    """Held by one process at a time, and let go of by the system if it dies."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load(kind, path):
    import torch  # noqa: F401  its libraries must be in the process before ours

    spec = importlib.util.spec_from_file_location(f"udi_kernels._{kind}", path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as e:
        raise BuildError(f"loading {path} failed ({e}); delete it to have it built anew") from e
    return module
