"""Datasets from a manifest: a CSV with one row per sample and one column per modality.

The columns ``label``, ``split``, ``group`` and ``id`` are reserved. Every other column is a modality and contains paths
(relative to the CSV's folder, several separated by ``;``), text or numbers. Columns of numbers are combined into
tables. A sample with an empty cell lacks the modality.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..console import log
from ..errors import UserError, choose, short
from ..options import Group, Options, assignments, fields_of, flag, names, one_of, option, pathname, reads
from ..registry import datasets
from . import kinds
from .cache import Cache, CacheOptions
from .dataset import Dataset, Modality, Split, presence
from .kinds import (
    LISTED,
    MISSING,
    STATISTICS_SAMPLES,
    ArrayOptions,
    AugmentationOptions,
    Cell,
    Column,
    Damage,
    Kind,
    PictureOptions,
    SoundOptions,
)
from .leaks import warn_about_columns, warn_about_shared_files
from .rows import RESERVED, Rows, find_labels, label_order, read
from .splits import SPLIT_FRACTIONS, SPLITS, find_splits
from .tables import Table

MAX_NUMBER = torch.finfo(torch.float32).max  # numbers are stored as float32
FEW_VALUES = 20  # a column of so few words may be meant as categories

LoadedColumn = tuple[Kind, list[bytes], torch.Tensor | None]  # the keys of its cells, the stored samples


@dataclass(frozen=True, kw_only=True)
class ManifestFile(Group, title="data of your own"):
    manifest: str | None = option(
        None,
        pathname,
        "CSV file of --dataset manifest: one column per modality, and label, split, group, id",
        "FILE",
        movable=True,
    )


@dataclass(frozen=True, kw_only=True)
class Columns(Group, title="data of your own"):
    kinds: dict[str, str] | None = option(
        None,
        assignments,
        "what columns hold, where file endings do not tell: image, frames, flow, audio, video, videosound (the sound"
        " track), array, text or number",
        "COLUMN=KIND,...",
    )
    tables: dict[str, str] | None = option(
        None,
        assignments,
        "modalities of several columns of numbers, or of words as categories, by name; patterns such as rna* count",
        "NAME=COLUMN+COLUMN,...",
        "one modality of all numbers, called table",
    )
    columns: tuple[str, ...] | None = option(
        None, names, "the columns that are modalities, or patterns of them", "A,B", "all but the reserved ones"
    )
    ignore: tuple[str, ...] = option((), names, "columns to leave out, or patterns of them", "A,B", "none")
    empty_numbers: str = option(
        "impute",
        one_of("impute", "refuse"),
        "an empty number beside others in a table: impute (the median of training, and an indicator) or refuse",
    )
    allow_missing: bool = option(
        False, flag, "keep samples with empty cells, and train on the modalities that they have"
    )


PREPROCESSING = (PictureOptions, SoundOptions, ArrayOptions, AugmentationOptions)  # what the kinds read
BUILD = (Columns, Damage, CacheOptions, *PREPROCESSING)  # what `build` reads


@dataclass(frozen=True)
class Spec:
    """What a modality is made of: its kind, its column or those of a table, and which of the latter hold words."""

    kind: type[Kind]
    columns: tuple[str, ...]
    words: frozenset[str] = frozenset()

    def described(self, state: dict[str, Any]) -> dict[str, Any]:
        """As plain values, with the state of the kind."""
        name = next(name for name, kind in kinds.kinds.items() if kind is self.kind)
        return {"kind": name, "columns": list(self.columns), "words": sorted(self.words), "state": state}


@datasets.register("manifest")
@reads(ManifestFile, *BUILD)
def manifest(options: Options) -> Dataset:
    """A CSV of your own, see --manifest."""
    file = options.of(ManifestFile).manifest
    if file is None:
        raise UserError("dataset manifest needs --manifest FILE, a CSV with one column per modality and a column label")
    return build(read(file), options)


def build(source: Rows, options: Options) -> Dataset:
    """Reads all files into a dataset.

    Raises a UserError that names the first unusable sample and the reason. With ``skip_bad`` unusable samples are left
    out and listed instead.
    """
    chosen = options.of(Columns)
    source, columns = select_columns(source, chosen)
    labels = find_labels(source)
    if chosen.columns is None:
        warn_about_columns(source, columns, labels)
    specs = find_specs(source, columns, chosen)
    cells = collect_cells(source, specs)
    bad = check_rows(source, cells, specs, labels, chosen)
    splits = find_splits(source, labels)
    kept = list(range(len(labels)))
    while True:
        report_bad_rows(source, {i: bad[i] for i in kept if i in bad}, options.of(Damage).skip_bad)
        kept = [i for name in SPLIT_FRACTIONS for i in kept if splits[i] == name and i not in bad]
        check_remaining(source, kept, splits, cells, specs)
        if errors := unseen_classes(kept, splits, labels):
            bad |= errors
            continue
        training = [row for row, i in enumerate(kept) if splits[i] == "train"]
        loaded, errors = load_columns(specs, cells, kept, options, training)
        if not errors:
            break
        bad |= errors

    suggest_categories(source, specs, [kept[row] for row in training])
    log_notes(loaded)
    classes = sorted({labels[i] for i in kept if labels[i]}, key=label_order)
    class_index = {label: c for c, label in enumerate(classes)} | {"": -1}
    split_of = {name: [row for row, i in enumerate(kept) if splits[i] == name] for name in SPLIT_FRACTIONS}
    stored = {m: tensor for m, (_, _, tensor) in loaded.items() if tensor is not None}
    for m, (kind, keys, _) in loaded.items():
        warn_about_shared_files(source, kept, splits, m, keys, kind.column.cells)
    ids = [source.id(i) for i in kept]
    made: dict[str, Split] = {}
    modalities: dict[str, Modality] = {}
    labelled = [row for row in split_of["train"] if class_index[labels[kept[row]]] >= 0]
    for m, (kind, keys, _) in loaded.items():
        rows = [row for row in labelled if cells[m][kept[row]] is not None]
        if not rows:
            raise UserError(f"{source.source}: no training sample has {m}")
        rows = rows[:: math.ceil(len(rows) / STATISTICS_SAMPLES)]
        modalities[m] = kind.modality(m, stored[m][rows], [keys[row] for row in rows])
    stored |= presences(cells, kept)
    for name, rows in split_of.items():
        span = slice(rows[0], rows[-1] + 1)  # rows are sorted by split, so slices need no copy
        tensors = {stored_name: tensor[span] for stored_name, tensor in stored.items()}
        made[name] = Split(torch.tensor([class_index[labels[i]] for i in kept[span]]), tensors, ids[span])
    name = Path(source.source).stem
    shapes = ", ".join(f"{m} {'x'.join(map(str, modalities[m].sample(made['train']).shape[1:]))}" for m in modalities)
    counts = ", ".join(f"{len(split)} {name}" for name, split in made.items())
    log.info(f"{name}: {counts}; {len(classes)} classes; {shapes}")
    recipe: dict[str, Any] | None = {
        "options": {n: v for n, v in options.flat().items() if any(n in fields_of(group) for group in PREPROCESSING)},
        "empty_numbers": chosen.empty_numbers,
        "modalities": {m: specs[m].described(kind.state) for m, (kind, *_) in loaded.items()},
    }
    if not is_plain(recipe):  # of a kind of the user's own
        log.info("%s: predict will not read new files, as a kind of column has state that is no plain value", name)
        recipe = None
    checked = frozenset(specs)
    return Dataset(len(classes), modalities, **made, name=name, class_names=classes, checked=checked, recipe=recipe)


def is_plain(value: Any) -> bool:
    """Whether a run folder can keep the value without running code when it is loaded."""
    if isinstance(value, dict):
        return all(is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str, torch.dtype, torch.Tensor)


def load_columns(
    specs: Mapping[str, Spec],
    cells: Mapping[str, list[Cell]],
    kept: Sequence[int],
    options: Options,
    training: Sequence[int] = (),
    states: Mapping[str, dict] | None = None,
) -> tuple[dict[str, LoadedColumn], dict[int, str]]:
    """The columns of the kept rows by modality, and the reasons for unreadable ones by row.

    Args:
        training: which of the kept rows are for training.
        states: of the kinds in an earlier run, if they are those of new files.
    """
    cache = Cache(options.of(CacheOptions).cache_dir)
    loaded: dict[str, LoadedColumn] = {}
    errors: dict[int, str] = {}
    for m, spec in specs.items():
        column = Column(m, [cells[m][i] for i in kept], options, cache, {}, training)
        loaded[m] = load_column(spec.kind(column), states[m] if states else None)
        for row, reason in column.bad.items():
            errors.setdefault(kept[row], f"column {m}: {reason}")
        if lacking := [row for row in column.lacking if row not in column.bad]:
            some = ", ".join(column.lacking[row] for row in lacking[:LISTED])
            log.warning("column %s is empty in %d of %d rows: %s", m, len(lacking), len(kept), some)
            for row in lacking:
                cells[m][kept[row]] = None
    for i in kept:
        if all(column[i] is None for column in cells.values()):
            errors.setdefault(i, "all modalities are empty")
    return loaded, errors


def log_notes(loaded: Mapping[str, LoadedColumn]) -> None:
    for kind, *_ in loaded.values():
        for note in kind.notes:
            log.warning(note)


def load_column(kind: Kind, state: dict | None = None) -> LoadedColumn:
    """Reads a column's headers and samples; errors are recorded in its ``bad``, and there is no tensor then.

    ``state``: what an earlier run has configured; by default the headers determine it, those of training files if there
    are any.
    """
    keys = kind.keys()
    headers = None if kind.column.bad else kind.read_headers(keys)
    if headers is None:
        return kind, keys, None
    present = [row for row, key in enumerate(keys) if key != MISSING]
    if state is None:
        own = vars(kind).keys() | {"state"}
        of_training = np.isin(present, kind.column.training)
        kind.configure(headers[of_training] if of_training.any() else headers)
        kind.state = {name: value for name, value in vars(kind).items() if name not in own}
    else:
        vars(kind).update(state)
    kind.review(headers, present)
    column = kind.column
    for row, reason in column.lacking.items():
        if row in column.training and not column.options.of(Columns).allow_missing:
            column.bad[row] = f"{reason} (--allow-missing trains on the other modalities)"
        else:
            column.cells[row], keys[row] = None, MISSING
    return kind, keys, None if kind.column.bad else kind.read(keys)


def presences(cells: Mapping[str, list[Cell]], kept: Sequence[int]) -> dict[str, torch.Tensor]:
    """The stored tensors that mark which of the kept rows have a modality, for those that some lack."""
    has = {m: torch.tensor([column[i] is not None for i in kept]) for m, column in cells.items()}
    return {presence(m): mask for m, mask in has.items() if not mask.all()}


# --- columns and their kinds ---


def select_columns(source: Rows, options: Columns) -> tuple[Rows, list[str]]:
    """The rows without ignored columns, and the columns of modalities, by --columns and --ignore."""
    header = list(source.rows[0])
    ignored = {name for pattern in options.ignore for name in matching("column", pattern, header)}
    if "label" in ignored:
        raise UserError("--ignore label: training needs the labels")
    rows = [{name: cell for name, cell in row.items() if name not in ignored} for row in source.rows]
    columns = [name for name in header if name not in {*RESERVED, *ignored}]
    if options.columns is not None:
        chosen = {name for pattern in options.columns for name in matching("column", pattern, columns)}
        columns = [name for name in columns if name in chosen]
    return (replace(source, rows=rows) if ignored else source), columns


def matching(what: str, pattern: str, columns: Sequence[str]) -> list[str]:
    """The columns that a name or a pattern refers to; a UserError if there are none."""
    found = [pattern] if pattern in columns else [name for name in columns if fnmatchcase(name, pattern)]
    return found or [choose(what, pattern, columns)]


def find_specs(source: Rows, columns: Sequence[str], options: Columns) -> dict[str, Spec]:
    """The modalities: a column each, and tables of several, by --tables; other numbers are one table."""
    given = options.kinds or {}
    for name in columns:
        if not any(row[name] for row in source.rows):
            raise UserError(f"{source.source}: column {name} is empty (--ignore {name!r} leaves it out)")
    for name in given:
        choose("column", name, columns)
    kind_of = {name: kinds.kinds.find(given.get(name) or guess_kind(source, name)) for name in columns}
    usable = [name for name in columns if kind_of[name] in (Table, kinds.Text)]
    tables: dict[str, list[str]] = {}
    for table, patterns in (options.tables or {}).items():
        found = [name for p in patterns.split("+") for name in matching("column of numbers or words", p, usable)]
        tables[table] = list(dict.fromkeys(found))
        if table in columns and table not in tables[table]:
            raise UserError(f"--tables {table}: there is a column of this name, choose another one")
    used = {name for found in tables.values() for name in found}
    specs = {m: Spec(kind, (m,)) for m, kind in kind_of.items() if kind is not Table and m not in used}
    if rest := [name for name in columns if kind_of[name] is Table and name not in used]:
        if "table" in specs or "table" in tables:
            raise UserError(
                f"columns {short(', '.join(rest))} would be the modality table, but there is one of this name: rename"
                " it, or name a table for them by --tables"
            )
        tables["table"] = rest
    for table, found in tables.items():
        specs[table] = Spec(Table, tuple(found), frozenset(name for name in found if kind_of[name] is not Table))
    if len(specs) == 1:
        ((m, spec),) = specs.items()
        of = f" of the columns {short(', '.join(spec.columns))}" if len(spec.columns) > 1 else ""
        hint = f": --tables a={spec.columns[0]},b=... makes several of them" if of else ""
        raise UserError(f"{source.source} has one modality, {m}{of}, and two or more are needed{hint}")
    return specs


def suggest_categories(source: Rows, specs: Mapping[str, Spec], training: Sequence[int]) -> None:
    """Tells of columns of text that may be meant as categories."""
    for m, spec in specs.items():
        values = sorted({source.rows[i][m] for i in training} - {""}) if spec.kind is kinds.Text else []
        if 0 < len(values) <= min(FEW_VALUES, len(training) - 1) and not values[0].lower().endswith(".txt"):
            log.info(
                "column %s is read as text and has %d values in training (%s): --tables NAME=%s makes them categories",
                m, len(values), short(", ".join(values)), m,
            )  # fmt: skip


def guess_kind(source: Rows, name: str) -> str:
    """The name of a column's kind, from its cells."""
    values = [row[name] for row in source.rows if row[name]]
    if sum(map(is_number, values)) > len(values) / 2:  # check_rows reports the others
        return "number"
    hints = {value: hint for value in values if (hint := no_number(value))}
    if hints and sum(value in hints or is_number(value) for value in values) > len(values) / 2:
        value, hint = next(iter(hints.items()))
        raise UserError(f"{source.source}: column {name} contains {short(value)!r}, {hint} (or --kinds {name}=text)")
    existing = [value for value in values[:100] if os.path.exists(paths_of(value, source.folder)[0])]
    value = next(iter(existing), values[0])
    paths = paths_of(value, source.folder)
    suffix = kinds.split_row(paths[0])[0].suffix.lower()
    for kind, suffixes in {
        "image": kinds.IMAGES,
        "audio": kinds.SOUNDS,
        "video": kinds.VIDEOS,
        "array": kinds.ARRAYS,
        "text": (".txt",),
    }.items():
        if suffix in suffixes:
            return "frames" if kind == "image" and len(paths) > 1 else kind
    if os.path.isdir(paths[0]) and len(existing) > len(values[:100]) / 2:  # a word may be a folder's name, too
        return "flow" if len(paths) == 2 or (paths[0] / "u").is_dir() else "frames"
    if re.fullmatch(r"\S*\.\w{1,5}|\S*[/\\]\S*", value):
        missing = "" if os.path.exists(paths[0]) else ", and there is no such file"
        how = f"give --kinds {name}=KIND, one of {', '.join(kinds.kinds)}"
        raise UserError(f"{source.source}: column {name} contains {short(value)!r}{missing}: {how}")
    return "text"


