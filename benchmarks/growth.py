"""How time and memory of each op grow with its sizes, and what a second thread gains, on a CPU.

    python benchmarks/growth.py [--only WORD ...] [--rounds 7] [--json FILE]
    python benchmarks/growth.py --table FILE                  # the table of these results

Each op is measured at three sizes, each four times the one before; losses forward and backward. Times are those of the
processor with one thread, which other processes hardly disturb. Growth: time per element at the largest size over that
at the middle one, 1.00 if linear. Memory: the same of what the call allocates at its peak. Threads: wall time with one
over that with two, at the largest size, beside the same figure of what bounds the op: a copy, or torch.exp, of as many
bytes as the op reads (at most 512 MB), or torch.mm. All samples are interleaved, and each time is the least one.

glibc is told to keep freed memory. It returns tensors from 32 MB on, and their page faults would look like growth;
`page_faults.py` measures these.
"""

import argparse
import json
import os
import sys
import time
from functools import partial

import torch

import measure
from page_faults import ENVIRONMENTS
from udi_kernels import (
    certainty_fusion,
    club_mi,
    club_nll,
    duc_loss,
    effective_dims,
    gramian,
    js_div,
    js_div_topk,
    linear_js_div,
    skew_kl,
    weighted_sum,
)

ENVIRONMENT = ENVIRONMENTS["memory kept"]
CLASSES, ROWS, DIMS = (16384, 65536, 262144), (62_500, 250_000, 1_000_000), (512, 2048, 8192)
LISTS, PARAMETERS = (4, 16, 64), (62_500_000, 250_000_000, 1_000_000_000)


def loss(f, shapes, leaf=0, **options):
    """The gradient of one of the inputs, of these shapes."""
    inputs = [torch.randn(shape) for shape in shapes]
    inputs[leaf].requires_grad_()
    return lambda: torch.autograd.grad(f(*inputs, **options), inputs[leaf])


def logits(f, *shape, **options):
    return loss(f, (shape, shape), **options)


def topk(rows, classes):
    indices, logprobs = torch.arange(16).expand(rows, 16), torch.randn(rows, 16).log_softmax(1)
    return loss(lambda x: js_div_topk(x, indices, logprobs), [(rows, classes)])


def club(f, *shape, **options):
    return loss(f, [shape] * 3, leaf=2, **options)


def dims(n, d, classes=10):
    return partial(effective_dims, torch.randn(n, d), torch.arange(n) % classes, classes)


def duc(n, d):
    return loss(partial(duc_loss, dims=torch.arange(d) % 4 == 1), [(n, d)] * 2)


