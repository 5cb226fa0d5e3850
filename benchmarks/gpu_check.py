"""All checks that need a GPU, offline, in three commands of less than ten minutes each.

    python benchmarks/gpu_check.py DIR --only kernels    # installs, builds, tests and sanitizes every kernel
    python benchmarks/gpu_check.py DIR --only speed      # inspects machine code, measures, reports
    python benchmarks/gpu_check.py DIR --only trainer    # tests and measures the trainer

A failed stage does not stop the next one. --only also takes names of stages, and --dry-run lists the stages. DIR gets a
one-page summary.md, a log per stage, tests.xml, results.json, table.md, plots and the trainer's results. Later commands
add to the summary. The exit code is 1 if a stage failed. Without a GPU, the same stages run on the CPU with the quick
selection of benchmarks, and the summary lists the stages that did not run.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable

BUILD = """
from udi_kernels import build_info
from udi_kernels._info import main
main()
slow = [f"{op}: {where}" for op, by in build_info()["backends"].items() for where, name in by.items()
        if name == "reference" and "float64" not in where]
raise SystemExit(f"served by plain torch: {', '.join(slow)}" if slow else 0)
"""

# Every kernel in a few odd sizes, because the sanitizers are a hundred times slower.
EXERCISE = """
import torch
from udi_kernels import (
    GradientPlan, certainty_fusion, club_mi, club_nll, duc_loss, effective_dims, gramian, js_div, js_div_topk,
    linear_js_div, skew_kl, weighted_sum,
)
for dtype in (torch.float32, torch.bfloat16):
    draw = lambda *shape: torch.randn(shape, device="cuda", dtype=dtype)
    for shape in ((64, 6), (7, 101), (33, 1271), (5, 8192), (3, 40001)):
        x, y = draw(*shape).requires_grad_(), draw(*shape).requires_grad_()
        some = torch.arange(shape[0], device="cuda") % 2
        js_div(x, y).backward(), js_div(x, y, weight=some).backward(), skew_kl(x, y).backward()
        js_div(x.t().contiguous().t(), y).backward()
        js_div(x * 1, y, inplace_backward=True).backward()
        top = y.detach().log_softmax(-1).topk(5)
        for tail in ("renormalize", "bucket", "zero"):
            js_div_topk(x, top.indices, top.values, tail=tail).backward()
        hidden, head = draw(shape[0], 40).requires_grad_(), draw(shape[1], 40).requires_grad_()
        linear_js_div(hidden, head, y.detach(), labels=some, hard_weight=0.5).backward()
    for shape in ((7, 41), (512, 130), (2100, 30)):
        for f in (club_mi, club_nll):
            f(*(draw(*shape).requires_grad_() for _ in range(3))).backward()
    classes = torch.arange(130, device="cuda") % 11
    inputs = [draw(130, 70).requires_grad_() for _ in range(3)]
    club_mi(*inputs, given=classes).backward()
    duc_loss(*inputs[:2], effective_dims(inputs[2], classes, 11)).backward()
    certainty_fusion(draw(3, 130, 101).requires_grad_()).sum().backward()
    for k in (3, 5, 8, 32):
        grads = [[draw(*s) for s in ((64, 33, 3, 3), (1271,), (), (0, 3), (16385,))] for _ in range(k)]
        weights = torch.rand(k, device="cuda")
        plan = GradientPlan(grads)
        gramian(grads), weighted_sum(grads, weights), plan.gramian(), plan.weighted_sum(weights)
