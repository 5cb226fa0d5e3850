"""Gradients and losses of DTensors, as FSDP2 and tensor parallelism make them: every rank works on its own shards.

All ranks of the mesh must call. Placements may differ between parameters, not between the K gradients of one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from . import _distributed, reference
from ._ops import NONE, backend


def gramian(compute: Callable, tensors: Sequence[Tensor | None], k: int | None) -> Tensor:
    """Each rank multiplies its shards in float64; one all-reduce of (K, K) adds up."""
    mesh, likes = _checked("gramian", tensors, k)
    for p, like in enumerate(likes):
        if isinstance(like, DTensor) and any(isinstance(placement, Partial) for placement in like.placements):
            raise ValueError(
                f"gramian: parameter {p}'s gradients must be sharded or replicated, got placements {like.placements}, "
                "a sum that is not made yet; call .redistribute()"
            )
    sharded = [_sharded_dims(like) for like in likes]
    reduced: list[int] = sorted(set().union(*sharded))
    # A gradient that is replicated along a reduced dimension of the mesh counts on the first rank there only.
    coordinate: Sequence[int] = mesh.get_coordinate() or ()
    counts = [all(coordinate[d] == 0 for d in reduced if d not in own) for own in sharded]
    shards = [_local(t) if counts[n % len(likes)] else None for n, t in enumerate(tensors)]
    if any(t is not None for t in shards):
        gram = compute(shards, k, True)
    else:
        device = next(t for t in tensors if t is not None).device
        gram = torch.zeros(k or 0, k or 0, dtype=torch.float64, device=device)
    for d in reduced:
        dist.all_reduce(gram, group=mesh.get_group(d))
    return gram.to(reference.accumulation_dtype(*(t.dtype for t in tensors if t is not None)))


def weighted_sum(
    compute: Callable,
    tensors: Sequence[Tensor | None],
    k: int | None,
    weights: Tensor,
    out: list[Any] | None,
    parameters: list[Any] | None,
) -> list[Any]:
    """Shard by shard, without communication; the sums have the gradients' placements."""
    _, likes = _checked("weighted_sum", tensors, k)
    if isinstance(weights, DTensor):
        weights = weights.full_tensor()
    shards = [_local(t) for t in tensors]
    if out is not None:
        for p, (t, like) in enumerate(zip(out, likes, strict=False)):
            _check_placed("weighted_sum", f"out[{p}]", t, t if like is None else like, f"parameter {p}'s gradient")
        compute(shards, k, weights, [_local(t) for t in out])
        return out
    if parameters is not None:
        for p, (t, like) in enumerate(zip(parameters, likes, strict=False)):
            _check_placed("weighted_sum", f"like[{p}]", t, t if like is None else like, f"parameter {p}'s gradient")
    laid_out = None if parameters is None else [_local(t.detach()) for t in parameters]
    return [
        DTensor.from_local(t, like.device_mesh, like.placements, shape=like.shape, stride=strided.stride())
        if isinstance(like, DTensor)
        else t
        for t, like, strided in zip(
            compute(shards, k, weights, None, laid_out), likes, parameters or likes, strict=True
        )
    ]


def _checked(op: str, tensors: Sequence[Tensor | None], k: int | None) -> tuple[DeviceMesh, list[Tensor | None]]:
    """The mesh, and one gradient of each parameter; the others have the same placements."""
    if k is None:
        raise ValueError(f"{op}: grads must be lists where they are DTensors, got stacked ones; unbind their first dim")
    params, mesh = len(tensors) // k, next(t.device_mesh for t in tensors if isinstance(t, DTensor))
    likes: list[Tensor | None] = [None] * params
    first: list[str] = [""] * params
    for n, t in enumerate(tensors):
        i, p = divmod(n, params)
        if t is None:
            continue
        name = f"grads[{i}][{p}]"
        if isinstance(t, DTensor) and t.device_mesh != mesh:
            raise ValueError(f"{op}: {name} must be on {mesh} as the others are, got {t.device_mesh}")
        like = likes[p]
        if like is None:
            likes[p], first[p] = t, name
        else:
            _check_placed(op, name, t, like, first[p])
    return mesh, likes


def _check_placed(op: str, name: str, got: Tensor, want: Tensor, other: str) -> None:
    for what in ("placements", "shape"):
        a, b = (getattr(t, what, "a tensor that is no DTensor") for t in (want, got))
        if a != b:
            a, b = (tuple(x) if isinstance(x, torch.Size) else x for x in (a, b))
            raise ValueError(f"{op}: {name} must have {what} {a} as {other} has, got {b}; call .redistribute()")


