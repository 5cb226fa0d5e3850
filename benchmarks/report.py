"""Tables and plots of benchmark results.

    python benchmarks/report.py results.json [--out DIR]

Reads the output of `pytest benchmarks/ --benchmark-only --benchmark-json=results.json` and prints tables. With --out it
writes table.md, a plot per family of ops, and a compact results.json with one line per benchmark.
"""

import argparse
import itertools
import json
import sys
import textwrap
from pathlib import Path

OURS = "udi_kernels"
# The implementation in most existing code.
USUAL = {
    "js_div": "eager",
    "js_div(inplace_backward=)": "torch.compile",
    "linear_js_div": "TRL",
    "js_div_topk": "scatter + js_div",
    "skew_kl": "eager",
    "js_div(views)": "eager",
    "js_div(weight=)": "indexed rows",
    "club_mi": "NxNxD",
    "club_mi(given=)": "eager",
    "gramian": "cat + matmul",
    "weighted_sum": "eager",
    "follower step": "NxNxD, cat + matmul",
    "duc_loss": "sample by sample",
    "effective_dims": "NxCxD",
    "certainty_fusion": "eager",
}
FIGURES = {
    "js_div": [
        "js_div",
        "js_div(inplace_backward=)",
        "linear_js_div",
        "js_div_topk",
        "skew_kl",
        "js_div(views)",
        "js_div(weight=)",
    ],
    "club_mi": ["club_mi", "club_mi(given=)"],
    "gradients": ["gramian", "weighted_sum", "follower step"],
    "dimml": ["duc_loss", "effective_dims", "certainty_fusion"],
}
COLORS = {
    "udi_kernels": "#d62728",
    "udi_kernels, stacked": "#ff9896",
    "udi_kernels, plan": "#8c1a1a",
    "torch.compile": "#1f77b4",
    "eager": "#7f7f7f",
    "logits": "#7f7f7f",
    "TRL": "#9467bd",
    "liger-kernel": "#2ca02c",
    "NxNxD": "#bcbd22",
    "NxCxD": "#bcbd22",
    "sample by sample": "#bcbd22",
    "NxNxD, cat + matmul": "#bcbd22",
    "cat + matmul": "#bcbd22",
    "dot products": "#17becf",
    "foreach": "#9467bd",
    "matmuls": "#e69f00",
    "tensordot": "#e69f00",
    "TorchJD": "#2ca02c",
    "indexed rows": "#e69f00",
    "scatter + js_div": "#9467bd",
    "all rows": "#bcbd22",
    "allocating": "#bcbd22",
    "torch.zeros": "#17becf",
    "mse_loss": "#17becf",
}


WHY_ABOVE = "A copy writes as much as it reads: ops that read more than they write can be faster, up to reading alone."
PEER = "#a6a6a6"


class Result:
    beside, kept_memory = False, None  # results from before these were measured

    def __init__(self, benchmark):
        self.seconds = benchmark["stats"]["median"]
        self.__dict__ |= benchmark["extra_info"]
        self.ours = self.provider.startswith(OURS)

    @property
    def panel(self):
        return " ".join(filter(None, (self.op, self.mode, self.dtype)))


def by_case(benchmarks):
    """A list of results for each case, in the order in which the cases ran."""
    cases = {}
    for benchmark in benchmarks:
        cases.setdefault(benchmark["group"], []).append(Result(benchmark))
    return list(cases.values())


# --- table ------------------------------------------------------------------------------------------------------


def table(cases):
    """The fastest of ours against the fastest peer, for each case."""
    on_gpu = any(r.host_us is not None for results in cases for r in results)
    columns = ["", "udi_kernels", "fastest peer", "speedup", "against usual code", "of copy speed", "extra memory"]
    columns.append("host µs" if on_gpu else "hot")
    keeps = any(r.kept_memory is not None for results in cases for r in results)
    columns += ["kept for backward"] * keeps
    rows = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for results in cases:
        same = [r for r in results if not r.beside]
        ours, peer = (min((r for r in same if r.ours == own), key=seconds, default=None) for own in (True, False))
        if ours is None:
            continue
        usual = next((r for r in results if r.provider == USUAL[ours.op]), None)
        name = " ".join(
            filter(None, (f"`{ours.op}`" if "_" in ours.op else ours.op, ours.shape, ours.dtype, ours.mode))
        )
        row = [
            name,
            duration(ours.seconds) + variant(ours) + note(ours),
            f"{duration(peer.seconds)} {peer.provider}{variant(peer)}{note(peer)}" if peer else "-",
            speedup(ours, peer),
            f"{speedup(ours, usual)} {usual.provider}" if usual else "-",
            f"{ours.copy_fraction:.0%}" if ours.cold else "in cache",
            f"{size(ours.peak_memory)}, peer {size(peer.peak_memory)}" if peer else size(ours.peak_memory),
        ]
        if on_gpu:
            row.append(f"{ours.host_us:.0f}, peer {peer.host_us:.0f}" if peer else f"{ours.host_us:.0f}")
        else:
            row.append(hot(same))
        if keeps:
            row.append(f"{size(ours.kept_memory)}, peer {size(peer.kept_memory)}" if peer else size(ours.kept_memory))
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def compared(results):
    """A case with what is measured beside it."""
    times = ", ".join(f"{r.provider} {duration(r.seconds)}" for r in results)
    return f"`{results[0].op}` {results[0].shape}: {times}."


