"""Everything that needs a GPU, in one call, without network.

    python benchmarks/gpu_check.py DIR [--minutes 9] [--only STAGE ...]

Installs, builds, tests, sanitizes, inspects, measures kernels and trainer, and reports; a stage that fails does not
stop the next. Leaves in DIR: check.log, tests.xml, results.json, table.md, plots and the trainer's figures. Exit code 1
if a stage failed. Without a GPU it does the same on the CPU, with the quick selection of benchmarks, and says which
stages did not run.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

BUILD = """
from udi_kernels import build_info
from udi_kernels.__main__ import main
main()
slow = [f"{op}: {where}" for op, by in build_info()["backends"].items() for where, name in by.items()
        if name == "reference" and "float64" not in where]
raise SystemExit(f"served by plain torch: {', '.join(slow)}" if slow else 0)
"""

# Every kernel in few and odd sizes: the sanitizers slow them down a hundredfold.
EXERCISE = """
import torch
from udi_kernels import GradientPlan, club_mi, club_nll, gramian, js_div, weighted_sum
for dtype in (torch.float32, torch.bfloat16):
    draw = lambda *shape: torch.randn(shape, device="cuda", dtype=dtype)
    for shape in ((64, 6), (7, 101), (33, 1271), (5, 8192), (3, 40001)):
        js_div(draw(*shape).requires_grad_(), draw(*shape).requires_grad_()).backward()
    for shape in ((7, 41), (512, 130), (2100, 30)):
        for f in (club_mi, club_nll):
            f(*(draw(*shape).requires_grad_() for _ in range(3))).backward()
    for k in (3, 8, 32):
        grads = [[draw(*s) for s in ((64, 33, 3, 3), (1271,), (), (0, 3), (16385,))] for _ in range(k)]
        weights = torch.rand(k, device="cuda")
        plan = GradientPlan(grads)
        gramian(grads), weighted_sum(grads, weights), plan.gramian(), plan.weighted_sum(weights)
torch.cuda.synchronize()
print("done")
"""


def stages(out, deadline):
    """(name, its command or why there is none, most seconds); the benchmarks get the time that is left."""
    gpu = torch.cuda.is_available()
    python = [sys.executable]
    pip = [*python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", ROOT]
    tests = [*python, "-m", "pytest", ROOT / "tests", "-q", f"--junitxml={out / 'tests.xml'}"]
    sanitizer = find_sanitizer()
    sanitize = [sanitizer, "--error-exitcode", "9", "--print-limit", "20", "--tool"]
    missing = None if gpu and sanitizer else "no compute-sanitizer" if gpu else "no GPU"
    measure = [*python, "-m", "pytest", ROOT / "benchmarks", "--benchmark-only", "-q", "--benchmark-columns=median,iqr"]
    measure += [f"--benchmark-json={out / 'results.json'}", *(["--full"] if gpu else [])]

    yield "install", pip, 120
    yield "build", [*python, "-c", BUILD], 120
    yield "tests", tests, 240
    for tool in ("memcheck", "racecheck"):
        yield tool, missing or [*sanitize, tool, *python, "-c", EXERCISE], 60
    yield "inspect", [*python, ROOT / "benchmarks" / "inspect_kernels.py"], 90
    trainer = [*python, ROOT / "benchmarks" / "trainer.py", "--out", out, "--rounds", "1" if not gpu else "2"]
    yield "trainer", [*trainer, *([] if gpu else ["--epochs", "2", "--samples", "3000"])], 120
    yield (
        "resnet18",
        [*trainer, "--encoder", "resnet18", "--samples", "1024", "--epochs", "2"] if gpu else "no GPU",
        120,
    )
    budget = max(60, deadline - time.monotonic() - 40)  # the last case, the tables and the plots need time too
    yield "benchmarks", [*measure, f"--budget={budget:.0f}"], budget + 30
    yield "report", [*python, ROOT / "benchmarks" / "report.py", out / "results.json", "--out", out], 60


def find_sanitizer():
    places = os.environ["PATH"], f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def run(command, limit, log):
    """Exit code, or None if it ran past its limit."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if "--tool" in command:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or an access out of bounds stays inside a cached block
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9, help="for everything; the benchmarks get what is left")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="install build tests memcheck racecheck ...")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    failed = []
    with open(out / "check.log", "w") as log:
        for name, command, limit in stages(out, time.monotonic() + 60 * options.minutes):
            if options.only and name not in options.only:
                continue
            start, position = time.monotonic(), log.tell()
            print(f"=== {name}", file=log, flush=True)
            code = 0 if isinstance(command, str) else run(command, limit, log)
            log.seek(0, os.SEEK_END)
            verdict = "ok" if code == 0 else f"stopped after {limit:.0f} s" if code is None else f"failed ({code})"
            if isinstance(command, str):
                verdict = f"not run: {command}"
            elif code != 0 and name == "install":
                verdict += ", used from its folder"
            elif code != 0:
                failed.append(name)
            print(f"{name:<11} {time.monotonic() - start:4.0f} s  {verdict}", flush=True)
            if code != 0:
                lines = (out / "check.log").read_text()[position:].splitlines()
                print("\n".join(f"    {line}" for line in lines[-15:]), flush=True)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall that ran passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
