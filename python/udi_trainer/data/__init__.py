"""Datasets: their structure, their validation, and the ones that come with the trainer."""

from . import digits, layouts, manifest, multiview, openml, spokendigits, video
from .dataset import Dataset, Modality, Split

__all__ = [
    "Dataset",
    "Modality",
    "Split",
    "digits",
    "layouts",
    "manifest",
    "multiview",
    "openml",
    "spokendigits",
    "video",
]
