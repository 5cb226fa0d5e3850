"""The Markdown tables of a study."""

from collections.abc import Collection, Sequence

from .summary import best_baseline, collect, format_difference, heading, is_baseline, mean_and_std, scores_by_seed

FOOTNOTE = """\
Accuracies are in percent: mean ± standard deviation over {unit}s. The difference in test accuracy is to the best
baseline, paired by {unit}, with the 95% t confidence interval of its mean. The best baseline has the highest mean
validation accuracy. {seeding} Collapsed runs are counted and included in the means."""


def tables(study, records: list[dict]) -> str:
    """One table per condition and section, and the footnote."""
    parts = []
    for (condition, section), lines in collect(study, records).items():
        best = best_baseline(lines)
        columns = {head: c for head, c in study.columns.items() if any(scores_by_seed(b, c[0]) for b in lines.values())}
        cells = [["", *columns, "difference", f"{study.unit}s", "collapsed"]]
        for name, by_seed in lines.items():
            scores = [(scores_by_seed(by_seed, key).values(), scale) for key, scale in columns.values()]
            shown = [format_scores(values, scale) if values else "" for values, scale in scores]
            collapsed = "" if is_baseline(by_seed) else str(sum(bool(entry.collapsed) for entry in by_seed.values()))
            cells.append([name, *shown, difference_cell(by_seed, lines, best, name), str(len(by_seed)), collapsed])
        parts.append(f"### {heading(condition, section)}\n\n{markdown(cells)}")
        for name, by_seed in lines.items():
            for seed, entry in by_seed.items():
                if entry.collapsed:
                    parts.append(f"Collapsed: {name}, seed {seed}: {entry.collapsed}.")
    return "\n\n".join([*parts, FOOTNOTE.format(unit=study.unit, seeding=study.seeding)])


def format_scores(values: Collection[float], scale: float = 1, digits: int = 2) -> str:
    """Mean ± standard deviation."""
    mean, std = mean_and_std(values)
    return f"{scale * mean:.{digits}f}" + ("" if std is None else f" ± {scale * std:.{digits}f}")


def difference_cell(by_seed: dict, lines: dict, best: str | None, name: str) -> str:
    """The table cell with the paired difference to the best baseline."""
    if name == best:
        return "best baseline"
    return format_difference(by_seed, lines[best]) if best else ""


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first one left, the others right."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [[f"{x:{'>' if i else '<'}{widths[i]}}" for i, x in enumerate(line)] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))
