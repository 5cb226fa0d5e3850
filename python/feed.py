"""Batches on the device: of data that lives there, or prefetched from the host, in the same order either way."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

AHEAD = 2  # batches prefetched


class Feed:
    """The batches of a split, with the stored tensors that these modalities read."""

    def __init__(self, run, split, modalities):
        self.split, self.device, self.resident = split, run.device, run.resident
        self.names = sorted({name for m in modalities for name in run.data.modalities[m].reads})

    def batches(self, order, size):
        """``order`` (samples, on the CPU) in batches: of resident data the indices alone, see :meth:`complete`."""
        if self.resident:
            return ({"index": index} for index in order.to(self.device).split(size))
        return self._stream(order.split(size))

    def complete(self, batch):
        """The whole batch. Of resident data it is gathered here, on the device: a graph can contain that."""
        return self.split.rows(batch["index"], self.names) if self.resident else batch

    def _stream(self, indices):
        on_gpu = self.device.type == "cuda"
        copies = torch.cuda.Stream(self.device) if on_gpu else None

        def load(index):
            batch = self.split.rows(index, self.names)
            if on_gpu:
                with torch.cuda.stream(copies):
                    batch = {n: t.pin_memory().to(self.device, non_blocking=True) for n, t in batch.items()}
            return batch, copies and copies.record_event()

        def arrive(batch, copied):
            if on_gpu:
                compute = torch.cuda.current_stream(self.device)
                compute.wait_event(copied)
                for t in batch.values():
                    t.record_stream(compute)
            return batch

        with ThreadPoolExecutor(1) as pool:
            ahead = deque()
            for index in indices:
                ahead.append(pool.submit(load, index))
                if len(ahead) > AHEAD:
                    yield arrive(*ahead.popleft().result())
            while ahead:
                yield arrive(*ahead.popleft().result())
