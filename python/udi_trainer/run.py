"""What all parts of a run share: options, data, device, seeds and the log."""

import time

import torch

from .console import log
from .data.dataset import Dataset
from .errors import UserError
from .options import Options
from .run_folder import RunFolder
from .seeds import derive_seed, seeded


class Run:
    """A run: its options, data and device, and what it has logged of each stage."""

    def __init__(self, options: Options, data: Dataset, device: torch.device, folder: RunFolder):
        self.options, self.device, self.folder = options, device, folder
        self.engine = choose_engine(options.engine, device)
        self.resident = options.data == "device" or (options.data == "auto" and fits(data, device))
        self.data = data.to(device if self.resident else torch.device("cpu"))
        self.labels = {"val": data.val.labels.cpu(), "test": data.test.labels.cpu()}
        self.batch_size = min(options.batch_size, len(data.train))
        self.steps = len(data.train) // self.batch_size  # of an epoch: full batches; the other shuffled samples wait
        self.history: dict[str, list[dict]] = {}  # stage -> its lines of metrics.jsonl
        self.began = time.perf_counter()

    def seed(self, *key) -> int:
        return derive_seed(self.options.seed, *key)

    def make(self, task, *args, **named):
        """A task of this class, its initial weights drawn from the seed of its name."""
        modality = args[0] if args else None
        with seeded(self.seed(task.name_of(modality))):
            return task(self, *args, **named)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp == "bf16")

    def optimizer(self, parameters) -> torch.optim.Optimizer:
        options, on_gpu = self.options, self.device.type == "cuda"
        if options.optimizer == "adamw":
            return torch.optim.AdamW(parameters, weight_decay=options.weight_decay, fused=True, capturable=on_gpu)
        return torch.optim.SGD(
            parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=True
        )

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def restore(self, stage: str) -> dict | None:
        """The stage's last checkpoint, or None; takes up its log from there."""
        saved = self.folder.checkpoint(stage)
        if saved:
            self.began = min(self.began, time.perf_counter() - saved["elapsed"])
        self.history[stage] = saved["rows"] if saved else []
        self.folder.write_log([row for rows in self.history.values() for row in rows])
        return saved

    def save(self, stage: str, row: dict, **state):
        """Checkpoints the stage after an epoch, and logs the epoch."""
        self.history[stage].append(row)
        self.folder.save(stage, **state, rows=self.history[stage], elapsed=self.elapsed())
        self.folder.append_log(row)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: choose from auto, cpu, cuda, cuda:i")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"--device {name}: torch {torch.__version__} sees {count} CUDA devices here: use --device cpu")
    return device


def choose_engine(option: str, device: torch.device) -> str:
    if device.type == "cuda":
        return "eager" if option == "eager" else "graph"
    if option == "graph":
        log.info("--engine graph: eager steps, for CUDA graphs need a GPU and this is %s", device)
    return "eager"


def fits(data: Dataset, device: torch.device) -> bool:
    """Whether the data may live on the device: there is room for as much again, and more."""
    return device.type == "cpu" or data.nbytes() < torch.cuda.mem_get_info(device)[0] / 3
