"""Argument checks shared by the public ops: the same errors on every backend."""

import torch

from ._ops import REDUCTIONS

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensors(op, **named):
    """Every argument is a floating-point tensor on one device."""
    first = None
    for name, t in named.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        if first is None:
            first, device = name, t.device
        elif t.device != device:
            raise ValueError(f"{op}: {name} must be on {device} as {first} is, got {t.device}")


def promote(*ts):
    """Brings mixed dtypes (autocast makes them) to the common one, as torch does for its own operators."""
    dtype = ts[0].dtype
    if all(t.dtype == dtype for t in ts):
        return ts
    for t in ts[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in ts)


def reduction(op, value):
    """The reduction as the ops take it."""
    if value not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {value!r}")
    return REDUCTIONS.index(value)


def device_type(t):
    """`t.device.type`, without the 3 us that formatting that string takes on a CPU."""
    return "cpu" if t.is_cpu else t.device.type
