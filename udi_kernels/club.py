"""Pickles of version 0.1 name the class `udi_kernels.club.CLUB`."""

from ._club import CLUB as CLUB
