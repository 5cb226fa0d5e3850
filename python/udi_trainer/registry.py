"""What can be chosen by name: methods, datasets, encoders, fusion rules. Rooms fill these; this file imports none."""

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

from .errors import UserError, choose

T = TypeVar("T", bound=Callable)


class Registry(dict[str, Any]):
    """Names to things, filled by a decorator: ``@encoders.register("cnn")``."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self._needs: dict[str, tuple[tuple[str, ...], str | None]] = {}
        self.recommended: dict[str, dict[str, Any]] = {}

    def register(
        self, name: str, needs: tuple[str, ...] = (), extra: str | None = None, **recommended: Any
    ) -> Callable:
        """``needs``: modules without which it is of no use, that this extra of the package installs.

        ``recommended``: options with it, where the user has not chosen others.
        """

        def add(thing: T) -> T:
            self[name], self._needs[name], self.recommended[name] = thing, (needs, extra), recommended
            return thing

        return add

    def find(self, name: str) -> Any:
        """The thing of this name, or an error that lists the names, or says what it lacks."""
        thing = self[choose(self.kind, name, self)]
        modules, extra = self._needs[name]
        missing = [module for module in modules if find_spec(module) is None]
        if missing:
            raise UserError(f'{self.kind} {name} needs {", ".join(missing)}: pip install -e ".[{extra}]"')
        return thing


def offered(function: Callable, *args):
    """Calls it with the first of these arguments, as many as it takes."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    taken = [p for p in inspect.signature(function).parameters.values() if p.kind in kinds]
    return function(*args[: len(taken)])


methods = Registry("method")
datasets = Registry("dataset")
encoders = Registry("encoder")
classifiers = Registry("classifier")
fusion_rules = Registry("fusion rule")
