"""Ranks over data sets, against the example of Demsar (JMLR 7, 2006): four classifiers on 14 data sets."""

import pytest

from studies.ranks import cliques, critical_difference, friedman, mean_ranks


def test_mean_ranks():
    scores = {"a": {"one": 0.9, "two": 0.5}, "b": {"one": 0.8, "two": 0.5}, "c": {"one": 0.7, "two": 0.6}}
    assert mean_ranks(scores) == {"a": 1.75, "b": 2.25, "c": 2.0}


def test_friedman():
    ranks = {"C4.5": 3.143, "C4.5+m": 2.0, "C4.5+cf": 2.893, "C4.5+m+cf": 1.964}
    assert friedman(ranks, 14) == pytest.approx(0.0197, abs=0.0005)  # F = 3.69 with 3 and 39 degrees of freedom
    assert friedman({"a": 1.0, "b": 2.0, "c": 3.0}, 5) == 0  # the same order everywhere


def test_critical_difference():
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.01)


def test_cliques():
    assert cliques([1.0, 1.5, 2.4, 5.0], 1.0) == [(0, 1), (1, 2)]
    assert cliques([1.0, 1.5, 2.0], 1.0) == [(0, 2)]
    assert cliques([1.0, 3.0], 1.0) == []
