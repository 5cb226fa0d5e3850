"""From the records of runs to what tables and plots show: entries by seed, means, paired differences, intervals."""

import statistics
from collections.abc import Collection

from scipy.stats import t


def spread(values: Collection[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation of a sample (None of one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def interval(values: Collection[float], level: float = 0.95) -> float | None:
    """Half the t confidence interval of the mean; None of one value."""
    std, n = spread(values)[1], len(values)
    return None if std is None else float(t.ppf((1 + level) / 2, n - 1)) * std / n**0.5


def differences(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Of scores by seed, for the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def paired(ours: dict, theirs: dict) -> str:
    """The mean difference of test accuracy in points and its interval, of entries by seed."""
    values = [100 * x for x in differences(column(ours, "test_acc"), column(theirs, "test_acc"))]
    if not values:
        return ""
    mean, half = spread(values)[0], interval(values)
    return f"{mean:+.2f}" + ("" if half is None else f" [{mean - half:+.2f}, {mean + half:+.2f}]")


def gather(study, records: list[dict]) -> dict:
    """{(condition, section): {name: {seed: Entry}}}, of an entry that several variants share the first one's."""
    tables = {}
    for record in records:
        for entry in study.entries(record):
            lines = tables.setdefault((record["condition"], entry.section), {})
            lines.setdefault(entry.name, {}).setdefault(record["seed"], entry)
    return {key: lines for key, lines in tables.items() if not all(map(is_baseline, lines.values()))}


def is_baseline(by_seed: dict) -> bool:
    return next(iter(by_seed.values())).baseline


def column(by_seed: dict, key: str) -> dict[int, float]:
    """This score by seed."""
    return {seed: entry.scores[key] for seed, entry in by_seed.items() if key in entry.scores}


def best_baseline(lines: dict) -> str | None:
    """Its name, by mean validation accuracy, never by test; the first of equals; None without baselines."""
    merits = {name: spread(column(b, "val_acc").values())[0] for name, b in lines.items() if is_baseline(b)}
    return max(merits, key=merits.get, default=None)


def title(condition: str, section: str) -> str:
    return ": ".join(filter(None, (condition, section)))
