"""Compiles the CUDA kernels for one architecture each, by NVRTC, which CUDA builds of torch bring.

A kernel is compiled by itself when a call first needs it, which takes half a second, and kept on disk beside the
host library. `python -m udi_kernels --compile sm_90` does all of that ahead of time; it needs no GPU.
"""

import functools
import hashlib
import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from os import cpu_count

import torch

from . import _build
from ._build import BuildError

# -default-device: everything in these files is device code.
OPTIONS = ("-std=c++20", "-default-device")
MINIMUM = 70  # Volta: the first to take kernel arguments of more than 4 KB

TYPES = ("float", "double", "udi::BFloat16", "udi::Half")
TABLE_WORDS = (500, 1500, 4080)  # kTableWords in csrc/cuda/arguments.h
KERNELS = [
    f"udi::{name}<{arguments}, {words}>"
    for words in TABLE_WORDS
    for T in TYPES
    for name, arguments in (
        *(("gramian_few", f"{T}, {k}") for k in range(3, 9)),
        ("gramian_tiles", T),
        ("weighted_sum", T),
    )
]


def serve(module):
    """Lets the host library `_cuda` have its kernels from here. An error if that cannot work, and plain torch does."""
    for device in range(torch.cuda.device_count()):
        if int(_arch(device)[3:]) < MINIMUM:
            raise BuildError(
                f"{torch.cuda.get_device_name(device)} is too old: they take compute capability 7.0 or later"
            )
    image("udi::weighted_sum<float, 500>", _arch(torch.cuda.current_device()))
    module.use_compiler(lambda kernel, device: image(kernel, _arch(device)))


def _arch(device):
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def image(kernel, arch):
    """Machine code of a kernel (an expression, as in KERNELS) for an architecture such as sm_90, and its name there."""
    slug = re.sub(r"\W+", "-", kernel.replace("udi::", "")).strip("-")
    code = _build.once(f"cubin-{_key()}/{slug}-{arch}.cubin", lambda: compile(kernel, arch))
    return code, re.search(rb"\.(?:text\.|entry )(\w+)", code)[1]  # the only section of code in it


def compile(kernel, arch):
    """Machine code; PTX of the latest architecture that NVRTC knows, if it does not know this one yet."""
    if not re.fullmatch(r"sm_\d+", arch):
        raise BuildError(f"an architecture must be written as sm_90 is, got {arch}")
    nvrtc, number = _nvrtc(), int(arch[3:])
    known = [a for a in _call(nvrtc.nvrtcGetSupportedArchs) if a <= number]
    if not known:
        raise BuildError(f"NVRTC {version()} has no code for {arch}")
    exact = number in known
    target = f"-arch={'sm' if exact else 'compute'}_{number if exact else max(known)}"

    source, *headers = _sources()
    program = _call(
        nvrtc.nvrtcCreateProgram,
        source.read_bytes(),
        source.name.encode(),
        len(headers),
        [h.read_bytes() for h in headers],
        [h.name.encode() for h in headers],
    )
    try:
        _call(nvrtc.nvrtcAddNameExpression, program, kernel.encode())
        options = [o.encode() for o in (target, *OPTIONS)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status:
            log = b" " * _call(nvrtc.nvrtcGetProgramLogSize, program)
            _call(nvrtc.nvrtcGetProgramLog, program, log)
            raise BuildError(f"NVRTC cannot compile {kernel} for {arch}:\n{log[:-1].decode()}")
        form = "CUBIN" if exact else "PTX"
        code = b" " * _call(getattr(nvrtc, f"nvrtcGet{form}Size"), program)
        _call(getattr(nvrtc, f"nvrtcGet{form}"), program, code)
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def version():
    return ".".join(map(str, _call(_nvrtc().nvrtcVersion)))


def _sources():
    folder = _build.SOURCES / "cuda"
    return [folder / "gradients.cu", folder / "arguments.h", folder / "types.cuh"]


@functools.cache
def _key():
    digest = hashlib.sha256(" ".join([version(), *OPTIONS]).encode())
    for path in _sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _nvrtc():
    try:
        from cuda.bindings import nvrtc

        _call(nvrtc.nvrtcVersion)
    except (ImportError, RuntimeError) as e:  # cuda-bindings, or the library that it looks for
        raise BuildError(f"no NVRTC ({e}); `pip install udi-kernels[cuda]`") from e
    return nvrtc


def _call(function, *args):
    """What the function returns beside its status."""
    status, *values = function(*args)
    if status:
        raise BuildError(f"{function.__name__} failed: {status.name}")
    return values[0] if len(values) == 1 else values


def fill_cache(archs):
    """Compiles all kernels for these architectures that are not in the cache."""
    began, by = time.monotonic(), version()
    wanted = [(kernel, arch) for arch in archs for kernel in KERNELS]
    # Processes: NVRTC compiles one program of a process at a time.
    with ProcessPoolExecutor(cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(_fill, wanted), 1):
            if sys.stderr.isatty():
                print(f"\r{done} of {len(wanted)} kernels ", end="", file=sys.stderr, flush=True)
    print(f"{len(wanted)} kernels by NVRTC {by} in {_build.cache()}, {time.monotonic() - began:.0f} s")


def _fill(wanted):
    image(*wanted)
