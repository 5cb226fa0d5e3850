"""Errors addressed to the user."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator

import torch


class UserError(ValueError):
    """A mistake that the user can fix, explained in one line. The command prints it and exits with code 2."""


def choose(kind: str, name: str, names: Iterable[str]) -> str:
    """Returns ``name`` if it is in ``names``; otherwise raises a UserError that lists them."""
    names = list(names)
    if name in names:
        return name
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"unknown {kind} {name!r}: choose from {', '.join(names)}{hint}")


def short(value: object, limit: int = 200) -> str:
    """The value as part of a message: cells of a file may be of any length."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


@contextlib.contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turns out-of-memory errors into a UserError that names the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch's CPU allocator raises a plain RuntimeError.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        lines = str(error).splitlines() or ["MemoryError"]
        raise UserError(f"out of memory {remedy} ({lines[0]})") from error


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
