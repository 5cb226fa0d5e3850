"""The cost of each method: trained and stored parameters, and operations per sample.

    python benchmarks/cost.py [--dataset cgdigits]

Counts multiply-adds of matrix products and convolutions as two operations each, as torch's FlopCounterMode does.
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from udi_trainer import train
from udi_trainer.registry import datasets, methods
from udi_trainer.training.engine import Eager

BATCH = 64


def training(method, data):
    """The trained parameters and the operations per sample in the first step of each stage, and the result."""
    trained, operations, run = {}, {}, Eager.run

    def counted(self, batch, number, flags):
        name = self.task.name
        with FlopCounterMode(display=False) as counter:
            run(self, batch, number, flags)
        groups = self.task.optimizer.param_groups
        trained[name] = sum(p.numel() for group in groups for p in group["params"])
        operations.setdefault(name, counter.get_total_flops() / BATCH)

    Eager.run = counted
    try:
        result = train(data, method, epochs=1, batch_size=BATCH, baselines=[], device="cpu", progress=False)
    finally:
        Eager.run = run
    return trained, operations, result


def table(data):
    rows = ["| method | trained | kept | training, a sample | inference, a sample |", "|---|---:|---:|---:|---:|"]
    for method in methods:
        trained, operations, result = training(method, data)
        if not trained:  # scikit-learn's
            continue
        kept = sum(p.numel() for p in {p for model in result.models.values() for p in model.parameters()})
        stored = {name: t[:BATCH] for name, t in data.test.stored.items()}
        with FlopCounterMode(display=False) as counter:
            result.predict(stored)
        inference = counter.get_total_flops() / BATCH
        cells = f"{sum(trained.values()):,}", f"{kept:,}", f"{sum(operations.values()):,.0f}", f"{inference:,.0f}"
        rows.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cgdigits")
    parser.add_argument("--data-root")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(table(datasets.find(options.dataset)(options.data_root)))