def is_number(cell: str) -> bool:
    try:
        float(cell)
        return "_" not in cell  # which Python would read over
    except ValueError:
        return False


def no_number(cell: str) -> str | None:
    """Why a cell that a person would read as numbers is none, or None."""
    if re.fullmatch(r"[+-]?\d+(,\d+)+|[+-]?\d{1,3}(\.\d{3})*,\d+", cell):
        return "no number: write decimals with a point, and thousands without a separator"
    if re.fullmatch(r"[\[(].*[\])]", cell, re.DOTALL) and all(map(is_number, re.split(r"[\s,;]+", cell[1:-1].strip()))):
        return "a list: give each of its numbers a column, or save it as .npy and give the path"
    return None


def paths_of(cell: str, folder: Path) -> list[Path]:
    """The paths in a cell, relative to the folder. A cell with a semicolon is one path if that file exists."""
    path = folder / os.path.expanduser(cell)
    if ";" not in cell or os.path.exists(path):
        return [path]
    return [folder / os.path.expanduser(part.strip()) for part in cell.split(";") if part.strip()] or [path]


def collect_cells(source: Rows, specs: Mapping[str, Spec]) -> dict[str, list[Cell]]:
    """The cells of each modality, in the form that its kind takes; None where empty."""

    def cell_of(spec: Spec, row: Mapping[str, str]) -> Cell:
        if spec.kind is Table:
            cells = [(name, row[name]) for name in spec.columns]
            values = [x if name in spec.words else float(x) if is_number(x) else math.nan for name, x in cells]
            return values if any(x for _, x in cells) else None
        cell = row[spec.columns[0]]
        if not cell:
            return None
        text = spec.kind is kinds.Text and not cell.lower().endswith(".txt")
        return cell if text else paths_of(cell, source.folder)

    return {m: [cell_of(spec, row) for row in source.rows] for m, spec in specs.items()}


