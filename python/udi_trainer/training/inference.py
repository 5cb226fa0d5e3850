"""What a trained task computes of whole splits."""

from collections.abc import Callable

import torch

from .. import distributed
from ..data.dataset import Split
from ..run import Run
from .feed import Feed
from .task import Task


@torch.no_grad()
def predict(task: Task, run: Run, split: Split, compute: Callable | None = None) -> torch.Tensor:
    """Logits (N, C) of the whole split, or what else ``compute`` makes of a batch; float32, on the CPU."""
    compute = compute or task.logits
    task.model.eval()
    feed = Feed(run, split, task.reads)
    parts = []
    for batch in feed.inference_batches(distributed.local_indices(len(split))):
        parts.append(compute(feed.complete(batch)))
        run.stop.check()
    return distributed.gather(torch.cat(parts).float(), len(split)).cpu()


def outputs(
    task: Task, run: Run, compute: Callable | None = None, modality: str | None = None
) -> dict[str, torch.Tensor]:
    """The task's logits, or what else ``compute`` makes of a batch, on validation and test, as fusion takes them.

    In a final fit, on test alone. A row is NaN where the sample lacks the modality (by default the task's own). Other
    rows are finite: what a model overflows becomes finite numbers.
    """
    modality = modality or task.modality

    def marked(split):
        z, present = predict(task, run, split, compute).nan_to_num(0), modality and split.present(modality)
        return z if present is None else z.masked_fill(~present[:, None], torch.nan)

    return {split: marked(run.data.splits()[split]) for split in run.labels}
