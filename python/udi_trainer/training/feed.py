"""Batches on the device, from data that lives there or is prefetched from the host; the order is the same."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ..data.dataset import Batch, Split, presence
from ..run import Run

AHEAD = 2  # batches prefetched


def inference_batch(device: torch.device) -> int:
    """Samples at a time where nothing is trained. On a CPU the activations of more would leave its caches."""
    return 125 if device.type == "cpu" else 1000


class Feed:
    """The batches of a split, with the stored tensors that the given modalities read."""

    def __init__(self, run: Run, split: Split, modalities: Sequence[str]) -> None:
        self.split, self.device, self.resident = split, run.device, run.resident
        views = {m: run.data.modalities[m] for m in modalities}
        masks = {presence(m) for m in views} & set(split.stored)
        self.names = sorted({name for view in views.values() for name in view.reads} | masks)
        self.varies = any(view.vary for view in views.values())
        # High-priority streams come from a pool that no stage computes on.
        copying = not self.resident and self.device.type == "cuda"
        self.copies = torch.cuda.Stream(self.device, priority=-1) if copying else None

    def batches(self, order: torch.Tensor, size: int) -> Iterator[Batch]:
        """Batches of the samples ``order`` (on the CPU); for resident data, indices alone, see :meth:`complete`."""
        if self.resident:
            return ({"index": index} for index in order.to(self.device).split(size))
        return self._stream(order.split(size))

    def inference_batches(self, order: torch.Tensor) -> Iterator[Batch]:
        """Batches for a pass without training."""
        return self.batches(order, inference_batch(self.device))

    def complete(self, batch: Batch) -> Batch:
        """The batch with its tensors. Resident data is gathered here, on the device, so that a graph can contain it."""
        return self.split.batch(batch["index"], self.names) if self.resident else batch

    def training_batch(self, batch: Batch) -> Batch:
        """The complete batch, with the random numbers that augment its modalities."""
        batch = self.complete(batch)
        chance = {"chance": torch.rand(len(batch["index"]), 4, device=self.device)} if self.varies else {}
        return batch | chance

    def _stream(self, indices: Sequence[torch.Tensor]) -> Iterator[Batch]:
        def load(index):
            batch = self.split.batch(index, self.names)
            if self.copies is None:
                return batch, None
            with torch.cuda.stream(self.copies):
                batch = {n: t.pin_memory().to(self.device, non_blocking=True) for n, t in batch.items()}
            return batch, self.copies.record_event()

        def arrive(batch, copied):
            if copied:
                compute = torch.cuda.current_stream(self.device)
                compute.wait_event(copied)
                for t in batch.values():
                    t.record_stream(compute)
            return batch

        with ThreadPoolExecutor(1) as pool:
            ahead: deque = deque()
            for index in indices:
                ahead.append(pool.submit(load, index))
                if len(ahead) > AHEAD:
                    yield arrive(*ahead.popleft().result())
            while ahead:
                yield arrive(*ahead.popleft().result())
