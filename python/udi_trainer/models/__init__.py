"""Encoders, and the classifiers made of them."""

from . import classifiers, encoders

__all__ = ["classifiers", "encoders"]