def _sharded_dims(t: Tensor | None) -> set[int]:
    return {d for d, p in enumerate(t.placements) if p.is_shard()} if isinstance(t, DTensor) else set()


def _local(t: Any) -> Any:
    return t.to_local() if isinstance(t, DTensor) else t


def club_mi(op: Any, tensors: Sequence[Any], reduction: str, code: int) -> Tensor:
    """The bound of all rows, with its gradient in the local ones; ``op`` takes plain tensors and a code."""
    local, group, place = _rows("club_mi", ("mu", "logvar", "y", "given"), tensors, reduction)
    if group is None:
        return place(op(*local, code))
    mu, logvar, y, given, _ = op.checked(*local, code)
    return place(_distributed.club_mi(mu, logvar, y, given, group, reduction=reduction, times=1))


def duc_loss(
    op: Any, student: Any, teacher: Any, dims: Tensor, temperature: float, reduction: str, code: int
) -> Tensor:
    """As `club_mi`; all rows of the teacher are gathered on every rank."""
    if isinstance(dims, DTensor):
        dims = dims.full_tensor()
    local, group, place = _rows("duc_loss", ("student", "teacher"), (student, teacher), reduction)
    if group is None:
        return place(op(*local, dims, temperature, code))
    if student.shape != teacher.shape:
        got = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"duc_loss: teacher must have student's shape where rows are sharded, got {got}")
    student, teacher, *_ = op.checked(*local, dims, temperature, code)
    return place(_distributed.duc_loss(op, student, teacher, dims, temperature, group, reduction=reduction, times=1))


def _rows(
    op: str, names: Sequence[str], tensors: Sequence[Any], reduction: str
) -> tuple[list[Any], "dist.ProcessGroup | None", Callable]:
    """The local rows, the group that shares them (None: every rank has all), and what makes a loss a DTensor.

    Other placements than rows and copies are redistributed to those of the first tensor with sharded rows.
    """
    mesh = _one_mesh(op, names, tensors)
    by_tensor = ([d for d, p in enumerate(t.placements) if p.is_shard(0)] for t in tensors if t is not None)
    shards = next(filter(None, by_tensor), [])
    if len(shards) > 1:
        raise ValueError(f"{op}: rows must be sharded over one dimension of the mesh, got {len(shards)}")
    if shards and reduction == "none":
        raise ValueError(f"{op}: sharded rows need reduction 'mean' or 'sum', got 'none'")
    placements = [Shard(0) if d in shards else Replicate() for d in range(mesh.ndim)]
    local = [None if t is None else t.redistribute(mesh, placements).to_local() for t in tensors]

    def place(loss: Tensor) -> Tensor:
        return DTensor.from_local(loss, mesh, [Replicate()] * mesh.ndim, run_check=False)

    return local, mesh.get_group(shards[0]) if shards else None, place


def _one_mesh(op: str, names: Sequence[str], tensors: Sequence[Any]) -> DeviceMesh:
    for name, t in zip(names, tensors, strict=True):
        if t is not None and not isinstance(t, DTensor):
            raise TypeError(f"{op}: {name} must be a DTensor as the others are, got {type(t).__name__}")
    mesh = tensors[0].device_mesh
    for name, t in zip(names, tensors, strict=True):
        if t is not None and t.device_mesh != mesh:
            raise ValueError(f"{op}: {name} must be on {mesh} as {names[0]} is, got {t.device_mesh}")
    return mesh


def js_div(
    op: Any, input: Any, target: Any, weight: Any, beta: float, temperature: float, reduction: str, code: int
) -> Tensor:
    """Every process computes its rows, or its classes of them; ``op`` takes plain tensors and a code."""
    mesh = _one_mesh("js_div", ("input", "target", "weight"), (input, target, weight))
    op.checked(input, target, weight, beta, temperature, code)
    for name, t in (("input", input), ("target", target)):
        if any(p.is_shard() and type(p) is not Shard for p in t.placements):
            raise ValueError(f"js_div: {name} must be sharded by Shard, got placements {t.placements}")
    # Along each dimension of the mesh as the first of both that is sharded there.
    pairs = zip(input.placements, target.placements, strict=True)
    placements = [next((p for p in pair if p.is_shard()), Replicate()) for pair in pairs]
    split = [d for d, p in enumerate(placements) if p.is_shard(input.ndim - 1)]
    if len(split) > 1:
        raise ValueError(f"js_div: classes must be sharded over one dimension of the mesh, got {len(split)}")
    of_rows = [Replicate() if d in split else p for d, p in enumerate(placements)]
    dtype = torch.promote_types(input.dtype, target.dtype)
    if split and backend("losses", input.device.type, dtype) == "reference":
        split, placements = [], of_rows
    x, y = (t.redistribute(mesh, placements).to_local() for t in (input, target))
    w = None if weight is None else weight.redistribute(mesh, of_rows).to_local()
    mask = None if w is None else w != 0
    if split:
        rows = _distributed.js_div(x, y, mask, beta, temperature, mesh.get_group(split[0])).reshape(x.shape[:-1])
    else:
        rows = op(x, y, mask, beta, temperature, NONE)
    return _reduced(rows, w, input.shape[:-1], mesh, of_rows, reduction)


