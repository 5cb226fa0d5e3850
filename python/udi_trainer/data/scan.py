"""Writes a manifest of a folder: ``manifest DIR sound='{label}_{speaker}_{take}.wav' image='{label}/{take}.png'``."""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .kinds import is_hidden
from .rows import RESERVED, write

GROUPS = ("group", "speaker", "actor", "subject", "patient", "singer", "person")  # fields that define a group


def main(argv: list[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{prog} manifest",
        description="Writes a manifest of the files in a folder. A pattern is a path in it with {fields}; files of"
        " different modalities with the same common fields form one sample. The field label is the label. Samples with"
        f" the same {', '.join(GROUPS)} or --group field stay in one split.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "patterns", nargs="+", metavar="NAME=PATTERN", help="one per modality; a pattern may match folders of frames"
    )
    parser.add_argument("--group", metavar="FIELD", help="field whose samples stay in one split")
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV to write (default: FOLDER/manifest.csv)")
    options = parser.parse_args(argv)
    out = options.out or options.folder / "manifest.csv"
    rows = scan(options.folder, dict(p.partition("=")[::2] for p in options.patterns), options.group, out.parent)
    try:
        write(out, rows)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose --out FILE") from None
    groups = {row["group"] for row in rows if "group" in row}
    print(f"{out}: {len(rows)} samples, {len({row['label'] for row in rows})} labels, {len(groups) or 'no'} groups")
    return 0


def scan(
    folder: Path, patterns: dict[str, str], group: str | None = None, base: Path | None = None
) -> list[dict[str, str]]:
    """The rows of a manifest: id, label, group and the paths relative to ``base`` (default: the folder)."""
    expressions = {m: expression(m, pattern) for m, pattern in patterns.items()}
    common = set.intersection(*(set(e.groupindex) for e in expressions.values()))
    if "label" not in common:
        raise UserError("every pattern must contain the field {label}")
    group = group or next((name for name in GROUPS if name in common), None)
    if group and group not in common:
        raise UserError(f"--group {group}: every pattern must contain this field")
    fields, samples = sorted(common), dict[tuple[str, ...], dict[str, str]]()
    for path in walk(folder):
        for m, e in expressions.items():
            match = e.fullmatch(path)
            if not match:
                continue
            key = tuple(match[name] for name in fields)
            sample = samples.setdefault(key, {})
            if m in sample:
                raise UserError(
                    f"{folder}: {sample[m]} and {path} are both {m} of {' '.join(key)}: add fields to all patterns"
                )
            sample[m] = path
    for m, pattern in patterns.items():
        if not any(m in sample for sample in samples.values()):
            raise UserError(f"{folder}: no path matches {pattern!r} ({m})")
    rows, prefix = [], os.path.relpath(folder.resolve(), (base or folder).resolve())
    for key, sample in sorted(samples.items()):
        values = dict(zip(fields, key, strict=True))
        row = {"id": "_".join(key), "label": values["label"]} | ({"group": values[group]} if group else {})
        rows.append(row | {m: os.path.normpath(f"{prefix}/{sample[m]}") if m in sample else "" for m in patterns})
    return rows


def expression(name: str, pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern, with a group for each field."""
    if not pattern or name in RESERVED:
        raise UserError(f"{name}={pattern}: must be NAME=PATTERN, with a name other than {', '.join(RESERVED)}")
    parts = re.split(r"\{(\w+)\}", pattern)
    seen, text = set[str](), ""
    for i, part in enumerate(parts):
        if i % 2 == 0:
            text += re.escape(part)
        else:
            text += f"(?P={part})" if part in seen else f"(?P<{part}>[^/]+?)"
            seen.add(part)
    return re.compile(text)


def walk(folder: Path) -> Iterator[str]:
    """The sorted paths of all files and subfolders but hidden ones, relative to the folder, with slashes."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted([*folders, *(name for name in files if not is_hidden(name))]):
            yield os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/")
