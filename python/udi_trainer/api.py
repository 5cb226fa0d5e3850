"""Training from Python: :func:`train`, of which the command is a user."""

import contextlib
import dataclasses
import io
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import nn

import udi_kernels

from . import distributed
from .console import console, log
from .data.check import check, check_presence
from .data.dataset import Dataset, Encoder, Modality, Split, presence
from .data.labels import hide
from .data.noise import corrupt
from .errors import UserError, choose, memory_errors
from .evaluation.predictions import details, predictions_csv
from .evaluation.report import draw, table
from .evaluation.scores import accuracy
from .methods.outcome import Outcome
from .models.classifiers import FeatureHead, JointClassifier
from .options import Options, resumed
from .predictor import Predictor, imported
from .registry import datasets, methods, offered
from .run import Run, choose_device
from .run_folder import RunFolder, as_json, locked, new_folder, read_config
from .stop import Stop

Method = str | Callable[[Run], Outcome]


@dataclass
class Result:
    """What a training reached.

    Attributes:
        metrics: as in metrics.json: ``metrics["fused"]["test_acc"]`` and the like.
        models: the trained classifiers by modality, each from a batch of inputs to (features, logits); of a joint
            method one of all modalities.
        history: the log of each stage, a dict an epoch.
        folder: the run folder, or None.
    """

    metrics: dict
    history: dict[str, list[dict]]
    predictor: Predictor
    folder: Path | None

    @property
    def models(self) -> dict[str, nn.Module]:
        return self.predictor.models

    def table(self) -> str:
        """Everything that was trained, as text."""
        return table(self.metrics)

    def predict(self, split: Split | dict[str, torch.Tensor]) -> torch.Tensor:
        """Fused probabilities (N, C), on the CPU, of a split or of its stored tensors alone."""
        return self.predictor.predict(split)


