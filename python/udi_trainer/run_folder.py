"""The folder of a run: config.json is written first, metrics.jsonl and checkpoints/ during training, the rest last."""

import contextlib
import datetime
import fcntl
import hashlib
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
    """Reads and writes the files of a run. Without a path it writes none and keeps checkpoints in memory.

    A checkpoint includes the log of its stage, so a resumed run continues the log, and a method can reuse stages that
    another method has trained. The files of a finished run are never overwritten; write errors there are ignored.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.ended = path is not None and (path / "metrics.json").exists()
        self.states: dict[str, memoryview] = {}  # checkpoints by stage, without a path

    def inside(self, name: str) -> "RunFolder":
        """A folder for another run in this one, which is finished when this one is."""
        inner = RunFolder(self.path and self.path / name)
        inner.ended = self.ended
        return inner

    def checkpoint_path(self, stage: str) -> Path | None:
        return self.path and self.path / "checkpoints" / f"{stage}.pt"

    def checkpoint(self, stage: str) -> dict | None:
        """The state that :meth:`save` stored for the stage, or None."""
        path = self.checkpoint_path(stage)
        if not path:
            state = torch.load(io.BytesIO(self.states[stage]), map_location="cpu") if stage in self.states else None
            return state and {name: value for name, value in state.items() if name != SEAL}
        return load_tensors(path, REPEAT) if path.exists() else None

    def save(self, name: str, /, **state: Any) -> None:
        if self.path:
            self.write(f"checkpoints/{name}.pt", serialized(state))
        else:
            self.states[name] = serialized(state)

    def write_log(self, rows: list[dict]) -> None:
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def append_log(self, row: dict) -> None:
        if not self.path or self.ended:
            return
        log = self.path / "metrics.jsonl"
        try:
            with open(log, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise unwritable(log, error) from None

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Writes a file; of a finished run only one that is missing."""
        if not self.path or (self.ended and (self.path / name).exists()):
            return
        try:
            write_atomically(self.path / name, data)
        except UserError:
            if not self.ended:
                raise


REPEAT = "delete it to repeat that stage, then resume"


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Locks the folder against other processes. The system releases the lock however this process ends."""
    if folder is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)  # the folder itself, which may be read-only
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is using {folder}: wait until it ends, or stop it") from None
        except OSError as error:
            log.warning(f"{folder} cannot be locked ({error.strerror}): make sure that no other process uses it")
        yield
    finally:
        os.close(handle)


def new_folder(out: str | None, label: str, config: dict) -> Path:
    """Creates ``out``, or a new folder under runs/; refuses a folder that is not empty."""
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
                raise UserError(f"--out {out} is not empty: choose another folder, or continue with --resume {out}")
            write_json(folder / "config.json", config)
    except OSError as error:
        raise UserError(
            f"run folder {folder} cannot be created ({error.strerror}): choose a writable one with --out"
        ) from None
    return folder


def read_config(folder: Path) -> dict:
    """The content of config.json."""
    path = folder / "config.json"
    try:
        return read_json(path)
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged") from None


def read_json(path: Path) -> dict:
    """The JSON object in a file; raises OSError or ValueError."""
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return value


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, as_json(value))


def load_tensors(path: Path, remedy: str, legacy: bool = False) -> dict:
    """Loads a dict of tensors and plain values after verifying its checksums; never runs code from the file.

    ``legacy``: also load torch's format before 1.6, a pickle without checksums.
    """
    try:
        damaged = None
        if not (legacy and is_pickle(path)):
            with zipfile.ZipFile(path) as records:  # torch writes checksums but never verifies them
                damaged = records.testzip()
        saved = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(saved, dict):
            if saved.pop(SEAL, None) in (None, seal(saved)):  # versions before 0.2 wrote none
                return saved
            damaged = "its structure"
        reason = f"the checksum of {damaged} is wrong" if damaged else "not a checkpoint"
    except pickle.UnpicklingError:  # torch's message recommends weights_only=False
        reason = "it contains code, which is not run, and not only tensors and plain values"
    except zipfile.BadZipFile:
        reason = "truncated, or not a checkpoint" if path.stat().st_size else "it is empty"
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UserError(f"{path} is damaged ({reason}): {remedy}") from None


def is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(1) == pickle.PROTO


SEAL = "seal"  # the name in a file of the digest of the rest


def seal(state: Any) -> str:
    """A digest of all plain values, and of the tensors' dtypes and shapes: another type would be met too late."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), tuple(value.shape)
        if isinstance(value, dict):
            return [(plain(name), plain(part)) for name, part in value.items()]
        return [plain(part) for part in value] if isinstance(value, list | tuple) else value

    return hashlib.blake2b(repr(plain(state)).encode(), digest_size=8).hexdigest()


def serialized(state: dict) -> memoryview:
    buffer = io.BytesIO()
    torch.save(state | {SEAL: seal(state)}, buffer)
    return buffer.getbuffer()


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replaces the file atomically: a reader always sees either the old content or the new one, even after a kill."""
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
        f"{path} cannot be written ({error.strerror}): free space or fix the permissions, then continue with --resume;"
        " earlier files are intact"
    )
