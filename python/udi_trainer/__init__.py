"""A compact trainer of multimodal models without a joint loss: UDI, its baselines, and what a method needs."""

from importlib.util import find_spec as _find

for _module in ("torch", "numpy", "sklearn", "matplotlib", "tqdm"):
    if _find(_module) is None:
        raise ModuleNotFoundError(f'udi_trainer needs {_module}: pip install -e ".[train]"', name=_module)

from . import data, methods, models  # noqa: E402  what is in them registers itself
from .api import Result, train  # noqa: E402
from .data import Dataset, Modality, Split  # noqa: E402
from .errors import UserError  # noqa: E402
from .methods import Outcome  # noqa: E402
from .options import Group, Options, option, reads  # noqa: E402
from .predictor import Predictor, load  # noqa: E402
from .run import Run  # noqa: E402

__all__ = [
    "Dataset",
    "Group",
    "Modality",
    "Options",
    "Outcome",
    "Predictor",
    "Result",
    "Run",
    "Split",
    "UserError",
    "data",
    "load",
    "methods",
    "models",
    "option",
    "reads",
    "train",
]
