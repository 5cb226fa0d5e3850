"""State that all parts of a run share: options, data, device, seeds and the log."""

import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch

from . import distributed
from .console import log
from .data.dataset import Dataset
from .errors import UserError
from .evaluation.fusion import FusionOptions, Rule, fuse
from .optimizers import SGD, AdamW
from .options import DECAYS, Options, upgraded
from .registry import datasets
from .run_folder import REPEAT, RunFolder
from .seeds import derive_seed, seeded
from .stop import Stop

T = TypeVar("T")


class Run:
    """A run: its options, data, device and folder, and the log of each stage."""

    def __init__(
        self,
        options: Options,
        data: Dataset,
        device: torch.device,
        folder: RunFolder,
        stop: Stop | None = None,
        fingerprint: str | None = None,
        first: "Run | None" = None,
    ) -> None:
        """
        Args:
            fingerprint: a digest of the data and the encoders, which checkpoints keep.
            first: the run whose decisions this one keeps: it is a final fit on training and validation together. Then
                no scores on validation exist, and stages end with the epoch that the first run kept.
        """
        self.fingerprint, self.first = fingerprint, first
        self.decisions: list[tuple[str, Any]] = []  # what validation has decided, see `decide`
        self.options = options = options.sized(len(data.train))
        self.device, self.folder, self.stop = device, folder, stop or Stop()
        self.engine = choose_engine(options.engine, device, options.shard)
        self.resident = options.data == "device" or (options.data == "auto" and fits(data, device))
        self.data = data.to(device if self.resident else torch.device("cpu"))
        self.class_weights = balanced(data).to(device) if options.class_weights == "balanced" else None
        evaluated = {"test": data.test} if first else {"val": data.val, "test": data.test}
        self.labels = {name: split.labels.cpu() for name, split in evaluated.items()}
        self.batch_size = batch_size(options, data)
        # Per epoch: full batches only. The samples left out differ between epochs.
        self.steps = len(data.train) // self.batch_size
        self.history: dict[str, list[dict]] = {}  # stage: its lines of metrics.jsonl
        self.decay: dict[str, float] = {}  # the weight decay chosen for each modality
        self.began = time.perf_counter()
        self.board = event_writer(folder) if options.tensorboard and distributed.first() else None

    def seed(self, *key: object) -> int:
        return derive_seed(self.options.seed, *key)

    def make(self, task: Callable[..., T], **arguments: Any) -> T:
        """A task of this class with these arguments; its initial weights are drawn from the seed of its name."""
        with seeded(self.seed(task.seed_name_of(arguments.get("modality")))):  # type: ignore[attr-defined]
            return task(self, **arguments)

    def decide(self, what: str, choose: Callable[[], T]) -> T:
        """What ``choose`` finds on validation. A final fit takes what it found in the first run instead.

        Every choice that reads validation is made here, so both runs make the same ones in the same order. ``what``
        names the choice. Choices within ``choose`` belong to it.
        """
        place = len(self.decisions)
        if self.first is None:
            value = choose()
            del self.decisions[place:]
        else:
            named, value = [*self.first.decisions[place:], ("nothing", None)][0]
            if named != what:
                raise UserError(f"--refit: the final fit decides {what}, where the first run decided {named}")
        self.decisions.append((what, value))
        return value

    def fuse(self, logits: dict[str, dict[str, torch.Tensor]], own: str = "auto") -> tuple[dict, Rule]:
        """The scores of the fused prediction and its rule, see `evaluation.fusion.fuse`; ``own``: the method's own."""
        return fuse(self.fusion(own), logits, self.labels, self.options.select, self.decide)

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.options.amp)

    @property
    def decays(self) -> tuple[float, ...]:
        """The weight decays to choose from."""
        decay = self.options.weight_decay
        return DECAYS if decay == "auto" else (decay,)  # type: ignore[return-value]

    def optimizer(self, parameters: Iterable, decay: float | None = None) -> torch.optim.Optimizer:
        """The optimizer that the options choose. It clips the gradients of each parameter group by itself.

        ``decay``: the weight decay, by default the first of :attr:`decays`.
        """
        options, decay = self.options, self.decays[0] if decay is None else decay
        optimizer: torch.optim.Optimizer
        if options.optimizer == "adamw":
            on_gpu = self.device.type == "cuda"
            optimizer = AdamW(parameters, weight_decay=decay, fused=True, capturable=on_gpu)
        else:
            fused = not options.shard  # fused SGD does not take a tensor as learning rate for FSDP2's parameters
            momentum = options.momentum
            optimizer = SGD(parameters, options.lr, momentum, weight_decay=decay, fused=fused)
            # Fused SGD needs the momentum of all parameters or of none, and leaves it uninitialized where its first
            # step is skipped (2.14). Zeros give the same first step.
            for p in (p for group in optimizer.param_groups for p in group["params"] if momentum):
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if options.clip_grad is not None:
            optimizer.register_step_pre_hook(partial(clip, options.clip_grad))
        return optimizer

    def fusion(self, own: str = "auto") -> str:
        """The fusion rule: the user's choice, else the method's own, else the one that the data set recommends."""
        recommended = datasets.recommended.get(self.options.dataset, {}).get("fusion", "auto")
        chosen = self.options.of(FusionOptions).fusion
        return next((rule for rule in (chosen, own) if rule != "auto"), recommended)

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def restore(self, stage: str, place: str | None = None) -> dict | None:
        """The stage's last checkpoint, or None; its log continues from there. ``place``: its file, if another."""
        saved = distributed.on_first(lambda: self.checkpoint(stage, place or stage))
        if saved:
            self.began = min(self.began, time.perf_counter() - saved["elapsed"])
        self.history[stage] = saved["rows"] if saved else []
        self.folder.write_log([row for rows in self.history.values() for row in rows])
        return saved

    def checkpoint(self, stage: str, place: str) -> dict | None:
        """The stage's last checkpoint, after checking that it belongs to this stage and these options."""
        saved = self.folder.checkpoint(place)
        if saved is None:
            return None
        path, mine = self.folder.checkpoint_path(place), identity(self.options)
        keys = {"stage", "options", "elapsed", "rows", "parts", "best", "under_way", "engine"}
        if saved.keys() - {"fingerprint"} != keys or saved["stage"] != stage:
            raise UserError(f"{path} is not a checkpoint of {stage}: {REPEAT}")
        if saved.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise UserError(f"{path} belongs to a run with other data or encoders: {REPEAT}")
        theirs = identity(Options.of_flat(upgraded(saved["options"]), map(type, self.options.groups)))
        for name, value in mine.items():
            if value != theirs[name]:
                values = f"{name} {theirs[name]}, in config.json {value}"
                raise UserError(
                    f"{path} belongs to a run with other options ({values}): correct config.json, or {REPEAT}"
                )
        return saved

    def save(self, stage: str, place: str, **state: Any) -> None:
        """Checkpoints the stage, in the file ``place``."""
        common = {"stage": stage, "options": identity(self.options), "elapsed": self.elapsed()}
        common["fingerprint"] = self.fingerprint
        if distributed.first():
            self.folder.save(place, **common, **state, rows=self.history[stage])

    def log(self, stage: str, row: dict):
        """Writes a line of metrics.jsonl, and its figures as TensorBoard events."""
        self.folder.append_log(row)
        self.show(stage, row, row["epoch"])

    def show(self, label: str, values: dict, epoch: int):
        """Writes figures as TensorBoard events."""
        if self.board:
            for name, value in values.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{name}/{label}", value, epoch)
            self.board.flush()


