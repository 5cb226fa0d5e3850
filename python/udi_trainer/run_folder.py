"""A run's folder: config.json at the start, metrics.jsonl and checkpoints/ while it trains, the rest at the end."""

import contextlib
import datetime
import fcntl
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .console import log
from .errors import UserError


class RunFolder:
    """Reads and writes the files of a run; without a path there are none, and checkpoints are in memory.

    A checkpoint holds all that its stage logged, so a resumed run takes up its log from there too, and a method the
    stages that another one has trained. A run that has ended lacks nothing: what cannot be written there any more is
    left as it is.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.ended = path is not None and (path / "metrics.json").exists()
        self.kept: dict[str, memoryview] = {}  # the checkpoints in memory

    def checkpoint_path(self, stage: str) -> Path | None:
        return self.path and self.path / "checkpoints" / f"{stage}.pt"

    def checkpoint(self, stage: str) -> dict | None:
        """What :meth:`save` kept of the stage."""
        path = self.checkpoint_path(stage)
        if not path:
            return torch.load(io.BytesIO(self.kept[stage]), map_location="cpu") if stage in self.kept else None
        return load_tensors(path, REPEAT) if path.exists() else None

    def save(self, name: str, /, **state: Any) -> None:
        if self.path:
            self.write(f"checkpoints/{name}.pt", serialized(state))
        else:
            self.kept[name] = serialized(state)

    def write_log(self, rows: list[dict]) -> None:
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def append_log(self, row: dict) -> None:
        if not self.path:
            return
        log = self.path / "metrics.jsonl"
        try:
            with open(log, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise unwritable(log, error) from None

    def write(self, name: str, data: bytes | memoryview) -> None:
        if not self.path:
            return
        try:
            write_atomically(self.path / name, data)
        except UserError:
            if not self.ended:
                raise


REPEAT = "delete it to repeat that stage, then resume"


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """No other process may work in the folder meanwhile. However this one ends, the system takes the lock away."""
    if folder is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)  # the folder itself: it may be read-only
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process works in {folder}: wait for its end, or stop it") from None
        except OSError as error:
            log.warning(f"{folder} cannot be locked ({error.strerror}): no other process may work in it")
        yield
    finally:
        os.close(handle)


def new_folder(out: str | None, label: str, config: dict) -> Path:
    """Creates ``out``, or a folder under runs/ that no run has yet; never takes one with something in it."""
    folder = Path(out) if out is not None else Path("runs")
    try:
        if out is not None:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            number = 1
            while True:
                folder = Path("runs") / (f"{label}-{stamp}" + (f"-{number}" if number > 1 else ""))
                try:
                    folder.mkdir(parents=True)
                    break
                except FileExistsError:
                    if not folder.is_dir():
                        raise
                    number += 1
        with locked(folder):
            if any(folder.iterdir()):
                raise UserError(f"--out {out} has something in it: choose another folder, or go on with --resume {out}")
            write_json(folder / "config.json", config)
    except OSError as error:
        raise UserError(
            f"run folder {folder} cannot be made ({error.strerror}): choose a writable one with --out"
        ) from None
    return folder


def read_config(folder: Path) -> dict:
    """config.json."""
    path = folder / "config.json"
    try:
        return read_json(path)
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged") from None


def read_json(path: Path) -> dict:
    """A JSON object, or an OSError or ValueError."""
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, as_json(value))


def load_tensors(path: Path, remedy: str) -> dict:
    """Tensors and plain values alone, if their checksums are right."""
    try:
        with zipfile.ZipFile(path) as records:  # torch writes a checksum of each, and never looks at it
            damaged = records.testzip()
        saved = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(saved, dict):
            return saved
        reason = f"the checksum of {damaged} is wrong" if damaged else "not a checkpoint"
    except pickle.UnpicklingError:  # torch would advise to load it without its safeguard
        reason = "it holds more than tensors and plain values: code, which is not run"
    except zipfile.BadZipFile:
        reason = "cut off, or not a checkpoint" if path.stat().st_size else "it is empty"
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UserError(f"{path} is damaged ({reason}): {remedy}") from None


def serialized(state: dict) -> memoryview:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def write_atomically(path: Path, data: bytes | memoryview) -> None:
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
