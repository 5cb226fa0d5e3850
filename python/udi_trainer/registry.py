"""What can be chosen by name: methods, datasets, encoders, fusion rules.

Packages register here; this module imports none of them.
"""

import importlib
import traceback
from collections.abc import Callable, Collection
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError, choose

T = TypeVar("T", bound=Callable)


class Registry(dict[str, Any]):
    """Objects by name. A decorator fills it: ``@encoders.register("cnn")``."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self._needs: dict[str, tuple[tuple[str, ...], str | None]] = {}
        self.recommended: dict[str, dict[str, Any]] = {}

    def register(
        self, name: str, needs: tuple[str, ...] = (), extra: str | None = None, **recommended: Any
    ) -> Callable:
        """Registers what it decorates.

        Args:
            needs: modules that it cannot work without.
            extra: the extra of this package that installs them.
            recommended: options for it, unless the user chooses others.
        """

        def add(thing: T) -> T:
            self[name], self._needs[name], self.recommended[name] = thing, (needs, extra), recommended
            return thing

        return add

    def find(self, name: str) -> Any:
        """The object of this name; the error lists the names, or the modules that are missing."""
        thing = self[choose(self.kind, name, self)]
        modules, extra = self._needs[name]
        missing = [module for module in modules if find_spec(module) is None]
        if missing:
            raise UserError(f'{self.kind} {name} needs {", ".join(missing)}: pip install -e ".[{extra}]"')
        return thing


def imported(where: str, remedy: str) -> Any:
    """The object that ``module:name`` refers to. The user gave the name, or trusts the module."""
    module, _, path = where.partition(":")
    if module.endswith(".py"):
        raise UserError(f"{where} names a file: give its module as {Path(module).stem}:{path}, from the file's folder")
    try:
        return attrgetter(path)(importlib.import_module(module))
    except Exception as error:  # whatever the module raises while it runs
        *_, place = traceback.extract_tb(error.__traceback__)
        own = "importlib" not in place.filename and place.filename != __file__
        reason = f"{type(error).__name__}: {error}" + (f", in {place.filename}, line {place.lineno}" if own else "")
        raise UserError(f"{where} cannot be imported ({reason}): {remedy}") from None


def check_trusted(folder: object, where: str, trust: Collection[str], again: str) -> None:
    """Raises UserError if a run folder names an object of a module that the user does not trust.

    Importing a module runs it, and the run folder may come from an untrusted source.
    """
    module = where.partition(":")[0]
    if module not in trust:
        raise UserError(
            f"{folder} names {where}, which is not trusted: {again}, or trust it (--trust {module}, trust=[{module!r}])"
        )


methods = Registry("method")
datasets = Registry("dataset")
encoders = Registry("encoder")
classifiers = Registry("classifier")
fusion_rules = Registry("fusion rule")
