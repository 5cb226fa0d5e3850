"""Compiles csrc's host code and loads it: at installation if torch is importable, else at the first call.

One recipe serves both. A library's name holds a hash of sources, flags, torch version and machine, so a stale one is
never loaded, and different machines can share a home directory. Importing this file compiles nothing and needs only
the standard library (setup.py imports it without the package).
"""

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
import threading
from pathlib import Path

from . import _cache
from ._cache import PACKAGE, SOURCES, BuildError, intact

PREBUILT = PACKAGE / "_lib"  # filled at installation; trusted like the package itself

# The flags that torch uses for each of its CPU capabilities; without a flag, the compiler's default target.
CPU_FLAGS = {
    "AVX512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mprefer-vector-width=512",
    "AVX2": "-mavx2 -mfma",
}
CXX_FLAGS = "-O3 -std=c++20 -fPIC -fvisibility=hidden -Wno-psabi -fno-math-errno -fno-trapping-math -ffp-contract=fast"

# The error in it says why a compiler cannot compile csrc, or would use another standard library than torch does.
PROBE = """\
#if defined(__clang__) ? __clang_major__ < 13 : __GNUC__ < 12
#error it is too old; install g++ 12, clang++ 13 or a later one, and set CXX
#elif !__has_include(<concepts>)
#error it has no C++20 standard library; install one (`apt install libstdc++-12-dev` or the like)
#endif
#include <cstddef>
#if defined(__linux__) && !defined(__GLIBCXX__)
#error torch needs libstdc++; remove -stdlib=libc++
#endif
"""

_loading = threading.RLock()


@functools.cache
def load(kind):
    """The extension module `_cpu` or `_cuda`, its ops registered; None if it is not available, with one warning."""
    with _loading:
        outcome = _load_or_build(kind)
    if isinstance(outcome, BuildError):
        _cache.warn(f"no native {kind} kernels, plain torch is used instead: {outcome}")
        return None
    return outcome


@functools.cache  # the error too: where warnings are errors, `load` raises at its first call
def _load_or_build(kind):
    try:
        name = library(kind)
        path = PREBUILT / name
        if not intact(path):
            path = _cache.path(name)
        if not intact(path):
            build(kind, path.parent)
        module = _load(kind, path)
        if kind == "cuda":
            from . import _nvrtc

            _nvrtc.serve(module)
        return module
    except BuildError as e:
        return e
    except OSError as e:  # not even a temporary folder
        return BuildError(_cache.cannot_write(e))


def library(kind, capability=None):
    """File name of the module for CPUs of this capability; by default this machine's."""
    if sys.platform == "win32":
        raise BuildError("the native build supports Linux and macOS; use WSL on Windows")
    return f"_{kind}-{_key(kind, capability or _capability())}{sysconfig.get_config_var('EXT_SUFFIX')}"


def capabilities(kind):
    """All capabilities that a library for other machines must serve."""
    return ["DEFAULT", *CPU_FLAGS] if kind == "cpu" and platform.machine() in ("x86_64", "AMD64") else ["DEFAULT"]


def build(kind, folder, capabilities=None):
    """Compiles the module into `folder`, for CPUs of these capabilities; by default for this machine.

    Waits while another process compiles it.
    """
    folder = Path(folder).absolute()
    targets = {folder / library(kind, capability): capability for capability in capabilities or [_capability()]}
    tools = _tools(kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if reason := _noexec(folder):
            raise BuildError(reason)
        with _cache.lock(next(iter(targets))):
            if missing := {path: capability for path, capability in targets.items() if not intact(path)}:
                _compile(kind, tools, missing)
    except OSError as e:
        raise BuildError(_cache.cannot_write(e)) from e


def _noexec(folder):
    """Why no library can be loaded from this folder; an empty string if one can."""
    if not os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):  # the flag is known on Linux only
        return ""
    return f"{folder} is mounted noexec, so no library loads from it; set UDI_KERNELS_CACHE to a folder elsewhere"


def _compile(kind, tools, targets):
    _cache.say(f"compiling the {kind} kernels, once for this machine; this takes about a minute ...")
    first = next(iter(targets))
    work = first.parent / f"{first.stem}.build"
    work.mkdir(0o700, exist_ok=True)
    (work / "build.ninja").write_bytes(os.fsencode(_ninja_file(kind, tools, targets)))
    code, output = _run([tools["ninja"], "-C", work])
    if code:
        log = work / "log.txt"
        log.write_bytes(os.fsencode(output))
        raise BuildError(f"compiling failed: {_first_error(output)} (full output in {log})")
    for target in targets:
        _cache.publish(work / target.name, target)
    shutil.rmtree(work)


def _run(command, **options):
    """Exit status and output, in English."""
    env = {**os.environ, "LC_ALL": "C"}
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, **options)
    except OSError as e:
        raise BuildError(f"cannot run {command[0]} ({e.strerror})") from e
    return run.returncode, os.fsdecode(run.stdout)


def _first_error(output):
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else "no output")


