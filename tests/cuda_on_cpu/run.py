"""Runs the CUDA kernels of csrc/cuda on the CPU; README.md says what that proves.

    python tests/cuda_on_cpu/run.py [plain asan tsan tests faults] [--jobs 2]

plain, asan, tsan: the stand-alone program, as it is, under AddressSanitizer and UndefinedBehaviorSanitizer, and under
ThreadSanitizer within blocks and across them. tests: the gradient tests of tests/kernels, under the first two
sanitizers. faults: plants faults and says what finds them. By default all but faults.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TORCH = Path(importlib.util.find_spec("torch").origin).parent
TYPES = {"float": "float", "double": "double", "udi::BFloat16": "bfloat16", "udi::Half": "half"}

BUILDS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fsanitize-sections=shared_memory"],
    "tsan": ["-fsanitize=thread"],
}
# What to run of each build: arguments, environment.
CHECKS = {
    "plain": [(["all"], {})],
    "asan": [(["quick"], {})],
    "tsan": [
        (["least"], {"TSAN_OPTIONS": "halt_on_error=1"}),
        (
            ["least"],
            {
                "TSAN_OPTIONS": f"halt_on_error=1 suppressions={HERE / 'across_blocks.supp'}",
                "BLOCKS_IN_ANY_ORDER": "1",
            },
        ),
    ],
}

# A fault: what it is, the build that finds it, the file, what stands there, what then stands there.
KERNELS, LAUNCHER = "cuda/gradients.cu", "cuda/gradients.cpp"
FAULTS = [
    (
        "no barrier before of_warp is read",
        "tsan",
        KERNELS,
        "  __syncthreads();\n  const int i = threadIdx",
        "  const int i = threadIdx",
    ),
    (
        "no barrier before the block's arrival",
        "tsan",
        KERNELS,
        "  __syncthreads();\n  if (threadIdx.x == 0) {",
        "  if (threadIdx.x == 0) {",
    ),
    ("no fence before the arrival", "tsan", KERNELS, "    __threadfence();  // of the whole", "    // of the whole"),
    ("no fence after the arrival", "tsan", KERNELS, "== sums.last;\n    __threadfence();", "== sums.last;"),
    ("the last block but one finishes", "asan", KERNELS, "== sums.last;", "== sums.last - 1;"),
    (
        "idle warps return before the barrier",
        "asan",
        KERNELS,
        "    __syncthreads();\n    if (top == groups) return;",
        "    if (top == groups) return;\n    __syncthreads();",
    ),
    ("two lanes store the same pair", "tsan", KERNELS, "lane > (i < j)", "lane > 1"),
    ("two lanes store the same tile's pair", "tsan", KERNELS, " && lane % kSharers == 0", ""),
    (
        "a lane misses a shuffle",
        "asan",
        KERNELS,
        "    for (int bit = kWarp / 2; bit; bit /= 2) sums[pair]",
        "    if (threadIdx.x % 32 != 7)\n      for (int bit = kWarp / 2; bit; bit /= 2) sums[pair]",
    ),
    ("alignment of rows not compared", "asan", KERNELS, "(differences & kMask) ? n : min(n, lead)", "min(n, lead)"),
    ("head as if addresses ended otherwise", "asan", KERNELS, "(-address & kMask)", "(address & kMask)"),
    ("one vector too many", "asan", KERNELS, "v + b * kThreads < chunk.vectors", "v + b * kThreads <= chunk.vectors"),
    ("one single element twice", "asan", KERNELS, "s < head ? s", "s <= head ? s"),
    ("a parameter goes on for one chunk more", "asan", KERNELS, "first() <= number", "first() < number"),
    ("out without the chunk's offset", "asan", KERNELS, "entry.out()) + chunk.begin", "entry.out())"),
    (
        "the last row left out beyond four",
        "asan",
        KERNELS,
        "first < shape.k; first += kBatch",
        "first + 1 < shape.k; first += kBatch",
    ),
    (
        "blocks share a chunk",
        "asan",
        KERNELS,
        "(blockIdx.x + 1) / gridDim.x);",
        "(blockIdx.x + 1) / gridDim.x) + (blockIdx.x + 1 < gridDim.x);",
    ),
    ("one block's sums left out", "asan", KERNELS, "b < sums.blocks; b += kWarp", "b + 1 < sums.blocks; b += kWarp"),
    ("the second launch overwrites the first's sums", "asan", LAUNCHER, "      sums.first += x;\n", ""),
    (
        "a table holds one entry more",
        "asan",
        LAUNCHER,
        "kMaxWords / entry_words(k_));",
        "kMaxWords / entry_words(k_) + 1);",
    ),
    (
        "the short table for one word more",
        "asan",
        LAUNCHER,
        "entry_words(k) > kTableWords[0])",
        "entry_words(k) > kTableWords[0] + 6)",
    ),
    ("the counter not cleared", "asan", LAUNCHER, "    on.zero(sums.arrived, 1);\n", ""),
    ("scratch one too small", "asan", LAUNCHER, "blocks() * k_ * k_ + 1", "blocks() * k_ * k_"),
]


def command(build, *args):
    return [
        *(os.environ.get("CXX", "g++"), "-std=c++20", "-g1", "-O1", "-fPIC", "-mf16c", "-mfma", "-ffp-contract=fast"),
        *("-Wall", "-Wno-unknown-pragmas", "-Werror", *BUILDS[build], f"-I{HERE}", *map(str, args)),
    ]


def call(arguments, **environment):
    run = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | environment)
    if run.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}\n{run.stdout}{run.stderr}")


def driver(build, folder, pool, csrc=ROOT / "csrc", types=TYPES, others=(), flags=()):
    """libcuda.so.1 with the kernels of these types from csrc, and objects of the others."""
    include = [f"-I{csrc / 'cuda'}", f"-I{csrc}", *flags]
    jobs = [
        (HERE / "kernels.cpp", f"{name}.o", f'-DKERNELS="{KERNELS}"', f"-DTYPE={T}", f"-DTABLE={name}_kernels")
        for T, name in types.items()
    ]
    jobs += [] if others else [(HERE / f"{name}.cpp", f"{name}.o") for name in ("machine", "driver")]
    for done in [
        pool.submit(call, command(build, *include, *flags, "-c", source, "-o", folder / output))
        for source, output, *flags in jobs
    ]:
        done.result()
    objects = [*(folder / output for _, output, *_ in jobs), *others]  # the first definition of what all have counts
    library = folder / "libcuda.so.1"
    call(command(build, "-shared", "-Wl,-soname,libcuda.so.1", *objects, "-o", library))
    return library


def program(build, folder, library, csrc=ROOT / "csrc"):
    sources = [HERE / "check.cpp", csrc / LAUNCHER, csrc / "cuda" / "driver.cpp"]
    include = [f"-I{csrc}", f"-I{TORCH / 'include'}", "-DUSE_CUDA"]
    call(command(build, *include, *sources, library, f"-Wl,-rpath,{folder}", "-ldl", "-o", folder / "check"))
    return folder / "check"


def check(build, folder, pool):
    binary = program(build, folder, driver(build, folder, pool))
    runs = [
        pool.submit(subprocess.run, [binary, *args], capture_output=True, text=True, env=os.environ | environment)
        for args, environment in CHECKS[build]
    ]
    failed = False
    for run in runs:
        out = run.result()
        failed |= out.returncode != 0
        print(f"{build}: {out.stdout.strip()}{out.stderr if out.returncode else ''}", flush=True)
    return failed


def gradient_tests(folder, pool):
    library = driver("asan", folder, pool)
    preload = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "LD_PRELOAD": f"{preload} {library}",
    }
    python = [sys.executable, "-W", "error::UserWarning", "-c"]
    call([*python, "import plugin"], **environment)
    tests = sorted((ROOT / "tests" / "kernels").glob("test_gradients*.py"))
    run = subprocess.run(
        # Products that float32 cannot hold are right on a CPU only.
        [sys.executable, "-m", "pytest", "-q", "-r", "f", "-p", "plugin", "-k", "not product", *tests],
        env=os.environ | environment,
    )
    return run.returncode != 0


def faults(folder, pool):
    """Each fault alone, in the kernels of two types."""
    whole = {build: folder / build for build in ("asan", "tsan")}
    for build, where in whole.items():
        where.mkdir()
        driver(build, where, pool, flags=["-DLEAST"])

    def find(number, fault):
        what, build, file, good, bad = fault
        csrc = folder / f"fault{number}" / "csrc"
        (csrc / "cuda").mkdir(parents=True)
        for path in [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").iterdir()]:
            text = path.read_text()
            if path == ROOT / "csrc" / file:
                assert text.count(good) == 1, f"{what}: the place is not there once"
                text = text.replace(good, bad)
            (csrc / path.relative_to(ROOT / "csrc")).write_text(text)
        library = whole[build] / "libcuda.so.1"
        if file == KERNELS:
            others = [library.with_name(f"{name}.o") for name in ("machine", "driver", "bfloat16", "half")]
            with ThreadPoolExecutor(1) as alone:
                library = driver(build, csrc.parent, alone, csrc, dict(list(TYPES.items())[:2]), others, ["-DLEAST"])
        binary = program(build, csrc.parent, library, csrc)
        found = None
        for _, environment in CHECKS[build]:
            environment = os.environ | environment | {"LD_LIBRARY_PATH": str(library.parent)}
            run = subprocess.run([binary, "least"], capture_output=True, text=True, env=environment)
            if run.returncode:
                lines = [line.strip() for line in (run.stderr + run.stdout).splitlines() if line.strip(" =")]
                found = next(filter(telling, lines), lines[0])[:100]
                break
        print(f"{what:<46} {build}: {found or 'NOT FOUND'}", flush=True)
        return found

    found = list(filter(None, pool.map(find, range(len(FAULTS)), FAULTS)))
    print(f"{len(found)} of {len(FAULTS)} faults found")
    return len(found) < len(FAULTS)


SPECIAL = {"tests": gradient_tests, "faults": faults}


def telling(line):
    return any(word in line for word in ("ERROR: Addr", "data race", "runtime error", "on_cpu:", "FAILED"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=[*BUILDS, "tests"])  # choices refuse a default in Python 3.11
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers and runs at a time")
    options = parser.parse_args()
    if unknown := {*options.what} - {*BUILDS, *SPECIAL}:
        parser.error(f"one of {', '.join([*BUILDS, *SPECIAL])} is wanted, not {', '.join(unknown)}")
    failed = []
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(options.jobs) as pool:
        for name in options.what:
            began = time.monotonic()
            folder = Path(work) / name
            folder.mkdir()
            bad = SPECIAL[name](folder, pool) if name in SPECIAL else check(name, folder, pool)
            print(f"{name}: {'FAILED' if bad else 'ok'}, {time.monotonic() - began:.0f} s", flush=True)
            failed += [name] * bad
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
