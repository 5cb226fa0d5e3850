"""The tables of a study, compared with scipy."""

import pytest
import scipy.stats

from studies import summary
from studies.command import main
from studies.study import Variant

from .helpers import line, table


def test_table_against_scipy():
    assert main(["stub"]) == 0
    ours, baseline = [0.6, 0.61, 0.64], [0.5, 0.51, 0.52]
    cells = line(table(), "ours")
    assert cells[1] == f"{100 * sum(ours) / 3:.2f} ± {100 * scipy.stats.tstd(ours):.2f}"
    low, high = scipy.stats.ttest_rel(ours, baseline).confidence_interval(0.95)
    gain = sum(ours) / 3 - sum(baseline) / 3
    assert cells[3] == f"{100 * gain:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    assert cells[4] == "3"


def test_best_baseline_is_chosen_on_validation():
    """b is far better on test, but a is better on validation."""
    assert main(["stub"]) == 0
    assert line(table(), "a alone")[3] == "best baseline"
    assert line(table(), "b alone")[3].startswith("+44.00")


def test_collapse_is_counted_and_named():
    assert main(["stub"]) == 0
    assert line(table(), "ours")[5] == "1" and line(table().split("### follower b")[1], "ours")[5] == "1"
    assert "Collapsed: ours, seed 0: follower b: it fell." in table()


def test_differences_pair_seeds():
    assert summary.differences({0: 3.0, 1: 5.0, 4: 9.0}, {1: 1.0, 4: 2.0, 7: 0.0}) == [4.0, 7.0]
    values = [0.1, 0.4, -0.2, 0.3]
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert summary.interval(values) == pytest.approx((high - low) / 2)
    assert summary.interval([0.5]) is None


def test_one_seed_has_no_spread():
    assert main(["stub", "--seeds", "1,"]) == 0
    assert line(table(), "ours")[1] == "61.00" and line(table(), "ours")[3] == "+10.00"


def test_conditions_have_baselines_of_their_own(stub):
    stub.variants = [Variant("ours", "--skill 0.6", condition=c) for c in ("clean", "noisy")]
    assert main(["stub", "--seeds", "2"]) == 0
    assert "### clean: prediction" in table() and "### noisy: prediction" in table()
    assert table().count("| a alone ") == 2