def hot(results):
    """The same comparison with warm caches and allocator."""
    if any(r.hot_us is None for r in results):
        return "-"
    ours, peer = (min((r.hot_us for r in results if r.ours == own), default=None) for own in (True, False))
    text = duration(ours / 1e6)
    return f"{text}, {ratio(ours, peer)}" if peer else text


def seconds(result):
    return result.seconds


def speedup(ours, other):
    return ratio(ours.seconds, other.seconds) if other else "-"


def ratio(ours, other):
    times = other / ours
    text = f"{times:.0f}×" if times >= 20 else f"{times:.1f}×" if times >= 2 else f"{times:.2f}×"
    return text if times >= 1 else f"{text} (slower)"


def variant(result):
    part = result.provider.removeprefix(OURS).strip(", ") if result.ours else result.variant
    return f" ({part})" if part else ""


def note(result):
    return "" if result.timing in ("CUDA graph replay", "wall time of a call") else " \\*"


def duration(seconds):
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            return f"{seconds * scale:.3g} {unit}"


def size(count):
    if count is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)):
        if count >= scale or unit == "B":
            return f"{count / scale:.3g} {unit}"


def markdown(cases):
    first = cases[0][0]
    copy = f"copy {first.copy_bandwidth / 1e9:.0f} GB/s, read {first.read_bandwidth / 1e9:.0f} GB/s"
    commit = f", commit {first.commit}" if first.commit else ""
    parts = [f"{first.device}; torch {first.torch}{commit}; {copy}. Medians, all providers interleaved."]
    if first.hot_us is not None:
        parts[0] += " Hot: right after calls with the same inputs, and the speedup over the fastest peer there."
    if any(note(r) for results in cases for r in results):
        parts[0] += " \\* cannot be captured in a CUDA graph: eager calls, launches included."
    if any(r.cold and r.copy_fraction > 1 for results in cases for r in results):
        parts[0] += f" {WHY_ABOVE}"
    quick = [results for results in cases if results[0].quick]
    rest = [results for results in cases if not results[0].quick]
    parts += [table(part) for part in (quick, rest) if part]
    parts += map(compared, filter(lambda results: any(r.beside for r in results), cases))
    return "\n\n".join(parts) + "\n"


# --- plots ------------------------------------------------------------------------------------------------------


