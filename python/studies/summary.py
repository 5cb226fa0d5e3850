"""Statistics of the runs of a study: entries by seed, means, paired differences and confidence intervals."""

import statistics
from collections.abc import Collection

from scipy.stats import t


def mean_and_std(values: Collection[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def interval(values: Collection[float], level: float = 0.95) -> float | None:
    """Half the width of the t confidence interval of the mean; None for a single value."""
    std, n = mean_and_std(values)[1], len(values)
    return None if std is None else float(t.ppf((1 + level) / 2, n - 1)) * std / n**0.5


def differences(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Differences of scores by seed, for the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def format_difference(ours: dict, theirs: dict) -> str:
    """The mean difference in test accuracy of two {seed: entry}, in points, with its interval."""
    values = differences(scores_by_seed(ours, "test_acc"), scores_by_seed(theirs, "test_acc"))
    return mean_with_interval([100 * x for x in values]) if values else ""


def mean_with_interval(values: Collection[float]) -> str:
    """The mean with its sign, and its 95% interval."""
    mean, half = mean_and_std(values)[0], interval(values)
    return f"{mean:+.2f}" + ("" if half is None else f" [{mean - half:+.2f}, {mean + half:+.2f}]")


def collect(study, records: list[dict]) -> dict:
    """{(condition, section): {name: {seed: Entry}}}. If several variants have the same entry, the first one counts."""
    tables = {}
    for record in records:
        for entry in study.entries(record):
            lines = tables.setdefault((record["condition"], entry.section), {})
            lines.setdefault(entry.name, {}).setdefault(record["seed"], entry)
    return {key: lines for key, lines in tables.items() if not all(map(is_baseline, lines.values()))}


def is_baseline(by_seed: dict) -> bool:
    return next(iter(by_seed.values())).baseline


def scores_by_seed(by_seed: dict, key: str) -> dict[int, float]:
    """{seed: score}."""
    return {seed: entry.scores[key] for seed, entry in by_seed.items() if key in entry.scores}


def best_baseline(lines: dict) -> str | None:
    """The name of the baseline with the highest mean validation accuracy; None without baselines."""
    means = {n: mean_and_std(scores_by_seed(b, "val_acc").values())[0] for n, b in lines.items() if is_baseline(b)}
    return max(means, key=means.get, default=None)


def heading(condition: str, section: str) -> str:
    return ": ".join(filter(None, (condition, section)))
