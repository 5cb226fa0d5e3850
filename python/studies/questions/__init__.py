"""The questions, a file each.

A new one is a file here with a class decorated with ``@studies.register(name)``, imported below. Its docstring is the
question; most need no more than ``variants``.
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
    "q",
    "quickstart",
    "shortcut",
    "speakers",
    "views",
]