def plot(cases, figure, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    plt.rcParams |= {"grid.color": "#e6e6e6", "axes.axisbelow": True}
    results = [r for case in cases for r in case if r.op in FIGURES[figure] and not r.beside]
    if not results:
        return
    panels = {}
    for r in sorted(results, key=lambda r: (FIGURES[figure].index(r.op), r.mode, r.dtype != "float32")):
        panels.setdefault(r.panel, []).append(r)
    columns = 3 if len(panels) == 3 else min(len(panels), 2)
    rows = -(-len(panels) // columns)
    shapes = max(len(shapes_of(panel)) for panel in panels.values())
    size = columns * max(5.2, 0.8 * shapes), 3.3 * rows + 1
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax, (title, panel) in itertools.zip_longest(axes.flat, panels.items(), fillvalue=(None, None)):
        if title is None:
            ax.remove()
            continue
        (lines if len(shapes_of(panel)) > 1 else bars)(ax, panel)
        ax.set_title(title, loc="left", fontweight="bold")
    handles = []
    if shapes > 1:
        drawn = dict.fromkeys(p for p in COLORS if any(r.provider == p for r in results))
        for color in dict.fromkeys(COLORS[p] for p in drawn):
            label = " / ".join(p for p in drawn if COLORS[p] == color)
            handles.append(plt.Line2D([], [], color=color, marker="o", markersize=5, label=label))
    for _, style, label in limits_of(results):
        handles.append(plt.Line2D([], [], color="black", linestyle=style, linewidth=1, label=label))
    fig.legend(handles=handles, loc="outside lower center", ncols=max(1, int(size[0] / 2.4)), frameon=False)
    text = f"{results[0].device}. Farther is faster. {WHY_ABOVE}"
    fig.suptitle(textwrap.fill(text, int(13 * size[0])), x=0.01, ha="left", color="#555555", fontsize=9)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def shapes_of(panel):
    """The shapes by K, if any, then by bytes: a line connects cases that differ only in size."""
    ordered = sorted(panel, key=lambda r: (group_of(r.shape), r.necessary_bytes))
    return list(dict.fromkeys(r.shape for r in ordered))


def group_of(shape):
    return int(shape.partition("K=")[2] or 0)


def limits_of(results):
    """The memory bandwidths in GB/s: (speed, line style, label)."""
    first = results[0]
    return [
        (first.copy_bandwidth / 1e9, "--", "a device copy: writes as much as it reads"),
        (first.read_bandwidth / 1e9, ":", "the ceiling: reading alone"),
    ]


def lines(ax, panel):
    """Bandwidth over size, with equidistant sizes."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    shapes = shapes_of(panel)
    for provider, color in COLORS.items():
        mine = {r.shape: r.bandwidth / 1e9 for r in panel if r.provider == provider}
        front = provider.startswith(OURS)
        style = {"linewidth": 2.2, "zorder": 4} if front else {"linewidth": 1.3, "zorder": 3}
        for _, group in itertools.groupby(enumerate(shapes), key=lambda item: group_of(item[1])):
            x, y = zip(*((i, mine.get(shape, float("nan"))) for i, shape in group), strict=True)
            ax.plot(x, y, color=color, marker="o", markersize=4.5, **style)
    for speed, style, _ in limits_of(panel):
        ax.axhline(speed, color="black", linestyle=style, linewidth=1)
    ax.set_yscale("log")
    values = [r.bandwidth for r in panel]
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 300 * min(values) else (1,)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(range(len(shapes)), [s.replace(" K", "\nK").replace("x", "\n×") for s in shapes])
    ax.set_xlim(-0.4, len(shapes) - 0.6)
    ax.set_ylabel("necessary bytes / time, GB/s")


def bars(ax, panel):
    """A single size: one bar per provider with its time, ours in color."""
    panel = sorted(panel, key=seconds, reverse=True)
    widths, limits = [r.bandwidth / 1e9 for r in panel], limits_of(panel)
    end = 1.05 * max(*widths, *(speed for speed, *_ in limits))
    ax.barh(range(len(panel)), widths, color=[COLORS[r.provider] if r.ours else PEER for r in panel], height=0.65)
    for i, r in enumerate(panel):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        weight = "bold" if r.ours else "normal"
        ax.text(widths[i] + 0.01 * end, i, duration(r.seconds), va="center", bbox=box, weight=weight, zorder=3)
    for speed, style, _ in limits:
        ax.axvline(speed, color="black", linestyle=style, linewidth=1)
    ax.set_xlim(0, end)
    ax.set_yticks(range(len(panel)), [r.provider for r in panel])
    ax.set_xlabel(f"{panel[0].shape}: necessary bytes / time, GB/s")
    ax.grid(axis="y", visible=False)


def write(path, data):
    """Writes the results with statistics instead of samples."""
    stats = ("min", "q1", "median", "q3", "max", "rounds")
    runs = [
        {"group": b["group"], "extra_info": b["extra_info"], "stats": {name: b["stats"][name] for name in stats}}
        for b in data["benchmarks"]
    ]
    head = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in data.items() if name != "benchmarks"]
    lines = ",\n".join(map(json.dumps, runs))
    path.write_text("{\n" + ",\n".join([*head, f'"benchmarks": [\n{lines}\n]']) + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="JSON written by pytest-benchmark")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the files to this folder")
    options = parser.parse_args()
    data = json.loads(Path(options.results).read_text())
    cases = by_case(data["benchmarks"])
    if not cases:
        sys.exit(f"{options.results} contains no results")
    text = markdown(cases)
    print(text, end="")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "table.md").write_text(text)
        write(options.out / "results.json", data)
        for figure in FIGURES:
            plot(cases, figure, options.out / f"{figure}.png")


if __name__ == "__main__":
    main()
