"""Trains as one of several processes, and keeps what every step measured: ``processes.py DTYPE METHODS STEPS FILE``.

METHODS: one after the other, with commas between them. With ``shard`` behind these: sharded, where there are several.
Options for all methods may follow as JSON.
"""

import json
import sys

import torch

from udi_trainer import Dataset, Modality, Split, distributed, train
from udi_trainer.training.engine import Eager


def dataset(make):
    """Images and vectors, of 5 classes."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 64 + 7, generator=generator)

    def split(size):
        labels = torch.randint(5, (size,), generator=generator)
        x = centers[labels] + torch.randn(size, 64 + 7, generator=generator)
        return Split(labels, {"image": x[:, :64].reshape(size, 1, 8, 8), "vector": x[:, 64:]})

    modalities = {"image": Modality("cnn", ("image",), make), "vector": Modality("mlp", ("vector",), make)}
    return Dataset(5, modalities, split(4 * 32), split(61), split(67))


def trained(dtype, method, steps, shard, given):
    """What every step measured, and the run's metrics."""
    measured, step = [], Eager.run

    def run(self, batch, number, flags):
        original = self.task.step

        def kept(*args, **kwargs):
            scalars = original(*args, **kwargs)
            measured.append({"stage": self.task.name} | {name: x.detach().clone() for name, x in scalars.items()})
            return scalars

        self.task.step = kept
        step(self, batch, number, flags)
        self.task.step = original

    Eager.run = run
    several = torch.distributed.is_initialized()
    options = {"controller": "dynamic", "align_every": 2, "q_warmup": 3, "baselines": []} if method == "udi" else {}
    if shard:  # small blocks; and no channels_last, which would lay the noise out otherwise
        distributed.BUCKET = 4 * 128
        options |= {"shard": several, "encoder": {"image": "mlp"} if method == "ogm-ge" else None}
    result = train(
        dataset(torch.Tensor.double if dtype == "float64" else torch.Tensor.float), method,
        epochs=int(steps) // 4, batch_size=32, lr=1e-3, progress=False, **options, **given,
    )  # fmt: skip
    Eager.run = step
    for row in measured:  # the mean over the processes, of what each measured on its part
        for x in row.values():
            if several and isinstance(x, torch.Tensor):
                torch.distributed.all_reduce(x)
                x /= torch.distributed.get_world_size()
    return {"steps": sorted(measured, key=lambda row: row["stage"]), "metrics": result.metrics}


def main(dtype, methods, steps, file, shard="", given="{}"):
    torch.set_default_dtype(getattr(torch, dtype))
    results = {method: trained(dtype, method, steps, shard, json.loads(given)) for method in methods.split(",")}
    if distributed.first():
        torch.save(results, file)


if __name__ == "__main__":
    with distributed.process_group():
        main(*sys.argv[1:])
    distributed.exit_process(0)
