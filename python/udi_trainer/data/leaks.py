"""Warnings about columns and files that tell the label where the files themselves may say nothing."""

import re
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from ..console import log
from .rows import RESERVED, Rows, counts_rows

INDEX_NAME = re.compile(r"unnamed: ?\d+|index|row|level_\d+", re.IGNORECASE)  # pandas' names among them


def warn_about_columns(source: Rows, names: Sequence[str], labels: Sequence[str]) -> None:
    """Warns of columns that seem to be a reserved one, that look like an index, or that alone determine the label."""
    for name in names:
        if close := get_close_matches(name.lower(), RESERVED, n=1, cutoff=0.8):
            log.warning("column %s is read as a modality, not as %s: rename it if it is meant as such", name, close[0])
        cells = [row[name] for row in source.rows]
        if INDEX_NAME.fullmatch(name) or counts_rows(cells):
            log.warning("column %s looks like an index of the rows: --ignore %r leaves it out", name, name)
        elif count := determines(cells, labels):
            log.warning(
                "column %s alone determines the label (each of its %d values has one): --ignore %r leaves it out",
                name, count, name,
            )  # fmt: skip


def determines(cells: Sequence[str], labels: Sequence[str]) -> int:
    """How many values the cells have if each has one label only, else 0.

    Values that occur once say nothing of it: half of the samples must share theirs with another one.
    """
    pairs = [(cell, label) for cell, label in zip(cells, labels, strict=True) if cell and label]
    counts = Counter(cell for cell, _ in pairs)
    shared = sum(count for count in counts.values() if count > 1)
    if 2 * shared < len(pairs):
        return 0
    found = {pair for pair in pairs if counts[pair[0]] > 1}  # one for each value if it has one label
    pure = len(found) == len({cell for cell, _ in found})
    return len(counts) if pure and len({label for _, label in found}) > 1 else 0


def warn_about_shared_files(
    source: Rows, kept: Sequence[int], splits: Sequence[str], name: str, keys: Sequence[bytes], cells: Sequence
) -> None:
    """Warns if validation or test has a file of a training sample: the score would reward memorization.

    Args:
        kept: the rows of the samples; ``splits`` is of all rows.
        keys, cells: of the samples, in the column of this name.
    """
    of_files = [(key, i) for key, i, cell in zip(keys, kept, cells, strict=True) if cell and isinstance(cell[0], Path)]
    trained = {key for key, i in of_files if splits[i] == "train"}
    shared = [i for key, i in of_files if splits[i] != "train" and key in trained]
    if shared:
        log.warning(
            "%s: %s is the same as that of a training sample (%d such)", source.location(shared[0]), name, len(shared)
        )