torch.cuda.synchronize()
print("done")
"""


@dataclass
class Stage:
    part: str
    name: str
    seconds: int  # time limit
    command: list
    missing: str | None = None  # the reason why it cannot run here


def stages(out):
    gpu = None if torch.cuda.is_available() else "no GPU"
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    unsanitized = gpu or (None if sanitizer else "no compute-sanitizer")
    arch = "sm_90" if gpu else "sm_{}{}".format(*torch.cuda.get_device_capability())
    # The tests compile hundreds of Triton kernels, so they run in one single-threaded process per core.
    shards = ["-n", str(os.cpu_count()), "--dist", "worksteal"] if find_spec("xdist") else []

    def tests(name, *paths):
        return [PYTHON, "-m", "pytest", "-q", "-rf", *shards, f"--junitxml={out / name}.xml", *paths]

    def sanitize(tool):
        return [sanitizer, "--error-exitcode", "9", "--print-limit", "20", "--tool", tool, PYTHON, "-c", EXERCISE]

    pip = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", ROOT]
    measure = [PYTHON, "-m", "pytest", ROOT / "benchmarks", "--benchmark-only", "-q", "--benchmark-columns=median,iqr"]
    measure += [f"--benchmark-json={out / 'results.json'}", "--budget=380", *([] if gpu else ["--full"])]
    trainer = [PYTHON, ROOT / "benchmarks" / "trainer.py", "--out", out, "--rounds", "1" if gpu else "2"]
    kernels = [ROOT / "tests" / "kernels"]
    return [
        Stage("kernels", "install", 60, pip),
        Stage("kernels", "build", 60, [PYTHON, "-c", BUILD]),
        Stage("kernels", "compile", 60, [PYTHON, "-m", "udi_kernels", "--compile", arch]),
        Stage("kernels", "exercise", 60, [PYTHON, "-c", EXERCISE], gpu),  # also fills the caches for the sanitizers
        Stage("kernels", "tests", 180, tests("tests", *kernels)),
        Stage("kernels", "memcheck", 70, sanitize("memcheck"), unsanitized),
        Stage("kernels", "racecheck", 70, sanitize("racecheck"), unsanitized),
        Stage("speed", "inspect", 80, [PYTHON, ROOT / "benchmarks" / "inspect_kernels.py", "--arch", arch]),
        Stage("speed", "benchmarks", 420, measure),
        Stage("speed", "report", 60, [PYTHON, ROOT / "benchmarks/report.py", out / "results.json", "--out", out]),
        Stage("trainer", "trainer-tests", 240, tests("trainer-tests", ROOT / "tests" / "trainer")),
        Stage("trainer", "cnn", 150, [*trainer, *(["--epochs", "2", "--samples", "3000"] if gpu else [])]),
        Stage(
            "trainer", "resnet18", 150, [*trainer, "--encoder", "resnet18", "--samples", "1024", "--epochs", "2"], gpu
        ),
    ]


def run(stage, log):
    """Runs a stage and returns its verdict."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}:{os.environ.get('PYTHONPATH', '')}"}
    if "tests" in stage.name:
        environment["OMP_NUM_THREADS"] = "1"
    if "--tool" in stage.command:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else cached blocks hide accesses out of bounds
    with open(log, "w") as file:
        process = subprocess.Popen(
            list(map(str, stage.command)),
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(stage.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"FAILED: stopped after {stage.seconds} s"
    return "ok" if code == 0 else "used from its folder" if stage.name == "install" else f"FAILED ({code})"


def summary(out, results):
    """Writes the one-page summary: machine, stages, failed tests, the ends of other failed logs, the table of times."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    triton = __import__("triton").__version__ if find_spec("triton") else "none"
    lines = [f"{where}; Python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton}", ""]
    lines += [f"{name:<14} {seconds:4.0f} s  {verdict}" for name, (seconds, verdict) in results.items()]
    for name in ("tests", "trainer-tests"):
        if (out / f"{name}.xml").exists():
            suite = xml.etree.ElementTree.parse(out / f"{name}.xml").getroot().find("testsuite")
            failed = [
                f"{case.get('classname')}::{case.get('name')}: {problem.get('message')}".partition("\n")[0]
                for case in suite
                for problem in case
                if problem.tag in ("failure", "error")
            ]
            lines += ["", f"{name}: {suite.get('tests')}, {suite.get('skipped')} skipped, {len(failed)} failed"]
            lines += [f"    {line[:160]}" for line in failed[:12]]
    for name, (_, verdict) in results.items():
        if verdict.startswith("FAILED") and "tests" not in name:
            tail = (out / f"{name}.log").read_text().splitlines()[-8:]
            lines += ["", f"{name}:", *(f"    {line[:160]}" for line in tail)]
    for name in ("table.md", "trainer-cnn.md", "trainer-resnet18.md"):
        if (out / name).exists():
            lines += ["", *(out / name).read_text().splitlines()[:30]]
    (out / "summary.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts or stages")
    parser.add_argument("--dry-run", action="store_true", help="print the stages and their time limits")
    options = parser.parse_args()
    out = options.out.resolve()
    chosen = [s for s in stages(out) if not options.only or {s.part, s.name} & {*options.only}]
    if options.dry_run:
        for s in chosen:
            print(f"{s.part:<8} {s.name:<14} {s.seconds:4} s  {s.missing or ''}")
        return 0

    out.mkdir(parents=True, exist_ok=True)
    state = out / "stages.json"
    results = json.loads(state.read_text()) if state.exists() else {}
    for s in chosen:
        start = time.monotonic()
        verdict = f"not run: {s.missing}" if s.missing else run(s, out / f"{s.name}.log")
        results[s.name] = time.monotonic() - start, verdict
        state.write_text(json.dumps(results))
        print(f"{s.name:<14} {results[s.name][0]:4.0f} s  {verdict}", flush=True)
    print("\n" + summary(out, results))
    return any(results[s.name][1].startswith("FAILED") for s in chosen)


if __name__ == "__main__":
    sys.exit(main())
