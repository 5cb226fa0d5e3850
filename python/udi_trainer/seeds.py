"""Seeds for random numbers. Each purpose has its own seed, so no stream depends on how much another one has drawn."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive_seed(*key: object) -> int:
    """A seed derived from this key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator in this context (for initial weights) and restores its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
