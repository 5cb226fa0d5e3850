"""Decoded data on disk, one memory-mapped array a column: decoded once, whatever the run and however it ended.

A column lies in two files: the samples, and beside them a key of each sample, written after it. So an unfinished column
tells which of its samples are whole, and a new one (a row more, another split) takes over what an older one has.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..console import Progress
from ..errors import UserError
from ..options import Group, option, pathname
from ..run_folder import read_json, write_json

VERSION = 1  # of how things are decoded: another number decodes all anew
KEY = 16  # bytes


@dataclass(frozen=True, kw_only=True)
class CacheOptions(Group, title="data"):
    cache_dir: str | None = option(
        None, pathname, "where decoded data is kept", "DIR", "the user's cache", movable=True
    )


class Unreadable(Exception):
    """Why a sample cannot be decoded, in words that name the file."""


def digest(*parts) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=KEY).digest()


def key_of(paths: Sequence[Path]) -> bytes:
    """Of files as they are now: their paths, sizes and times of change."""
    facts = []
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise Unreadable(f"{path}: {error.strerror}") from None
        facts.append((os.path.abspath(path), stat.st_size, stat.st_mtime_ns))
    return digest(facts)


class Cache:
    """Columns in a folder; without one, in the user's cache. It may be deleted at any time."""

    def __init__(self, folder: str | Path | None = None):
        root = os.environ.get("UDI_KERNELS_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(folder) if folder else Path(root) / "udi_trainer"

    def column(
        self,
        label: str,
        options: tuple,
        keys: Sequence[bytes],
        decode: Callable[[int], np.ndarray],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor | None, dict[int, str]]:
        """The samples (N, *shape), one a key, from the cache; those that it lacks are decoded, side by side.

        ``options``: all that decoding depends on beside the files. Samples that raise :class:`Unreadable` are returned
        by number, with the reason; then there is no tensor.
        """
        folder = self.folder / digest(VERSION, label, options, shape, str(dtype)).hex()
        path = folder / f"{hashlib.blake2b(b''.join(keys), digest_size=KEY).hexdigest()}.bin"
        if not path.exists():
            with self.writable(folder), locked(path.with_suffix(".lock")):
                errors = {} if path.exists() else fill(path, label, keys, decode, np.empty(shape, numpy_type(dtype)))
                if errors:
                    return None, errors
        count = len(keys) * int(np.prod(shape, dtype=np.int64))
        # A private mapping: whoever writes to the tensor changes his own copy.
        return torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(len(keys), *shape), {}

    def remember(self, key: bytes, compute: Callable[[], dict]) -> dict:
        """What was computed for this key once, a JSON object."""
        path = self.folder / "statistics" / f"{key.hex()}.json"
        with contextlib.suppress(OSError, json.JSONDecodeError):
            return read_json(path)
        value = compute()
        with self.writable(path.parent), locked(path.with_suffix(".lock")):
            write_json(path, value)
        return value

    @contextlib.contextmanager
    def writable(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"decoded data cannot be kept in {self.folder} ({reason}): choose --cache-dir DIR"
            ) from None


def numpy_type(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype


@contextlib.contextmanager
def locked(path: Path):
    """Waits for others at the same work; the lock of a process that was killed is free."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fill(path: Path, label: str, keys: Sequence[bytes], decode, like: np.ndarray) -> dict[int, str]:
    """Writes a column, from where it was left and from what other columns have; the numbers it could not decode."""
    part, written, size, errors = path.with_suffix(".part"), path.with_suffix(".keys"), like.nbytes, {}
    if not part.exists():
        written.unlink(missing_ok=True)  # it speaks of samples that somebody deleted
    done = np.fromfile(written, f"V{KEY}").tolist() if written.exists() else []
    done += [b""] * (len(keys) - len(done))
    others = known(path.parent, besides=path)
    todo = [i for i, key in enumerate(keys) if done[i] != key]
    data, index = (os.open(file, os.O_RDWR | os.O_CREAT, 0o644) for file in (part, written))

    def make(i):
        key = keys[i]
        try:
            if key in others:
                source, row = others[key]
                with open(source, "rb") as file:
                    raw = os.pread(file.fileno(), size, row * size)
            else:
                sample = np.asarray(decode(i))
                if sample.shape != like.shape:
                    raise Unreadable(f"shape {sample.shape} in the place of {like.shape}")
                raw = sample.astype(like.dtype).tobytes()
        except Unreadable as error:
            errors[i] = str(error)
            return
        put(data, raw, i * size)
        put(index, key, i * KEY)

    try:
        with Progress(f"decoding {label}", len(todo)) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                for _ in pool.map(make, todo):
                    progress.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        os.fsync(data)
    finally:
        os.close(data)
        os.close(index)
    if not errors:
        os.replace(part, path)
    return errors


def put(file: int, raw: bytes, place: int):
    """All of it: where a disk fills up, the system writes what has room, and raises nothing."""
    if os.pwrite(file, raw, place) < len(raw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def known(folder: Path, besides: Path) -> dict[bytes, tuple[Path, int]]:
    """Where other columns of the same kind have samples, by key: file and row."""
    found = {}
    for written in folder.glob("*.keys"):
        whole = written.with_suffix(".bin")
        source = whole if whole.exists() else written.with_suffix(".part")
        if written.stem != besides.stem and source.exists():
            found |= {key: (source, row) for row, key in enumerate(np.fromfile(written, f"V{KEY}").tolist())}
    found.pop(bytes(KEY), None)
    return found
