"""The plots of studies: test accuracies, and differences to the best baseline."""

import statistics
import textwrap
from collections.abc import Collection
from pathlib import Path

from udi_trainer.evaluation.plotting import INK, MODALITY_COLORS, MUTED, label_ends, new_figure, style_axes

from .ranks import cliques, critical_difference
from .summary import best_baseline, collect, differences, heading, interval, is_baseline, mean_and_std, scores_by_seed

COLOR = MODALITY_COLORS[0]
LEAST_SETS = 6  # data sets that a critical difference needs


def draw(study, records: list[dict], path: Path) -> str:
    """Left: the lines of the tables, with one dot per seed, their mean and its interval. Right: paired differences."""
    tables = collect(study, records)
    heights = [len(lines) + 1.2 for lines in tables.values()]
    figure = new_figure(12, 1.3 + 0.36 * sum(heights) + 0.35 * len(heights))
    panels = figure.subplots(len(tables), 2, squeeze=False, height_ratios=heights, width_ratios=[1.5, 1])
    for (left, right), ((condition, section), lines) in zip(panels, tables.items(), strict=True):
        best = best_baseline(lines)
        draw_accuracies(left, lines, best)
        style_axes(left, heading(condition, section), "test accuracy, %" if left is panels[-1, 0] else "")
        draw_differences(right, lines, best)
        style_axes(right, f"against {best}" if best else "", "difference, points" if right is panels[-1, 1] else "")
        for axes in (left, right):
            axes.set_ylim(len(lines) - 0.4, -0.6)
            axes.grid(axis="y", visible=False)
            axes.locator_params(axis="x", nbins=6)
    question = textwrap.fill(study.__doc__, 130)
    how = "Dot: a {0} (x: collapsed). Bar: mean and its 95% interval. Right: differences paired by {0}, likewise."
    figure.suptitle(f"{question}\n{how.format(study.unit)}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=110)
    return path.name


def trend(
    scores: dict[str, dict[str, dict[int, float]]], claims: list[tuple[str, str]], title: str, xlabel: str, path: Path
) -> str:
    """Left: mean scores {name: {x: {seed: score}}}, one line per name. Right: paired differences for the claims.

    A claim is a pair of names. The first name must have all x, the others at least the last one.
    """
    figure = new_figure(12, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    ticks = list(next(iter(scores.values())))
    lines = []
    for i, (name, by_x) in enumerate(scores.items()):
        color = (*MODALITY_COLORS, MUTED)[i % (len(MODALITY_COLORS) + 1)]
        positions = [i for i, x in enumerate(ticks) if x in by_x]
        values = [100 * mean_and_std(by_x[ticks[i]].values())[0] for i in positions]
        lines.append((name, values[-1], color))
        left.plot(positions, values, "o-", color=color, linewidth=2.2 if i < 2 else 1.3)
    left.margins(x=0.03)
    style_axes(left, title, xlabel)
    label_ends(left, [(name, len(ticks) - 1, value, color) for name, value, color in lines])
    kept = [(ours, theirs) for ours, theirs in claims if ours in scores and theirs in scores]
    rows = [(ours, theirs, x) for ours, theirs in kept for x in ticks if x in scores[theirs]]
    for y, (ours, theirs, x) in enumerate(rows):
        mean, half = mean_and_interval([100 * d for d in differences(scores[ours][x], scores[theirs][x])])
        color = COLOR if mean - half > 0 else MUTED
        right.plot([mean - half, mean + half], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        right.plot(mean, y, "D", color=color, markersize=5)
        right.text(1.02, y, f"{mean:+.1f}", transform=right.get_yaxis_transform(), va="center", fontsize=9)
    right.set_yticks(range(len(rows)), [f"{ours} − {theirs}, {x}" for ours, theirs, x in rows], fontsize=9)
    right.invert_yaxis()
    right.axvline(0, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    style_axes(right, "Paired differences, 95% intervals", "points")
    for axes in (left, right):
        axes.grid(axis="y" if axes is right else "x", visible=False)
    left.set_xticks(range(len(ticks)), ticks)
    figure.savefig(path, dpi=110)
    return path.name


def benchmark(
    points: dict[str, dict[str, float]], ranks: dict[str, float], title: str, reference: str, path: Path
) -> str:
    """Left: the difference of each method to the reference, {method: {data set: points}}. Right: mean ranks.

    From six data sets on, a bar joins methods whose ranks differ by less than Nemenyi's critical difference.
    """
    names, sets = sorted(ranks, key=lambda m: ranks[m]), list(points[reference])
    figure = new_figure(12, 1.8 + 0.32 * len(names))
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    colors = {m: INK if m == reference else COLOR if m == "udi" else MUTED for m in names}
    bars = {m: mean_and_interval(points[m].values()) for m in names}
    # Few methods far behind would squeeze the others: what is beyond the limit is an arrow at the edge.
    limit = max(1.0, 1.5 * statistics.quantiles([abs(mean) for mean, _ in bars.values()], n=4)[2])
    for y, m in enumerate(names):
        mean, half = bars[m]
        left.plot([max(mean - half, -limit), min(mean + half, limit)], [y, y], color=colors[m], linewidth=2)
        offsets = swarm(list(points[m].values()), near=0.03 * limit)
        marks = [(x, y + offset, 3.5, "o") for x, offset in zip(points[m].values(), offsets, strict=True)]
        for x, height, size, shape in [*marks, (mean, y, 5, "D")]:
            shape = shape if abs(x) <= limit else "<" if x < 0 else ">"
            left.plot(min(max(x, -limit), limit), height, shape, color=colors[m], markersize=size, clip_on=False)
        left.text(1.03, y, f"{mean:+.1f}", transform=left.get_yaxis_transform(), va="center", fontsize=9)
        right.plot(ranks[m], y, "o", color=colors[m], markersize=5)
        right.text(ranks[m] + 0.03 * len(names), y, f"{ranks[m]:.1f}", va="center", fontsize=9)
    how = "mean rank"
    if len(sets) >= LEAST_SETS:
        difference = critical_difference(len(names), len(sets))
        for i, (first, last) in enumerate(cliques([ranks[m] for m in names], difference)):
            x = (1.08 + 0.03 * i) * len(names)
            right.plot([x, x], [first - 0.2, last + 0.2], color=INK, linewidth=3, solid_capstyle="butt")
        how += f"; bar: not significant (Nemenyi, {difference:.1f})"
    left.set_xlim(-1.05 * limit, 1.05 * limit)
    left.axvline(0, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    style_axes(left, f"against the {reference}: data sets, and their mean with its 95% interval", "points")
    style_axes(right, how, "1 is the best")
    for axes in (left, right):
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
    left.set_yticks(range(len(names)), names, fontsize=9)
    right.set_yticks([])
    figure.suptitle(textwrap.fill(f"{title}: {', '.join(sets)}", 130), x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=110)
    return path.name


def draw_accuracies(axes, lines: dict, best: str | None):
    scores = {name: {seed: 100 * x for seed, x in scores_by_seed(b, "test_acc").items()} for name, b in lines.items()}
    bars = {name: mean_and_interval(by_seed.values()) for name, by_seed in scores.items()}
    every = [x for by_seed in scores.values() for x in by_seed.values()]
    low = min(*every, *(mean - half for mean, half in bars.values()))
    high = max(*every, *(mean + half for mean, half in bars.values()))
    margin = 0.03 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)
    for y, (name, by_seed) in enumerate(scores.items()):
        baseline, (mean, half) = is_baseline(lines[name]), bars[name]
        axes.barh(y, 2 * half, left=mean - half, height=0.62, color=MUTED if baseline else COLOR, alpha=0.3, zorder=2)
        axes.plot([mean, mean], [y - 0.31, y + 0.31], color=INK if baseline else COLOR, linewidth=2, zorder=3)
        offsets = swarm(list(by_seed.values()), near=0.011 * (high - low + 2 * margin))
        for (seed, x), offset in zip(by_seed.items(), offsets, strict=True):
            marker = "x" if lines[name][seed].collapsed else "o"
            axes.plot(x, y + offset, marker, color=MUTED if baseline else COLOR, markersize=3.5, zorder=4)
        axes.text(1.02, y, f"{mean:.1f}", transform=axes.get_yaxis_transform(), va="center", fontsize=9,
                  weight="bold" if name == best else "normal")  # fmt: skip
    axes.set_yticks(range(len(scores)), list(scores), fontsize=9)


def draw_differences(axes, lines: dict, best: str | None):
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    if best is None:
        return axes.set_visible(False)
    theirs = scores_by_seed(lines[best], "test_acc")
    gains = {name: [100 * x for x in differences(scores_by_seed(b, "test_acc"), theirs)] for name, b in lines.items()}
    bars = {name: mean_and_interval(values) for name, values in gains.items() if values and name != best}
    extents = {name: abs(mean) + half for name, (mean, half) in bars.items()}
    # The study's own lines set the range. An arrow at the edge marks baselines far outside.
    own = max([1.0, *(extent for name, extent in extents.items() if not is_baseline(lines[name]))])
    limit = 1.05 * max([own, *(extent for extent in extents.values() if extent < 2 * own)])
    for y, name in enumerate(lines):
        color = MUTED if is_baseline(lines[name]) else COLOR
        if name == best:
            axes.text(0, y, " best baseline", va="center", fontsize=9, weight="bold")
        elif name in bars:
            mean, half = bars[name]
            axes.text(1.02, y, f"{mean:+.1f}", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
            if extents[name] > limit:
                axes.plot(limit if mean > 0 else -limit, y, ">" if mean > 0 else "<", color=color, clip_on=False)
            else:
                axes.plot([mean - half, mean + half], [y, y], color=color, linewidth=2, solid_capstyle="butt")
                axes.plot(mean, y, "D", color=color, markersize=5)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xlim(-limit, limit)


def mean_and_interval(values: Collection[float]) -> tuple[float, float]:
    return mean_and_std(values)[0], interval(values) or 0


def swarm(values: list[float], near: float) -> list[float]:
    """Vertical offsets that separate values closer than ``near``, for lines at distance 1."""
    steps: list[int] = []
    for i, x in enumerate(values):
        used = {steps[j] for j in range(i) if abs(values[j] - x) < near}
        nearest_first = sorted(range(-len(values), len(values)), key=abs)
        steps.append(next(step for step in nearest_first if step not in used))
    size = min(0.13, 0.31 / max(1, *map(abs, steps)))
    return [size * step for step in steps]
