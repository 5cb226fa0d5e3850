"""Training from Python: :func:`train`. The command line uses the same classes."""

import contextlib
import functools
import io
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import udi_kernels
from udi_kernels import _build

from . import distributed
from .console import console, log
from .data.check import check, check_presence
from .data.dataset import Dataset, Encoder, Modality, Split, presence
from .data.fingerprint import difference, digest, fingerprint
from .data.labels import hide
from .data.noise import corrupt
from .errors import UserError, choose, memory_errors
from .evaluation.predictions import details, predictions_csv
from .evaluation.report import controller_table, draw, table
from .evaluation.scores import accuracy
from .methods.outcome import Outcome
from .methods.scikit import too_large
from .models.classifiers import FeatureHead, JointClassifier
from .models.encoders import make_encoder
from .options import SCIKIT, Options, find_method, name_of, resumed, spelled
from .predictor import Predictor
from .registry import datasets, imported, methods
from .run import Run, batch_size, choose_device, identity
from .run_folder import RunFolder, as_json, locked, new_folder, read_config, write_json
from .stop import Stop

NEARLY_ALL = 0.995  # of the samples
REFIT = ("modalities", "unimodal", "ensemble", "fusion_head", "fused", "baselines")  # the metrics of a final fit
Method = str | Callable[[Run], Outcome]


