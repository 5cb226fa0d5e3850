"""Encoders and classifiers."""

from . import classifiers, encoders

__all__ = ["classifiers", "encoders"]
