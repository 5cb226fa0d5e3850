"""How the steps of a task run: one operator after the other, or as whole-step CUDA graphs.

Both see the same batches, seeds and kinds of steps, so that they train the same.
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
    """Launches a step's operators one by one. Sums its scalars on the device; nothing waits for it until `means`."""

    kept = ("names", "totals", "finite", "steps")  # of an epoch that is interrupted

    def __init__(self, task: Task, feed: Feed, seed: int) -> None:
        self.task, self.feed, self.seed = task, feed, seed + (distributed.rank() << 40)  # masks of their own
        # torch.manual_seed would take 130 us, to look for other devices too.
        self.generator = torch.default_generator
        if feed.device.type == "cuda":
            index = feed.device.index
            self.generator = torch.cuda.default_generators[torch.cuda.current_device() if index is None else index]
        self.names: list[str] = []
        self.totals = self.finite = torch.empty(0)  # of each scalar: its sum, and in how many steps that was finite
        self.steps = 0

    def step(self, batch: Batch, number: int) -> None:
        self.reseed(number)
        self.run(batch, number, self.task.flags(number))
        self.steps += 1

    def reseed(self, number: int) -> None:
        """A step's random numbers depend on its number alone, whatever ran before it."""
        if self.task.random:
            self.generator.manual_seed(self.seed + number)

    def run(self, batch: Batch, number: int, flags: dict) -> None:
        scalars = self.task.step(self.feed.training_batch(batch), **flags)
        values = torch.stack([x.detach().float() for x in scalars.values()])
        if not self.names:
            self.names, self.totals = list(scalars), torch.zeros_like(values)
            self.finite = torch.zeros_like(values, dtype=torch.int64)
        self.totals += values
        self.finite += self.totals.isfinite()  # a sum that is not finite stays so

    def gather(self) -> None:
        """The sums of all processes that train together, in each."""
        distributed.average_([self.totals])
        distributed.minimum_(self.finite)

    def means(self) -> dict[str, float]:
        """The scalars' means over the steps since :meth:`clear`."""
        return dict(zip(self.names, (self.totals / self.steps).tolist(), strict=True))

    def fault(self) -> tuple[str, int] | None:
        """The first scalar that was not finite, and in which step since :meth:`clear`, counted from 0."""
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
    """Replays a CUDA graph for each kind of step (the flags that it runs with).

    The first step of a kind runs eagerly: it compiles and allocates what the second, which is captured, finds there. A
    step that waits for the GPU shows itself then, and is left eager: a capture that fails half-way leaves the memory
    pool and the random generator in a state that torch cannot mend. The very first step may wait, for what is copied to
    the device once.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.graphs, self.seen, self.pool = {}, [], torch.cuda.graph_pool_handle()
        self.warm = False

    def run(self, batch: Batch, number: int, flags: dict) -> None:
        if self.pool is None or not self.warm:
            self.warm = True
            return super().run(batch, number, flags)
        if flags not in self.seen:
            self.seen.append(flags)
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
        kind = tuple(flags.values())
        if kind not in self.graphs:
            self.graphs[kind] = self.capture(batch, number, flags)
        graph, static = self.graphs[kind]
        for name, t in batch.items():
            static[name].copy_(t)
        graph.replay()

    def capture(self, batch: Batch, number: int, flags: dict) -> tuple[torch.cuda.CUDAGraph, Batch]:
        graph, static = torch.cuda.CUDAGraph(), {name: t.clone() for name, t in batch.items()}
        # Thread-local: a thread may be allocating the next batch meanwhile.
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
    """Whatever waits for the GPU raises an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