# --- checks of rows ---


def check_rows(
    source: Rows, cells: Mapping[str, list[Cell]], specs: Mapping[str, Spec], labels: Sequence[str], options: Columns
) -> dict[int, str]:
    """The errors in the table itself, by row."""
    bad = check_cells(source, cells, specs, options.empty_numbers)
    for i, row in enumerate(source.rows):
        split = SPLITS.get(row.get("split", "").lower())
        lacking = next((m for m, column in cells.items() if column[i] is None), None)
        if "split" in row and split is None:
            bad[i] = f"split {row['split']!r} is not train, val or test"
        elif not labels[i] and split != "train":
            means = f"label {row['label']} means no label" if row["label"] else "no label"
            bad[i] = f"{means} (only training rows may lack one)"
        elif lacking and not options.allow_missing and split in ("train", None):
            bad.setdefault(i, f"column {lacking} is empty (--allow-missing trains on the other modalities)")
    return bad


def check_cells(
    source: Rows, cells: Mapping[str, list[Cell]], specs: Mapping[str, Spec], empty_numbers: str
) -> dict[int, str]:
    """The errors in the cells of modalities, and in ids, by row."""
    bad: dict[int, str] = {}
    seen: dict[str, int] = {}
    for i, row in enumerate(source.rows):
        wrong = (wrong_number(row, spec, cells[m][i], empty_numbers) for m, spec in specs.items())
        if all(column[i] is None for column in cells.values()):
            bad[i] = "all modalities are empty"
        elif reason := next(filter(None, wrong), None):
            bad[i] = reason
        elif name := row.get("id"):
            if name in seen:
                bad[i] = f"id {name!r} is also used in {source.location(seen[name])}"
            seen.setdefault(name, i)
    return bad