@dataclass
class Result:
    """The result of a training.

    Attributes:
        metrics: as in metrics.json: ``metrics["fused"]["test_acc"]`` and the like.
        models: the trained classifiers by modality, each from a batch of inputs to (features, logits); for a joint
            method one model of all modalities.
        history: the log of each stage, one dict per epoch.
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
        """The comparison of everything that was trained, and what the dynamic controller measured, as text."""
        return "\n\n".join(filter(None, (controller_table(self.history), table(self.metrics))))

    def predict(self, split: Split | dict[str, torch.Tensor]) -> torch.Tensor:
        """Fused probabilities (N, C), on the CPU, for a split or just its stored tensors."""
        return self.predictor.predict(split)


def train(
    dataset: Dataset | str = "fewdigits",
    method: Method | None = None,
    encoders: dict[str, Encoder] | None = None,
    *,
    resume: str | Path | None = None,
    trust: Sequence[str] = (),
    progress: bool = True,
    **options: Any,
) -> Result:
    """Trains a method and its baselines; the figures equal those of the command with the same options.

    torch's global state is restored afterwards: number of threads, TF32, random generators.

    Args:
        dataset: tensors in memory, or the name of a registered data set.
        method: ``"udi"`` (the default), ``"joint"``, ``"ensemble"``, ...; or a function from a :class:`Run` to an
            :class:`Outcome`.
        encoders: replace the modalities' own, by modality: a name, or a callable from a sample's shape to a fresh
            module from inputs ``(N, *shape)`` to features (N, width). It is called once for each model.
        resume: the folder of an interrupted run, which continues with its options; give data set and encoders again.
        trust: modules that may be imported because the folder to resume names them.
        progress: print messages and a progress bar.
        options: those of the command, with underscores: ``epochs=30``, ``baselines=["joint", "ensemble"]``, ``out=DIR``
            for a run folder (without it nothing is written); and those that the method declares.

    Raises:
        UserError: before anything is trained; it names what is wrong with data or options.
    """
    if isinstance(dataset, str):
        choose("dataset", dataset, datasets)
    with (
        usual_torch(),
        distributed.process_group(),
        console(distributed.first()) if progress else contextlib.nullcontext(),
    ):
        if resume is None:
            folder, chosen = None, Options.make(method=method, dataset=dataset, **options)
        else:
            said = {"dataset": dataset if isinstance(dataset, str) else dataset.name}
            said |= {"method": method if isinstance(method, str) else name_of(method)} if method else {}
            said = {key: value for key, value in said.items() if value != getattr(Options, key)}  # not the defaults
            own = method if callable(method) else None
            folder, chosen = restored(resume, options | said, method=own, encoders=encoders or {}, trust=trust)
        training = Training(chosen, None if isinstance(dataset, str) else dataset, encoders, method)
        if folder is None and chosen.out is not None:
            folder = training.new_folder()
        return training.run(folder)


def restored(folder: str | Path, given: dict, **own: Any) -> tuple[Path, Options]:
    """The folder and the options of an interrupted run; ``own``: see :func:`resumed`."""
    try:
        config = distributed.on_first(lambda: read_config(Path(folder)))
    except UserError as error:
        raise UserError(f"--resume {folder}: no run to resume, {error}") from None
    if distributed.world() == 1:
        config.pop("shard", None)  # which needs several processes, and made no difference to the figures
    return Path(folder), resumed(str(folder), config, given, **own)


class Training:
    """A training that is ready to start: its options and data have been checked."""

    def __init__(
        self,
        options: Options,
        data: Dataset | None = None,
        encoders: dict[str, Encoder] | None = None,
        method: Method | None = None,
    ) -> None:
        self.options = options
        self.method = method if callable(method) else find_method(options.method)
        self.device = choose_device(options.device)
        if options.shard and distributed.world() == 1:
            raise UserError("--shard needs several processes to spread parameters over: start them by torchrun")
        if options.amp == "fp16" and (self.device.type == "cpu" or options.shard):
            why = "with --shard" if options.shard else "on a CPU"
            raise UserError(f"--amp fp16 does not work {why}: use --amp bf16")
        if options.tensorboard and find_spec("tensorboard") is None:
            raise UserError('--tensorboard needs tensorboard: pip install -e ".[tensorboard]"')
        for kind in sorted({"cpu", self.device.type}):  # the ops, then the kernels of a GPU
            _build.load(kind)  # compiled now, where nothing was: with a line of its own, not in the middle of training
        data = data or datasets.find(options.dataset)(options)
        data = replace(data, modalities=with_encoders(data.modalities, options, encoders or {}))
        check(data)
        data = replace(data, classes=int(data.classes))  # it may be NumPy's
        if any(t.is_inference() for split in data.splits().values() for t in split.stored.values()):
            data = replace(data, **{name: split.cloned() for name, split in data.splits().items()})
        if options.noise:
            data = corrupt(data, *options.noise)
        if options.labels is not None:
            data = hide(data, options.labels, options.seed)
            check_presence(data)
        if options.refit:  # what cannot be joined is refused now
            one = torch.zeros(1, dtype=torch.int64)
            replace(data, train=data.train.take(one), val=data.val.take(one)).joined()
        for group in options.groups:
            group.check(data)
        self.options = options = options.sized(len(data.train))
        batch_size(options, data)
        with torch.random.fork_rng(devices=[]):
            for m in options.encoder_weights or ():
                make_encoder(m, data.modalities[m], data.train, tell=True)
        self.data = data
        self.baselines = {name: methods.find(name) for name in self.baseline_names() if name != options.method}

    def baseline_names(self) -> list[str]:
        """Those of the options. If there are any, small data has scikit-learn's as well."""
        chosen = self.options.baselines or ()
        if not chosen:
            return []
        if reason := too_large(self.data):
            log.info("%s are left out: the data has %s", " and ".join(SCIKIT), reason)
            return [name for name in chosen if name not in SCIKIT]
        return list(dict.fromkeys((*chosen, *SCIKIT)))

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """Of the data as it is trained on, and of the encoders."""
        return fingerprint(self.data)

    def keep_encoders(self, folder: Path) -> None:
        """Keeps ``cnn1d`` for the modalities of a run that began with it, as the default where it is ``fcn`` now."""
        saved = distributed.on_first(lambda: read_config(folder)).get("fingerprint")
        for m, view in self.data.modalities.items():
            part = f"encoder of {m}"
            if view.encoder != "fcn" or not isinstance(saved, dict) or saved.get(part) == self.fingerprint[part]:
                continue
            earlier = replace(self.data, modalities=self.data.modalities | {m: replace(view, encoder="cnn1d")})
            if fingerprint(earlier)[part] == saved.get(part):
                self.data = earlier
                del self.fingerprint

    def check_same(self, folder: Path | None) -> None:
        """Raises UserError if the data are not those of the run in the folder, or differ between the processes."""
        if folder:
            self.keep_encoders(folder)
        if distributed.world() > 1:
            given = {spelled(name): repr(value) for name, value in identity(self.options).items()}
            ours = given | self.fingerprint
            theirs = distributed.on_first(lambda: ours)
            wrong = difference(ours, theirs)
            if distributed.any_process(bool(wrong)):
                what = f"{', '.join(wrong)} here, unlike in the first one" if wrong else "another one has other data"
                raise UserError(f"process {distributed.rank()}: all processes must be given the same, but {what}")
        if folder:
            distributed.on_first(lambda: self.check_folder(folder))

    def check_folder(self, folder: Path) -> None:
        config = read_config(folder)
        saved = config.get("fingerprint")
        if not isinstance(saved, dict):
            log.warning("%s has no fingerprint of its data: it is added, and this data taken to be the run's", folder)
            with contextlib.suppress(UserError):  # a finished run may be read-only
                write_json(folder / "config.json", config | {"fingerprint": self.fingerprint})
        elif wrong := difference(self.fingerprint, saved):
            raise UserError(
                f"--resume {folder}: the data is not that of this run, it differs in {', '.join(sorted(wrong))}:"
                " give the same data, or start another run"
            )

    def new_folder(self) -> Path:
        """A run folder with config.json in it."""
        options = self.options
        with self.settings():
            config = options.flat() | environment(self.device) | {"fingerprint": self.fingerprint}
        label = f"{options.dataset}-{options.method}-seed{options.seed}".replace(":", ".")  # of module:function
        return distributed.on_first(lambda: new_folder(options.out, label, config))

    def run(self, folder: Path | None, stop: Stop | None = None) -> Result:
        """Trains the method and its baselines. ``stop``: a request to end early."""
        options, written = self.options, folder if distributed.first() else None
        with locked(written), self.settings(), memory_errors(f"with {sizes(options)}"):
            where = f", {distributed.world()} processes" if distributed.world() > 1 else ""
            where += f"; run folder {folder}" if folder else ""
            log.info(f"{options.method} on {options.dataset}, seed {options.seed}, {self.device}{where}")
            if unlabelled := int((self.data.train.labels < 0).sum()):
                log.info("train: %d of %d samples have no label", unlabelled, len(self.data.train))
            self.check_same(folder)
            given = digest(self.fingerprint) if folder else None
            run = Run(options, self.data, self.device, RunFolder(written), stop, given)
            metrics: dict[str, Any] = {"method": options.method, "dataset": options.dataset, "seed": options.seed}
            found, first, fused = self.train(run)
            metrics |= {"device": str(self.device), **found}
            predictor = first
            if options.refit:
                final = self.final_run(run, bool(folder))
                try:
                    found, predictor, fused = self.train(final)
                except KeyError as error:
                    if error.args != ("val",):
                        raise
                    raise UserError(
                        "--refit: the final fit has no validation, and a method reads it outside of Run.decide"
                    ) from error
                metrics["refit"] = {name: found[name] for name in REFIT if name in found}
                metrics["seconds"]["refit"] = final.elapsed()
                metrics["seconds"]["total"] += final.elapsed()
                log.info("the predictor is that of the final fit")
            if written:  # the figures first: nothing after them can lose them
                if predictor.models:
                    predictor.save(run.folder, self.data)
                run.folder.write("metrics.json", as_json(metrics))
            for m in suspicious(metrics, first, run.data):
                log.warning(
                    "%s is right on nearly all samples of training and of validation: if its features come from a model"
                    " that saw these labels, validation cannot choose anything, and test will be worse",
                    m,
                )
            run.show("fused", metrics["fused"], options.epochs)
            if written:
                if fused is not None:
                    each = predictor.logits(run.data.test, shares=True)
                    run.folder.write("predictions.csv", predictions_csv(self.data, each, fused))
                picture(metrics, run)
        return Result(metrics, run.history, predictor, folder)

    def train(self, run: Run) -> tuple[dict[str, Any], Predictor, torch.Tensor | None]:
        """Trains the method and its baselines: metrics, the method's predictor, and its probabilities on test."""
        outcome, fused = self.method(run), None
        metrics = {"anchor": None, "modalities": {}, "unimodal": {}, **outcome.metrics, "baselines": {}}
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
            metrics["classes"] = self.data.named_classes()
        return metrics, predictor, fused

    def final_run(self, first: Run, fingerprinted: bool) -> Run:
        """The run after ``first`` on training and validation together; it keeps its files in the folder ``refit``."""
        data, options = self.data.joined(), first.options.replace(batch_size=first.batch_size)
        log.info("final fit on %d samples of training and %d of validation", len(self.data.train), len(self.data.val))
        given = digest(fingerprint(data)) if fingerprinted else None
        return Run(options, data, self.device, first.folder.inside("refit"), first.stop, given, first)

    def predictor(self, outcome: Outcome) -> Predictor:
        data = self.data
        return Predictor(
            data.modalities, outcome.models, outcome.rule, self.options.amp, data.named_classes(), data.recipe
        )

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Sets torch's global state as the options say, and restores it afterwards."""
        gpus = [self.device] if self.device.type == "cuda" else []
        threads = torch.get_num_threads()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(gpus))
            if gpus:
                stack.enter_context(tf32(self.options.tf32))
                stack.enter_context(warnings.catch_warnings())
                for expected in ("Synchronization debug mode", "This instance was constructed with capturable=True"):
                    warnings.filterwarnings("ignore", expected)  # from steps that are captured, or tested for it
            if self.options.compile:  # otherwise a compiled graph gives the gradients of one loss only
                from torch._functorch import config  # slow to import

                stack.enter_context(config.patch(donated_buffer=False))
            try:
                if self.steps_are_small():
                    torch.set_num_threads(1)
                yield
            finally:
                torch.set_num_threads(threads)

    def steps_are_small(self) -> bool:
        """Whether a step takes about a millisecond: then more threads gain nothing, and wait on a busy machine.

        Measured on cgdigits with 2 cores: one thread is as quick as two when idle, 40 times quicker beside a compiler.
        """
        sizes = (view.sample(self.data.train)[0].numel() for view in self.data.modalities.values())
        return self.options.batch_size * sum(sizes) < 2**16


