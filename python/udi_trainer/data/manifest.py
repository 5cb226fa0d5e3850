"""Data of one's own: a CSV with a row a sample and a column a modality.

The columns ``label``, ``split``, ``group`` and ``id`` are reserved. Any other is a modality: paths (relative ones are
taken from the CSV's folder; several are separated by ``;``), text, or numbers. An empty cell: the sample lacks it.
"""

import csv
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..console import log
from ..errors import UserError, choose
from ..options import Group, Options, assignments, flag, option, pathname, reads
from ..registry import datasets
from . import kinds
from .cache import Cache, CacheOptions
from .dataset import Dataset, Split, presence
from .kinds import SAMPLES, Augmentation, Column, Kind, Pictures, Sound

RESERVED = ("label", "split", "group", "id")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLITS |= {"test": "test", "testing": "test"}
LARGEST = torch.finfo(torch.float32).max  # as which numbers are stored
SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}  # where a manifest does not say


@dataclass(frozen=True, kw_only=True)
class ManifestFile(Group, title="data of your own"):
    manifest: str | None = option(
        None,
        pathname,
        "CSV of --dataset manifest: a column a modality, and label, split, group, id",
        "FILE",
        movable=True,
    )


@dataclass(frozen=True, kw_only=True)
class Columns(Group, title="data of your own"):
    kinds: dict[str, str] | None = option(
        None,
        assignments,
        "what columns hold, where file endings do not tell: image, frames, flow, audio, array, text or number",
        "COLUMN=KIND,...",
    )
    tables: dict[str, str] | None = option(
        None,
        assignments,
        "columns of numbers that are a modality each, by name",
        "NAME=COLUMN+COLUMN,...",
        "one modality of them all, called table",
    )
    skip_bad: bool = option(False, flag, "leave out samples that cannot be read, and list them")
    allow_missing: bool = option(False, flag, "train on samples with empty cells, too: on the modalities they have")


BUILD = (Columns, CacheOptions, Pictures, Sound, Augmentation)  # what `build` reads


@dataclass
class Rows:
    """A table of samples, whoever made it. ``lines``: where each is in ``source``, for messages."""

    source: str
    folder: Path
    rows: list[dict[str, str]]
    lines: list[int] | None = None

    def at(self, i: int) -> str:
        return f"{self.source}, {f'line {self.lines[i]}' if self.lines else f'sample {i}'}"


@datasets.register("manifest")
@reads(ManifestFile, *BUILD)
def manifest(options: Options) -> Dataset:
    """A CSV of one's own, see --manifest."""
    file = options.of(ManifestFile).manifest
    if file is None:
        raise UserError("dataset manifest needs --manifest FILE, a CSV with a column a modality and a column label")
    return build(read(file), options)


def read(file: str | Path) -> Rows:
    """The rows of a CSV, or of a .tsv."""
    file = Path(file).expanduser()
    try:
        with open(file, newline="", encoding="utf-8-sig") as text:
            reader = csv.reader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
            lines = [(reader.line_num, line) for line in reader if any(cell.strip() for cell in line)]
    except OSError as error:
        raise UserError(f"manifest {file} cannot be read ({error.strerror})") from None
    except (csv.Error, UnicodeError) as error:
        raise UserError(f"manifest {file} is no CSV in UTF-8: {error}") from None
    header = [name.strip() for name in lines[0][1]] if lines else []
    if "label" not in header or len(lines) < 2:
        raise UserError(
            f"manifest {file} needs a header with a column label, and samples: it has {header or 'nothing'}"
        )
    if doubled := [name for name, count in Counter(header).items() if count > 1 or not name]:
        raise UserError(f"manifest {file} has columns of the same name, or without one: {doubled}")
    for number, line in lines[1:]:
        if len(line) != len(header):
            raise UserError(f"{file}, line {number} has {len(line)} cells, the header {len(header)}")
    rows = [dict(zip(header, (cell.strip() for cell in line), strict=True)) for _, line in lines[1:]]
    return Rows(str(file), file.parent, rows, [number for number, _ in lines[1:]])


