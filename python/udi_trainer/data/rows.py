"""The rows of a manifest, as its CSV file has them: one per sample, with a cell for each column."""

import csv
import difflib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..console import log
from ..errors import UserError, short
from .cache import LFS_POINTER

RESERVED = ("label", "split", "group", "id")  # columns that are no modality


@dataclass
class Rows:
    """A table of samples. ``source`` and ``lines``, the line number of each sample, serve error messages."""

    source: str
    folder: Path
    rows: list[dict[str, str]]
    lines: list[int] | None = None

    def location(self, i: int) -> str:
        return f"{self.source}, {f'line {self.lines[i]}' if self.lines else f'sample {i}'}"

    def id(self, i: int) -> str:
        """Its id, else its line number in the file, else its index."""
        return self.rows[i].get("id") or str(self.lines[i] if self.lines else i)


def read(file: str | Path, labelled: bool = True) -> Rows:
    """Reads a CSV or .tsv file. ``labelled``: refuse one without a column label.

    The names in ``RESERVED`` match in any case. A column without a name is left out if it is empty or counts the rows.
    """
    file = Path(file).expanduser()
    (_, header), *lines = parse(file) or [(0, [])]
    names = [name.strip().lower() if name.strip().lower() in RESERVED else name.strip() for name in header]
    if not lines or (labelled and "label" not in names):
        wanted = "a header with a column label, and samples" if labelled else "a header, and samples"
        raise UserError(
            f"manifest {file} needs {wanted}; the header is {short(header) if header else 'missing'}{mistaken(header)}"
        )
    for number, line in lines:
        if any("\0" in cell for cell in line):
            raise UserError(f"{file}, line {number} has a NUL character")
        if len(line) != len(names):
            raise UserError(f"{file}, line {number} has {len(line)} cells, the header has {len(names)}")
    kept = [j for j, name in enumerate(names) if name or not meaningless(j, [line[j].strip() for _, line in lines])]
    counts = Counter(names[j] for j in kept)
    if invalid := [header[j].strip() for j in kept if counts[names[j]] > 1 or not names[j]]:
        raise UserError(f"manifest {file} has duplicate or empty column names: {short(invalid)}")
    rows = [{names[j]: line[j].strip() for j in kept} for _, line in lines]
    return Rows(str(file), file.parent, rows, [number for number, _ in lines])


def parse(file: Path) -> list[tuple[int, list[str]]]:
    """The cells of each line that is not blank, with its number."""
    limit = csv.field_size_limit(sys.maxsize)  # a text may be longer than csv's own limit
    number = 0
    try:
        with open(file, newline="", encoding="utf-8-sig") as text:
            reader = csv.reader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
            lines = []
            for line in reader:
                number = reader.line_num
                if any(cell.strip() for cell in line):
                    lines.append((number, line))
            return lines
    except OSError as error:
        raise UserError(f"manifest {file} cannot be read ({error.strerror})") from None
    except UnicodeError as error:
        raise UserError(f"manifest {file} is not a UTF-8 CSV: {error}") from None
    except csv.Error as error:
        raise UserError(f"manifest {file} is not a UTF-8 CSV: {error}, after line {number}") from None
    finally:
        csv.field_size_limit(limit)


def mistaken(header: Sequence[str]) -> str:
    """What the file seems to be instead, or the column that may be meant, as the end of a message."""
    first = header[0].lstrip() if header else ""
    if first.startswith(LFS_POINTER):
        return ": this is a Git LFS pointer, not the file itself, so run git lfs pull"
    if first.startswith(("{", "[")):
        return ": this looks like JSON, and a manifest is a CSV"
    for separator, name in {";": "semicolons", "\t": "tabs"}.items():
        if len(header) == 1 and separator in first:
            return f": its columns are separated by {name}, so save it with commas" + " or as .tsv" * (name == "tabs")
    close = difflib.get_close_matches("label", [name.strip().lower() for name in header], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def meaningless(position: int, cells: Sequence[str]) -> bool:
    """Whether a column without a name is empty, as trailing commas make it, or counts the rows, as pandas' index."""
    if not any(cells):
        return True
    if counts_rows(cells):
        log.info("column %d has no name and counts the rows: it is left out", position + 1)
        return True
    return False


def counts_rows(cells: Sequence[str]) -> bool:
    """Whether the cells are consecutive integers, in the order of the rows."""
    if len(cells) < 2 or not all(re.fullmatch(r"\d{1,15}", cell) for cell in cells):
        return False
    return [int(cell) for cell in cells] == list(range(int(cells[0]), int(cells[0]) + len(cells)))


def write(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# --- labels ---


def find_labels(source: Rows) -> list[str]:
    """The label of each row, "" where it has none: the cell is empty, nan or -1, which means the same from Python.

    Equal numbers such as 1 and 1.0 are one label, in its shortest spelling.
    """
    spellings: dict[str, set[str]] = defaultdict(set)
    plain = []
    for row in source.rows:
        label = row["label"]
        plain.append(re.sub(r"\.?0*$", "", label) if re.fullmatch(r"-?\d+\.\d*", label) else label)
        spellings[plain[-1]].add(label)
    nothing = {label for label in spellings if label in ("", "-1") or label.lower() == "nan"}
    for label in sorted(nothing - {""}):
        hint = "; if this is a class, give it another name" if label == "-1" else ""
        log.warning("label %s means no label: %d rows have it%s", label, plain.count(label), hint)
    cases: dict[str, list[str]] = defaultdict(list)
    for label in sorted(spellings.keys() - nothing):
        cases[" ".join(label.split()).casefold()].append(label)
    for alike in cases.values():
        if len(alike) > 1:
            log.warning("labels %s differ in case or spaces only, and are different classes", short(alike))
    shortest = {label: min(sorted(ways), key=len) for label, ways in spellings.items()}
    return ["" if label in nothing else shortest[label] for label in plain]


def label_order(label: str) -> tuple[int, float, str]:
    """Sorts numbers by value, before words."""
    return (0, float(label), label) if re.fullmatch(r"-?\d+(\.\d+)?", label) else (1, 0.0, label)
