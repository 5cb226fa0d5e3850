"""New files, read as the run that made a recipe has read its own: the same kinds, shapes, medians and categories."""

from collections.abc import Sequence
from typing import Any

import torch

from ..console import log
from ..errors import UserError, short
from ..options import Options
from . import kinds
from .cache import CacheOptions
from .dataset import Split
from .kinds import Damage
from .manifest import (
    PREPROCESSING,
    Spec,
    check_cells,
    collect_cells,
    load_columns,
    log_notes,
    presences,
    report_bad_rows,
)
from .rows import RESERVED, Rows, find_labels


def samples(
    source: Rows, recipe: dict[str, Any], classes: Sequence[str], skip_bad: bool = False, cache_dir: str | None = None
) -> Split:
    """The samples of these rows. Labels that are missing, or none of the classes, are -1.

    Raises a UserError that names the first unusable sample. With ``skip_bad`` such samples are left out and listed.
    """
    parts = recipe["modalities"]
    specs = {
        m: Spec(kinds.kinds.find(part["kind"]), tuple(part["columns"]), frozenset(part["words"]))
        for m, part in parts.items()
    }
    read = [name for spec in specs.values() for name in spec.columns]
    header = list(source.rows[0])
    for name in read:
        if name not in header:
            has = short(", ".join(header))
            raise UserError(
                f"{source.source} lacks the column {name}, which the run reads (cells may be empty): it has {has}"
            )
    if others := [name for name in header if name not in {*read, *RESERVED}]:
        log.info("%s: columns that the run does not read: %s", source.source, short(", ".join(others)))
    own = {"cache_dir": cache_dir, "skip_bad": skip_bad}
    options = Options.of_flat(recipe["options"] | own, (*PREPROCESSING, CacheOptions, Damage))
    cells = collect_cells(source, specs)
    bad = check_cells(source, cells, specs, recipe["empty_numbers"])
    kept = list(range(len(source.rows)))
    states = {m: part["state"] for m, part in parts.items()}
    while True:
        report_bad_rows(source, {i: bad[i] for i in kept if i in bad}, skip_bad)
        kept = [i for i in kept if i not in bad]
        if not kept:
            raise UserError(f"{source.source}: no sample is left")
        loaded, bad = load_columns(specs, cells, kept, options, states=states)
        if not bad:
            break
    log_notes(loaded)
    index = {name: c for c, name in enumerate(classes)}
    labels = [index.get(label, -1) for label in find_labels(source)] if "label" in header else [-1] * len(source.rows)
    stored = {m: tensor for m, (_, _, tensor) in loaded.items() if tensor is not None} | presences(cells, kept)
    return Split(torch.tensor([labels[i] for i in kept]), stored, [source.id(i) for i in kept])