def write(file: Path, rows: Sequence[dict[str, str]]):
    with open(file, "w", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def build(source: Rows, options: Options) -> Dataset:
    """Reads all files, or fails with a line that names the first sample it cannot use, and what is wrong with it.

    With ``skip_bad`` such samples are left out and listed.
    """
    names = [name for name in source.rows[0] if name not in RESERVED]
    kind_of = find_kinds(source, names, options)
    tables = tables_of(source, kind_of, options)
    cells = gather(source, kind_of, tables)
    bad = check_rows(source, cells, tables, options)
    splits = find_splits(source, options)
    labels = [row["label"] for row in source.rows]
    kept = list(range(len(labels)))
    cache = Cache(options.of(CacheOptions).cache_dir)
    while True:
        report(source, {i: bad[i] for i in kept if i in bad}, options)
        kept = [i for name in SHARES for i in kept if splits[i] == name and i not in bad]
        check_left(source, kept, splits, cells)
        if found := untrained(kept, splits, labels):
            bad |= found
            continue
        columns = {}
        for m, kind in kind_of.items():
            column = Column(m, [cells[m][i] for i in kept], options, cache, {})
            columns[m] = load(kind(column))
            found |= {
                kept[row]: f"column {m}: {reason}" for row, reason in column.bad.items() if kept[row] not in found
            }
        if not found:
            break
        bad |= found

    classes = sorted({labels[i] for i in kept if labels[i]}, key=natural)
    number = {label: c for c, label in enumerate(classes)} | {"": -1}
    split_of = {name: [row for row, i in enumerate(kept) if splits[i] == name] for name in SHARES}
    warn_of_shared(source, kept, splits, columns)
    ids = [source.rows[i].get("id") or str(source.lines[i] if source.lines else i) for i in kept]
    made, modalities = {}, {}
    trained = [row for row in split_of["train"] if number[labels[kept[row]]] >= 0]
    for m, (kind, keys, stored) in columns.items():
        rows = [row for row in trained if cells[m][kept[row]] is not None]
        if not rows:
            raise UserError(f"{source.source}: no training sample has {m}")
        rows = rows[:: math.ceil(len(rows) / SAMPLES)]
        modalities[m] = kind.modality(m, stored[rows], [keys[row] for row in rows])
    for name, rows in split_of.items():
        span = slice(rows[0], rows[-1] + 1)  # sorted by split: no tensor is copied
        tensors = {m: stored[span] for m, (_, _, stored) in columns.items()}
        for m in columns:
            if any(cells[m][i] is None for i in kept):
                tensors[presence(m)] = torch.tensor([cells[m][i] is not None for i in kept[span]])
        made[name] = Split(torch.tensor([number[labels[i]] for i in kept[span]]), tensors, ids[span])
    name = Path(source.source).stem
    shapes = ", ".join(f"{m} {'x'.join(map(str, modalities[m].sample(made['train']).shape[1:]))}" for m in modalities)
    counts = ", ".join(f"{len(split)} {name}" for name, split in made.items())
    log.info(f"{name}: {counts}; {len(classes)} classes; {shapes}")
    return Dataset(len(classes), modalities, **made, name=name, class_names=classes, checked=frozenset(columns))


def load(kind: Kind) -> tuple[Kind, list[bytes], torch.Tensor | None]:
    """Both passes over a column; what cannot be read is noted in it."""
    keys = kind.keys()
    facts = None if kind.column.bad else kind.find_out(keys)
    if facts is None:
        return kind, keys, None
    kind.settle(facts)
    return kind, keys, kind.read(keys)


def natural(label: str):
    """Numbers by their size, before words."""
    return (0, float(label), label) if re.fullmatch(r"-?\d+(\.\d+)?", label) else (1, 0.0, label)


# --- what columns hold ---


def find_kinds(source: Rows, names: list[str], options: Options) -> dict[str, type[Kind]]:
    """The kind of each modality, by option or by its first cells; columns of numbers are taken together."""
    given = options.of(Columns).kinds or {}
    for name in names:
        if not any(row[name] for row in source.rows):
            raise UserError(f"{source.source}: column {name} is empty")
    for name in given:
        choose("column", name, names)
    found = {name: kinds.kinds.find(given.get(name) or guess(source, name)) for name in names}
    tables = {table: columns.split("+") for table, columns in (options.of(Columns).tables or {}).items()}
    numbers = [name for name in names if found[name] is kinds.Numbers]
    for table, columns in tables.items():
        for name in columns:
            choose("column of numbers", name, numbers)
        if table in names and table not in columns:
            raise UserError(f"--tables {table}: a column has this name")
    rest = [name for name in numbers if not any(name in columns for columns in tables.values())]
    kept = {name: kind for name, kind in found.items() if kind is not kinds.Numbers}
    if rest and "table" in kept:
        raise UserError("a column cannot be named table beside columns of numbers, which are together called so")
    return kept | {table: kinds.Numbers for table in [*tables, *["table"] * bool(rest)]}


def guess(source: Rows, name: str) -> str:
    values = [row[name] for row in source.rows if row[name]]
    if sum(map(is_number, values)) > len(values) / 2:  # the others are refused by row
        return "number"
    there = (value for value in values[:100] if os.path.exists(paths_of(value, source.folder)[0]))
    value = next(there, values[0])
    several = paths_of(value, source.folder)
    suffix = kinds.parted(several[0])[0].suffix.lower()
    for kind, suffixes in {
        "image": kinds.IMAGES,
        "audio": kinds.SOUNDS,
        "array": kinds.ARRAYS,
        "text": (".txt",),
    }.items():
        if suffix in suffixes:
            return "frames" if kind == "image" and len(several) > 1 else kind
    if os.path.isdir(several[0]):
        return "flow" if len(several) == 2 or (several[0] / "u").is_dir() else "frames"
    if re.fullmatch(r"\S*\.\w{1,5}|\S*[/\\]\S*", value):
        gone = "" if os.path.exists(several[0]) else ", and there is no such file"
        raise UserError(f"{source.source}: column {name} holds {value!r}{gone}: --kinds {name}=KIND tells what that is")
    return "text"


def is_number(cell: str) -> bool:
    try:
        float(cell)
        return True
    except ValueError:
        return False


def paths_of(cell: str, folder: Path) -> list[Path]:
    """Relative to the folder; a name with a semicolon is one path if there is such a file."""
    whole = folder / os.path.expanduser(cell)
    if ";" not in cell or os.path.exists(whole):
        return [whole]
    return [folder / os.path.expanduser(part.strip()) for part in cell.split(";") if part.strip()] or [whole]


def tables_of(source: Rows, kind_of: dict[str, type[Kind]], options: Options) -> dict[str, list[str]]:
    """The columns of each modality of numbers."""
    tables = {table: columns.split("+") for table, columns in (options.of(Columns).tables or {}).items()}
    taken = {name for columns in tables.values() for name in columns} | set(kind_of) | set(RESERVED)
    rest = {"table": [name for name in source.rows[0] if name not in taken]}
    return {table: columns for table, columns in (rest | tables).items() if kind_of.get(table) is kinds.Numbers}


def gather(source: Rows, kind_of: dict[str, type[Kind]], tables: dict[str, list[str]]) -> dict[str, list]:
    """The cells of each modality, as its kind takes them; None where empty."""

    def cell_of(m, kind, row):
        if kind is kinds.Numbers:
            values = [row[name] for name in tables[m]]
            return [float(x) if is_number(x) else math.nan for x in values] if any(values) else None
        if not row[m]:
            return None
        return row[m] if kind is kinds.Text and not row[m].endswith(".txt") else paths_of(row[m], source.folder)

    return {m: [cell_of(m, kind, row) for row in source.rows] for m, kind in kind_of.items()}


# --- what is wrong with rows ---


def check_rows(source: Rows, cells: dict[str, list], tables: dict[str, list[str]], options: Options) -> dict[int, str]:
    """What is wrong with rows as the table has them, by number."""
    bad, seen, splits = {}, {}, [row.get("split", "").lower() for row in source.rows]
    for i, row in enumerate(source.rows):
        lacking = [m for m, column in cells.items() if column[i] is None]
        numbers = [pair for m, names in tables.items() if cells[m][i] for pair in zip(names, cells[m][i], strict=True)]
        wrong = next((name for name, x in numbers if not abs(x) <= LARGEST), None)
        if "split" in row and splits[i] not in SPLITS:
            bad[i] = f"split {row['split']!r} is none of train, val and test"
        elif not row["label"] and SPLITS.get(splits[i]) != "train":
            bad[i] = "no label (only rows of the split train may lack one)"
        elif len(lacking) == len(cells):
            bad[i] = "no modality at all"
        elif lacking and not options.of(Columns).allow_missing and SPLITS.get(splits[i], "train") == "train":
            bad[i] = f"column {lacking[0]} is empty (--allow-missing trains on what there is)"
        elif wrong:
            bad[i] = f"column {wrong} holds {row[wrong]!r}: a finite number is wanted"
        elif name := row.get("id"):
            if name in seen:
                bad[i] = f"id {name!r} is that of {source.at(seen[name])} too"
            seen.setdefault(name, i)
    return bad


def report(source: Rows, bad: dict[int, str], options: Options):
    """Raises an error with the first bad row; or lists them, to be left out."""
    if not bad:
        return
    lines = [f"{source.at(i)}: {bad[i]}" for i in sorted(bad)]
    if not options.of(Columns).skip_bad:
        more = f"; and {len(lines) - 1} more" if len(lines) > 1 else ""
        raise UserError(f"{lines[0]}{more} (--skip-bad leaves them out and lists them)")
    for line in lines:
        log.warning("left out: %s", line)


def check_left(source: Rows, kept: list[int], splits: list[str], cells: dict[str, list]):
    """Every split has samples, every modality too."""
    for name in SHARES:
        if not any(splits[i] == name for i in kept):
            raise UserError(f"{source.source}: no sample is left for {name}")
    for m, column in cells.items():
        if all(column[i] is None for i in kept):
            raise UserError(f"{source.source}: no sample is left that has {m}")


def untrained(kept: list[int], splits: list[str], labels: list[str]) -> dict[int, str]:
    """Samples of a class that is absent from training, by number."""
    trained = {labels[i] for i in kept if splits[i] == "train"}
    return {
        i: f"label {labels[i]!r} is in {splits[i]}, but no training sample has it"
        for i in kept
        if labels[i] not in trained
    }


def warn_of_shared(source: Rows, kept: list[int], splits: list[str], columns: dict):
    """The same file in training and elsewhere: what is measured there is memory."""
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
                "%s: %s is the same as that of a training sample (%d such)", source.at(shared[0]), m, len(shared)
            )


