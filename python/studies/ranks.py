"""Ranks of methods over data sets: Friedman's test, and Nemenyi's critical difference (Demsar, JMLR 7, 2006)."""

import statistics
from collections.abc import Sequence

from scipy.stats import f, rankdata, studentized_range

Scores = dict[str, dict[str, float]]  # {method: {data set: score}}, of the same data sets


def mean_ranks(scores: Scores) -> dict[str, float]:
    """The mean rank of each method; 1 is the best, and equal scores share the mean of their ranks."""
    sets = list(next(iter(scores.values())))
    ranks = [rankdata([-scores[method][name] for method in scores]) for name in sets]
    return {method: statistics.fmean(column) for method, column in zip(scores, zip(*ranks, strict=True), strict=True)}


def friedman(ranks: dict[str, float], sets: int) -> float:
    """The p-value of equal ranks, by Iman and Davenport's form of Friedman's test."""
    k = len(ranks)
    chi2 = 12 * sets / (k * (k + 1)) * (sum(r * r for r in ranks.values()) - k * (k + 1) ** 2 / 4)
    left = sets * (k - 1) - chi2
    return 0.0 if left <= 1e-9 else float(f.sf((sets - 1) * chi2 / left, k - 1, (k - 1) * (sets - 1)))


def critical_difference(methods: int, sets: int, level: float = 0.05) -> float:
    """How far two mean ranks must be apart: Nemenyi's test."""
    q = studentized_range.ppf(1 - level, methods, float("inf")) / 2**0.5
    return float(q) * (methods * (methods + 1) / (6 * sets)) ** 0.5


def cliques(ranks: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """The first and last of each maximal group of ascending ranks that are not further apart than this."""
    spans = []
    for i, rank in enumerate(ranks):
        last = max(j for j, other in enumerate(ranks) if other - rank <= difference)
        if last > i and (not spans or last > spans[-1][1]):
            spans.append((i, last))
    return spans
