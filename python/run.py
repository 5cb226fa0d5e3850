"""A run and its folder: options, data, device, log, checkpoints; everything that a later process needs to go on."""

import contextlib
import datetime
import io
import json
import os
import time
from pathlib import Path

import torch

from common import UserError, derive_seed


class Run:
    """Written files: config.json at the start, metrics.jsonl and checkpoints/ while it trains, metrics.json at the end.

    A checkpoint holds all that its stage logged, so a resumed run takes up its log from there too.
    """

    def __init__(self, folder, options, data, device):
        self.folder, self.options, self.device = folder, options, device
        self.engine = choose_engine(options.engine, device)
        self.resident = options.data == "device" or (options.data == "auto" and fits(data, device))
        self.data = data.to(device) if self.resident else data
        self.labels = {"val": data.val.labels, "test": data.test.labels}
        self.batch = min(options.batch_size, len(data.train))
        self.steps = len(data.train) // self.batch  # of an epoch: full batches only; the other shuffled samples wait
        self.rows = {}  # stage -> its lines of metrics.jsonl
        self.began = time.perf_counter()

    def seed(self, *key):
        return derive_seed(self.options.seed, *key)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp == "bf16")

    def optimizer(self, weights):
        return torch.optim.AdamW(weights, fused=True, capturable=self.device.type == "cuda")

    def elapsed(self):
        return time.perf_counter() - self.began

    def restore(self, stage):
        """The stage's last checkpoint, or None; puts the log back to that moment."""
        path = self.folder / "checkpoints" / f"{stage}.pt"
        saved = None
        if path.exists():
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{path} is damaged ({reason}): delete it to repeat that stage, then resume") from None
            self.began = min(self.began, time.perf_counter() - saved["elapsed"])
        self.rows[stage] = saved["rows"] if saved else []
        lines = [json.dumps(row) for rows in self.rows.values() for row in rows]
        write(self.folder / "metrics.jsonl", "".join(line + "\n" for line in lines).encode())
        return saved

    def save(self, stage, row, **state):
        """Checkpoints the stage after an epoch, and logs the epoch's row."""
        self.rows[stage].append(row)
        buffer = io.BytesIO()
        torch.save({**state, "rows": self.rows[stage], "elapsed": self.elapsed()}, buffer)
        write(self.folder / "checkpoints" / f"{stage}.pt", buffer.getbuffer())
        log = self.folder / "metrics.jsonl"
        try:
            with open(log, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise unwritable(log, error) from None


def choose_engine(option, device):
    if device.type == "cuda":
        return "eager" if option == "eager" else "graph"
    if option == "graph":
        print(f"--engine graph: eager steps, for CUDA graphs need a GPU and this is {device}")
    return "eager"


def fits(data, device):
    """Whether the data may live on the device: there is room for as much again, and more."""
    return device.type == "cpu" or data.nbytes() < torch.cuda.mem_get_info(device)[0] / 3


def write_json(path, value):
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def write(path, data):
    """All or nothing: a reader, or a process killed here, sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from None


def unwritable(path, error):
    return UserError(
        f"{path} cannot be written ({error.strerror}): make room or mend the permissions, then go on with --resume;"
        " what was saved before is intact"
    )


def new_folder(out, label):
    """Creates ``out``, or a folder under runs/ that no run has yet; never takes one with something in it."""
    try:
        if out is not None:
            folder = Path(out)
            if folder.is_dir() and any(folder.iterdir()):
                raise UserError(f"--out {out} has something in it: choose another folder, or go on with --resume {out}")
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        for number in range(1, 1000):
            folder = Path("runs") / (f"{label}-{stamp}" + (f"-{number}" if number > 1 else ""))
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise UserError(
            f"run folder {folder} cannot be made ({error.strerror}): choose a writable one with --out"
        ) from None
