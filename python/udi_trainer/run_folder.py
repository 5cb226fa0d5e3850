"""A run's folder: config.json at the start, metrics.jsonl and checkpoints/ while it trains, the rest at the end."""

import contextlib
import datetime
import io
import json
import os
from pathlib import Path

import torch

from .errors import UserError


class RunFolder:
    """Reads and writes the files of a run; without a path there are none, and checkpoints are in memory.

    A checkpoint holds all that its stage logged, so a resumed run takes up its log from there too, and a method the
    stages that another one has trained.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.kept: dict[str, memoryview] = {}  # the checkpoints in memory

    def checkpoint(self, stage: str) -> dict | None:
        """What :meth:`save` kept of the stage."""
        if not self.path:
            return torch.load(io.BytesIO(self.kept[stage]), map_location="cpu") if stage in self.kept else None
        path = self.path / "checkpoints" / f"{stage}.pt"
        return load_tensors(path, "delete it to repeat that stage, then resume") if path.exists() else None

    def save(self, stage: str, **state):
        if self.path:
            save_tensors(self.path / "checkpoints" / f"{stage}.pt", state)
        else:
            self.kept[stage] = serialised(state)

    def write_log(self, rows: list[dict]):
        if self.path:
            write(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def append_log(self, row: dict):
        if not self.path:
            return
        log = self.path / "metrics.jsonl"
        try:
            with open(log, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise unwritable(log, error) from None


def new_folder(out: str | None, label: str) -> Path:
    """Creates ``out``, or a folder under runs/ that no run has yet; never takes one with something in it."""
    folder = Path(out) if out is not None else Path("runs")
    try:
        if out is not None:
            if folder.is_dir() and any(folder.iterdir()):
                raise UserError(f"--out {out} has something in it: choose another folder, or go on with --resume {out}")
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        number = 1
        while True:
            folder = Path("runs") / (f"{label}-{stamp}" + (f"-{number}" if number > 1 else ""))
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                if not folder.is_dir():
                    raise
                number += 1
    except OSError as error:
        raise UserError(
            f"run folder {folder} cannot be made ({error.strerror}): choose a writable one with --out"
        ) from None


def read_json(path: Path) -> dict:
    """A JSON object, or an OSError or ValueError."""
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def write_json(path: Path, value):
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def load_tensors(path: Path, remedy: str) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): {remedy}") from None


def save_tensors(path: Path, state: dict):
    write(path, serialised(state))


def serialised(state: dict) -> memoryview:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def write(path: Path, data):
    """All or nothing: a reader, or a process killed here, sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written ({error.strerror}): make room or mend the permissions, then go on with --resume;"
        " what was saved before is intact"
    )
