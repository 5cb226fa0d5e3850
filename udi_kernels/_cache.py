"""Compiled files: where they are kept, which of them may be loaded, and how they are written.

Loading a library runs its code, so the cache must be a folder that only this user and root can write to. This file
needs only the standard library: setup.py imports it without the package.
"""

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import warnings
from pathlib import Path

PACKAGE = Path(__file__).absolute().parent
SOURCES = PACKAGE / "csrc" if (PACKAGE / "csrc").exists() else PACKAGE.parent / "csrc"

_warned: set[str] = set()


class BuildError(RuntimeError):
    """What is missing or failed, and the remedy, in one line."""


def warn(message):
    """Warns once per process. Where warnings are errors, only the first call fails."""
    if message not in _warned:
        _warned.add(message)
        with contextlib.suppress(ValueError):  # stderr is closed
            warnings.warn(f"udi_kernels: {message}", stacklevel=3)


def say(message):
    """Prints a line to stderr; a stderr that is missing, full or closed stops no work."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr:
            print(f"udi_kernels: {message}", file=sys.stderr, flush=True)


def folder():
    """The cache's folder, created with mode 0700 if it does not exist.

    It is in $UDI_KERNELS_CACHE, $XDG_CACHE_HOME or ~/.cache, in this order, or under the temporary folder if there is
    no usable home. BuildError if another user can write to it.
    """
    chosen, home = os.environ.get("UDI_KERNELS_CACHE") or os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME", "")
    if chosen or os.path.isabs(home):
        path = Path(chosen or Path(home, ".cache"), "udi_kernels").absolute()
        if _create(path) or chosen:
            _check_owner(path)
            return path
    path = Path(tempfile.gettempdir(), f"udi_kernels-{os.geteuid()}")
    _create(path)
    _check_owner(path, shared_parent=True)
    return path


def _create(path):
    try:
        path.mkdir(0o700, parents=True, exist_ok=True)
        return True
    except OSError:
        return False


def _check_owner(path, shared_parent=False):
    """BuildError if a user other than this one and root could have written to `path`.

    Links are followed. Where any user can create the path (`shared_parent`), it must be a real folder of this user.
    """
    try:
        status = path.lstat() if shared_parent else path.stat()
    except OSError:
        return  # nothing to load
    user = os.geteuid()
    if shared_parent and not stat.S_ISDIR(status.st_mode):
        fault = "it is not a real folder"
    elif status.st_uid != user and (shared_parent or status.st_uid != 0):
        fault = f"it belongs to user {status.st_uid}, not {user}"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault = "others can write to it"
    else:
        return
    raise BuildError(f"{path} is not trusted: {fault}; remove it, or set UDI_KERNELS_CACHE to a folder of your own")


def path(name):
    """Path of a file of the cache, whether it exists or not; in a private folder if the cache is not trusted."""
    try:
        target = folder() / name
        for part in (target.parent, target, _digest_file(target)):
            _check_owner(part)
        return target
    except BuildError as e:
        warn(f"{e}. Nothing is loaded from there; this process compiles into a temporary folder")
        return _private() / name


@functools.cache
def _private():
    """A folder that this process removes at its end."""
    made, owner = tempfile.mkdtemp(prefix="udi_kernels-"), os.getpid()

    def remove():
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(made, ignore_errors=True)

    atexit.register(remove)
    return Path(made)


def once(name, make):
    """Contents of a file of the cache; `make()` is called and its result stored if the file does not exist.

    Waits while another process makes the file.
    """
    try:
        target = path(name)
        if intact(target):
            return target.read_bytes()
        target.parent.mkdir(0o700, parents=True, exist_ok=True)
        with lock(target):
            if not intact(target):
                temporary = target.with_suffix(f".{os.getpid()}")
                temporary.write_bytes(make())
                publish(temporary, target)
            return target.read_bytes()
    except OSError as e:
        warn(f"{cannot_write(e)}. Until then, each process compiles again")
        return make()


def cannot_write(e):
    return f"cannot write to the cache ({e}); set UDI_KERNELS_CACHE to a writable folder"


def intact(path):
    """Whether the file has the contents that were written: loading a truncated library kills the process."""
    try:
        return _digest_file(path).read_bytes() == hashlib.sha256(path.read_bytes()).hexdigest().encode()
    except OSError:
        return False


def publish(temporary, target):
    """Moves a finished file to its name, atomically; the digest reveals one that a power failure truncated."""
    digest = _digest_file(target)
    digest.write_bytes(hashlib.sha256(temporary.read_bytes()).hexdigest().encode())
    for path in (temporary, digest):
        path.chmod(0o644)  # whatever the umask
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, target)


def _digest_file(path):
    return path.with_name(f"{path.name}.sha256")


@contextlib.contextmanager
def lock(target):
    """Held by one process at a time; the system releases it if that process dies."""
    import fcntl

    with open(target.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
