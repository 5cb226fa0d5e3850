"""Distributed data-parallel training with torchrun: each process computes on its share of every batch.

With a single process these functions do nothing. All processes hold the same parameters, because gradients are averaged
before the optimizer step. Whatever follows from parameters, metrics and seeds is therefore the same in all of them and
needs no communication. gloo transfers CPU tensors, nccl GPU tensors.
"""

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from .errors import UserError

BUCKET = 25 * 2**20  # bytes of gradients in one all-reduce, as in DDP
T = TypeVar("T")


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Joins torchrun's process group for this context; does nothing without torchrun or in an existing group."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    initialize(*next(dist.rendezvous("env://")))
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise UserError(f"process {rank()} lost contact with another one ({str(error).splitlines()[0]})") from error
    finally:
        dist.destroy_process_group()


def initialize(store: dist.Store, rank: int, world: int) -> None:
    """Initializes the process group under a fresh prefix of torchrun's store.

    After a restart torchrun keeps the store, which still holds the addresses of dead processes, and its restart count
    differs between nodes (pytorch#135712). So no process trusts old entries: rank 0 announces the prefix to each other
    process until that process has acknowledged it.
    """
    prefix = uuid.uuid4().hex
    if rank == 0:
        for other in range(1, world):
            while not store.check([f"{prefix}/{other}"]):
                store.set(f"prefix for {store.get(f'rank/{other}').decode()}", prefix)
                time.sleep(0.01)
    else:
        store.set(f"rank/{rank}", prefix)
        prefix = store.get(f"prefix for {prefix}").decode()
        store.set(f"{prefix}/{rank}", "acknowledged")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world)


def exit_process(code: int) -> NoReturn:
    """Exits the process; under torchrun without Python's own shutdown.

    DTensor's caches keep gloo's threads alive after the group is destroyed. A thread that frees a tensor during
    Python's shutdown aborts the process (pytorch#190489).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that writes files and messages."""
    return rank() == 0


def group() -> dist.ProcessGroup | None:
    """The group of all processes; None if there is only one."""
    return dist.group.WORLD if world() > 1 else None


def on_first(make: Callable[[], T]) -> T:
    """Calls ``make`` in the first process and returns its result in all; a UserError is raised in all, too."""
    if world() == 1:
        return make()
    made: list[Any] = [None, None]
    if first():
        try:
            made[0] = make()
        except UserError as error:
            made[1] = str(error)
    dist.broadcast_object_list(made, 0)
    if made[1] is not None:
        raise UserError(made[1])
    return made[0]


def share(order: torch.Tensor, batch_size: int) -> torch.Tensor:
    """This process's samples from ``order``, which lists the samples of all batches: an equal part of each batch."""
    return order.view(-1, world(), batch_size // world())[:, rank()].flatten()


def local_indices(count: int) -> torch.Tensor:
    """Indices of this process's part of ``count`` samples. Parts have equal sizes, so a few samples come twice."""
    each = -(-count // world())
    return torch.arange(rank() * each, (rank() + 1) * each) % count


def gather(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Concatenates, in order, the rows that the processes computed for their :func:`local_indices`."""
    if world() == 1:
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)[:count]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """All processes' rows of a batch. Gradients flow to this process's rows only, times the number of processes: if all
    processes compute the same loss, their averaged gradients equal those of a single process.
    """
    if world() == 1:
        return rows
    fixed = rows.detach().contiguous()
    parts = [torch.empty_like(fixed) for _ in range(world())]
    dist.all_gather(parts, fixed)
    parts[rank()] = fixed + world() * (rows - fixed)
    return torch.cat(parts)


def average(tensors: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
    """Each tensor's mean over the processes, with few all-reduces. A None must be None in all processes."""
    if world() == 1:
        return tensors
    means: list[torch.Tensor | None] = list(tensors)
    for indices in buckets(tensors):
        flat = torch.cat([tensors[i].flatten() for i in indices])  # type: ignore[union-attr]
        dist.all_reduce(flat)
        flat /= world()
        for i, mean in zip(indices, flat.split([tensors[i].numel() for i in indices]), strict=True):  # type: ignore
            # Keep the gradient's strides: fused optimizers read memory linearly and assume the parameter's layout.
            means[i] = torch.empty_like(tensors[i]).copy_(mean.view_as(tensors[i]))  # type: ignore
    return means


def buckets(tensors: Sequence[torch.Tensor | None]) -> Iterator[list[int]]:
    """Groups indices of tensors by dtype into buckets of about ``BUCKET`` bytes, alike in all processes."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, t in enumerate(tensors):
        if t is not None:
            by_dtype.setdefault(t.dtype, []).append(i)
    for indices in by_dtype.values():
        bucket, size = [], 0
        for i in indices:
            bucket.append(i)
            size += tensors[i].nbytes  # type: ignore[union-attr]
            if size >= BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


def average_(tensors: Sequence[torch.Tensor]) -> None:
    """Averages in place, for buffers that depend on a process's own samples, such as BatchNorm's."""
    if world() > 1:
        for t, mean in zip(tensors, average(tensors), strict=True):
            t.copy_(mean)  # type: ignore[arg-type]


def minimum_(t: torch.Tensor) -> None:
    if world() > 1:
        dist.all_reduce(t, dist.ReduceOp.MIN)


def total(t: torch.Tensor) -> torch.Tensor:
    """Sum over the processes."""
    if world() > 1:
        dist.all_reduce(t := t.clone())
    return t


def from_first(t: torch.Tensor) -> torch.Tensor:
    """The first process's tensor, in all processes."""
    if world() > 1:
        dist.broadcast(t, 0)
    return t


def noise_like(t: torch.Tensor) -> torch.Tensor:
    """Standard normal noise, the same in all processes; for a sharded tensor, this process's shard of it."""
    if type(t) is torch.Tensor:
        return from_first(torch.randn_like(t))
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(t, DTensor)
    return distribute_tensor(torch.randn(t.shape, dtype=t.dtype, device=t.device), t.device_mesh, t.placements)


def any_process(condition: bool) -> bool:
    """Whether the condition holds in any process."""
    if world() == 1:
        return condition
    result = torch.tensor(int(condition))
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return bool(result)
