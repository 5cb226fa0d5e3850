"""A disk cache of decoded data: one memory-mapped array per column, decoded once for all runs.

A column has two files: the samples, and an index with the key and a checksum of each sample, which is written after the
sample. The index tells which samples are complete and undamaged, and lets a new column (one more row, another split)
copy samples from an older one.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..console import Progress, log
from ..errors import UserError
from ..options import Group, option, pathname
from ..run_folder import read_json, write_json

VERSION = 3  # of the decoders; a new number invalidates the cache
KEY = 16  # bytes
LFS_POINTER = "version https://git-lfs"  # how a file starts that Git LFS has not fetched
RECORD = KEY + 4  # bytes of a sample in the index: its key, and a CRC-32 of its data


@dataclass(frozen=True, kw_only=True)
class CacheOptions(Group, title="data"):
    cache_dir: str | None = option(
        None, pathname, "where decoded data is kept", "DIR", "the user's cache", movable=True
    )


class Unreadable(Exception):
    """A sample that cannot be decoded; the message names the file."""


def digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=KEY).digest()


def file_key(paths: Sequence[Path]) -> bytes:
    """A key of the files' current state: their paths, sizes and modification times."""
    facts = []
    for path in paths:
        try:
            stat = os.stat(path)
            pointer = stat.st_size < 1000 and path.is_file() and path.read_bytes().startswith(LFS_POINTER.encode())
        except OSError as error:
            hint = (
                ": separate folders by /" if "\\" in str(path) and Path(str(path).replace("\\", "/")).exists() else ""
            )
            raise Unreadable(f"{path}: {error.strerror}{hint}") from None
        if pointer:
            raise Unreadable(f"{path}: a Git LFS pointer, not the file itself: run git lfs pull")
        facts.append((os.path.abspath(path), stat.st_size, stat.st_mtime_ns))
    return digest(facts)


class Cache:
    """Cached columns in a folder, by default the user's cache folder. The folder may be deleted at any time."""

    def __init__(self, folder: str | Path | None = None) -> None:
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
        """The samples (N, *shape) of the keys, from the cache. Missing ones are decoded in parallel.

        ``options``: everything besides the files that decoding depends on. Samples that raise :class:`Unreadable` are
        returned as a dict from row to reason; there is no tensor then.
        """
        folder = self.folder / digest(VERSION, label, options, shape, str(dtype)).hex()
        path = folder / f"{hashlib.blake2b(b''.join(keys), digest_size=KEY).hexdigest()}.bin"
        sample = np.empty(shape, numpy_type(dtype))
        if not intact(path, keys, sample.nbytes):
            with self.writable(folder), file_lock(path.with_suffix(".lock")):
                if path.exists() and not intact(path, keys, sample.nbytes):
                    log.warning("the cached column %s is damaged (%s): its samples are decoded again", label, path)
                    os.replace(path, path.with_suffix(".part"))
                if not path.exists() and (errors := decode_column(path, label, keys, decode, sample)):
                    return None, errors
        count = len(keys) * int(np.prod(shape, dtype=np.int64))
        # A private mapping: writing to the tensor changes the process's own copy only.
        return torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(len(keys), *shape), {}

    def memoize(self, key: bytes, compute: Callable[[], dict]) -> dict:
        """The result of ``compute``, a JSON object, computed once per key."""
        path = self.folder / "statistics" / f"{key.hex()}.json"
        with contextlib.suppress(OSError, ValueError):
            saved = read_json(path)
            if saved.get("digest") == digest(json.dumps(saved.get("value"))).hex():
                return saved["value"]
            log.warning("the cached statistics %s are damaged: they are computed again", path)
        value = compute()
        with self.writable(path.parent), file_lock(path.with_suffix(".lock")):
            write_json(path, {"value": value, "digest": digest(json.dumps(value)).hex()})
        return value

    @contextlib.contextmanager
    def writable(self, folder: Path) -> Iterator[None]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"decoded data cannot be stored in {self.folder} ({reason}): choose --cache-dir DIR"
            ) from None


