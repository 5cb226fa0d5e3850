"""What every file of the trainer shares: errors meant for the user, named registries, derived seeds."""

import difflib
import hashlib
from importlib.util import find_spec


class UserError(Exception):
    """Something that the user can mend: the command prints it as one line and ends with exit code 2."""


class Registry(dict):
    """Names to things, filled by a decorator: ``@encoders.register("cnn")``."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.needs = kind, {}

    def register(self, name, needs=(), extra=None):
        """``needs``: modules without which it is of no use, that this extra of the package installs."""

        def add(thing):
            self[name], self.needs[name] = thing, (needs, extra)
            return thing

        return add

    def find(self, name):
        thing = self[choose(self.kind, name, self)]
        modules, extra = self.needs[name]
        missing = [module for module in modules if find_spec(module) is None]
        if missing:
            raise UserError(f'{self.kind} {name} needs {", ".join(missing)}: pip install -e ".[{extra}]"')
        return thing


def choose(kind, name, names):
    """``name`` if it is one of ``names``, else an error that lists them."""
    if name in names:
        return name
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"unknown {kind} {name!r}: choose from {', '.join(names)}{hint}")


def derive_seed(*key):
    """A seed for this purpose alone: no purpose depends on how many random numbers another one drew."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