def wrong_number(row: Mapping[str, str], spec: Spec, cell: Cell, empty_numbers: str) -> str | None:
    """What is wrong with the numbers of a table's cell, or None."""
    if spec.kind is not Table or cell is None:
        return None
    for name, x in zip(spec.columns, cell, strict=True):
        if isinstance(x, str) or abs(x) <= MAX_NUMBER:
            continue
        if row[name]:
            hint = no_number(row[name])
            return f"column {name} contains {short(row[name])!r}, {hint or 'which is not a finite number'}"
        if empty_numbers == "refuse":
            return f"column {name} is empty (--empty-numbers impute takes the median of training)"
    return None


def report_bad_rows(source: Rows, bad: Mapping[int, str], skip: bool) -> None:
    """Raises an error for the first bad row; with ``skip`` lists all of them instead."""
    if not bad:
        return
    lines = [f"{source.location(i)}: {bad[i]}" for i in sorted(bad)]
    if not skip:
        more = f"; and {len(lines) - 1} more" if len(lines) > 1 else ""
        raise UserError(f"{lines[0]}{more} (--skip-bad leaves them out and lists them)")
    for line in lines:
        log.warning("left out: %s", line)


def check_remaining(
    source: Rows,
    kept: Sequence[int],
    splits: Sequence[str],
    cells: Mapping[str, list[Cell]],
    specs: Mapping[str, Spec],
) -> None:
    """Checks that every split, every modality and every column of a table still has samples."""
    for name in SPLIT_FRACTIONS:
        if not any(splits[i] == name for i in kept):
            raise UserError(f"{source.source}: no sample is left for {name}")
    for m, column in cells.items():
        if all(column[i] is None for i in kept):
            raise UserError(f"{source.source}: no sample is left that has {m}")
        for name in specs[m].columns if specs[m].kind is Table else ():
            if not any(source.rows[i][name] for i in kept if splits[i] == "train"):
                raise UserError(
                    f"{source.source}: column {name} is empty in training (--ignore {name!r} leaves it out)"
                )


def unseen_classes(kept: Sequence[int], splits: Sequence[str], labels: Sequence[str]) -> dict[int, str]:
    """The samples whose class does not occur in training, with the reason."""
    trained = {labels[i] for i in kept if splits[i] == "train"}
    return {
        i: f"label {labels[i]!r} is in {splits[i]}, but no training sample has it"
        for i in kept
        if labels[i] not in trained
    }
