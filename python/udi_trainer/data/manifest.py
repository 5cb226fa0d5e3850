"""Datasets from a manifest: a CSV with one row per sample and one column per modality.

The columns ``label``, ``split``, ``group`` and ``id`` are reserved. Every other column is a modality and contains paths
(relative to the CSV's folder, several separated by ``;``), text or numbers. A sample with an empty cell lacks the
modality.
"""

import csv
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..console import log
from ..errors import UserError, choose
from ..options import Group, Options, assignments, flag, option, pathname, reads
from ..registry import datasets
from . import kinds
from .cache import Cache, CacheOptions
from .dataset import Dataset, Modality, Split, presence
from .kinds import (
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

RESERVED = ("label", "split", "group", "id")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLITS |= {"test": "test", "testing": "test"}
MAX_NUMBER = torch.finfo(torch.float32).max  # numbers are stored as float32
SPLIT_FRACTIONS = {"train": 0.7, "val": 0.15, "test": 0.15}  # for splits that a manifest does not name

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
        "modalities of several columns of numbers, by name",
        "NAME=COLUMN+COLUMN,...",
        "one modality of them all, called table",
    )
    allow_missing: bool = option(
        False, flag, "keep samples with empty cells, and train on the modalities that they have"
    )


# What `build` reads.
BUILD = (Columns, Damage, CacheOptions, PictureOptions, SoundOptions, ArrayOptions, AugmentationOptions)


@dataclass
class Rows:
    """A table of samples. ``source`` and ``lines``, the line number of each sample, serve error messages."""

    source: str
    folder: Path
    rows: list[dict[str, str]]
    lines: list[int] | None = None

    def location(self, i: int) -> str:
        return f"{self.source}, {f'line {self.lines[i]}' if self.lines else f'sample {i}'}"


@datasets.register("manifest")
@reads(ManifestFile, *BUILD)
def manifest(options: Options) -> Dataset:
    """A CSV of your own, see --manifest."""
    file = options.of(ManifestFile).manifest
    if file is None:
        raise UserError("dataset manifest needs --manifest FILE, a CSV with one column per modality and a column label")
    return build(read(file), options)


def read(file: str | Path) -> Rows:
    """Reads the rows of a CSV or .tsv file."""
    file = Path(file).expanduser()
    try:
        with open(file, newline="", encoding="utf-8-sig") as text:
            reader = csv.reader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
            lines = [(reader.line_num, line) for line in reader if any(cell.strip() for cell in line)]
    except OSError as error:
        raise UserError(f"manifest {file} cannot be read ({error.strerror})") from None
    except (csv.Error, UnicodeError) as error:
        raise UserError(f"manifest {file} is not a UTF-8 CSV: {error}") from None
    header = [name.strip() for name in lines[0][1]] if lines else []
    if "label" not in header or len(lines) < 2:
        raise UserError(
            f"manifest {file} needs a header with a column label, and samples; the header is {header or 'missing'}"
        )
    if invalid := [name for name, count in Counter(header).items() if count > 1 or not name]:
        raise UserError(f"manifest {file} has duplicate or empty column names: {invalid}")
    for number, line in lines[1:]:
        if any("\0" in cell for cell in line):
            raise UserError(f"{file}, line {number} has a NUL character")
        if len(line) != len(header):
            raise UserError(f"{file}, line {number} has {len(line)} cells, the header has {len(header)}")
    rows = [dict(zip(header, (cell.strip() for cell in line), strict=True)) for _, line in lines[1:]]
    return Rows(str(file), file.parent, rows, [number for number, _ in lines[1:]])


