"""Training to the end: what a task is, and the loop that every method shares."""

import contextlib
import copy
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn.functional import nll_loss
from tqdm import tqdm

from common import UserError
from engine import Eager, Graphs
from feed import Feed
from fusion import accuracy


class Task:
    """One stage of a method: a model, and how a step trains it.

    A subclass has its ``phase``, and sets ``model`` and ``parts``: everything with a state_dict that training changes,
    by name, the model and the optimizers among them. Its seed, its name and the number of an epoch or step determine
    all that is random in it, so a checkpoint needs no random state.
    """

    phase = None
    capturable = True  # whether a CUDA graph can hold its steps: nothing in them waits for the GPU

    def __init__(self, run, modality=None):
        self.run, self.modality = run, modality
        self.name = "-".join(filter(None, (self.phase, modality)))
        self.reads = run.data.modalities if modality is None else (modality,)  # modalities whose input it needs
        torch.manual_seed(run.seed(self.name))

    def flags(self, number):
        """What kind of step this is: keyword arguments of `step`, of few values, the same names in every step."""
        return {}

    def step(self, batch, **flags):
        """Trains on the batch; returns named scalars, left on the device."""
        raise NotImplementedError

    def logits(self, batch):
        """The prediction (N, C)."""
        raise NotImplementedError


def update(optimizer, weights, grads):
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad
    optimizer.step()


