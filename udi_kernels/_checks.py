"""Checks in Python: of what an op's schema cannot carry, and, where csrc does not serve, of all that csrc checks.

The words are those of csrc/ops; tests compare them.
"""

from numbers import Number
from typing import NoReturn

import torch
from torch import Tensor

from ._ops import REDUCTIONS

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def not_tensors(op: str, **named: object) -> NoReturn:
    """Raises for the first that is not a tensor."""
    name, value = next((name, value) for name, value in named.items() if not isinstance(value, Tensor))
    raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def number(op: str, name: str, value: object) -> None:
    """Not a tensor: reading that would wait for its device, and it would get no gradient."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"{op}: {name} must be a number, got a tensor, which would get no gradient; pass {name}.item()"
            + ("; to learn it, divide both logits by it instead" if name == "temperature" else "")
        )
    if not isinstance(value, (Number, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def reduction(op: str, value: str) -> int:
    """The reduction as the ops take it."""
    if value not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {value!r}")
    return REDUCTIONS.index(value)


def dense(op: str, name: str, t: Tensor) -> None:
    if t.layout is not torch.strided:
        raise ValueError(f"{op}: {name} must be dense, got {t.layout}; call .to_dense()")


def tensors(op: str, **named: Tensor) -> None:
    """Every argument is dense and has a floating-point dtype, and all are on one device."""
    first, like = next(iter(named.items()))
    for name, t in named.items():
        dense(op, name, t)
        if t.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.device != like.device:
            raise ValueError(f"{op}: {name} must be on {like.device} as {first} is, got {t.device}")


def same_shape(op: str, **named: Tensor) -> None:
    """Every argument has the first one's shape."""
    first, like = next(iter(named.items()))
    for name, t in named.items():
        if t.shape != like.shape:
            raise ValueError(f"{op}: {name} must have {first}'s shape {tuple(like.shape)}, got {tuple(t.shape)}")


def promote(*ts: Tensor) -> tuple[Tensor, ...]:
    """Brings mixed dtypes (autocast makes them) to the common one, as torch does for its own operators."""
    dtype = ts[0].dtype
    for t in ts[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in ts)