def with_encoders(modalities: dict[str, Modality], options: Options, given: dict[str, Encoder]) -> dict[str, Modality]:
    """The modalities with the encoders given here or by option."""
    chosen, weights = (options.encoder or {}) | given, options.encoder_weights or {}
    for m in [*chosen, *weights, *(options.freeze or {})]:
        choose("modality", m, modalities)
    views = {}
    for m, view in modalities.items():
        encoder = chosen.get(m, view.encoder)
        if m in weights and (not isinstance(encoder, str) or ":" in encoder):
            raise UserError(f"--encoder-weights {m}: the trainer's own encoders read weights, this one is yours")
        if isinstance(encoder, str) and ":" in encoder:
            encoder = imported(encoder, "--encoder MODALITY=module:Class")
        views[m] = replace(view, encoder=encoder, width=options.features, weights=weights.get(m))
    return views


@contextlib.contextmanager
def usual_torch() -> Iterator[None]:
    """torch as training needs it, whatever the caller has set: with gradients, and the CPU as default device."""
    device = torch.get_default_device()
    try:
        if device.type != "cpu":
            torch.set_default_device(None)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if device.type != "cpu":
            torch.set_default_device(device)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Switches TF32 for float32 products and convolutions on a GPU; restores torch's old and new flags afterwards.

    torch refuses to read its old flags where its new ones (``fp32_precision``) disagree; setting the old sets the new.
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
    """Adds the accuracy on the shifted test split to the scores, if there is one."""
    if data.shifted is None or not predictor.models:
        return
    labels = data.shifted.labels.cpu()
    metrics["fused"]["shifted_acc"] = accuracy(predictor.predict(data.shifted), labels)
    for m, logits in predictor.logits(data.shifted, shares=True).items():
        if m in metrics["modalities"]:
            metrics["modalities"][m]["shifted_acc"] = accuracy(logits, labels)


