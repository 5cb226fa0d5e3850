"""How the steps of a task run: operator by operator, or as CUDA graphs of whole steps.

Both see the same batches, seeds and kinds of steps, so both train the same model.
"""

import contextlib
from collections.abc import Iterator

import torch

from .. import distributed
from ..console import log
from ..data.dataset import Batch
from ..errors import UserError
from .feed import Feed
from .task import Task


class Eager:
    """Launches a step's operators one by one. Scalars are summed on the device; nothing waits for it before `means`."""

    kept = ("names", "totals", "finite", "steps")  # saved when an epoch is interrupted

    def __init__(self, task: Task, feed: Feed, seed: int) -> None:
        self.task, self.feed, self.seed = task, feed, seed + (distributed.rank() << 40)  # ranks draw different masks
        # torch.manual_seed would take 130 us, because it looks for other devices too.
        self.generator = torch.default_generator
        if feed.device.type == "cuda":
            index = feed.device.index
            self.generator = torch.cuda.default_generators[torch.cuda.current_device() if index is None else index]
        self.names: list[str] = []
        # For each scalar: its sum, and the number of steps with a finite sum.
        self.totals = self.finite = torch.empty(0)
        self.steps = 0

    def step(self, batch: Batch, number: int) -> None:
        self.reseed(number)
        self.run(batch, number, self.task.flags(number))
        self.steps += 1

    def reseed(self, number: int) -> None:
        """A step's random numbers depend on its number alone, not on what ran before."""
        if self.task.random:
            self.generator.manual_seed(self.seed + number)

    def run(self, batch: Batch, number: int, flags: dict) -> None:
        try:
            scalars = self.task.step(self.feed.training_batch(batch), **flags)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"{self.task.name}: BatchNorm needs two samples or more, and a batch has one: raise --batch-size"
            ) from error
        with torch.no_grad():
            values = torch.stack([x.float() for x in scalars.values()])
        if not self.names:
            self.names, self.totals = list(scalars), torch.zeros_like(values)
            self.finite = torch.zeros_like(values, dtype=torch.int64)
        self.totals += values
        self.finite += self.totals.isfinite()  # a non-finite sum stays non-finite

    def gather(self) -> None:
        """Reduces the sums over all processes."""
        distributed.average_([self.totals])
        distributed.minimum_(self.finite)

    def means(self) -> dict[str, float]:
        """The mean of each scalar over the steps since :meth:`clear`."""
        return dict(zip(self.names, (self.totals / self.steps).tolist(), strict=True))

    def fault(self) -> tuple[str, int] | None:
        """The first scalar that was not finite, and its step since :meth:`clear`, counted from 0."""
        finite = dict(zip(self.names, self.finite.tolist(), strict=True))
        first = min(finite.values())
        faulty = [name for name, count in finite.items() if count == first < self.steps]
        return (faulty[1] if faulty[0] == "loss" and len(faulty) > 1 else faulty[0], first) if faulty else None

    def clear(self) -> None:
        self.steps = 0
        for t in (self.totals, self.finite):
            t.zero_()

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: dict) -> None:
        for name in self.kept:
            value = state[name]
            setattr(self, name, value.to(self.feed.device) if isinstance(value, torch.Tensor) else value)


class Graphs(Eager):
    """Replays one CUDA graph for each kind of step, that is, for each combination of flags and frozen encoders.

    The first step of a kind runs eagerly; it compiles kernels and allocates memory for the second, which is captured. A
    step that synchronises with the GPU raises in that first run, and its task stays eager: a capture that fails halfway
    leaves the memory pool and the random generator in a state that torch cannot repair. The very first step may
    synchronise, because some data is copied to the device once.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.graphs, self.seen, self.pool = {}, [], torch.cuda.graph_pool_handle()
        self.warm = False

    def run(self, batch: Batch, number: int, flags: dict) -> None:
        if self.pool is None or not self.warm:
            self.warm = True
            return super().run(batch, number, flags)
        kind = (*flags.values(), *self.task.frozen_now)
        if kind not in self.seen:
            self.seen.append(kind)
            try:
                with no_waiting():
                    return super().run(batch, number, flags)
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                log.info("%s: eager steps, for these wait for the GPU: %s", self.task.name, str(error).splitlines()[0])
                self.pool, self.graphs = None, {}
                self.reseed(number)
                return super().run(batch, number, flags)
        if kind not in self.graphs:
            self.graphs[kind] = self.capture(batch, number, flags)
        graph, static = self.graphs[kind]
        for name, t in batch.items():
            static[name].copy_(t)
        graph.replay()

    def capture(self, batch: Batch, number: int, flags: dict) -> tuple[torch.cuda.CUDAGraph, Batch]:
        graph, static = torch.cuda.CUDAGraph(), {name: t.clone() for name, t in batch.items()}
        # Thread-local, because another thread may be allocating the next batch.
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                super().run(static, number, flags)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.task.name}: its steps cannot be captured in a CUDA graph ({reason}): use --engine eager"
            ) from error
        return graph, static


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Makes every synchronisation with the GPU an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
