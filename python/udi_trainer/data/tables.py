"""Tables: columns of numbers and of words as one vector per sample."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from .cache import digest
from .dataset import Modality
from .kinds import Kind, kinds
from .pipelines import Features


@kinds.register("number")
class Table(Kind):
    """One or more columns as a vector per row; a cell is a list with a float (NaN: empty) or a word per column.

    A number is one position, followed by an indicator of empty cells if training has any; these take the median of
    training. A word is a position for each word that training has, and one for all others.
    """

    header_size = 0
    parts: list[Any]  # of each column: (median, whether there is an indicator), or the positions of its words

    def keys(self) -> list[bytes]:
        return [digest(cell) for cell in self.column.cells]

    def read_headers(self, keys: list[bytes]) -> np.ndarray:
        return np.zeros((len(keys), 0))

    def configure(self, headers: np.ndarray) -> None:
        rows = [self.column.cells[row] for row in self.column.training if self.column.cells[row]]
        self.parts = [describe(values) for values in zip(*rows, strict=True)]
        self.shape = (len(self.vector(rows[0])),)

    def vector(self, cell: Sequence[Any]) -> list[float]:
        """The stored form of a cell."""
        x: list[float] = []
        for value, part in zip(cell, self.parts, strict=True):
            if isinstance(part, dict):
                place = part.get(value, len(part))
                x += [float(place == i) for i in range(len(part) + 1)]
            else:
                middle, indicator = part
                empty = value != value
                x += [middle if empty else value, *[float(empty)] * indicator]
        return x

    def read(self, keys: list[bytes]) -> torch.Tensor:
        zeros = [0.0] * self.shape[0]
        return torch.tensor([self.vector(cell) if cell else zeros for cell in self.column.cells])

    def modality(self, name: str, sample: torch.Tensor, keys: Sequence[bytes]) -> Modality:
        """Numbers are normalised; indicators and words stay 0 and 1."""
        mean, std = self.normalisation(sample, keys, lambda x: x)
        numeric: list[bool] = []
        for part in self.parts:
            numeric += [False] * (len(part) + 1) if isinstance(part, dict) else [True, *[False] * part[1]]
        mean = tuple(m if is_number else 0.0 for m, is_number in zip(mean, numeric, strict=True))
        std = tuple(s if is_number else 1.0 for s, is_number in zip(std, numeric, strict=True))
        return Modality("mlp", (name,), Features(mean, std))


def describe(values: Sequence[Any]) -> Any:
    """How a column is stored, from its training cells: see :attr:`Table.parts`."""
    if isinstance(values[0], str):
        return {word: i for i, word in enumerate(sorted(set(values)))}
    numbers = [x for x in values if x == x]
    return float(median(numbers)), len(numbers) < len(values)
