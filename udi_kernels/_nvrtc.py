"""Compiles the CUDA kernels with NVRTC, which CUDA builds of torch bring, for one architecture at a time.

Each kernel is compiled when a call first needs it, which takes half a second, and stored in the cache.
`python -m udi_kernels --compile sm_90` compiles all kernels ahead of time and needs no GPU.
"""

import functools
import hashlib
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from . import _cache
from ._cache import SOURCES, BuildError

# -default-device: these files hold device code only.
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
    """Makes this module the source of kernels for the host library `_cuda`; BuildError if they cannot run here."""
    for device in range(torch.cuda.device_count()):
        if int(_arch(device)[3:]) < MINIMUM:
            raise BuildError(
                f"{torch.cuda.get_device_name(device)} is too old: compute capability 7.0 or later is needed"
            )
    image("udi::weighted_sum<float, 500>", _arch(torch.cuda.current_device()))
    module.use_compiler(lambda kernel, device: image(kernel, _arch(device)))


def _arch(device):
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def image(kernel, arch):
    """Machine code of a kernel (an expression, as in KERNELS) for an architecture (sm_90), and its mangled name."""
    slug = re.sub(r"\W+", "-", kernel.replace("udi::", "")).strip("-")
    code = _cache.once(f"cubin-{_key()}/{slug}-{arch}.cubin", lambda: compile(kernel, arch))
    return code, re.search(rb"\.(?:text\.|entry )(\w+)", code)[1]  # the only code section


def compile(kernel, arch):
    """Machine code, or PTX of the latest architecture that NVRTC knows if it does not know this one yet."""
    if not re.fullmatch(r"sm_\d+", arch):
        raise BuildError(f"an architecture must be written like sm_90, got {arch}")
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
    folder = SOURCES / "cuda"
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
    except (ImportError, RuntimeError) as e:  # no cuda-bindings, or no library behind them
        raise BuildError(f"no NVRTC ({e}); `pip install udi-kernels[cuda]`") from e
    return nvrtc


def _call(function, *args):
    """The function's values, without its status; BuildError if it failed."""
    status, *values = function(*args)
    if status:
        raise BuildError(f"{function.__name__} failed: {status.name}")
    return values[0] if len(values) == 1 else values


def fill_cache(archs):
    """Compiles all kernels for these architectures, except those that the cache holds."""
    began, by, folder = time.monotonic(), version(), _cache.folder()
    if not os.access(folder, os.W_OK):
        raise BuildError(_cache.cannot_write(folder))
    requested = [(kernel, arch) for arch in archs for kernel in KERNELS]
    # Processes: NVRTC compiles one program of a process at a time.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(_compile_kernel, requested), 1):
            if sys.stderr.isatty():
                print(f"\r{done} of {len(requested)} kernels ", end="", file=sys.stderr, flush=True)
    print(f"{len(requested)} kernels by NVRTC {by} in {folder}, {time.monotonic() - began:.0f} s")


def _compile_kernel(arguments):
    image(*arguments)