def train(
    dataset: Dataset | str = "fewdigits",
    method: Method = "udi",
    encoders: dict[str, Encoder] | None = None,
    *,
    resume: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Result:
    """Trains a method, and baselines beside it; the figures are those of the command with the same options.

    Leaves torch as it was: its number of threads, TF32, the state of its random generators.

    Args:
        dataset: tensors in memory, or the name of one of the trainer's datasets.
        method: ``"udi"``, ``"joint"``, ``"ensemble"``, ...; or a function from a :class:`Run` to an :class:`Outcome`.
        encoders: in the place of the modalities' own, by modality: a name, or a callable from a sample's shape to a
            fresh module from inputs (N, *shape) to features (N, width). It is called anew for each model.
        resume: the folder of an interrupted run to go on with, with its options; dataset and encoders are given again.
        progress: print messages and a progress bar.
        options: those of the command, with underscores: ``epochs=30``, ``baselines=["joint", "ensemble"]``, ``out=DIR``
            for a run folder (without it nothing is written), ...; see :class:`Options`.

    Raises:
        UserError: naming what is wrong with data or options, before anything is trained.
    """
    name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
    data_name = dataset if isinstance(dataset, str) else dataset.name
    with distributed.process_group(), console(distributed.first()) if progress else contextlib.nullcontext():
        if resume is None:
            folder, chosen = None, Options.make(method=name, dataset=data_name, **options)
        else:
            said = {"method": name, "dataset": data_name}  # where they are not the defaults
            said = {key: value for key, value in said.items() if value != getattr(Options, key)}
            folder, chosen = restored(resume, options | said)
        plan = Plan(chosen, None if isinstance(dataset, str) else dataset, encoders, method)
        if folder is None and chosen.out is not None:
            folder = plan.new_folder()
        return plan.run(folder)


def restored(folder: str | Path, given: dict) -> tuple[Path, Options]:
    """Folder and options of an interrupted run."""
    try:
        config = distributed.on_first(lambda: read_config(Path(folder)))
    except UserError as error:
        raise UserError(f"--resume {folder}: no run to resume, {error}") from None
    if distributed.world() == 1:
        config.pop("shard", None)  # which needs several processes, and made no difference to the figures
    return Path(folder), resumed(str(folder), config, given)


class Plan:
    """A training about to begin: what it needs is there, and fits."""

    def __init__(
        self,
        options: Options,
        data: Dataset | None = None,
        encoders: dict[str, Encoder] | None = None,
        method: Method | None = None,
    ) -> None:
        self.options = options
        self.method = method if callable(method) else methods.find(options.method)
        self.baselines = {name: methods.find(name) for name in options.baselines or () if name != options.method}
        self.device = choose_device(options.device)
        if options.shard and distributed.world() == 1:
            raise UserError("--shard needs several processes to spread parameters over: start them by torchrun")
        if options.tensorboard and find_spec("tensorboard") is None:
            raise UserError('--tensorboard needs tensorboard: pip install -e ".[tensorboard]"')
        data = data or offered(datasets.find(options.dataset), options.data_root, options)
        data = replace(data, modalities=with_encoders(data.modalities, options, encoders or {}))
        check(data)
        if options.noise:
            data = corrupt(data, *options.noise)
        if options.labels is not None:
            data = hide(data, options.labels, options.seed)
            check_presence(data)
        self.data = data
        if options.anchor != "auto":
            choose("anchor", options.anchor, data.modalities)

    def new_folder(self) -> Path:
        """With config.json in it."""
        options = self.options
        with self.settings():
            config = dataclasses.asdict(options) | environment(self.device)
        label = f"{options.dataset}-{options.method}-seed{options.seed}"
        return distributed.on_first(lambda: new_folder(options.out, label, config))

    def run(self, folder: Path | None, stop: Stop | None = None) -> Result:
        """``stop``: what asks it to end before it is done."""
        options, ours = self.options, folder if distributed.first() else None
        with locked(ours), self.settings(), memory_errors(f"with {sizes(options)}"):
            where = f", {distributed.world()} processes" if distributed.world() > 1 else ""
            where += f"; run folder {folder}" if folder else ""
            log.info(f"{options.method} on {options.dataset}, seed {options.seed}, {self.device}{where}")
            if unlabelled := int((self.data.train.labels < 0).sum()):
                log.info("train: %d of %d samples have no label", unlabelled, len(self.data.train))
            run = Run(options, self.data, self.device, RunFolder(ours), stop)
            outcome = self.method(run)
            metrics: dict[str, Any] = {"method": options.method, "dataset": options.dataset, "seed": options.seed}
            metrics |= {"device": str(self.device), "anchor": None, "modalities": {}, "unimodal": {}, **outcome.metrics}
            metrics["baselines"] = {}
            for name, method in self.baselines.items():
                other = method(run)
                predictor = self.predictor(other)
                add_shifted(other.metrics, predictor, run.data)
                add_without(other.metrics, predictor, run.data)
                metrics["baselines"][name] = other.metrics["fused"]
            metrics["seconds"] = seconds(run)
            predictor = self.predictor(outcome)
            add_shifted(metrics, predictor, run.data)
            add_without(metrics, predictor, run.data)
            if outcome.models:
                fused = predictor.predict(run.data.test)
                metrics["fused"] |= details(fused, self.data.test.labels)
                metrics["classes"] = list(self.data.class_names or map(str, range(self.data.classes)))
                each = predictor.logits(run.data.test, shares=True)
                run.folder.write("predictions.csv", predictions_csv(self.data, each, fused))
            run.show("fused", metrics["fused"], options.epochs)
            if ours:
                predictor.save(run.folder, self.data)
                picture(metrics, run)
                run.folder.write("metrics.json", as_json(metrics))
        return Result(metrics, run.history, predictor, folder)

    def predictor(self, outcome: Outcome) -> Predictor:
        return Predictor(self.data.modalities, outcome.models, outcome.rule, self.options.amp)

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """torch as the options want it, and afterwards as it was."""
        gpus = [self.device] if self.device.type == "cuda" else []
        threads = torch.get_num_threads()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(gpus))
            if gpus:
                stack.enter_context(tf32(self.options.tf32))
                stack.enter_context(warnings.catch_warnings())
                for usual in ("Synchronization debug mode", "This instance was constructed with capturable=True"):
                    warnings.filterwarnings("ignore", usual)  # of steps that will be captured, and of the look at them
            if self.options.compile:  # else a compiled graph serves one of its losses' gradients alone
                stack.enter_context(torch._functorch.config.patch(donated_buffer=False))
            try:
                if self.small():
                    torch.set_num_threads(1)
                yield
            finally:
                torch.set_num_threads(threads)

    def small(self) -> bool:
        """Whether a step takes about a millisecond: more than one thread gains nothing, and on a busy machine waits.

        Measured on cgdigits with 2 cores: as quick with one as with two when idle, 40 times quicker beside a compiler.
        """
        sizes = (view.sample(self.data.train)[0].numel() for view in self.data.modalities.values())
        return self.options.batch_size * sum(sizes) < 2**16


