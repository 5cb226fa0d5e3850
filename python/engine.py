"""How the steps of a task run: one operator after the other, or as whole-step CUDA graphs.

Both see the same batches, seeds and kinds of steps, so that they train the same.
"""

import torch


class Eager:
    """Launches a step's operators one by one. Sums the figures on the device; nothing waits for it until `means`."""

    def __init__(self, task, feed, seed):
        self.task, self.feed, self.seed = task, feed, seed
        # torch.manual_seed would take 130 us, to look for other devices too.
        index = feed.device.index or 0
        self.generator = torch.cuda.default_generators[index] if feed.device.type == "cuda" else torch.default_generator
        self.names, self.totals, self.steps = None, None, 0

    def step(self, batch, number):
        # A step's random numbers depend on its number alone, whatever ran before it or runs beside it.
        self.generator.manual_seed(self.seed + number)
        self.run(batch, self.task.flags(number))
        self.steps += 1

    def run(self, batch, flags):
        figures = self.task.step(self.feed.complete(batch), **flags)
        values = torch.stack([x.detach().float() for x in figures.values()])
        if self.totals is None:
            self.names, self.totals = list(figures), torch.zeros_like(values)
        self.totals += values

    def drew_random(self):
        """Whether the last step drew random numbers."""
        fresh = torch.Generator(self.feed.device).manual_seed(self.generator.initial_seed())
        return not torch.equal(self.generator.get_state(), fresh.get_state())

    def means(self):
        """The figures' means over the steps since the last call."""
        means = dict(zip(self.names, (self.totals / self.steps).tolist(), strict=True))
        self.steps = 0
        self.totals.zero_()
        return means


class Graphs(Eager):
    """Replays a CUDA graph for each kind of step (the flags that it runs with).

    The first step of a kind runs eagerly: it compiles and allocates what the second, which is captured, finds there.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.graphs, self.seen, self.pool = {}, [], torch.cuda.graph_pool_handle()

    def run(self, batch, flags):
        if self.pool is None:
            return super().run(batch, flags)
        if flags not in self.seen:
            self.seen.append(flags)
            return super().run(batch, flags)
        kind = tuple(flags.values())
        if kind not in self.graphs:
            try:
                self.graphs[kind] = self.capture(batch, flags)
            except RuntimeError as error:
                print(f"{self.task.name}: eager steps, for these cannot be captured: {str(error).splitlines()[0]}")
                self.pool, self.graphs = None, {}
                return super().run(batch, flags)
        graph, static = self.graphs[kind]
        for name, t in batch.items():
            static[name].copy_(t)
        graph.replay()

    def capture(self, batch, flags):
        graph, static = torch.cuda.CUDAGraph(), {name: t.clone() for name, t in batch.items()}
        # Thread-local: a thread may be allocating the next batch meanwhile.
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            super().run(static, flags)
        return graph, static
