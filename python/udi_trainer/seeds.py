"""Where random numbers come from: a seed for each purpose, so that none depends on how many another one drew."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive_seed(*key: object) -> int:
    """A seed for this purpose alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initial weights drawn inside depend on this seed alone; torch's generator goes on as if nothing was drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