def by_rows(op: Any, tensors: dict[str, Any], options: Sequence[Any], reduction: str, code: int) -> Tensor:
    """Every process computes its rows, all classes of them; ``op`` takes plain tensors, the options and a code."""
    mesh = _one_mesh(op.name, list(tensors), list(tensors.values()))
    op.checked(*tensors.values(), *options, code)
    shape = next(iter(tensors.values())).shape[:-1]
    given = [(name, t) for name, t in tensors.items() if t is not None]
    for name, t in given:
        if any(p.is_shard() and not (type(p) is Shard and p.dim < len(shape)) for p in t.placements):
            raise ValueError(
                f"{op.name}: {name} must be sharded over rows, got placements {t.placements}; "
                "gather its last dimension by .redistribute()"
            )
    # Along each dimension of the mesh as the first of them that is sharded there.
    places = zip(*(t.placements for _, t in given), strict=True)
    placements = [next((p for p in along if p.is_shard()), Replicate()) for along in places]
    local = [None if t is None else t.redistribute(mesh, placements).to_local() for t in tensors.values()]
    *logits, w = local
    rows = op(*logits, None if w is None else w != 0, *options, NONE)
    return _reduced(rows, w, shape, mesh, placements, reduction)


def _reduced(
    rows: Tensor, w: Tensor | None, shape: torch.Size, mesh: DeviceMesh, places: Sequence[Any], reduction: str
) -> Tensor:
    """The losses of all rows, whose shape this is, given the local ones of weight other than 0 and their places."""
    if reduction == "none":
        strides = torch.empty(shape, device="meta").stride()
        rows = rows if w is None else rows * w.to(rows.dtype)
        return DTensor.from_local(rows, mesh, places, run_check=False, shape=shape, stride=strides)
    w = torch.ones_like(rows, dtype=torch.float64) if w is None else w.double()
    sums = torch.stack(((rows.detach() * w).sum(), w.sum(), w.count_nonzero()))
    for d, p in enumerate(places):
        if p.is_shard():
            dist.all_reduce(sums, group=mesh.get_group(d))
    value, mass, kept = sums
    if reduction == "mean":
        if shape.numel():
            mass = torch.where(kept == 0, 1, mass)  # so that the mean is 0
        value, w = value / mass, w / mass
    loss = _distributed.Reduced.apply(rows, w.to(rows.dtype), value.to(rows.dtype))
    return DTensor.from_local(loss, mesh, [Replicate()] * mesh.ndim, run_check=False)


def linear_js_div(loss: Callable, tensors: dict[str, Any]) -> Tensor:
    """Heads sharded over the classes, whose rows all processes have; ``loss`` takes local tensors and their `Shard`."""
    name = "linear_js_div"
    mesh = _one_mesh(name, list(tensors), list(tensors.values()))
    weight = tensors["weight"]
    split = [d for d, p in enumerate(weight.placements) if p == Shard(0)]
    if len(split) > 1:
        raise ValueError(f"{name}: classes must be sharded over one dimension of the mesh, got {len(split)}")
    if backend("losses", weight.device.type, weight.dtype) == "reference":
        split = []
    local: dict[str, Any] = {}
    for key, t in tensors.items():
        dim = {"weight": 0, "bias": 0, "target_weight": 0, "target_bias": 0}.get(key)
        if key == "target" and tensors["target_weight"] is None and tensors["logprobs"] is None:
            dim = t.ndim - 1
        places = [Replicate() if dim is None or d not in split else Shard(dim) for d in range(mesh.ndim)]
        summed = [Partial() if key == "input" and d in split else p for d, p in enumerate(places)]
        if t is not None and list(t.placements) != places:  # else its gradient would be summed at once
            t = t.redistribute(mesh, places)
        local[key] = None if t is None else t.to_local(grad_placements=summed)
    shard = None
    if split:
        processes, rank = mesh.size(split[0]), mesh.get_local_rank(split[0])
        first = min(len(weight), rank * -(-len(weight) // processes))  # as Shard cuts
        shard = _distributed.Shard(mesh.get_group(split[0]), first, len(weight))
    return DTensor.from_local(loss(**local, shard=shard), mesh, [Replicate()] * mesh.ndim, run_check=False)
