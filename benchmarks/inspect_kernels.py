"""What the compilers make of every GPU kernel, without a GPU: registers, spills, local and shared memory, load width.

    python benchmarks/inspect_kernels.py [--arch sm_90 ...]

Triton: calls the launchers on tensors without memory, notes each kernel they would launch, and compiles it as the
launch would, so what is inspected is what is shipped.  CUDA: all kernels of csrc/cuda, with the short table.
Exit code 1 if a kernel spills or uses local memory and ACCEPTED does not say why.
"""

import argparse
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("sm_80", "sm_90", "sm_100")
# Kernel name: the reason why it may spill or use local memory.
ACCEPTED = {}
COLUMNS = ("kernel", "configuration", "arch", "registers", "spills", "local", "shared", "widest load")

# (rows, classes) and (rows, features): every kernel in every configuration; those in ONCE for float32 alone.
JS_DIV_SHAPES = (
    (64, 1), (64, 6), (4096, 6), (64, 101), (1024, 1000), (1024, 1271), (8192, 4096), (512, 8192), (4096, 32000),
    (8, 262144),
)  # fmt: skip
CLUB_SHAPES = (64, 41), (512, 512), (65536, 512)
ONCE = {(64, 1), (4096, 6), (1024, 1271), (64, 41)}


# --- Triton -----------------------------------------------------------------------------------------------------


def launches():
    """(kernel, arguments, options, label) of everything the launchers launch at these shapes, each signature once."""
    import torch
    from triton.runtime.jit import JITFunction

    from udi_kernels.triton import club, js_div

    seen = {}

    def note(kernel, *args, grid, warmup, **kwargs):
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {k: values.pop(k) for k in list(values) if k not in kernel.arg_names}
        source = signature(kernel, values)
        seen.setdefault((kernel.fn.__name__, repr(source), repr(options)), (kernel, source, options, label))

    run, JITFunction.run = JITFunction.run, note
    try:
        for dtype in (torch.float32, torch.bfloat16):
            new = dict(dtype=dtype, device="meta")
            bf16 = dtype == torch.bfloat16
            for R, C in (shape for shape in JS_DIV_SHAPES if not (bf16 and shape in ONCE)):
                label = f"{str(dtype)[6:]} {R}x{C}"
                x, y = torch.empty(R, C, **new), torch.empty(R, C, **new)
                _, stats = js_div.js_div_fwd(x, y, None, 0.5, 1.0, 2)
                for needs in ((True, False), (True, True))[: 1 if C in (101, 1271, 8192) else 2]:
                    js_div.js_div_bwd(torch.empty((), device="meta"), x, y, None, stats, 0.5, 1.0, 2, *needs)
            for N, D in (shape for shape in CLUB_SHAPES if not (bf16 and shape in ONCE)):
                label = f"{str(dtype)[6:]} {N}x{D}"
                inputs = [torch.empty(N, D, **new) for _ in range(3)]
                for reduction in (0, 2):
                    grad, stats = club.club_mi_fwd(*inputs, reduction)
                    club.club_mi_bwd(grad, *inputs, stats, reduction, False, False, True)
                    club.club_mi_bwd(grad, *inputs, stats, reduction, True, True, True)
                club.club_nll_bwd(club.club_nll_fwd(*inputs), *inputs, True, True, False)
    finally:
        JITFunction.run = run
    return list(seen.values())


def signature(kernel, values):
    """Types, constants and divisibility of the arguments, by the rules of Triton's own launch."""
    import torch

    names = {"float32": "fp32", "float64": "fp64", "float16": "fp16", "bfloat16": "bf16", "int32": "i32"}
    types, constants, attributes = {}, {}, {}

    def describe(path, param, value):
        if param.is_constexpr or value is None:
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + names[str(value.dtype)[6:]]
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, tuple):
            return tuple(describe((*path, i), param, v) for i, v in enumerate(value))
        if value == 1 and not param.do_not_specialize:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0 and not param.do_not_specialize:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, param in enumerate(kernel.params):
        types[param.name] = describe((i,), param, values[param.name])
    return types, constants, attributes


@functools.cache
def launches_here():
    return launches()  # kernels do not travel between processes: each worker notes the launches itself


def compile_triton(index, arch):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, (types, constants, attributes), options, label = launches_here()[index]
    binary = compile(
        ASTSource(kernel, types, constants, attributes), target=GPUTarget("cuda", int(arch[3:]), 32), options=options
    )
    named = {kernel.arg_names[path[0]]: value for path, value in constants.items()}
    tile = "x".join(str(named[n]) for n in ("ROWS", "LANES", "STEP", "BLOCK", "WIDTH") if n in named)
    wanted = [n for n in ("DX", "DMU", "DLOGVAR", "DY") if n in types and types[n] != "constexpr"]
    label = " ".join([f"{label}: {tile}, {options['num_warps']} warps", *wanted])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        ((registers, spills, local, _, widest),) = inspect(file.name).values()
    return [(name, label, arch, registers, spills, local, binary.metadata.shared, widest)]


# --- CUDA C++ ---------------------------------------------------------------------------------------------------


def compile_cuda(kernel, arch):
    from udi_kernels import _nvrtc

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(_nvrtc.image(kernel, arch)[0])
        ((registers, spills, local, shared, widest),) = inspect(file.name).values()
    return [(kernel.replace("udi::", ""), "CUDA", arch, registers, spills, local, shared, widest)]


# --- any cubin --------------------------------------------------------------------------------------------------


def inspect(cubin):
    """{kernel: (registers, spills, local bytes, shared bytes, widest load in bits)} of a file of machine code."""
    usage = {
        m[0]: (int(m[1]), int(m[2]) + int(m[4]), int(m[3]))
        for m in re.findall(
            r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", cuobjdump("-res-usage", cubin)
        )
    }
    result = {}
    for part in re.split(r"Function : ", cuobjdump("-sass", cubin))[1:]:
        name, _, code = part.partition("\n")
        registers, local, shared = usage[name.strip()]
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
        loads = re.findall(r"\bLDG\.(\S+)", code)
        widest = max((int((re.search(r"\b(64|128|256)\b", load) or [32])[0]) for load in loads), default=0)
        result[name.strip()] = registers, spills, local, shared, widest
    return result


def cuobjdump(flag, cubin):
    """The one that comes with Triton; its neighbour nvdisasm does the work of -sass."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["cuobjdump", flag, cubin], capture_output=True, text=True, check=True, env=environment
    ).stdout


# --- the command ------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHS, metavar="sm_XX", help=f"default: {' '.join(ARCHS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time; default: all cores")
    options = parser.parse_args()
    archs = options.arch

    from udi_kernels._nvrtc import KERNELS, TABLE_WORDS

    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_triton, i, arch) for i in range(len(launches_here())) for arch in archs]
        kernels = [kernel for kernel in KERNELS if kernel.endswith(f"{TABLE_WORDS[0]}>")]
        futures += [pool.submit(compile_cuda, kernel, arch) for kernel in kernels for arch in archs]
        rows = [row for future in futures for row in future.result()]

    table = [COLUMNS, *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
    for row in table:
        print("  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))

    bad = [row for row in rows if row[4] or row[5]]
    for name, label, arch, *_ in bad:
        print(f"{name} ({label}, {arch}) spills or uses local memory: {ACCEPTED.get(name, 'NOT ACCEPTED')}")
    print(f"\n{len(rows)} kernels, {len(bad)} with spills or local memory")
    return any(row[0] not in ACCEPTED for row in bad)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
