"""A fingerprint of what a run was given, compared when the run is resumed, and across its processes.

It holds no paths: the same data at another place has the same one.
"""

import hashlib

import torch

from ..models.encoders import make_encoder
from .dataset import Dataset

BLOCK = 2**26  # bytes hashed at a time


def fingerprint(data: Dataset) -> dict[str, str]:
    """Digests by part: labels, ids and stored tensors of each split, classes, and each encoder's structure."""
    parts = {"classes": digest((data.classes, list(data.class_names or ())))}
    for name, split in data.splits().items():
        parts[f"{name} labels"] = tensor_digest(split.labels)
        parts[f"{name} ids"] = digest(None if split.ids is None else list(map(str, split.ids)))
        parts |= {f"{name} {stored}": tensor_digest(t) for stored, t in split.stored.items()}
    with torch.random.fork_rng(devices=[]):
        for m, modality in data.modalities.items():
            encoder, width = make_encoder(m, modality, data.train)
            shapes = [(name, tuple(t.shape)) for name, t in encoder.state_dict().items()]
            parts[f"encoder of {m}"] = digest((repr(encoder), shapes, width))
    return parts


def digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def tensor_digest(t: torch.Tensor) -> str:
    """Of dtype, shape and values."""
    digested = hashlib.blake2b(repr((str(t.dtype), tuple(t.shape))).encode(), digest_size=8)
    flat = t.detach().cpu().contiguous().flatten().view(torch.uint8)
    for block in flat.split(BLOCK):
        digested.update(block.numpy())
    return digested.hexdigest()


def difference(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """The parts that differ."""
    return [part for part in ours.keys() | theirs.keys() if ours.get(part) != theirs.get(part)]
