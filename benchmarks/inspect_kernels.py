"""Static analysis of the machine code of every GPU kernel, without a GPU.

    python benchmarks/inspect_kernels.py [--arch sm_90 ...] [--write]

Triton: calls the launchers with meta tensors, records the kernels that they would launch, and compiles them in the same
way, so the inspected code is the shipped code. CUDA: all kernels of csrc/cuda, compiled by NVRTC with the short table.

Columns: instructions per element of the input matrix (CUDA: per element loaded in the kernel's busiest loop), in total
and by pipe; registers per thread; resident warps per multiprocessor; KB of loads that these have in flight (in one loop
body, or in the whole kernel if it has no loop); the widest global load and store in bits.

The exit code is 1 if a kernel spills, uses local memory or stores single bytes (ACCEPTED lists exceptions), or if it
takes over 5% more instructions than in the committed table of the same compiler. --write updates the table.
"""

import argparse
import csv
import functools
import itertools
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import sass

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "kernels.csv"
ARCHS = ("sm_80", "sm_90", "sm_100")
RISE = 1.05
# (Kernel, architecture): the reason why it may spill up to 16 bytes.
ACCEPTED = {
    ("gramian_few<BFloat16, 8", "sm_100"): "K = 8: without spills only two of three blocks would fit",
    ("gramian_few<Half, 8", "sm_100"): "K = 8: as above",
}
COLUMNS = (
    "kernel", "configuration", "arch", "compiler", "instructions", "fma", "alu", "xu", "memory", "registers", "warps",
    "flight", "load", "store", "shared", "local", "spills", "bytes",
)  # fmt: skip
KEY = COLUMNS[:3]

# (rows, classes) and (rows, features): every kernel in every configuration; those in ONCE for float32 only.
JS_DIV_SHAPES = (
    (64, 1), (64, 6), (4096, 6), (64, 101), (1024, 1000), (1024, 1271), (8192, 4096), (512, 8192), (4096, 32000),
    (512, 50257), (8, 262144),
)  # fmt: skip
BETAS = (0.0, 0.3)  # besides 1/2, for BETA_SHAPES
BETA_SHAPES = (8192, 4096), (4096, 32000)
TOPK_SHAPES = ((64, 101), 8), ((4096, 32000), 8), ((4096, 32000), 100)
SKEW_SHAPES = (64, 6), (64, 101), (1024, 1000), (8192, 4096), (4096, 32000), (8, 262144)
# Masked, and with classes that are not adjacent: (4, C, R / 4).
MASKED_SHAPES = (64, 6), (1024, 150), (1024, 1000), (8192, 4096), (4096, 32000), (8, 262144)
LINEAR_SHAPES = (512, 8192), (512, 32000), (512, 128256)
CLUB_SHAPES = (64, 41), (512, 512), (65536, 512)
ONCE = {(64, 1), (4096, 6), (1024, 1271), (64, 41)}


# --- Triton -----------------------------------------------------------------------------------------------------