def event_writer(folder: RunFolder):
    """A writer of TensorBoard events; a resumed run appends to them."""
    from torch.utils.tensorboard import SummaryWriter

    if folder.path is None:
        raise UserError("tensorboard=True needs a run folder: give out=DIR")
    return SummaryWriter(str(folder.path / "tensorboard"))


def batch_size(options: Options, data: Dataset) -> int:
    """Samples per step, of all processes together."""
    size, world = min(options.batch_size, len(data.train)), distributed.world()
    if size % world:
        raise UserError(f"--batch-size: {size} samples have no equal parts for {world} processes")
    return size


def clip(norm: float, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    """Scales the gradients of each parameter group down to this norm, as ``clip_grad_norm_`` does.

    Not in place: gradients of two parameters may be one tensor.
    """
    groups = ([p for p in group["params"] if p.grad is not None] for group in optimizer.param_groups)
    for having in filter(None, groups):
        grads = [p.grad for p in having]
        total = torch.nn.utils.get_total_norm(grads)
        scale = (norm / (total + 1e-6)).clamp(max=1)
        for p, grad in zip(having, torch._foreach_mul(grads, scale), strict=True):
            p.grad = grad


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision as ``--amp`` says."""
    return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "none")


def balanced(data: Dataset) -> torch.Tensor:
    """Weights of the classes (C,), inverse to their numbers of labelled training samples, with mean 1 over these."""
    counts = torch.bincount(data.train.labels[data.train.labels >= 0], minlength=data.classes).double()
    return (counts.sum() / (data.classes * counts)).float()


def identity(options: Options) -> dict:
    """The options that the figures depend on."""
    fixed = {name for name, field in options.fields().items() if name != "out" and not field.metadata["movable"]}
    return {name: value for name, value in options.flat().items() if name in fixed}


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and distributed.world() > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # one GPU per process
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: choose from auto, cpu, cuda, cuda:i")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"--device {name}: torch {torch.__version__} sees {count} CUDA devices here: use --device cpu")
    if device.type == "cuda" and distributed.world() > 1:
        torch.cuda.set_device(device)  # otherwise each process would open a context on the first GPU, too
    return device


def choose_engine(option: str, device: torch.device, shard: bool = False) -> str:
    if device.type == "cuda" and not shard:
        if option == "auto" and distributed.world() > 1:
            return "eager"  # communication inside graphs only on request
        return "eager" if option == "eager" else "graph"
    if option == "graph":
        reason = "cannot hold the communication of sharded parameters" if shard else f"need a GPU and this is {device}"
        log.info("--engine graph: eager steps, for CUDA graphs %s", reason)
    return "eager"


def fits(data: Dataset, device: torch.device) -> bool:
    """Whether the data may live on the device: it takes less than a third of the free memory."""
    return device.type == "cpu" or data.nbytes() < torch.cuda.mem_get_info(device)[0] / 3
