"""The splits of a manifest's rows: those that it names; others are drawn, stratified by label."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence

from ..console import log
from ..errors import UserError, short
from .rows import Rows

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLITS |= {"test": "test", "testing": "test"}
SPLIT_FRACTIONS = {"train": 0.7, "val": 0.15, "test": 0.15}  # for splits that a manifest does not name


def find_splits(source: Rows, labels: Sequence[str]) -> list[str]:
    """The split of each row. Splits that the table does not name are drawn from its training samples, by group.

    Args:
        labels: of the rows; "" where there is none.
    """
    rows = source.rows
    splits = [SPLITS.get(row.get("split", "").lower(), "train") for row in rows]
    groups = [row.get("group") or f"\0{i}" for i, row in enumerate(rows)]
    absent = [name for name in ("val", "test") if name not in splits]
    if absent:
        fractions = {"train": SPLIT_FRACTIONS["train"]} | {name: SPLIT_FRACTIONS[name] for name in absent}
        pool = [i for i, name in enumerate(splits) if name == "train" and labels[i]]
        what = " and ".join(absent)
        if not pool:
            raise UserError(f"{source.source}: no training sample has a label, so {what} cannot be drawn from them")
        try:
            drawn = draw_splits([labels[i] for i in pool], [groups[i] for i in pool], fractions)
        except UserError as error:
            raise UserError(f"{source.source} has no split {what}: {error}") from None
        for i, name in zip(pool, drawn, strict=True):
            splits[i] = name
        if "split" in rows[0]:
            log.info("%s has no split %s: drawn from its training samples", source.source, what)
    splits_of_group: dict[str, dict[str, int]] = defaultdict(dict)
    for i, (group, name) in enumerate(zip(groups, splits, strict=True)):
        splits_of_group[group].setdefault(name, i)
        if len(splits_of_group[group]) > 1 and labels[i]:
            other = next(iter(splits_of_group[group].values()))
            where = f"{splits[other]} ({source.location(other)})"
            raise UserError(f"{source.location(i)}: group {group!r} is in {name}, and in {where}")
    return splits


def draw_splits(labels: Sequence[str], groups: Sequence[str], fractions: dict[str, float], seed: int = 0) -> list[str]:
    """Assigns each sample to a split, stratified by label; a group stays within one split.

    Groups are assigned in random order, the largest first, each to the split that lacks its labels most. Every label is
    in the first split, training: the only group of a label goes there, as does the last one if no other did.

    Raises:
        UserError: there are too few groups to do so.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    left = Counter(label for label, _ in {*zip(labels, groups, strict=True)})  # groups of each label
    single = {label for label, count in left.items() if count == 1}
    order = list(members)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: (all(labels[i] not in single for i in members[group]), -len(members[group])))
    if single:
        log.warning(
            "labels %s are in one group or sample only, which is for training: no other split has them",
            short(sorted(single)),
        )
    total, counts, (training, *_) = sum(fractions.values()), Counter(labels), fractions
    wanted = {name: {label: x / total * n for label, n in counts.items()} for name, x in fractions.items()}
    split_of: dict[str, str] = {}
    trained: set[str] = set()
    for remaining, group in zip(range(len(order), 0, -1), order, strict=True):
        own = Counter(labels[i] for i in members[group])
        empty = [name for name in fractions if name not in split_of.values()] if remaining <= len(fractions) else []
        # How many of this group's labels each split still lacks, relative to its size; rounded, so that ties are ties.
        lack = {
            name: round(sum(n * wanted[name][x] / counts[x] / fractions[name] for x, n in own.items()), 9)
            for name in empty or fractions
        }
        last = any(left[label] == 1 and label not in trained for label in own)
        best = training if last else max(lack, key=lambda name: lack[name])
        split_of[group] = best
        trained |= own.keys() if best == training else set()
        for label, n in own.items():
            wanted[best][label] -= n
            left[label] -= 1
    if lacking := [name for name in fractions if name not in split_of.values()]:
        raise UserError(
            f"{len(order)} groups are too few for {', '.join(fractions)}: no group is left for {', '.join(lacking)},"
            " as each is in one split only and training needs every label"
        )
    return [split_of[group] for group in groups]
