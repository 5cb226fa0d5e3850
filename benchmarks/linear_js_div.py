"""Time and peak memory of linear_js_div, its chunks and its peers, on a CPU.

    python benchmarks/linear_js_div.py [--shape 2048x32000 ...] [--dtype float32 ...] [--rounds 5] [--json FILE]

Heads of 512 features (student) and 1024 (teacher), forward and backward to hidden states and head of the student.

Time: all providers in turn, in one process, for so many rounds; the least processor time of all threads, and the least
wall time. On a shared machine the first is the steadier of the two. OMP_WAIT_POLICY=passive keeps waiting threads from
counting.

Memory: each provider in a process of its own, since freed memory that an allocator keeps would hide the next one's
peak. The process first makes a call with few rows, which loads code and starts threads. Then it resets the kernel's
record of its peak resident memory (/proc/self/clear_refs), makes the call, and takes the rise of that peak (VmHWM): it
counts every page that was touched, whoever allocated it, the buffers of the matrix library among them. A fixed
MALLOC_MMAP_THRESHOLD_ makes glibc return each freed tensor to the system, which it else stops doing for tensors below
32 MB. The gradients are in the peak.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_WAIT_POLICY": "passive"}
STUDENT, TEACHER = 512, 1024
CHUNKS = 64, 128, 256, 512, 1024


def providers():
    import torch

    import peers
    from udi_kernels import linear_js_div

    def masked(x, w, t, tw):
        return linear_js_div(x, w, t, tw, row_weight=torch.arange(len(x)) % 2)

    return {
        "logits + js_div": peers.linear_js_div_logits,
        "linear_js_div": linear_js_div,
        **{f"linear_js_div, {n} rows": partial(linear_js_div, chunk=n) for n in CHUNKS},
        "linear_js_div, half of the rows masked": masked,
        "torch.compile": peers.compiled(peers.linear_js_div_reference),
        "liger-kernel, chunked": peers.linear_js_div_liger,
        "liger-kernel, chunked, compiled": partial(peers.linear_js_div_liger, compiled=True),
        "TRL's formula, whole": peers.linear_js_div_trl,
        "TRL's formula, checkpointed chunks": peers.linear_js_div_trl_chunked,
    }


def draw(rows, classes, dtype):
    import torch

    torch.manual_seed(0)
    shapes = (rows, STUDENT), (classes, STUDENT), (rows, TEACHER), (classes, TEACHER)
    x, w, t, tw = (torch.randn(s).mul_(1 if s[0] == rows else 2 / s[1] ** 0.5).to(dtype) for s in shapes)
    return x.requires_grad_(), w.requires_grad_(), t, tw


def step(loss, x, w, t, tw):
    x.grad = w.grad = None
    loss(x, w, t, tw).backward()


def peak_memory(loss, rows, classes, dtype):
    """Bytes by which resident memory rises during the call; to be called once in a process."""
    x, w, t, tw = draw(rows, classes, dtype)
    few = x[:64].detach().requires_grad_(), w, t[:64], tw
    step(loss, *few)
    few[0].grad = w.grad = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    step(loss, x, w, t, tw)
    return _status("VmHWM") - before


def _status(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))


def peak_in_a_process(name, shape, dtype):
    command = [sys.executable, __file__, "--shape", shape, "--dtype", dtype, "--peak-of", name]
    run = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    return int(run.stdout.splitlines()[-1]) if run.returncode == 0 else None


def times(table, rows, classes, dtype, rounds):
    """{provider: (least processor seconds, least wall seconds)}"""
    inputs, few = (draw(n, classes, dtype) for n in (rows, 64))
    best = {}
    for n in range(rounds):
        for name, loss in table.items():
            if n == 0 and "compile" not in name:
                step(loss, *few)
            elif n == 0:
                step(loss, *inputs)
            wall, cpu = time.perf_counter(), time.process_time()
            step(loss, *inputs)
            took = time.process_time() - cpu, time.perf_counter() - wall
            best[name] = tuple(map(min, took, best.get(name, took)))
            print(rows, classes, name, *took, file=sys.stderr, flush=True)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["2048x32000"], help="rows x classes")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--only", nargs="+", metavar="PROVIDER", help="these providers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.peak_of and any(os.environ.get(k) != v for k, v in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    import torch

    table = providers()
    results = []
    for dtype in options.dtype:
        for shape in options.shape:
            rows, classes = map(int, shape.split("x"))
            if options.peak_of:
                print(peak_memory(table[options.peak_of], rows, classes, getattr(torch, dtype)))
                return
            chosen = {k: v for k, v in table.items() if not options.only or k in options.only}
            memory = {}
            for name in chosen:
                memory[name] = peak_in_a_process(name, shape, dtype)
                print(shape, dtype, name, memory[name], file=sys.stderr, flush=True)
            seconds = times(chosen, rows, classes, getattr(torch, dtype), options.rounds) if options.rounds else {}
            outputs = (rows + classes) * STUDENT * getattr(torch, dtype).itemsize
            print(f"\n{shape} {dtype}, {torch.get_num_threads()} threads, gradients {outputs / 1e6:.0f} MB\n")
            print("| | processor time | ratio | wall time | ratio | peak memory | ratio |")
            print("|---|---:|---:|---:|---:|---:|---:|")
            first = next(iter(chosen))
            for name in chosen:
                cells = [name]
                for i in range(2):
                    mine, base = (seconds.get(n, (None, None))[i] for n in (name, first))
                    cells += [f"{mine:.2f} s", f"{mine / base:.2f}"] if mine else ["–", "–"]
                peak, base = memory[name], memory[first]
                cells += [f"{peak / 1e6:.0f} MB", f"1/{base / peak:.1f}" if base else "–"] if peak else ["–", "–"]
                print("| " + " | ".join(cells) + " |", flush=True)
                cpu, wall = seconds.get(name, (None, None))
                results.append(
                    dict(shape=shape, dtype=dtype, provider=name, cpu_seconds=cpu, seconds=wall, peak_memory=peak)
                )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
