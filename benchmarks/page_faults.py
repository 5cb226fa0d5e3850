"""What page faults cost js_div at vocabulary size, on a CPU.

    python benchmarks/page_faults.py [--shape 4096x32000] [--dtype float32 ...] [--rounds 15] [--json FILE]

Forward and backward of js_div, of js_div(inplace_backward=True) and of torch.compile, with each of the allocators in
ENVIRONMENTS. Each allocator has a process; in a round, each process in turn makes one call of everything. A call starts
with nothing but the inputs, so its gradient is new memory, unless malloc has kept it. Medians of wall time, of the
kernel's part of the processor time and of page faults; and the least processor time of all threads, which is steadier
on a shared machine. OMP_WAIT_POLICY=passive keeps waiting threads from counting.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

ENVIRONMENTS = {
    "as usual": {},
    "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},  # torch's own option, for tensors of at least 2 MB
    "memory kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 50)},  # glibc's malloc
}


def calls(rows, classes, dtype):
    """{name: (what to do before the call, the call)}"""
    import torch

    import peers
    from udi_kernels import js_div

    torch.manual_seed(0)
    x, y = (torch.randn(rows, classes).to(getattr(torch, dtype)) for _ in range(2))
    buffer, root, leaf = x.clone(), torch.zeros((), requires_grad=True), x.requires_grad_()
    compiled = peers.compiled(peers.js_div_probabilities)

    def in_place():
        logits = peers.Layer.apply(root, [buffer])
        torch.autograd.grad(js_div(logits, y, inplace_backward=True), logits)

    return {
        "js_div": (lambda: None, lambda: torch.autograd.grad(js_div(leaf, y), leaf)),
        "torch.compile": (lambda: None, lambda: torch.autograd.grad(compiled(leaf, y), leaf)),
        "js_div(inplace_backward=True)": (lambda: buffer.copy_(x.detach()), in_place),
        "js_div, forward": (lambda: None, lambda: js_div(leaf, y)),
        "torch.ones of the gradient's size": (lambda: None, lambda: torch.ones(x.shape, dtype=x.dtype)),
    }


def serve(shape, dtype):
    """Makes a call for each line of standard input, and prints what it took."""
    table = calls(*map(int, shape.split("x")), dtype)
    for name in sys.stdin:
        before, call = table[name.strip()]
        before()
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        call()
        took, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        user, system, faults = (getattr(now, k) - getattr(used, k) for k in ("ru_utime", "ru_stime", "ru_minflt"))
        print(json.dumps([took, user + system, system, faults]), flush=True)


def measured(shape, dtype, rounds):
    """[{shape, dtype, allocator, call, seconds, cpu_seconds, system_seconds, page_faults}]"""
    command = [sys.executable, __file__, "--serve", "--shape", shape, "--dtype", dtype]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    servers = {
        name: subprocess.Popen(command, env=os.environ | {"OMP_WAIT_POLICY": "passive"} | env, **pipes)
        for name, env in ENVIRONMENTS.items()
    }
    samples, names = {}, list(calls(1, 1, dtype))
    for n in range(-1, rounds):  # the first one compiles
        for name in names:
            for allocator, server in servers.items():
                server.stdin.write(f"{name}\n")
                server.stdin.flush()
                result = json.loads(server.stdout.readline())
                if n >= 0:
                    samples.setdefault((allocator, name), []).append(result)
    for server in servers.values():
        server.communicate()
    return [
        dict(
            shape=shape, dtype=dtype, allocator=allocator, call=name,
            seconds=statistics.median(taken), cpu_seconds=min(cpu),
            system_seconds=statistics.median(system), page_faults=statistics.median(faults),
        )
        for (allocator, name), results in samples.items()
        for taken, cpu, system, faults in [zip(*results, strict=True)]
    ]  # fmt: skip


def table(results):
    """With ratios to torch.compile with the usual allocator."""
    base = next(r for r in results if r["call"] == "torch.compile")
    head = f"{base['shape']} {base['dtype']}", "allocator", "time", "speedup", "processor time", "speedup"
    rows = [f"| {' | '.join(head)} | kernel's part | page faults |", "|---|---|" + "---:|" * 6]
    for r in results:
        cells = [r["call"], r["allocator"]]
        for k in ("seconds", "cpu_seconds"):
            cells += [f"{1e3 * r[k]:.0f} ms", f"{base[k] / r[k]:.2f}×"]
        cells += [f"{1e3 * r['system_seconds']:.0f} ms", f"{r['page_faults']:,.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x32000", help="rows x classes")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.shape, options.dtype[0])
    results = []
    for dtype in options.dtype:
        results.append(measured(options.shape, dtype, options.rounds))
        print(table(results[-1]), end="\n\n", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(sum(results, []), file, indent=1)


if __name__ == "__main__":
    main()