def _ninja_file(kind, tools, targets):
    torch = _torch()
    include = [torch / "include", SOURCES, sysconfig.get_paths()["include"], tools["pybind11"]]
    flags = [*CXX_FLAGS.split(), f"-DUDI_MODULE=_{kind}", *(f"-I{folder}" for folder in include)]
    flags += ["-DUSE_CUDA"] if kind == "cuda" else []
    # torch's own libstdc++, by name: a compiler that finds only the static one would link a second copy, and
    # std::ostream of one copy with the locales of the other crashes when a message holds a number.
    runtime = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-l:libstdc++.so.6"]
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", *runtime]
    lines = [
        f"cxx = {_command(tools['cxx'])}",
        "rule cxx",
        f"  command = $cxx {_command(flags)} $target -c $in -o $out",
        "rule link",
        f"  command = $cxx -shared $in {_command(libraries)} -o $out",
    ]
    steps = {}
    for target, capability in targets.items():
        objects = []
        for source in _sources(kind):
            own = source.parent.name == "cpu"  # a kernel; the rest is the same for every capability
            objects.append(f"{capability if own else kind}/{source.name}.o")
            path = re.sub("[$ :]", r"$\g<0>", os.fspath(source))
            steps[objects[-1]] = f"cxx {path}" + (f"\n  target = {_flags(kind, capability)}" if own else "")
        steps[target.name] = f"link {' '.join(objects)}"
    return "\n".join([*lines, *(f"build {output}: {step}" for output, step in steps.items())]) + "\n"


def _command(words):
    """For the shell that ninja starts."""
    return shlex.join(words).replace("$", "$$")


def _sources(kind):
    ops = [SOURCES / "ops.cpp"] if kind == "cpu" else []  # for all devices; first because it compiles longest
    return [*ops, *sorted((SOURCES / kind).glob("*.cpp")), SOURCES / "python.cpp"]


def _tools(kind):
    """What the build needs, by name; or a BuildError that names the remedy."""
    ninja, pybind11 = shutil.which("ninja"), importlib.util.find_spec("pybind11")
    if not ninja:  # the environment is not activated, so its commands are not on PATH
        ninja = shutil.which("ninja", path=str(Path(sys.executable).parent))
    if not ninja or not pybind11:
        raise BuildError("ninja and pybind11 are needed; `pip install ninja pybind11`")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        raise BuildError("no Python headers; install them (`apt install python3-dev` or the like)")
    if kind == "cuda" and not any((_torch() / "lib").glob("libtorch_cuda.*")):
        raise BuildError("this torch was built without CUDA; install a CUDA build of torch")
    return {"cxx": _compiler(), "ninja": ninja, "pybind11": Path(pybind11.origin).parent / "include"}


def _compiler():
    """The C++ compiler's command, as a list of words, once it has compiled PROBE."""
    chosen = os.environ.get("CXX", "").strip()
    try:
        # $CXX is one path, which may hold spaces, or a command: "ccache g++".
        words = [chosen] if shutil.which(chosen) else shlex.split(chosen)
    except ValueError as e:
        raise BuildError(f"CXX={chosen} is not a command ({e})") from e
    if not words:
        words = [path for path in map(shutil.which, ("c++", "g++", "clang++")) if path][:1]
    if not words or not shutil.which(words[0]):
        raise BuildError("no C++ compiler; install one (`apt install g++` or the like, or set CXX)")
    failed, output = _run([*words, "-fsyntax-only", "-x", "c++", "-"], input=PROBE.encode())
    if failed:
        reason = _first_error(output).rpartition("error: ")[2].removeprefix("#error ")
        failed, version = _run([*words, "--version"])
        name = shlex.join(words) + ("" if failed else f" ({version.splitlines()[0]})")
        raise BuildError(f"{name} cannot compile the kernels: {reason}")
    return words


@functools.cache
def _torch():
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed; `pip install torch`")
    return Path(spec.origin).parent


@functools.cache
def _capability():
    """torch's name for this CPU's instruction set (ATEN_CPU_CAPABILITY lowers it)."""
    _torch()  # raises where there is none
    try:
        import torch
    except (ImportError, OSError) as e:
        raise BuildError(f"torch cannot be imported ({e})") from e
    return torch.backends.cpu.get_cpu_capability()


@functools.cache
def _key(kind, capability):
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file() and path.parent.name in (kind, "ops", SOURCES.name):
            digest.update(path.name.encode() + path.read_bytes())
    for part in (torch_version(), CXX_FLAGS, _flags(kind, capability), platform.machine()):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _flags(kind, capability):
    return CPU_FLAGS.get(capability, "") if kind == "cpu" else ""


def torch_version():
    """What binary compatibility depends on: major.minor of a release, all of a pre-release."""
    version = re.search(r"__version__ = '(.+)'", (_torch() / "version.py").read_text())[1]
    release = re.fullmatch(r"(\d+\.\d+)[.\d]*(\+(?!git).*)?", version)
    return release[1] if release else version


def _load(kind, path):
    import torch  # noqa: F401  loads the libraries that ours needs

    spec = importlib.util.spec_from_file_location(f"udi_kernels._{kind}", path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as e:
        remedy = _noexec(path.parent) or "delete it to compile it again"
        raise BuildError(f"loading {path} failed ({e}); {remedy}") from e
    return module