def add_without(metrics: dict, predictor: Predictor, data: Dataset) -> None:
    """Adds the accuracy of a joint model without each modality in turn: the features of that one are then 0.

    For models by modality, fusion has done so from their logits. A model of the user's own class may not know what a
    missing modality is.
    """
    joint = [model for name, model in predictor.models.items() if name not in data.modalities]
    if not joint or not all(isinstance(model, (JointClassifier, FeatureHead)) for model in joint):
        return
    labels, absent = data.test.labels.cpu(), torch.zeros(len(data.test), dtype=torch.bool)
    metrics["fused"]["without"] = {
        m: accuracy(predictor.predict(data.test.stored | {presence(m): absent}), labels) for m in data.modalities
    }


def suspicious(metrics: dict, predictor: Predictor, data: Dataset) -> list[str]:
    """The modalities whose accuracy is at least 99.5% both on validation and on the labelled training samples."""
    high = [m for m, found in metrics["modalities"].items() if found.get("val_acc", 0) >= NEARLY_ALL]
    if not high or not predictor.models:
        return []
    labelled = data.train.take((data.train.labels >= 0).nonzero().flatten())
    logits = predictor.logits(labelled, shares=True)
    labels = labelled.labels.cpu()
    return [m for m in high if m in logits and accuracy(logits[m], labels) >= NEARLY_ALL]


def picture(metrics: dict, run: Run) -> None:
    """Writes report.png; a failure is only a warning, whatever fails in the drawing."""
    image = io.BytesIO()
    try:
        draw(metrics, run.history, image)
        run.folder.write("report.png", image.getbuffer())
    except Exception as error:
        log.warning("no report.png: %s", str(error) or type(error).__name__)


def sizes(options: Options) -> str:
    """What takes memory, and the options that need less."""
    less = ["a smaller one"]
    if options.amp == "none":
        less.append("--amp bf16")
    if options.data != "host":
        less.append("--data host")
    return f"--batch-size {options.batch_size}: try {', '.join(less)}"


def seconds(run: Run) -> dict[str, float]:
    """Seconds by phase, and in total."""
    phases = {"anchor_phase": 0.0, "follower_phase": 0.0}
    for rows in run.history.values():
        phase = f"{rows[0]['phase']}_phase"
        phases[phase] = phases.get(phase, 0) + sum(row["seconds"] for row in rows)
    return phases | {"total": run.elapsed()}


def environment(device: torch.device) -> dict:
    """Versions and hardware, on which the figures depend, too."""
    return {
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "udi_kernels": udi_kernels.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
        }
    }
