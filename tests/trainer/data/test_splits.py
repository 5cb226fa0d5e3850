"""Drawn splits: stratified, by group, and every class trains."""

import random
from collections import Counter, defaultdict

import pytest

from udi_trainer import UserError
from udi_trainer.data.rows import Rows
from udi_trainer.data.splits import SPLIT_FRACTIONS, draw_splits, find_splits


def test_drawn_splits_are_stratified_and_the_same_again():
    labels = ["x"] * 700 + ["y"] * 200 + ["z"] * 100
    names = draw_splits(labels, [str(i) for i in range(1000)], {"train": 0.7, "val": 0.15, "test": 0.15})
    assert names == draw_splits(labels, [str(i) for i in range(1000)], {"train": 0.7, "val": 0.15, "test": 0.15})
    for label, count in Counter(labels).items():
        got = Counter(name for name, x in zip(names, labels, strict=True) if x == label)
        assert abs(got["train"] - 0.7 * count) <= 2 and abs(got["val"] - got["test"]) <= 2


def test_groups_stay_together():
    pick = random.Random(0)
    groups = [f"g{pick.randrange(40)}" for _ in range(1000)]
    labels = [str(pick.randrange(5)) for _ in groups]
    names = draw_splits(labels, groups, {"train": 0.7, "val": 0.15, "test": 0.15})
    homes = {}
    for group, name in zip(groups, names, strict=True):
        assert homes.setdefault(group, name) == name
    counts = Counter(names)
    assert 600 < counts["train"] < 800 and counts["val"] > 100 and counts["test"] > 100


def test_three_groups_are_enough_and_two_are_not():
    shares = {"train": 0.7, "val": 0.15, "test": 0.15}
    assert sorted(set(draw_splits(["a", "b"] * 9, list("xxyyzz") * 3, shares))) == ["test", "train", "val"]
    with pytest.raises(UserError, match="2 groups"):
        draw_splits(["a", "b"] * 4, list("xxyy") * 2, shares)


def test_no_class_is_left_out_of_training(caplog):
    """Random classes and groups. Ties by rounding errors, and classes of one group, once left some out."""
    draws = 0
    for seed in range(3):
        pick = random.Random(seed)
        for _ in range(300):
            labels, groups, groups_of = [], [], defaultdict(set)
            for c in range(pick.randrange(2, 12)):
                for g in range(pick.choice([1, 2, 3, 6])):
                    size = pick.choice([1, 2, 5, 10, 30])
                    labels += [f"c{c}"] * size
                    groups += [f"g{c}-{g}"] * size
                    groups_of[f"c{c}"].add(f"g{c}-{g}")
            spare = sum(len(own) - 1 for own in groups_of.values())  # groups that training can do without
            if spare < 2:
                with pytest.raises(UserError, match="too few"):
                    draw_splits(labels, groups, SPLIT_FRACTIONS)
                continue
            names = draw_splits(labels, groups, SPLIT_FRACTIONS)
            assert {label for label, name in zip(labels, names, strict=True) if name == "train"} == set(labels)
            assert set(names) == set(SPLIT_FRACTIONS)
            draws += 1
    assert draws > 700


def test_the_only_group_of_a_label_trains(caplog):
    labels, groups = ["a", "b"] * 10 + ["c"] * 50, [f"g{i}" for i in range(20)] + ["single"] * 50
    names = draw_splits(labels, groups, SPLIT_FRACTIONS)
    assert set(names[20:]) == {"train"}
    assert "labels ['c'] are in one group or sample only, which is for training" in caplog.text


def test_groups_that_training_cannot_spare():
    with pytest.raises(UserError, match="3 groups are too few for train, val, test: no group is left for val, test"):
        draw_splits(["a", "b", "c"], ["x", "y", "z"], SPLIT_FRACTIONS)


def test_nothing_to_draw_from(tmp_path):
    rows = [{"label": "", "split": "train"}] * 3 + [{"label": "a", "split": "test"}]
    with pytest.raises(UserError, match="no training sample has a label, so val cannot be drawn"):
        find_splits(Rows("m.csv", tmp_path, rows), ["", "", "", "a"])
