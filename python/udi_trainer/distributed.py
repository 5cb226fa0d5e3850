"""Several processes that train as one, started by torchrun: each has its share of every batch.

All here is nothing where one process trains. Every process holds the same parameters: gradients are averaged before an
optimizer sees them, so what follows from parameters, figures and seeds is the same everywhere, and needs no message.
Messages on the CPU go by gloo, between GPUs by nccl.
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

BUCKET = 25 * 2**20  # bytes of gradients that travel in one message, as in DDP
T = TypeVar("T")


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started beside this one, if there are any and nobody has yet."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    initialize(*next(dist.rendezvous("env://")))
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise UserError(f"process {rank()} lost another one ({str(error).splitlines()[0]})") from error
    finally:
        dist.destroy_process_group()


def initialize(store: dist.Store, rank: int, world: int) -> None:
    """Begins the group, in a part of torchrun's store where nobody has written yet.

    torchrun keeps the store when it starts its processes anew, with the addresses of those that are gone, and its count
    of restarts differs from node to node (pytorch#135712). So nobody believes what may be old: the first process names
    a part to each of the others until that has said it was told.
    """
    prefix = uuid.uuid4().hex
    if rank == 0:
        for other in range(1, world):
            while not store.check([f"{prefix}/{other}"]):
                store.set(f"part of {store.get(f'who/{other}').decode()}", prefix)
                time.sleep(0.01)
    else:
        store.set(f"who/{rank}", prefix)
        prefix = store.get(f"part of {prefix}").decode()
        store.set(f"{prefix}/{rank}", "told")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world)


def exit_process(code: int) -> NoReturn:
    """Ends the process, one of several without Python's own end.

    DTensor's caches keep gloo's threads beyond the group, and one that lets go of a message's tensor while Python ends
    aborts the process (pytorch#190489).
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
    """Whether this is the process that writes and tells."""
    return rank() == 0


def group() -> dist.ProcessGroup | None:
    """Of all processes, if they are several."""
    return dist.group.WORLD if world() > 1 else None


def on_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all; its error too."""
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
    """Of samples in the order of their batches those of this process, an equal part of each batch."""
    return order.view(-1, world(), batch_size // world())[:, rank()].flatten()


def local_indices(count: int) -> torch.Tensor:
    """This process's part of so many samples that all have to be seen once: as many in each, so some twice."""
    each = -(-count // world())
    return torch.arange(rank() * each, (rank() + 1) * each) % count


def gather(rows: torch.Tensor, count: int) -> torch.Tensor:
    """What all processes computed of their :func:`part`, in order."""
    if world() == 1:
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)[:count]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """All processes' rows of a batch. The gradient reaches those of this one, times the number of processes: of a loss
    that is the same in all of them the averaged gradients are then those of one process.
    """
    if world() == 1:
        return rows
    fixed = rows.detach().contiguous()
    parts = [torch.empty_like(fixed) for _ in range(world())]
    dist.all_gather(parts, fixed)
    parts[rank()] = fixed + world() * (rows - fixed)
    return torch.cat(parts)


def average(tensors: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
    """Each tensor's mean over the processes, in few messages. What is None is None in all."""
    if world() == 1:
        return tensors
    means: list[torch.Tensor | None] = list(tensors)
    for indices in buckets(tensors):
        flat = torch.cat([tensors[i].flatten() for i in indices])  # type: ignore[union-attr]
        dist.all_reduce(flat)
        flat /= world()
        for i, mean in zip(indices, flat.split([tensors[i].numel() for i in indices]), strict=True):  # type: ignore
            # In the gradient's own strides: a fused optimizer walks through memory, and takes them for the parameter's.
            means[i] = torch.empty_like(tensors[i]).copy_(mean.view_as(tensors[i]))  # type: ignore
    return means


def buckets(tensors: Sequence[torch.Tensor | None]) -> Iterator[list[int]]:
    """Indices of tensors that go together: one dtype, so many bytes; the same in all processes."""
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
    """The same in place: buffers that a process keeps of its own share, such as BatchNorm's."""
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
    """The first process's, in all."""
    if world() > 1:
        dist.broadcast(t, 0)
    return t


def noise_like(t: torch.Tensor) -> torch.Tensor:
    """From a normal distribution; the first process's, in all, or of sharded tensors a shard of that in each."""
    if type(t) is torch.Tensor:
        return from_first(torch.randn_like(t))
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(t, DTensor)
    return distribute_tensor(torch.randn(t.shape, dtype=t.dtype, device=t.device), t.device_mesh, t.placements)


def any_process(wish: bool) -> bool:
    """Whether any process wishes it."""
    if world() == 1:
        return wish
    wishes = torch.tensor(int(wish))
    dist.all_reduce(wishes, dist.ReduceOp.MAX)
    return bool(wishes)