def lists(k, parameters, dtype=torch.float32):
    """K gradients over 16 tensors; of the same million random numbers, for speed."""
    block, size = torch.randn(1 << 20).to(dtype), parameters // 16
    return [[block.repeat(-(-size // len(block)))[:size].contiguous() for _ in range(16)] for _ in range(k)]


def summed(k, parameters, dtype=torch.float32):
    return partial(weighted_sum, lists(k, parameters, dtype), torch.rand(k))


def gram(k, parameters, dtype=torch.float32):
    return partial(gramian, lists(k, parameters, dtype))


BF16 = torch.bfloat16
# Name: what bounds it, bytes that it reads of a size, the sizes, and the function that makes the call.
SERIES = {
    "js_div, 256 rows × C": ("exp", 2048, CLASSES, lambda c: logits(js_div, 256, c)),
    "js_div, N × 32 classes": ("exp", 256, ROWS, lambda n: logits(js_div, n, 32)),
    "skew_kl, 256 rows × C": ("exp", 2048, CLASSES, lambda c: logits(skew_kl, 256, c)),
    "skew_kl, N × 32 classes": ("exp", 256, ROWS, lambda n: logits(skew_kl, n, 32)),
    "js_div_topk, 256 rows × C": ("copy", 1024, CLASSES, partial(topk, 256)),
    "js_div_topk, N × 32 classes": ("exp", 128, ROWS, lambda n: topk(n, 32)),
    "linear_js_div, 256 rows × C, H = 64": (
        "mm", 512, CLASSES, lambda c: loss(linear_js_div, [(256, 64), (c, 64), (256, 64), (c, 64)], leaf=1),
    ),
    "club_mi, N × 64": ("copy", 768, ROWS, lambda n: club(club_mi, n, 64)),
    "club_mi, 4096 × D": ("copy", 49152, DIMS, lambda d: club(club_mi, 4096, d)),
    "club_mi(given=), N × 64, 100 classes": (
        "copy", 768, ROWS, lambda n: club(club_mi, n, 64, given=torch.arange(n) % 100),
    ),
    "club_nll, N × 64": ("copy", 768, ROWS, lambda n: club(club_nll, n, 64)),
    "club_nll, 4096 × D": ("copy", 49152, DIMS, lambda d: club(club_nll, 4096, d)),
    "duc_loss, 512 × D": ("exp", 4096, DIMS, partial(duc, 512)),
    "effective_dims, N × 64, 10 classes": ("copy", 256, ROWS, lambda n: dims(n, 64)),
    "effective_dims, 4096 × D, 10 classes": ("copy", 16384, DIMS, partial(dims, 4096)),
    "certainty_fusion, 3 × N × 32": (
        "exp", 384, ROWS, lambda n: partial(certainty_fusion, torch.randn(3, n, 32)),
    ),
    "certainty_fusion, 3 × 64 × C": (
        "copy", 768, CLASSES, lambda c: partial(certainty_fusion, torch.randn(3, 64, c)),
    ),
    "gramian, K = 2, P in bfloat16": ("copy", 4, PARAMETERS, lambda p: gram(2, p, BF16)),
    "gramian, K, P = 10⁶": ("copy", 4_000_000, LISTS, lambda k: gram(k, 1_000_000)),
    "weighted_sum, K = 2, P in bfloat16": ("copy", 4, PARAMETERS, lambda p: summed(2, p, BF16)),
    "weighted_sum, K, P = 10⁶": ("copy", 4_000_000, LISTS, lambda k: summed(k, 1_000_000)),
}  # fmt: skip


def bound(kind, count):
    """A copy or torch.exp of so many bytes, at most 512 MB, in float32, into memory that is there.

    Or the product of ``linear_js_div``'s head: its two heads of 64 columns are 512 bytes a class.
    """
    if kind == "mm":
        x, weight = torch.randn(256, 64), torch.randn(count // 512, 64)
        return partial(torch.mm, x, weight.t(), out=torch.empty(256, len(weight)))
    source = torch.randn(1 << 20).repeat(-(-min(count, 1 << 29) >> 22))
    target = torch.empty_like(source)
    return partial(target.copy_, source) if kind == "copy" else partial(torch.exp, source, out=target)


def seconds(calls, rounds):
    """{(name, threads): least wall time}, {name: least processor time with one thread}, of all calls in turn."""
    wall, processor = {}, {}
    for n in range(-1, rounds):  # the first one warms up
        for name, call in calls.items():
            for threads in (1, 2):
                torch.set_num_threads(threads)
                start, used = time.perf_counter(), time.process_time()
                call()
                took, used = time.perf_counter() - start, time.process_time() - used
                if n >= 0:
                    wall[name, threads] = min(took, wall.get((name, threads), took))
                if n >= 0 and threads == 1:
                    processor[name] = min(used, processor.get(name, used))
    return wall, processor


def measured(name, rounds, device):
    """What the table shows of a series; the reason in words where a size does not fit."""
    kind, each, sizes, make = SERIES[name]
    points = []
    for size in sizes:
        needed = 2 * size * each + (1 << 30)
        if needed > device.free_memory():
            missing = f"needs about {needed / 2**30:.1f} GiB, {device.free_memory() / 2**30:.1f} are free"
            points.append(dict(size=size, missing=missing))
            continue
        calls = {"op": make(size), "bound": bound(kind, size * each)}
        wall, processor = seconds(calls, rounds)
        gains = {name: wall[name, 1] / wall[name, 2] for name in calls}
        memory = device.peak_memory(calls["op"])
        points.append(dict(size=size, seconds=processor["op"], memory=memory, gains=gains))
    return dict(series=name, bound=kind, points=points)


def row(result):
    points = [p for p in result["points"] if "missing" not in p]
    cells = [result["series"], f"{result['points'][-1]['size']:,}"]
    for p in result["points"]:
        cells.append(p.get("missing") or f"{1e3 * p['seconds']:.3g} ms")
    if len(points) < 2:
        return [*cells, "–", "–", "–", "–"]
    middle, last = points[-2:]
    times = last["size"] / middle["size"]
    memory = last["memory"] / middle["memory"] / times if middle["memory"] > 1 << 20 else None
    ours, other = last["gains"]["op"], last["gains"]["bound"]
    cells += [f"{last['seconds'] / middle['seconds'] / times:.2f}", f"{memory:.2f}" if memory else "none"]
    return [*cells, f"{ours:.2f}", f"{other:.2f} {result['bound']}, {ours / other:.2f}"]


def table(results):
    head = ["", "largest", "1/16", "1/4", "largest", "growth", "memory", "1 → 2 threads", "bound"]
    rows = [head, ["---"] + ["---:"] * 8, *map(row, results)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="series whose name starts with it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--table", metavar="FILE", help="measure nothing, and print the table of these results")
    options = parser.parse_args()
    if options.table:
        with open(options.table) as file:
            print(table(json.load(file)))
        return
    if any(os.environ.get(k) != v for k, v in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    device, results = measure.CPU(), []
    for name in SERIES:
        if name.startswith(tuple(options.only)):
            results.append(measured(name, options.rounds, device))
            print(*row(results[-1]), sep=" | ", flush=True)
            if options.json:
                with open(options.json, "w") as file:
                    json.dump(results, file, indent=1)
    print(table(results))


if __name__ == "__main__":
    main()
