"""The questions, one per file.

To add one, write a class decorated with ``@studies.register(name)`` in a new file here and import it below. Its
docstring is the question. Most studies only need ``variants``.
"""

from . import (
    anchor,
    cgdigits,
    cgmnist,
    controller,
    defaults,
    dimml,
    estimator,
    features,
    fewlabels,
    field,
    q,
    quickstart,
    shortcut,
    speakers,
    views,
)

__all__ = [
    "anchor",
    "cgdigits",
    "cgmnist",
    "controller",
    "defaults",
    "dimml",
    "estimator",
    "features",
    "fewlabels",
    "field",
    "q",
    "quickstart",
    "shortcut",
    "speakers",
    "views",
]