def numpy_type(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Waits while another process holds the lock. The lock of a killed process is free."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def record(key: bytes, data: bytes | memoryview) -> bytes:
    """What the index keeps of a sample: its key, and a checksum of its data."""
    return key + zlib.crc32(data).to_bytes(4, "little")


def read_index(path: Path) -> list[bytes]:
    """The records of the samples in a column, whose data is in a file beside it."""
    try:
        return np.fromfile(path.with_suffix(".keys"), f"V{RECORD}").tolist()
    except OSError:
        return []


def intact_rows(file: Path, keys: Sequence[bytes], size: int) -> list[bool]:
    """Which rows of this file hold the samples of these keys, undamaged. ``size``: bytes of a sample."""
    records = read_index(file)
    if not file.exists() or not size:
        return [False] * len(keys)
    with open(file, "rb") as data, ThreadPoolExecutor(os.cpu_count()) as pool:

        def check(i: int) -> bool:
            return i < len(records) and record(keys[i], os.pread(data.fileno(), size, i * size)) == records[i]

        return list(pool.map(check, range(len(keys))))


def intact(path: Path, keys: Sequence[bytes], size: int) -> bool:
    return path.exists() and path.stat().st_size == len(keys) * size and all(intact_rows(path, keys, size))


def decode_column(
    path: Path, label: str, keys: Sequence[bytes], decode: Callable[[int], np.ndarray], like: np.ndarray
) -> dict[int, str]:
    """Writes a column of samples ``like`` this one; returns the reasons for unreadable samples by row.

    Continues an unfinished file, and copies samples that other columns of the same kind contain.
    """
    part, index_path, size = path.with_suffix(".part"), path.with_suffix(".keys"), like.nbytes
    errors: dict[int, str] = {}
    others = other_columns(path)
    missing = [i for i, done in enumerate(intact_rows(part, keys, size)) if not done]
    data, index = (os.open(file, os.O_RDWR | os.O_CREAT, 0o644) for file in (part, index_path))

    def write_sample(i: int) -> None:
        key = keys[i]
        try:
            if key in others:
                source, row, saved = others[key]
                with open(source, "rb") as file:
                    raw = os.pread(file.fileno(), size, row * size)
            if key not in others or record(key, raw) != saved:
                sample = np.asarray(decode(i))
                if sample.shape != like.shape:
                    raise Unreadable(f"shape {sample.shape} instead of {like.shape}")
                raw = sample.astype(like.dtype).tobytes()
        except Unreadable as error:
            errors[i] = str(error)
            return
        write_at(data, raw, i * size)
        write_at(index, record(key, raw), i * RECORD)

    try:
        with Progress(f"decoding {label}", len(missing)) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                for _ in pool.map(write_sample, missing):
                    progress.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        os.ftruncate(data, len(keys) * size)
        os.fsync(data)
    finally:
        os.close(data)
        os.close(index)
    if not errors:
        os.replace(part, path)
    return errors


def write_at(file: int, data: bytes, offset: int) -> None:
    """Writes all of the data or raises: on a full disk, pwrite writes what fits and reports no error."""
    if os.pwrite(file, data, offset) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def other_columns(path: Path) -> dict[bytes, tuple[Path, int, bytes]]:
    """The file, row and record of each sample, by key, in the other columns of the folder."""
    samples: dict[bytes, tuple[Path, int, bytes]] = {}
    for index_path in path.parent.glob("*.keys"):
        finished = index_path.with_suffix(".bin")
        source = finished if finished.exists() else index_path.with_suffix(".part")
        if index_path.stem != path.stem and source.exists():
            samples |= {r[:KEY]: (source, row, r) for row, r in enumerate(read_index(index_path))}
    samples.pop(bytes(KEY), None)
    return samples
