"""Studies, by name. The questions fill it; this file imports none."""

from udi_trainer.registry import Registry

studies = Registry("study")
