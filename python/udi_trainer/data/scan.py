"""A first manifest from a folder: ``manifest DIR sound='{label}_{speaker}_{take}.wav' image='{label}/{take}.png'``."""

import argparse
import os
import re
from pathlib import Path

from ..errors import UserError
from .manifest import RESERVED, write

GROUPS = ("group", "speaker", "actor", "subject", "patient", "singer", "person")  # fields that are never split across


def main(argv: list[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{prog} manifest",
        description="Writes a manifest of the files in a folder. A pattern is a path in it with {fields}; files of"
        " several modalities whose common fields agree are one sample. The field label becomes the label; one of"
        f" {', '.join(GROUPS)}, or --group, is never split across.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "patterns", nargs="+", metavar="NAME=PATTERN", help="a modality each; a folder of frames will do"
    )
    parser.add_argument("--group", metavar="FIELD", help="field that is never split across")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the CSV to write (default: FOLDER/manifest.csv)")
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


def scan(folder: Path, patterns: dict[str, str], group: str | None = None, base: Path | None = None) -> list[dict]:
    """Rows of a manifest: label, group, id and the paths, relative to ``base`` if it contains the folder."""
    expressions = {m: expression(m, pattern) for m, pattern in patterns.items()}
    common = set.intersection(*(set(e.groupindex) for e in expressions.values()))
    if "label" not in common:
        raise UserError("every pattern needs the field {label}")
    group = group or next((name for name in GROUPS if name in common), None)
    if group and group not in common:
        raise UserError(f"--group {group}: not a field of every pattern")
    shared, samples = sorted(common), {}
    for path in walk(folder):
        for m, e in expressions.items():
            match = e.fullmatch(path)
            if not match:
                continue
            key = tuple(match[name] for name in shared)
            sample = samples.setdefault(key, {})
            if m in sample:
                raise UserError(
                    f"{folder}: {sample[m]} and {path} are both {m} of {' '.join(key)}: name more fields alike"
                )
            sample[m] = path
    for m, pattern in patterns.items():
        if not any(m in sample for sample in samples.values()):
            raise UserError(f"{folder}: no path in it is like {pattern!r} ({m})")
    rows, prefix = [], os.path.relpath(folder.resolve(), (base or folder).resolve())
    for key, sample in sorted(samples.items()):
        named = dict(zip(shared, key, strict=True))
        row = {"id": "_".join(key), "label": named["label"]} | ({"group": named[group]} if group else {})
        rows.append(row | {m: os.path.normpath(f"{prefix}/{sample[m]}") if m in sample else "" for m in patterns})
    return rows


def expression(name: str, pattern: str) -> re.Pattern:
    if not pattern or name in RESERVED:
        raise UserError(f"{name}={pattern}: NAME=PATTERN is wanted, with a name other than {', '.join(RESERVED)}")
    parts = re.split(r"\{(\w+)\}", pattern)
    seen, text = set(), ""
    for i, part in enumerate(parts):
        if i % 2 == 0:
            text += re.escape(part)
        else:
            text += f"(?P={part})" if part in seen else f"(?P<{part}>[^/]+?)"
            seen.add(part)
    return re.compile(text)


def walk(folder: Path):
    """All files and folders below, as relative paths with slashes, in order."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    for place, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted([*folders, *files]):
            yield os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
