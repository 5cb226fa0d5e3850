"""From the figures of runs to tables and plots: means over seeds, paired differences, intervals."""

import statistics

from scipy.stats import t

from report import INK, MODALITY_COLORS, MUTED

REACH = 10  # percentage points below the best mean; what lies farther off is a number at the edge of its plot
FOOTNOTE = """\
Accuracies in percent: mean ± standard deviation over the seeds. Difference: in test accuracy to the best baseline,
paired by seed, with the 95% t confidence interval of its mean; the best baseline is the one of the highest mean
validation accuracy. Seeds change initial weights and the order of samples, not the samples: the interval says nothing
about other test samples. Collapsed runs are counted, and are part of the means."""


def spread(values):
    """Mean, and the standard deviation of a sample (None of one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def interval(values, level=0.95):
    """Half the t confidence interval of the mean; None of one value."""
    std, n = spread(values)[1], len(values)
    return None if std is None else float(t.ppf((1 + level) / 2, n - 1)) * std / n**0.5


def differences(ours, theirs):
    """Of figures by seed, for the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def gather(study, runs):
    """{(condition, section): {name: {seed: Row}}}, of a row that several variants share the first one's."""
    tables = {}
    for run in runs:
        for row in study.rows(study.variant(run), run):
            rows = tables.setdefault((run["condition"], row.section), {})
            rows.setdefault(row.name, {}).setdefault(run["seed"], row)
    return {key: rows for key, rows in tables.items() if not all(is_baseline(r) for r in rows.values())}


def is_baseline(by_seed):
    return next(iter(by_seed.values())).baseline


def column(by_seed, key):
    return {seed: row.figures[key] for seed, row in by_seed.items() if key in row.figures}


def best_baseline(rows):
    """Its name, by mean validation accuracy, never by test; the first of equals; None without baselines."""
    merits = {name: spread(column(r, "val_acc").values())[0] for name, r in rows.items() if is_baseline(r)}
    return max(merits, key=merits.get, default=None)


def tables(study, runs):
    """Markdown, one table for each condition and section."""
    parts = []
    for (condition, section), rows in gather(study, runs).items():
        best = best_baseline(rows)
        columns = {head: c for head, c in study.columns.items() if any(column(r, c[0]) for r in rows.values())}
        lines = [["", *columns, "difference", "seeds", "collapsed"]]
        for name, by_seed in rows.items():
            figures = [(column(by_seed, key).values(), scale) for key, scale in columns.values()]
            cells = [show(values, scale) if values else "" for values, scale in figures]
            collapsed = "" if is_baseline(by_seed) else str(sum(bool(row.collapsed) for row in by_seed.values()))
            lines.append([name, *cells, against(by_seed, rows, best, name), str(len(by_seed)), collapsed])
        parts.append(f"### {title(condition, section)}\n\n{markdown(lines)}")
        for name, by_seed in rows.items():
            for seed, row in by_seed.items():
                if row.collapsed:
                    parts.append(f"Collapsed: {name}, seed {seed}: {row.collapsed}.")
    return "\n\n".join([*parts, FOOTNOTE])


def title(condition, section):
    return ": ".join(filter(None, (condition, section)))


def show(values, scale=1, digits=2):
    """Mean ± standard deviation."""
    mean, std = spread(values)
    return f"{scale * mean:.{digits}f}" + ("" if std is None else f" ± {scale * std:.{digits}f}")


def against(by_seed, rows, best, name):
    """The paired difference to the best baseline, as the table shows it."""
    if name == best:
        return "best baseline"
    values = differences(column(by_seed, "test_acc"), column(rows[best], "test_acc")) if best else []
    if not values:
        return ""
    mean, half = 100 * spread(values)[0], interval(values)
    return f"{mean:+.2f}" + ("" if half is None else f" [{mean - 100 * half:+.2f}, {mean + 100 * half:+.2f}]")


def markdown(lines):
    """A table that is readable as it stands too: first column left, the others right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [[f"{x:{'>' if i else '<'}{widths[i]}}" for i, x in enumerate(line)] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (padded[0], rule, *padded[1:]))


def new_figure(width, height):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    return figure


def draw(study, runs, path):
    """Test accuracy of every line of the tables: a dot a seed (a cross where it collapsed), the mean, its interval."""
    tables = gather(study, runs)
    heights = [len(rows) for rows in tables.values()]
    figure = new_figure(9, 0.9 * len(tables) + 0.42 * sum(heights))
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=[n + 0.8 for n in heights])[:, 0]
    for axes, ((condition, section), rows) in zip(panels, tables.items(), strict=True):
        means = {name: 100 * spread(column(by_seed, "test_acc").values())[0] for name, by_seed in rows.items()}
        floor = max(means.values()) - REACH
        for y, (name, by_seed) in enumerate(rows.items()):
            color, mean = MUTED if is_baseline(by_seed) else INK, means[name]
            if mean < floor:
                axes.text(0.005, y, f"\N{LEFTWARDS ARROW} {mean:.1f}", va="center", color=color, fontsize=9,
                          transform=axes.get_yaxis_transform())  # fmt: skip
                continue
            values = {seed: 100 * x for seed, x in column(by_seed, "test_acc").items()}
            half = interval(values.values()) or 0
            axes.plot([mean, mean], [y - 0.3, y + 0.3], color=color, linewidth=2)
            axes.barh(y, 2 * half, left=mean - half, height=0.5, color=color, alpha=0.2)
            for kind, marker in ((False, "o"), (True, "x")):
                points = [x for seed, x in values.items() if bool(by_seed[seed].collapsed) == kind]
                axes.plot(points, [y] * len(points), marker, color=MODALITY_COLORS[0], markersize=4, alpha=0.8)
        best = best_baseline(rows)
        if best and means[best] >= floor:
            axes.axvline(means[best], color=MUTED, linestyle=":", zorder=0)
        axes.use_sticky_edges = False
        axes.margins(x=0.08)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_title(title(condition, section), loc="left", fontsize=11)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("test accuracy, %: seeds (x: collapsed), mean, its 95% interval; dotted: best baseline")
    figure.savefig(path, dpi=130)
    return path.name