def fit(tasks, run, epochs=None):
    """Trains the tasks to their end, or to an earlier epoch; leaves the one that was best on validation in each.

    Several tasks are trained side by side: on a GPU step by step in turn, each on a stream of its own; on a CPU in
    threads that share its cores.
    """
    epochs = epochs or run.options.epochs
    stages = [Stage(task, run) for task in tasks]
    cores = torch.get_num_threads() if run.device.type == "cpu" else 1
    share = max(1, cores // len(stages)) if len(stages) > 1 and cores > 1 else None
    total = sum(max(0, epochs - s.epoch) * run.steps for s in stages)
    with tqdm(total=total, desc=" + ".join(s.label for s in stages), disable=None, leave=False) as bar:
        while active := [s for s in stages if s.epoch < epochs and not s.diverged]:
            active = [s for s in active if s.epoch == min(a.epoch for a in active)]  # resumed ones may lag behind
            began = time.perf_counter()
            train_epoch(active, share, bar)
            for stage in active:
                with stage.stream():
                    stage.end(began, len(active))
            bar.set_postfix({s.task.modality or "val_acc": f"{s.rows[-1]['val_acc']:.3f}" for s in active})
    for stage in stages:
        stage.finish()


def train_epoch(stages, threads, bar):
    """An epoch of each stage, step by step in turn; or at the same time, each with so many threads of the CPU.

    Stages that draw random numbers take turns there too, for the generator is one for all.
    """
    steps = [stage.epoch_steps() for stage in stages]
    if threads is None:
        for _ in zip(*steps, strict=True):
            bar.update(len(stages))
        return

    random = False
    for stage, ours in zip(stages, steps, strict=True):
        next(ours)
        bar.update()
        random |= stage.engine.drew_random()
    stopped = threading.Event()

    def train(group):
        for done in zip(*group, strict=True):
            bar.update(len(done))
            if stopped.is_set():
                return

    # The number of threads, on which rounding depends, is the same whatever runs beside a stage.
    with ThreadPoolExecutor(len(stages), initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        try:
            list(pool.map(train, [steps] if random else [[ours] for ours in steps]))
        except BaseException:
            stopped.set()
            raise


class Stage:
    """A task on its way: taken up from its last checkpoint, trained epoch by epoch, checkpointed after each."""

    def __init__(self, task, run):
        self.task, self.run = task, run
        self.label = f"{task.phase} {task.modality or ''}".strip()
        self.feed = Feed(run, run.data.train, task.reads)
        saved = run.restore(task.name)
        self.rows, self.best = run.rows[task.name], saved["best"] if saved else None
        if saved:
            for name, part in task.parts.items():
                part.load_state_dict(saved["parts"][name])
        optimizers = [part for part in task.parts.values() if isinstance(part, torch.optim.Optimizer)]
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in self.groups:  # a tensor, and always the same: graphs read the learning rate from it
            group["lr"] = torch.zeros((), device=run.device)
        self._stream = torch.cuda.Stream(run.device) if run.device.type == "cuda" else None
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(run.device))
        engine = Graphs if run.engine == "graph" and task.capturable else Eager
        self.engine = engine(task, self.feed, run.seed(task.name, "steps"))

    @property
    def epoch(self):
        return len(self.rows)

    @property
    def diverged(self):
        return bool(self.rows) and self.rows[-1]["diverged"]

    def stream(self):
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    def epoch_steps(self):
        """Trains an epoch; yields after each step."""
        options, train, steps = self.run.options, self.run.data.train, self.run.steps
        shuffle = torch.Generator().manual_seed(self.run.seed(self.task.name, self.epoch))
        order = torch.randperm(len(train), generator=shuffle)[: steps * self.run.batch]
        self.task.model.train()
        with self.stream():
            for group in self.groups:
                lr = options.lr * group.get("lr_factor", 1)
                group["lr"].fill_(lr * (1 + math.cos(math.pi * self.epoch / options.epochs)) / 2)
            batches = iter(self.feed.batches(order, self.run.batch))
        first = self.epoch * steps
        for number in range(first, first + steps):
            with self.stream():
                self.engine.step(next(batches), number)
            yield

    def end(self, began, shared):
        """Ends an epoch, whose time was shared by so many stages: validates, logs, checkpoints."""
        means = self.engine.means()
        logits, labels = predict(self.task, self.run, self.run.data.val), self.run.labels["val"]
        log_p = logits.log_softmax(-1)
        val = {
            "val_acc": accuracy(logits, labels),
            "val_loss": nll_loss(log_p, labels).item(),
            "val_entropy": -(log_p.exp() * log_p).sum(-1).mean().item(),
        }
        diverged = not all(map(math.isfinite, [*means.values(), val["val_loss"]]))
        if diverged and self.best is None:
            lr = self.run.options.lr
            raise UserError(f"{self.label}: the loss is not finite in the first epoch: lower --lr (it is {lr})")
        row = {"phase": self.task.phase, "modality": self.task.modality, "epoch": self.epoch + 1}
        row |= {name: x if math.isfinite(x) else None for name, x in (means | val).items()}  # JSON has no NaN
        row |= {"diverged": diverged, "seconds": (time.perf_counter() - began) / shared}
        if best_epoch([*self.rows, row]) is row:
            self.best = copy.deepcopy(self.task.model.state_dict())
        parts = {name: part.state_dict() for name, part in self.task.parts.items()}
        self.run.save(self.task.name, row, parts=parts, best=self.best)

    def finish(self):
        self.task.model.load_state_dict(self.best)
        if self._stream:
            torch.cuda.current_stream(self.run.device).wait_stream(self._stream)
        kept, planned = best_epoch(self.rows), self.run.options.epochs
        seconds = sum(row["seconds"] for row in self.rows)
        end = f"; stopped: loss not finite in epoch {self.epoch}" if self.diverged else ""
        where = f"epoch {kept['epoch']:>{len(str(planned))}} of {self.epoch}"
        print(f"{self.label:<18} val acc {kept['val_acc']:.4f} in {where} {seconds:7.1f} s{end}", flush=True)


def best_epoch(rows):
    """The row of the highest validation accuracy, of the lowest loss among these; the first of equals."""
    return min((row for row in rows if not row["diverged"]), key=lambda row: (-row["val_acc"], row["val_loss"]))


def outputs(task, run, compute=None):
    """The task's logits, or what else it computes of a batch, on validation and test, as fusion takes them."""
    return {"val": predict(task, run, run.data.val, compute), "test": predict(task, run, run.data.test, compute)}


@torch.no_grad()
def predict(task, run, split, compute=None):
    """Logits (N, C) of the whole split, or what else the task computes of a batch; float32, on the CPU."""
    compute = compute or task.logits
    task.model.eval()
    feed = Feed(run, split, task.reads)
    batches = feed.batches(torch.arange(len(split)), 1000)
    return torch.cat([compute(feed.complete(batch)) for batch in batches]).float().cpu()