def with_encoders(modalities: dict[str, Modality], options: Options, given: dict[str, Encoder]) -> dict[str, Modality]:
    """The modalities with the encoders that are given, or chosen by option."""
    chosen, weights = (options.encoder or {}) | given, options.encoder_weights or {}
    for m in [*chosen, *weights]:
        choose("modality", m, modalities)
    views = {}
    for m, view in modalities.items():
        encoder = chosen.get(m, view.encoder)
        if isinstance(encoder, str) and ":" in encoder:
            encoder = imported(encoder, "--encoder MODALITY=module:Class")
        views[m] = replace(view, encoder=encoder, width=options.features, weights=weights.get(m))
    return views


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """float32 products and convolutions of a GPU by TF32 or not; afterwards as they were, by torch's old or new flags.

    torch refuses to tell its old flags where its new ones (``fp32_precision``) disagree, and the old set the new.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    backends = matmul, cudnn.conv, cudnn.rnn, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, level = [backend.fp32_precision for backend in backends], None
    with contextlib.suppress(RuntimeError):
        level = torch.get_float32_matmul_precision()
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = allowed
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = (precision == "tf32" for precision in before[:2])
        if level:
            torch.set_float32_matmul_precision(level)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def add_shifted(metrics: dict, predictor: Predictor, data: Dataset) -> None:
    """To scores the accuracy on the shifted test split, if there is one."""
    if data.shifted is None or not predictor.models:
        return
    labels = data.shifted.labels.cpu()
    metrics["fused"]["shifted_acc"] = accuracy(predictor.predict(data.shifted), labels)
    for m, logits in predictor.logits(data.shifted, shares=True).items():
        if m in metrics["modalities"]:
            metrics["modalities"][m]["shifted_acc"] = accuracy(logits, labels)


def add_without(metrics: dict, predictor: Predictor, data: Dataset) -> None:
    """To scores the accuracy without each modality, in turn, where a model reads them all: its features are then 0.

    Of models by modality fusion has told, from their logits; one of the user's own class may not know what is missing.
    """
    joint = [model for name, model in predictor.models.items() if name not in data.modalities]
    if not joint or not all(isinstance(model, (JointClassifier, FeatureHead)) for model in joint):
        return
    labels, absent = data.test.labels.cpu(), torch.zeros(len(data.test), dtype=torch.bool)
    metrics["fused"]["without"] = {
        m: accuracy(predictor.predict(data.test.stored | {presence(m): absent}), labels) for m in data.modalities
    }


def picture(metrics: dict, run: Run) -> None:
    """report.png, without which a run is none the worse."""
    image = io.BytesIO()
    draw(metrics, run.history, image)
    try:
        run.folder.write("report.png", image.getbuffer())
    except UserError as error:
        log.warning(str(error))


def sizes(options: Options) -> str:
    """What takes memory, and what would take less."""
    less = ["a smaller one"]
    if options.amp == "none":
        less.append("--amp bf16")
    if options.data != "host":
        less.append("--data host")
    return f"--batch-size {options.batch_size}: try {', '.join(less)}"


def seconds(run: Run) -> dict[str, float]:
    """By phase, and in all."""
    phases = {"anchor_phase": 0.0, "follower_phase": 0.0}
    for rows in run.history.values():
        phase = f"{rows[0]['phase']}_phase"
        phases[phase] = phases.get(phase, 0) + sum(row["seconds"] for row in rows)
    return phases | {"total": run.elapsed()}


def environment(device: torch.device) -> dict:
    """What else the figures depend on."""
    return {
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "udi_kernels": udi_kernels.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
        }
    }
