"""The error that is meant for the user."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator

import torch


class UserError(ValueError):
    """Something that the user can mend, in one line: the command prints it and ends with exit code 2."""


def choose(kind: str, name: str, names: Iterable[str]) -> str:
    """``name`` if it is one of ``names``, else an error that lists them."""
    names = list(names)
    if name in names:
        return name
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"unknown {kind} {name!r}: choose from {', '.join(names)}{hint}")


@contextlib.contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Out of memory becomes a UserError with this remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch's allocator for the CPU has no class of its own.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        lines = str(error).splitlines() or ["MemoryError"]
        raise UserError(f"out of memory {remedy} ({lines[0]})") from error