def cases():
    """(op, shape, dtype, options in words, function that launches it) of all that is inspected."""
    import torch

    from udi_kernels.triton import certainty, club, duc, effective_dims, js_div, js_div_topk, linear_js_div

    def case(op, shape, words, launch, *args):
        return op, shape, dtype, words, functools.partial(launch, *args)

    scalar = torch.empty((), device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        new = dict(dtype=dtype, device="meta")
        for R, C in (shape for shape in JS_DIV_SHAPES if not (dtype == torch.bfloat16 and shape in ONCE)):
            x, y = torch.empty(R, C, **new), torch.empty(R, C, **new)
            stats = torch.empty(6, R, device="meta")
            for beta in (0.5, *(BETAS if (R, C) in BETA_SHAPES else ())):
                words, options = "" if beta == 0.5 else f"beta {beta}", (beta, 1.0, 2)
                yield case("js_div", (R, C), words, js_div.js_div_fwd, x, y, None, *options)
                for needs in ((True, False), (True, True))[: 1 if C in (101, 1271, 8192) else 2]:
                    backward = js_div.js_div_bwd, scalar, x, y, None, stats, *options, *needs
                    yield case("js_div", (R, C), words, *backward)
            if (R, C) in SKEW_SHAPES:
                options = 0.1, False, 1.0, 2
                yield case("skew_kl", (R, C), "", js_div.skew_kl_fwd, x, y, None, *options)
                yield case("skew_kl", (R, C), "", js_div.skew_kl_bwd, scalar, x, y, None, stats, *options, True, True)
        for (R, C), K in TOPK_SHAPES:
            x, index = torch.empty(R, C, **new), torch.empty(R, K, dtype=torch.int64, device="meta")
            log_p, stats = torch.empty(R, K, device="meta"), torch.empty(5, R, device="meta")
            for tail, beta in ((0, 0.5), (1, 0.3), (1, 1.0), (2, 0.0)):
                words, options = f"tail {tail} beta {beta} K {K}", (tail, beta, 1.0, 2)
                yield case("js_div_topk", (R, C), words, js_div_topk.js_div_topk_fwd, x, index, log_p, None, *options)
                backward = js_div_topk.js_div_topk_bwd, scalar, x, index, log_p, None, stats, *options, True
                yield case("js_div_topk", (R, C), words, *backward)
        for R, C in MASKED_SHAPES:
            x, first = torch.empty(R, C, **new), torch.empty(4, C, R // 4, **new).mT
            weight = torch.empty(R, device="meta")
            for words, a, w in (("masked", x, weight), ("channels first", first, None)):
                stats = torch.empty(6 + (w is not None), R, device="meta")
                yield case("js_div", (R, C), words, js_div.js_div_fwd, a, a, w, 0.5, 1.0, 2)
                yield case("js_div", (R, C), words, js_div.js_div_bwd, scalar, a, a, w, stats, 0.5, 1.0, 2, True, False)
        R, C = 4096, 8000  # of 32000 classes over 4 processes
        x, y, sums = torch.empty(R, C, **new), torch.empty(R, C, **new), torch.empty(4, R, device="meta")
        yield case("js_div", (R, C), "part", js_div.js_div_part_sums, x, y, None, 1.0)
        for beta in (0.0, 0.5):
            words = "part" if beta else "part beta 0.0"
            yield case("js_div", (R, C), words, js_div.js_div_part_divergences, x, y, None, sums, beta, 1.0)
        for (R, C), beta, labels in itertools.product(LINEAR_SHAPES, (0.0, 0.5, 0.3, 1.0), (False, True)):
            x, soft = torch.empty(R, C, **new), torch.empty(R, device="meta")
            hard = (soft, torch.empty(R, dtype=torch.int64, device="meta")) if labels else (None, None)
            words = " ".join(filter(None, ("" if beta == 0.5 else f"beta {beta}", "labels" if labels else "")))
            rows = linear_js_div.linear_js_div_rows, x, x, soft, *hard, beta, 1.0, True
            yield case("linear_js_div", (R, C), words, *rows)
        for shape in (shape for shape in CLUB_SHAPES if not (dtype == torch.bfloat16 and shape in ONCE)):
            N, D = shape
            inputs, stats = [torch.empty(N, D, **new) for _ in range(3)], torch.empty(5, D, device="meta")
            classes = torch.empty(3, N + 1, dtype=torch.int64, device="meta")
            for reduction, given in itertools.product((0, 2), (None, classes)):
                grad = torch.empty((N,) if reduction == 0 else (), device="meta")
                words = " ".join(filter(None, ("" if given is None else "given", "" if reduction else "each row")))
                yield case("club_mi", shape, words, club.club_mi_fwd, *inputs, given, reduction)
                for needs in ((False, False, True), (True, True, True)):
                    backward = club.club_mi_bwd, grad, *inputs, given, stats, reduction, *needs
                    yield case("club_mi", shape, words, *backward)
            yield case("club_nll", shape, "", club.club_nll_fwd, *inputs, None)
            yield case("club_nll", shape, "", club.club_nll_bwd, scalar, *inputs, None, True, True, False)
        student, teacher = torch.empty(1024, 512, **new), torch.empty(1024, 512, **new)
        dims, features = torch.empty(512, dtype=torch.bool, device="meta"), torch.empty(10000, 512, **new)
        labels, logits = torch.empty(10000, dtype=torch.int64, device="meta"), torch.empty(3, 8192, 101, **new)
        grad, heads = torch.empty(8192, 101, **new), (3 * 8192, 101)
        yield case("duc_loss", (1024, 1024), "", duc.duc_loss_fwd, student, teacher, dims, 10.0, 2, True)
        centroids = effective_dims.effective_dims_fwd, features, labels, 101
        yield case("effective_dims", (10000, 512), "", *centroids)
        yield case("certainty_fusion", heads, "", certainty.certainty_fusion_fwd, logits, 1.0)
        yield case("certainty_fusion", heads, "", certainty.certainty_fusion_bwd, grad, logits, 1.0, True)


@functools.cache  # kernels cannot be pickled: each worker process records the launches itself
def launches():
    """(kernel, types and constants of its arguments, options, grid, first case) of every distinct launch."""
    from triton.runtime.jit import JITFunction

    seen, case = {}, None

    def record(kernel, *args, grid, warmup, **kwargs):
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {"num_warps": 4} | {k: values.pop(k) for k in list(values) if k not in kernel.arg_names}
        source = signature(kernel, values)
        seen.setdefault((kernel.fn.__name__, repr(source), repr(options), grid), (kernel, source, options, grid, case))

    run, JITFunction.run = JITFunction.run, record
    try:
        for *what, launch in cases():
            case = what
            launch()
    finally:
        JITFunction.run = run
    return list(seen.values())


def signature(kernel, values):
    """Types, constants and divisibility of the arguments, by the rules of Triton's launcher."""
    import torch

    names = dict(float32="fp32", float64="fp64", float16="fp16", bfloat16="bf16", int32="i32", int64="i64")
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


def inspect_triton(index, arch):
    """The table's row of a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, (types, constants, attributes), options, grid, (op, (R, C), dtype, words) = launches()[index]
    binary = triton.compile(
        ASTSource(kernel, types, constants, attributes), target=GPUTarget("cuda", int(arch[3:]), 32), options=options
    )
    (code,) = sass.read(binary.asm["cubin"]).values()
    named = {kernel.arg_names[path[0]]: value for path, value in constants.items()}
    sizes = [named[n] for n in ("HEADS", "ROWS", "LANES", "STEP", "BLOCK", "WIDTH") if n in named]
    wanted = [n for n in ("DX", "DMU", "DLOGVAR", "DY") if n in types and types[n] != "constexpr"]
    label = [
        f"{op} {str(dtype)[6:]} {R}x{C}",
        words,
        "x".join(map(str, sizes)),
        f"{options['num_warps']} warps",
        *wanted,
    ]

    # A loop runs once per tile of the program's part of the matrix.
    programs, warps = math.prod(grid), options["num_warps"]
    trips = max(1, math.ceil(R * C / programs / math.prod(sizes)))
    pipes = code.straight.pipes
    for loop in code.loops:
        for name, n in loop.pipes.items():
            pipes[name] += n * trips
    pipes = {name: n * programs * warps for name, n in pipes.items()}
    resident = code.resident(warps, arch, binary.metadata.shared)
    in_flight = max(s.loaded for s in code.loops or [code.straight]) * 32 * resident / 1024
    name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
    return table_row(
        name, " ".join(filter(None, label)), arch, f"Triton {triton.__version__}", code, pipes, R * C / 32,
        warps=resident, flight=round(in_flight), shared=binary.metadata.shared,
    )  # fmt: skip


def table_row(name, label, arch, compiler, code, pipes, elements, **more):
    each = {pipe: round(pipes.get(pipe, 0) / elements, 2) for pipe in ("fma", "alu", "xu", "memory")}
    return dict(
        kernel=name, configuration=label, arch=arch, compiler=compiler,
        instructions=round(sum(pipes.values()) / elements, 1), **each, registers=code.registers,
        load=code.widest("LDG"), store=code.widest("STG"), local=code.local, spills=code.spills,
        bytes=code.byte_stores, **more,
    )  # fmt: skip


# --- CUDA C++ ---------------------------------------------------------------------------------------------------


def inspect_cuda(kernel, arch):
    """The row of a kernel: the counts of its busiest loop per element loaded."""
    from udi_kernels import _nvrtc

    (code,) = sass.read(_nvrtc.image(kernel, arch)[0]).values()
    busiest = max(code.loops, key=lambda loop: loop.loaded, default=code.straight)
    size = 8 if "double" in kernel else 4 if "float" in kernel else 2
    resident = code.resident(8, arch, code.shared)  # all kernels use blocks of 256 threads
    return table_row(
        kernel.replace("udi::", ""), "CUDA", arch, f"NVRTC {_nvrtc.version()}", code, busiest.pipes,
        max(busiest.loaded / size, 1), warps=resident, flight=round(busiest.loaded * 32 * resident / 1024),
        shared=code.shared,
    )  # fmt: skip


# --- checks -----------------------------------------------------------------------------------------------------


def faults(rows, committed):
    """Messages about faults; `committed`: rows by KEY."""
    for row in rows:
        where = f"{row['kernel']} ({row['configuration']}, {row['arch']})"
        accepted = any(row["kernel"].startswith(name) and row["arch"] == arch for name, arch in ACCEPTED)
        if (row["spills"] or row["local"]) and not (accepted and int(row["local"]) <= 16):
            yield f"{where} spills: {row['spills']} local loads and stores, {row['local']} bytes"
        if row["bytes"]:
            yield f"{where} has {row['bytes']} stores of single bytes"
        old = committed.get(tuple(row[k] for k in KEY))
        if old and old["compiler"] == row["compiler"] and row["instructions"] > RISE * float(old["instructions"]):
            yield f"{where} takes {row['instructions']} instructions per element, {old['instructions']} in {TABLE.name}"


def committed_rows():
    if not TABLE.exists():
        return {}
    with open(TABLE, newline="") as file:
        return {tuple(row[k] for k in KEY): row for row in csv.DictReader(file)}


# --- the command ------------------------------------------------------------------------------------------------


def inspect(archs, jobs):
    """The table's rows."""
    from udi_kernels._nvrtc import KERNELS, TABLE_WORDS

    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        triton = [pool.submit(inspect_triton, i, arch) for i in range(len(launches())) for arch in archs]
        kernels = [kernel for kernel in KERNELS if kernel.endswith(f"{TABLE_WORDS[0]}>")]
        cuda = [pool.submit(inspect_cuda, kernel, arch) for kernel in kernels for arch in archs]
        rows = [future.result() for future in (*triton, *cuda)]
    return list({tuple(row[k] for k in KEY): row for row in rows}.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHS, metavar="sm_XX", help=f"default: {' '.join(ARCHS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time; default: all cores")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    options = parser.parse_args()
    rows = inspect(options.arch, options.jobs)

    table = [COLUMNS, *([str(row[c]) for c in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    for line in table:
        print("  ".join(c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))))

    committed = committed_rows()
    messages = list(faults(rows, {} if options.write else committed))
    if options.write:
        with open(TABLE, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    compilers = {row["compiler"] for row in rows}
    other = compilers - {row["compiler"] for row in committed.values()}
    print("", *messages, sep="\n")
    if other and not options.write:
        print(f"instruction counts not compared: {TABLE.name} has none for {', '.join(sorted(other))}")
    print(f"{len(rows)} kernels, {len(messages)} faults")
    return bool(messages)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
