"""Methods by name: each is a function from a run to an :class:`Outcome`.

A new method is one file here with a function decorated with ``@methods.register(name)``, imported below. Methods that
train the same stage share it: a stage that has been trained in a run folder is loaded from there.
"""

from . import (
    dgl,
    dimml,
    ensemble,
    g2d,
    g_blending,
    gramian,
    joint,
    joint_sum,
    mla,
    mmpareto,
    ogm_ge,
    pdmp,
    pmr,
    reconboost,
    scikit,
    self_training,
    udi,
)
from .outcome import Outcome

__all__ = [
    "Outcome",
    "dgl",
    "dimml",
    "ensemble",
    "g2d",
    "g_blending",
    "gramian",
    "joint",
    "joint_sum",
    "mla",
    "mmpareto",
    "ogm_ge",
    "pdmp",
    "pmr",
    "reconboost",
    "scikit",
    "self_training",
    "udi",
]
