"""The registry of studies. Questions register here; this module imports none of them."""

from udi_trainer.registry import Registry

studies = Registry("study")
