"""The error that is meant for the user."""

import difflib
from collections.abc import Iterable


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
