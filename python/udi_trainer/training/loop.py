"""The training loop: epochs, validation and checkpoints, for several tasks side by side."""

import contextlib
import copy
import itertools
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from .. import distributed
from ..console import Progress, log
from ..errors import UserError
from ..options import Options
from ..run import Run
from ..run_folder import REPEAT
from ..stop import Stopped
from .engine import Eager, Graphs
from .feed import Feed
from .inference import predict
from .task import Task

T = TypeVar("T", bound=Task)


def fit(tasks: Sequence[Task], run: Run, epochs: int | None = None) -> None:
    """Trains the tasks to their end, or to an earlier epoch; each model is left at its best epoch on validation.

    Several tasks train side by side: on a GPU they alternate step by step, each on its own stream; on a CPU they run in
    threads that share its cores.
    """
    stages = [Stage(task, run) for task in tasks]
    share_stream(stages)  # before their streams wait for the restoring
    for stage in stages:
        stage.restore(epochs)
    cores = torch.get_num_threads() if run.device.type == "cpu" else 1
    parallel = len(stages) > 1 and cores > 1 and distributed.world() == 1  # threads would reorder messages
    threads = max(1, cores // len(stages)) if parallel else None
    total = sum(max(0, (s.last_epoch(epochs) - s.epoch) * run.steps - s.done) for s in stages)
    with Progress(" + ".join(s.label for s in stages), total) as progress, run.stop.deferred():
        while active := [s for s in stages if not s.ended(epochs)]:
            active = [s for s in active if s.epoch == min(a.epoch for a in active)]  # a resumed stage may lag behind
            began = time.perf_counter()
            try:
                train_epoch(active, threads, progress)
                for stage in active:
                    with stage.on_stream():
                        stage.end(began, len(active))
            except Stopped:
                for stage in active:
                    with stage.on_stream():
                        stage.suspend(began, len(active))
                raise
            if not run.first:
                progress.show(**{s.task.modality or "val_acc": s.history[-1]["val_acc"] for s in active})
    for stage in stages:
        if epochs and stage.epoch <= epochs < stage.task.epochs:  # another method may train it further
            stage.save(stage.place(epochs))
        stage.finish()


def fit_best(candidates: Sequence[Sequence[T]], run: Run, epochs: int | None = None) -> list[T]:
    """Trains groups of tasks, as by :func:`fit`; the task of each group that is best on validation.

    A final fit trains these alone.
    """

    def choose() -> list[int]:
        fit([task for group in candidates for task in group], run, epochs)
        places = []
        for group in candidates:
            rows = [best_epoch(run.history[task.name], run.options.select) for task in group]
            places.append(rows.index(best_epoch(rows, run.options.select)))
            if len(group) > 1:
                best = group[places[-1]]
                log.info("%s: weight decay %g, the best on validation", best.name, best.decay)
        return places

    places = run.decide("weight decay", choose)
    best = [group[place] for group, place in zip(candidates, places, strict=True)]
    if run.first:
        fit(best, run, epochs)
    return best


def share_stream(stages: Sequence["Stage"]) -> None:
    """Stages that draw random numbers share a stream: their graphs read seeds from one place, in order."""
    drawing = [stage for stage in stages if stage.task.random and stage.stream]
    for stage in drawing:
        stage.stream = drawing[0].stream


def train_epoch(stages: Sequence["Stage"], threads: int | None, progress: Progress) -> None:
    """Trains an epoch of each stage, alternating step by step; or in parallel, with ``threads`` CPU threads each.

    Stages that draw random numbers alternate in any case, because they share the generator.
    """
    steps = [stage.epoch_steps() for stage in stages]
    if threads is None:
        alternate(steps, progress)
        return

    for ours in steps:  # the first step runs here, so that native code is built once
        progress.update(next(ours, 0))
    in_turn = [ours for stage, ours in zip(stages, steps, strict=True) if stage.task.random]
    groups = [in_turn] * bool(in_turn) + [[s] for s in steps if s not in in_turn]
    stopped = threading.Event()

    # Rounding depends on the number of threads, so it does not depend on what runs in parallel.
    with ThreadPoolExecutor(len(stages), initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        try:
            list(pool.map(lambda group: alternate(group, progress, stopped), groups))
        except BaseException:
            stopped.set()
            raise


def alternate(steps: Sequence[Iterator[int]], progress: Progress, stopped: threading.Event | None = None) -> None:
    """Alternates step by step until all end; a resumed epoch has fewer steps."""
    for done in itertools.zip_longest(*steps, fillvalue=0):
        progress.update(sum(done))
        if stopped and stopped.is_set():
            return


class Stage:
    """A task in training: epoch by epoch, with a checkpoint after each."""

    def __init__(self, task: Task, run: Run) -> None:
        self.task, self.run = task, run
        if task.loss_scale and "loss_scale" not in task.parts:
            for optimizer in optimizers_of(task):
                task.loss_scale.attach(optimizer)
            task.parts["loss_scale"] = task.loss_scale
        task.model = task.parts.get("model", task.model)  # the sharded one again, if training goes on
        self.label = f"{task.phase} {task.modality or ''}".strip()
        self.feed = Feed(run, run.data.train, task.reads)
        self.present = None if task.modality is None else run.data.train.present(task.modality)
        labelled = run.data.train.labels.cpu() >= 0
        self.labelled = labelled if self.present is None else labelled & self.present
        self.history: list[dict] = []
        self.done, self.seconds = 0, 0.0  # steps of the current epoch, and their time before the run was resumed
        self.best: dict | None = None
        self.stream = torch.cuda.Stream(run.device) if run.device.type == "cuda" else None
        engine = Graphs if run.engine == "graph" and task.capturable else Eager
        self.engine = engine(task, self.feed, run.seed(task.seed_name, "steps"))

    def place(self, epochs: int | None) -> str:
        """The name of the checkpoint; an earlier end has its own."""
        return f"{self.task.name} to epoch {epochs}" if epochs and epochs < self.task.epochs else self.task.name

    def restore(self, epochs: int | None = None) -> None:
        """Continues from the checkpoint of the end at ``epochs``, or else from the last one, if there is one."""
        places = dict.fromkeys((self.place(epochs), self.task.name))
        saved = next(filter(None, (self.run.restore(self.task.name, place) for place in places)), None)
        self.history = self.run.history[self.task.name]
        if saved:
            self.load_checkpoint(saved)
        self.groups = [group for optimizer in optimizers_of(self.task) for group in optimizer.param_groups]
        for group in self.groups:
            # A tensor, and always the same: graphs read the learning rate from it.
            group["lr"] = torch.zeros((), device=self.run.device)
            if "capturable" in group:  # the checkpoint may come from another device
                group["capturable"] = self.run.device.type == "cuda"
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.run.device))

    def load_checkpoint(self, saved: dict) -> None:
        try:
            self.best, (self.done, self.seconds) = saved["best"], saved["under_way"]
            for name, part in self.task.parts.items():
                self.task.load(part, saved["parts"][name])
            if self.done:
                self.engine.load_state_dict(saved["engine"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            path = self.run.folder.checkpoint_path(self.task.name)
            reason = (str(error) or repr(error)).splitlines()[-1].strip()
            raise UserError(f"{path} does not fit the model of {self.label} ({reason}): {REPEAT}") from None

    def save(self, place: str | None = None) -> None:
        """Checkpoints the stage, in the file ``place`` if given."""
        parts, best = {name: part.state_dict() for name, part in self.task.parts.items()}, self.best
        if self.run.options.shard:
            from .sharding import full_state

            parts, best = full_state(parts), full_state(best)
        under_way = (self.done, self.seconds)
        engine = self.engine.state_dict() if self.done else None
        place = place or self.task.name
        self.run.save(self.task.name, place, parts=parts, best=best, under_way=under_way, engine=engine)

    @property
    def epoch(self) -> int:
        return len(self.history)

    def last_epoch(self, epochs: int | None) -> int:
        """The epoch that training ends with at the latest; in a final fit, the one that the first run kept."""
        if self.run.first:
            return best_epoch(self.run.first.history[self.task.name][:epochs], self.run.options.select)["epoch"]
        return epochs or self.task.epochs

    def ended(self, epochs: int | None) -> bool:
        patience = self.run.options.patience
        waited = patience and self.history and self.epoch - self.kept_row()["epoch"] >= patience
        return self.epoch >= self.last_epoch(epochs) or bool(waited)

    def on_stream(self) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()

    def epoch_steps(self) -> Iterator[int]:
        """Trains an epoch, or what is left of it; yields 1 after each step."""
        train, steps = self.run.data.train, self.run.steps
        shuffle = torch.Generator().manual_seed(self.run.seed(self.task.seed_name, self.epoch))
        kept = [self.labelled, self.present] if self.task.semi_supervised else [self.labelled]
        orders = [
            cycle(torch.randperm(len(train), generator=shuffle), which, steps * self.run.batch_size) for which in kept
        ]
        with self.on_stream():
            if not self.done:
                self.task.begin_epoch(self.epoch)
            self.task.train_mode(self.epoch)
            self.set_rates(self.epoch * steps + self.done)
            done, size = self.done * self.run.batch_size, self.run.batch_size // distributed.world()
            shares = [distributed.share(order[done:], self.run.batch_size).view(-1, size) for order in orders[::-1]]
            batches = iter(self.feed.batches(torch.cat(shares, dim=1).flatten(), len(shares) * size))
        while self.done < steps:
            number = self.epoch * steps + self.done
            with self.on_stream():
                if number <= self.run.options.warmup * steps:
                    self.set_rates(number)
                self.engine.step(next(batches), number)
            self.done += 1
            yield 1
            self.run.stop.check(self.done)

    def set_rates(self, number: int) -> None:
        """Sets the learning rates for the step of this number."""
        options, steps = self.run.options, self.run.steps
        warm = min(1.0, (number + 1) / (options.warmup * steps)) if options.warmup else 1.0
        for group in self.groups:
            scale = warm * group.get("lr_scale", 1)
            group["lr"].fill_(learning_rate(options, self.epoch, scale, self.task.epochs))

    def suspend(self, began: float, shared: int) -> None:
        """Checkpoints an unfinished epoch, so that a resumed run continues it."""
        if self.done:
            self.seconds += (time.perf_counter() - began) / shared
            self.engine.gather()
            self.save()

    def end(self, began: float, shared: int) -> None:
        """Ends an epoch: validates, logs, checkpoints. ``shared``: the number of stages that shared its time."""
        self.engine.gather()
        distributed.average_([b for b in self.task.model.buffers() if b.is_floating_point()])
        means, fault = self.engine.means(), self.engine.fault()
        val = {} if self.run.first else self.validate()
        if fault or not math.isfinite(val.get("val_loss", 0)):
            raise self.diverged(*(fault or ("val_loss", self.done - 1)))
        row = {"phase": self.task.phase, "modality": self.task.modality, "epoch": self.epoch + 1, **means, **val}
        row |= self.task.measured()
        row["seconds"] = self.seconds + (time.perf_counter() - began) / shared
        self.history.append(row)
        if self.kept_row() is row:
            self.best = copy.deepcopy(self.task.model.state_dict())
        self.done, self.seconds = 0, 0.0
        self.engine.clear()
        self.save()
        self.run.log(self.task.name, row)

    def validate(self) -> dict[str, float]:
        logits, labels = predict(self.task, self.run, self.run.data.val), self.run.labels["val"]
        modality = self.task.modality
        if modality and (kept := self.run.data.val.present(modality)) is not None:
            logits, labels = logits[kept], labels[kept]
        return self.task.validate(logits, labels)

    def diverged(self, name: str, step: int) -> UserError:
        path, number = self.run.folder.checkpoint_path(self.task.name), self.epoch * self.run.steps + step + 1
        good = f"; the last good checkpoint is {path}, of epoch {self.epoch}" if path and self.epoch else ""
        lr = self.run.options.lr
        where = f"in step {number}, of epoch {self.epoch + 1}"
        return UserError(f"{self.label}: {name} is not finite {where}: lower --lr (it is {lr}){good}")

    def finish(self) -> None:
        if self.stream:
            torch.cuda.current_stream(self.run.device).wait_stream(self.stream)
        assert self.best is not None
        self.task.load(self.task.model, self.best)
        if self.run.options.shard:
            from .sharding import unsharded

            self.task.model = unsharded(self.task.model)
        for parameter in self.task.parameters:
            parameter.grad = None  # it may keep the memory of a graph alive
        kept, planned = self.kept_row(), self.task.epochs
        seconds = sum(row["seconds"] for row in self.history)
        where = f"epoch {kept['epoch']:>{len(str(planned))}} of {planned if self.run.first else self.epoch}"
        what = "trained up to" if self.run.first else f"val acc {kept['val_acc']:.4f} in"
        log.info(f"{self.label:<18} {what} {where} {seconds:7.1f} s")
        if kept.get("val_classes") == 1:
            log.warning("%s predicts one class for all validation samples: try --class-weights balanced", self.label)

    def kept_row(self) -> dict:
        """The row of the epoch whose model is kept: the best on validation, in a final fit the last."""
        return self.history[-1] if self.run.first else best_epoch(self.history, self.run.options.select)


def learning_rate(options: Options, epoch: int, scale: float = 1.0, epochs: int | None = None) -> float:
    """The learning rate of an epoch, counted from 0. ``epochs``: the length of the stage, if not that of the run."""
    lr = options.lr * scale
    if options.schedule == "cosine":
        return lr * (1 + math.cos(math.pi * epoch / (epochs or options.epochs))) / 2
    if options.schedule == "step":
        every, factor = options.lr_step
        return lr * factor ** (epoch // every)
    return lr


def optimizers_of(task: Task) -> list[torch.optim.Optimizer]:
    return [part for part in task.parts.values() if isinstance(part, torch.optim.Optimizer)]


def merit(row: dict, select: str | None = None) -> float:
    """What ``--select`` chooses by, from a row of the log: the higher, the better."""
    return -row["val_loss"] if select == "nll" else row["val_macro_f1" if select == "macro-f1" else "val_acc"]


def best_epoch(history: Sequence[dict], select: str | None = None) -> dict:
    """The row of the highest merit; ties go to the lowest loss, then to the first."""
    return min(history, key=lambda row: (-merit(row, select), row["val_loss"]))


def cycle(order: torch.Tensor, kept: torch.Tensor | None, count: int) -> torch.Tensor:
    """The first ``count`` of the kept samples in this order, repeated as needed: all epochs have as many steps."""
    if kept is not None and not kept.all():
        order = order[kept[order]]
        order = order.repeat(-(-count // len(order)))
    return order[:count]