def write(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def build(source: Rows, options: Options) -> Dataset:
    """Reads all files into a dataset.

    Raises a UserError that names the first unusable sample and the reason. With ``skip_bad`` unusable samples are left
    out and listed instead.
    """
    names = [name for name in source.rows[0] if name not in RESERVED]
    kind_of = find_kinds(source, names, options)
    tables = tables_of(source, kind_of, options)
    cells = collect_cells(source, kind_of, tables)
    bad = check_rows(source, cells, tables, options)
    splits = find_splits(source, options)
    labels = [row["label"] for row in source.rows]
    kept = list(range(len(labels)))
    cache = Cache(options.of(CacheOptions).cache_dir)
    while True:
        report_bad_rows(source, {i: bad[i] for i in kept if i in bad}, options)
        kept = [i for name in SPLIT_FRACTIONS for i in kept if splits[i] == name and i not in bad]
        check_remaining(source, kept, splits, cells)
        if errors := unseen_classes(kept, splits, labels):
            bad |= errors
            continue
        training = [row for row, i in enumerate(kept) if splits[i] == "train"]
        columns: dict[str, LoadedColumn] = {}
        for m, kind_class in kind_of.items():
            column = Column(m, [cells[m][i] for i in kept], options, cache, {}, training)
            columns[m] = load_column(kind_class(column))
            errors |= {
                kept[row]: f"column {m}: {reason}" for row, reason in column.bad.items() if kept[row] not in errors
            }
        if not errors:
            break
        bad |= errors

    for kind, *_ in columns.values():
        for note in kind.notes:
            log.warning(note)
    classes = sorted({labels[i] for i in kept if labels[i]}, key=label_order)
    class_index = {label: c for c, label in enumerate(classes)} | {"": -1}
    split_of = {name: [row for row, i in enumerate(kept) if splits[i] == name] for name in SPLIT_FRACTIONS}
    stored = {m: tensor for m, (_, _, tensor) in columns.items() if tensor is not None}
    warn_about_shared_files(source, kept, splits, columns)
    ids = [source.rows[i].get("id") or str(source.lines[i] if source.lines else i) for i in kept]
    made: dict[str, Split] = {}
    modalities: dict[str, Modality] = {}
    labelled = [row for row in split_of["train"] if class_index[labels[kept[row]]] >= 0]
    for m, (kind, keys, _) in columns.items():
        rows = [row for row in labelled if cells[m][kept[row]] is not None]
        if not rows:
            raise UserError(f"{source.source}: no training sample has {m}")
        rows = rows[:: math.ceil(len(rows) / STATISTICS_SAMPLES)]
        modalities[m] = kind.modality(m, stored[m][rows], [keys[row] for row in rows])
    for name, rows in split_of.items():
        span = slice(rows[0], rows[-1] + 1)  # rows are sorted by split, so slices need no copy
        tensors = {m: tensor[span] for m, tensor in stored.items()}
        for m in columns:
            if any(cells[m][i] is None for i in kept):
                tensors[presence(m)] = torch.tensor([cells[m][i] is not None for i in kept[span]])
        made[name] = Split(torch.tensor([class_index[labels[i]] for i in kept[span]]), tensors, ids[span])
    name = Path(source.source).stem
    shapes = ", ".join(f"{m} {'x'.join(map(str, modalities[m].sample(made['train']).shape[1:]))}" for m in modalities)
    counts = ", ".join(f"{len(split)} {name}" for name, split in made.items())
    log.info(f"{name}: {counts}; {len(classes)} classes; {shapes}")
    return Dataset(len(classes), modalities, **made, name=name, class_names=classes, checked=frozenset(columns))


def load_column(kind: Kind) -> LoadedColumn:
    """Reads a column's headers and samples; errors are recorded in its ``bad``, and there is no tensor then.

    Without training files, all determine the stored shape.
    """
    keys = kind.keys()
    headers = None if kind.column.bad else kind.read_headers(keys)
    if headers is None:
        return kind, keys, None
    present = [row for row, key in enumerate(keys) if key != MISSING]
    of_training = np.isin(present, kind.column.training)
    kind.configure(headers[of_training] if of_training.any() else headers)
    kind.review(headers, present)
    return kind, keys, None if kind.column.bad else kind.read(keys)


def label_order(label: str) -> tuple[int, float, str]:
    """Sorts numbers by value, before words."""
    return (0, float(label), label) if re.fullmatch(r"-?\d+(\.\d+)?", label) else (1, 0.0, label)


# --- kinds of columns ---


def find_kinds(source: Rows, names: list[str], options: Options) -> dict[str, type[Kind]]:
    """The kind of each modality, from --kinds or guessed from its cells; numeric columns are combined into tables."""
    given = options.of(Columns).kinds or {}
    for name in names:
        if not any(row[name] for row in source.rows):
            raise UserError(f"{source.source}: column {name} is empty")
    for name in given:
        choose("column", name, names)
    kind_of = {name: kinds.kinds.find(given.get(name) or guess_kind(source, name)) for name in names}
    tables = {table: columns.split("+") for table, columns in (options.of(Columns).tables or {}).items()}
    numbers = [name for name in names if kind_of[name] is kinds.Numbers]
    for table, columns in tables.items():
        for name in columns:
            choose("column of numbers", name, numbers)
        if table in names and table not in columns:
            raise UserError(f"--tables {table}: there is a column of this name, choose another one")
    rest = [name for name in numbers if not any(name in columns for columns in tables.values())]
    others = {name: kind for name, kind in kind_of.items() if kind is not kinds.Numbers}
    if rest and "table" in others:
        raise UserError("rename the column table: columns of numbers are combined into a modality of this name")
    return others | {table: kinds.Numbers for table in [*tables, *["table"] * bool(rest)]}


def guess_kind(source: Rows, name: str) -> str:
    """The name of a column's kind, from its cells."""
    values = [row[name] for row in source.rows if row[name]]
    if sum(map(is_number, values)) > len(values) / 2:  # check_rows reports the others
        return "number"
    existing = (value for value in values[:100] if os.path.exists(paths_of(value, source.folder)[0]))
    value = next(existing, values[0])
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
    if os.path.isdir(paths[0]):
        return "flow" if len(paths) == 2 or (paths[0] / "u").is_dir() else "frames"
    if re.fullmatch(r"\S*\.\w{1,5}|\S*[/\\]\S*", value):
        missing = "" if os.path.exists(paths[0]) else ", and there is no such file"
        raise UserError(f"{source.source}: column {name} contains {value!r}{missing}: give --kinds {name}=KIND")
    return "text"


def is_number(cell: str) -> bool:
    try:
        float(cell)
        return True
    except ValueError:
        return False


def paths_of(cell: str, folder: Path) -> list[Path]:
    """The paths in a cell, relative to the folder. A cell with a semicolon is one path if that file exists."""
    path = folder / os.path.expanduser(cell)
    if ";" not in cell or os.path.exists(path):
        return [path]
    return [folder / os.path.expanduser(part.strip()) for part in cell.split(";") if part.strip()] or [path]


def tables_of(source: Rows, kind_of: dict[str, type[Kind]], options: Options) -> dict[str, list[str]]:
    """The columns of each numeric modality."""
    tables = {table: columns.split("+") for table, columns in (options.of(Columns).tables or {}).items()}
    used = {name for columns in tables.values() for name in columns} | set(kind_of) | set(RESERVED)
    rest = {"table": [name for name in source.rows[0] if name not in used]}
    return {table: columns for table, columns in (rest | tables).items() if kind_of.get(table) is kinds.Numbers}


def collect_cells(source: Rows, kind_of: dict[str, type[Kind]], tables: dict[str, list[str]]) -> dict[str, list[Cell]]:
    """The cells of each modality, in the form that its kind takes; None where empty."""

    def cell_of(m: str, kind: type[Kind], row: dict[str, str]) -> Cell:
        if kind is kinds.Numbers:
            values = [row[name] for name in tables[m]]
            return [float(x) if is_number(x) else math.nan for x in values] if any(values) else None
        if not row[m]:
            return None
        return row[m] if kind is kinds.Text and not row[m].lower().endswith(".txt") else paths_of(row[m], source.folder)

    return {m: [cell_of(m, kind, row) for row in source.rows] for m, kind in kind_of.items()}


# --- checks of rows ---


def check_rows(source: Rows, cells: dict[str, list], tables: dict[str, list[str]], options: Options) -> dict[int, str]:
    """The errors in the table itself, by row."""
    bad: dict[int, str] = {}
    seen: dict[str, int] = {}
    splits = [row.get("split", "").lower() for row in source.rows]
    for i, row in enumerate(source.rows):
        lacking = [m for m, column in cells.items() if column[i] is None]
        numbers = [pair for m, names in tables.items() if cells[m][i] for pair in zip(names, cells[m][i], strict=True)]
        wrong = next((name for name, x in numbers if not abs(x) <= MAX_NUMBER), None)
        if "split" in row and splits[i] not in SPLITS:
            bad[i] = f"split {row['split']!r} is not train, val or test"
        elif not row["label"] and SPLITS.get(splits[i]) != "train":
            bad[i] = "no label (only training rows may lack one)"
        elif len(lacking) == len(cells):
            bad[i] = "all modalities are empty"
        elif lacking and not options.of(Columns).allow_missing and SPLITS.get(splits[i], "train") == "train":
            bad[i] = f"column {lacking[0]} is empty (--allow-missing trains on the other modalities)"
        elif wrong:
            bad[i] = f"column {wrong} contains {row[wrong]!r}, which is not a finite number"
        elif name := row.get("id"):
            if name in seen:
                bad[i] = f"id {name!r} is also used in {source.location(seen[name])}"
            seen.setdefault(name, i)
    return bad


def report_bad_rows(source: Rows, bad: dict[int, str], options: Options) -> None:
    """Raises an error for the first bad row; with --skip-bad lists all of them instead."""
    if not bad:
        return
    lines = [f"{source.location(i)}: {bad[i]}" for i in sorted(bad)]
    if not options.of(Damage).skip_bad:
        more = f"; and {len(lines) - 1} more" if len(lines) > 1 else ""
        raise UserError(f"{lines[0]}{more} (--skip-bad leaves them out and lists them)")
    for line in lines:
        log.warning("left out: %s", line)


def check_remaining(source: Rows, kept: list[int], splits: list[str], cells: dict[str, list[Cell]]) -> None:
    """Checks that every split and every modality still has samples."""
    for name in SPLIT_FRACTIONS:
        if not any(splits[i] == name for i in kept):
            raise UserError(f"{source.source}: no sample is left for {name}")
    for m, column in cells.items():
        if all(column[i] is None for i in kept):
            raise UserError(f"{source.source}: no sample is left that has {m}")


def unseen_classes(kept: list[int], splits: list[str], labels: list[str]) -> dict[int, str]:
    """The samples whose class does not occur in training, with the reason."""
    trained = {labels[i] for i in kept if splits[i] == "train"}
    return {
        i: f"label {labels[i]!r} is in {splits[i]}, but no training sample has it"
        for i in kept
        if labels[i] not in trained
    }


def warn_about_shared_files(source: Rows, kept: list[int], splits: list[str], columns: dict[str, LoadedColumn]) -> None:
    """Warns if validation or test contains a file of a training sample: the score would reward memorization."""
    for m, (kind, keys, _) in columns.items():
        of_files = [
            (key, i)
            for key, i, cell in zip(keys, kept, kind.column.cells, strict=True)
            if cell and isinstance(cell[0], Path)
        ]
        trained = {key for key, i in of_files if splits[i] == "train"}
        shared = [i for key, i in of_files if splits[i] != "train" and key in trained]
        if shared:
            log.warning(
                "%s: %s is the same as that of a training sample (%d such)", source.location(shared[0]), m, len(shared)
            )


# --- splits ---


def find_splits(source: Rows, options: Options) -> list[str]:
    """The split of each row. Splits that the table does not name are drawn from its training samples, by group."""
    rows = source.rows
    splits = [SPLITS.get(row.get("split", "").lower(), "train") for row in rows]
    groups = [row.get("group") or f"\0{i}" for i, row in enumerate(rows)]
    absent = [name for name in ("val", "test") if name not in splits]
    if absent:
        fractions = {"train": SPLIT_FRACTIONS["train"]} | {name: SPLIT_FRACTIONS[name] for name in absent}
        pool = [i for i, name in enumerate(splits) if name == "train" and rows[i]["label"]]
        drawn = draw_splits([rows[i]["label"] for i in pool], [groups[i] for i in pool], fractions)
        for i, name in zip(pool, drawn, strict=True):
            splits[i] = name
        if "split" in rows[0]:
            log.info("%s has no split %s: drawn from its training samples", source.source, " and ".join(absent))
    splits_of_group: dict[str, dict[str, int]] = defaultdict(dict)
    for i, (group, name) in enumerate(zip(groups, splits, strict=True)):
        splits_of_group[group].setdefault(name, i)
        if len(splits_of_group[group]) > 1 and rows[i]["label"]:
            other = next(iter(splits_of_group[group].values()))
            where = f"{splits[other]} ({source.location(other)})"
            raise UserError(f"{source.location(i)}: group {group!r} is in {name}, and in {where}")
    return splits


def draw_splits(labels: list[str], groups: list[str], fractions: dict[str, float], seed: int = 0) -> list[str]:
    """Assigns each sample to a split, stratified by label; a group stays within one split.

    Groups are assigned in random order, the largest first, each to the split that lacks its labels most.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    order = list(members)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: -len(members[group]))
    if len(order) < len(fractions):
        raise UserError(f"{len(order)} groups are too few for {', '.join(fractions)}: each group is in one split only")
    total, counts = sum(fractions.values()), Counter(labels)
    wanted = {name: {label: x / total * n for label, n in counts.items()} for name, x in fractions.items()}
    split_of: dict[str, str] = {}
    for left, group in zip(range(len(order), 0, -1), order, strict=True):
        own = Counter(labels[i] for i in members[group])
        empty = [name for name in fractions if name not in split_of.values()] if left <= len(fractions) else []
        # How many of this group's labels each split still lacks, relative to its size.
        lack = {
            name: sum(n * wanted[name][x] / counts[x] / fractions[name] for x, n in own.items())
            for name in empty or fractions
        }
        best = max(lack, key=lambda name: lack[name])
        split_of[group] = best
        for label, n in own.items():
            wanted[best][label] -= n
    return [split_of[group] for group in groups]