# --- splits ---


def find_splits(source: Rows, options: Options) -> list[str]:
    """As the table has them; what it does not name is drawn from the training samples, stratified, by group."""
    rows = source.rows
    given = [SPLITS.get(row.get("split", "").lower(), "train") for row in rows]
    groups = [row.get("group") or f"\0{i}" for i, row in enumerate(rows)]
    absent = [name for name in ("val", "test") if name not in given]
    if absent:
        shares = {"train": SHARES["train"]} | {name: SHARES[name] for name in absent}
        inside = [i for i, name in enumerate(given) if name == "train" and rows[i]["label"]]
        drawn = draw([rows[i]["label"] for i in inside], [groups[i] for i in inside], shares)
        for i, name in zip(inside, drawn, strict=True):
            given[i] = name
        if "split" in rows[0]:
            log.info("%s has no split %s: drawn from its training samples", source.source, " and ".join(absent))
    homes = defaultdict(dict)
    for i, (group, name) in enumerate(zip(groups, given, strict=True)):
        homes[group].setdefault(name, i)
        if len(homes[group]) > 1 and rows[i]["label"]:
            other = next(iter(homes[group].values()))
            raise UserError(f"{source.at(i)}: group {group!r} is in {name}, and in {given[other]} ({source.at(other)})")
    return given


def draw(labels: list[str], groups: list[str], shares: dict[str, float], seed: int = 0) -> list[str]:
    """A split for each sample: labels in the same proportions in all, no group in two.

    Groups are dealt out in random order, the largest first, each to the split that lacks its labels most.
    """
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    order = list(members)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: -len(members[group]))
    if len(order) < len(shares):
        raise UserError(f"{len(order)} groups cannot be shared out to {', '.join(shares)}: none may be in two of them")
    total, counts = sum(shares.values()), Counter(labels)
    room = {name: {label: share / total * n for label, n in counts.items()} for name, share in shares.items()}
    given = {}
    for left, group in zip(range(len(order), 0, -1), order, strict=True):
        own = Counter(labels[i] for i in members[group])
        empty = [name for name in shares if name not in given.values()] if left <= len(shares) else []
        # By how much of what a split may still have of these labels the group would fill.
        lack = {
            name: sum(n * room[name][x] / counts[x] / shares[name] for x, n in own.items()) for name in empty or shares
        }
        best = max(lack, key=lack.get)
        given[group] = best
        for label, n in own.items():
            room[best][label] -= n
    return [given[group] for group in groups]
