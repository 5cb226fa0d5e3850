"""Training one stage to its end: the loop that every method shares.

A task has
    name, phase, modality    for log and checkpoints
    model                    what predicts
    parts                    everything with a state_dict that training changes, by name, the model among them
    optimizers               whose learning rate follows the schedule
    step(index, number)      trains on these samples; returns named scalars, left on the device
    logits(split, index)     the prediction
An epoch depends on the seed, the stage, its number and the parts alone: a checkpoint needs no random state.
"""

import copy
import math
import time

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from common import UserError
from fusion import accuracy


def fit(task, run):
    """Trains ``task`` from its last checkpoint, if it has one; leaves the epoch that was best on validation in it."""
    options, train = run.options, run.data.train
    batch = min(options.batch_size, len(train))
    steps = len(train) // batch  # full batches only; the rest of the shuffled samples waits for another epoch
    saved = run.restore(task.name)
    best = saved["best"] if saved else None
    rows = run.rows[task.name]
    if saved:
        for name, part in task.parts.items():
            part.load_state_dict(saved["parts"][name])

    label = f"{task.phase} {task.modality or ''}".strip()
    with tqdm(total=options.epochs * steps, initial=len(rows) * steps, desc=label, disable=None, leave=False) as bar:
        for epoch in range(len(rows), options.epochs):
            if rows and rows[-1]["diverged"]:
                break
            began = time.perf_counter()
            torch.manual_seed(run.seed(task.name, epoch))
            for optimizer in task.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = options.lr * (1 + math.cos(math.pi * epoch / options.epochs)) / 2
            order = torch.randperm(len(train))[: steps * batch].to(run.device)
            task.model.train()
            total = 0
            for number, index in enumerate(order.split(batch), start=epoch * steps):
                figures = task.step(index, number)
                total = total + torch.stack(list(figures.values())).detach()
                bar.update()
            means = dict(zip(figures, (total / steps).tolist(), strict=True))

            logits, labels = predict(task, run.data.val), run.labels["val"]
            val = {"val_acc": accuracy(logits, labels), "val_loss": cross_entropy(logits, labels).item()}
            bar.set_postfix(val_acc=f"{val['val_acc']:.3f}")
            diverged = not all(map(math.isfinite, [*means.values(), val["val_loss"]]))
            if diverged and best is None:
                raise UserError(f"{label}: the loss is not finite in the first epoch: lower --lr (it is {options.lr})")
            rank = (-val["val_acc"], val["val_loss"])
            if not diverged and (best is None or rank < best["rank"]):
                best = {"rank": rank, "epoch": epoch + 1, "model": copy.deepcopy(task.model.state_dict())}
            row = {"phase": task.phase, "modality": task.modality, "epoch": epoch + 1}
            row |= {name: x if math.isfinite(x) else None for name, x in (means | val).items()}  # JSON has no NaN
            row |= {"diverged": diverged, "seconds": time.perf_counter() - began}
            parts = {name: part.state_dict() for name, part in task.parts.items()}
            run.save(task.name, row, parts=parts, best=best)
    task.model.load_state_dict(best["model"])
    kept = rows[best["epoch"] - 1]
    seconds = sum(row["seconds"] for row in rows)
    end = f"; stopped: loss not finite in epoch {len(rows)}" if rows[-1]["diverged"] else ""
    where = f"epoch {kept['epoch']:>{len(str(options.epochs))}} of {options.epochs}"
    print(f"{label:<18} val acc {kept['val_acc']:.4f} in {where} {seconds:7.1f} s{end}", flush=True)
    return task


def outputs(task, run):
    """The task's logits on validation and test, as fusion takes them."""
    return {"val": predict(task, run.data.val), "test": predict(task, run.data.test)}


@torch.no_grad()
def predict(task, split):
    """Logits (N, C) of the whole split, float32, on the CPU."""
    task.model.eval()
    indices = torch.arange(len(split), device=split.labels.device).split(1000)
    return torch.cat([task.logits(split, index).float().cpu() for index in indices])
