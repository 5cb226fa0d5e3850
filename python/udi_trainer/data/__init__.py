"""Datasets: what they are made of, whether they are fit to be trained on, and those that come with the trainer."""

from . import digits, layouts, manifest, spokendigits
from .dataset import Dataset, Modality, Split

__all__ = ["Dataset", "Modality", "Split", "digits", "layouts", "manifest", "spokendigits"]
