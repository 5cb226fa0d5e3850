"""All options of a run: their kinds, defaults and help in one place, for the command, the Python API and --resume."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .errors import UserError, choose
from .registry import datasets, encoders, fusion_rules, methods

# --- kinds: from text of a command line, or from a value, to the value; ValueError says what is wanted ---


def number(
    kind: type[int] | type[float], least: float | None = None, above: float | None = None, below: float = math.inf
) -> Callable:
    """A finite number of this kind within its bounds."""

    def parse(x):
        try:
            fits = isinstance(x, str | (Integral if kind is int else Real)) and not isinstance(x, bool)
            value = kind(x) if fits else math.nan
        except ValueError:
            value = math.nan
        low = (least is not None and value < least) or (above is not None and value <= above)
        if not math.isfinite(value) or low or value >= below:
            bound = f"of at least {least}" if least is not None else f"above {above}"
            bound += f" and below {below}" if below < math.inf else ""
            raise ValueError(f"{x!r} is not {'an integer' if kind is int else 'a number'} {bound}")
        return value

    return parse


def pair(what: str, *kinds: Callable) -> Callable:
    """Two values, each of a kind of its own; in text separated by a comma."""

    def parse(x):
        parts = x.split(",") if isinstance(x, str) else x
        if not isinstance(parts, list | tuple) or len(parts) != 2:
            raise ValueError(f"{x!r} is not two {what} such as 0.5,0.5")
        return tuple(kind(part) for kind, part in zip(kinds, parts, strict=True))

    return parse


def some_of(*choices: str) -> Callable:
    def parse(x: Any) -> tuple[str, ...]:
        return tuple(choose("value", name, choices) for name in names(x))

    return parse


def names(x: str | Sequence[str]) -> tuple[str, ...]:
    """A list of names; in text separated by commas, or none."""
    if isinstance(x, str):
        return () if x == "none" else tuple(x.split(","))
    if not isinstance(x, list | tuple) or not all(isinstance(name, str) for name in x):
        raise ValueError(f"{x!r} is not a list of names")
    return tuple(x)


def count_or_fraction(x: Any) -> int | float:
    """How many, or from 0 to 1 what fraction: 1 is one, 1.0 is all."""
    if isinstance(x, str):
        x = number(float if "." in x else int)(x)
    return number(int, 1)(x) if isinstance(x, Integral) else number(float, above=0, below=1 + 1e-9)(x)


def steps_or_epoch(x: Any) -> str | int:
    return x if x == "epoch" else number(int, 1)(x)


def text(x: Any) -> str:
    if not isinstance(x, str):
        raise ValueError(f"{x!r} is not a name")
    return x


def path(x: Any) -> str:
    return str(x)


def flag(x: Any) -> bool:
    if not isinstance(x, bool):
        raise ValueError(f"{x!r} is neither True nor False")
    return x


def assignments(x):
    """By modality; in text MODALITY=VALUE, separated by commas."""
    pairs = [part.partition("=")[::2] for part in x.split(",")] if isinstance(x, str) else [*dict(x).items()]
    if not all(isinstance(part, str) and part for pair in pairs for part in pair):
        raise ValueError(f"{x!r} is not a list such as audio=VALUE,image=VALUE")
    return dict(pairs)


def one_of(*choices: str) -> Callable:
    def parse(x):
        return choose("value", x, choices)

    return parse


# --- the options ---


def option(
    group: str, default: Any, kind: Callable, help: str, metavar: str | None = None, shown: str | None = None
) -> Any:
    """``shown``: the default as the help has it, where None stands for something else."""
    return dataclasses.field(
        default=default, metadata={"group": group, "kind": kind, "help": help, "metavar": metavar, "shown": shown}
    )


WHAT, FILES, TRAINING, UDI, DIMML, MACHINE = (
    "what to train", "data of your own", "training", "UDI", "DI-MML", "machine",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a run, checked when it is made; all have a default.

    Raises:
        UserError: naming the option, what was given and what is wanted.
    """

    method: str = option(WHAT, "udi", text, "what to train: {methods}")
    dataset: str = option(
        WHAT, "fewdigits", text, "on what: {datasets}; what they recommend counts unless given: {recommended}"
    )
    data_root: str | None = option(WHAT, None, path, "folder of the dataset's files, where it needs any", "DIR")
    noise: tuple[float, float] | None = option(
        WHAT,
        None,
        pair("amounts INPUT,LABEL", number(float, 0), number(float, 0, below=1)),
        "corrupt the training split (not validation, not test): add Gaussian noise of this standard deviation to"
        " inputs (a fraction of pixels' range), make this fraction of labels wrong; the same for all seeds",
        "INPUT,LABEL",
    )
    labels: int | float | None = option(
        WHAT,
        None,
        count_or_fraction,
        "labels that the training split keeps: how many, or what fraction; drawn by the seed, of each class alike."
        " UDI's L_con and L_com, and self-training, learn from the other samples too; the rest from the labelled ones,"
        " in as many steps",
        "N|F",
        "all",
    )
    resplit: int | None = option(
        WHAT,
        None,
        number(int, 1),
        "of splitdigits, fewdigits and huedigits: draw training, so many samples of validation, and test by the seed",
        "N",
        "one split for all seeds",
    )
    rho: float = option(
        WHAT,
        0.95,
        number(float, 0, below=1 + 1e-9),
        "of huedigits: how often the hue is the label's own; in the shifted test split it is random",
    )
    baselines: tuple[str, ...] | None = option(
        WHAT,
        None,
        names,
        "methods to train beside it, or none",
        "A,B",
        "joint for udi; udi, ensemble and joint for dimml",
    )
    fusion: str = option(
        WHAT,
        "auto",
        text,
        "fusion rule: {fusion_rules}; auto: certainty for dimml, loglinear for residual followers, else what the"
        " dataset recommends, else the best on validation of mean, sum, weighted",
    )

    encoder: dict[str, str] | None = option(
        WHAT,
        None,
        assignments,
        "encoders in the place of the modalities' own: {encoders}, or module:Class, called with a sample's shape",
        "MODALITY=NAME,...",
    )
    encoder_weights: dict[str, str] | None = option(
        WHAT, None, assignments, "files of weights that encoders start from, such as torchvision's", "MODALITY=FILE,..."
    )
    features: int = option(WHAT, 64, number(int, 1), "width of the encoders' features")

    manifest: str | None = option(
        FILES, None, path, "CSV of --dataset manifest: a column a modality, and label, split, group, id", "FILE"
    )
    kinds: dict[str, str] | None = option(
        FILES,
        None,
        assignments,
        "what columns hold, where file endings do not tell: image, frames, flow, audio, array, text or number",
        "COLUMN=KIND,...",
    )
    tables: dict[str, str] | None = option(
        FILES, None, assignments, "columns of numbers that are a modality each, by name", "NAME=COLUMN+COLUMN,...",
        "one modality of them all, called table",
    )  # fmt: skip
    image_size: int | None = option(
        FILES, None, number(int, 4), "pixels that images and frames are resized to", "N", "64 or as small as they are"
    )
    frames: int = option(FILES, 3, number(int, 1), "frames of a clip: random ones in training, else fixed ones")
    sample_rate: int | None = option(
        FILES, None, number(int, 100), "hertz that sound is resampled to", "N", "the lowest there, 22050 at most"
    )
    audio_length: float | None = option(
        FILES, None, number(float, above=0), "seconds of sound; shorter sound is repeated", "S",
        "of the longest, 10 at most",
    )  # fmt: skip
    stft: tuple[float, float] = option(
        FILES,
        (23.22, 16.01),
        pair("times WINDOW,HOP", number(float, above=0), number(float, above=0)),
        "window and hop of the spectrogram, in milliseconds",
        "WINDOW,HOP",
    )
    augment: tuple[str, ...] = option(
        FILES, (), some_of("crop", "flip", "spec"), "in training, at random: crop (images, sound), flip (images),"
        " spec (bands and times of spectrograms masked: SpecAugment)", "A,B", "none",
    )  # fmt: skip
    skip_bad: bool = option(FILES, False, flag, "leave out samples that cannot be read, and list them")
    allow_missing: bool = option(
        FILES, False, flag, "train on samples with empty cells, too: what modalities they have"
    )
    fold: int | None = option(
        FILES,
        None,
        number(int, 0),
        "who is held out, of spokendigits and cremad: speakers of validation and test are then never heard in training",
        "N",
        "0; of cremad none, its customary split",
    )
    labelled_speakers: int | None = option(
        FILES, None, number(int, 1), "of spokendigits' training speakers: how many have labels", "N", "all"
    )
    image_noise: float = option(
        FILES, 0.6, number(float, 0), "of spokendigits' images: standard deviation, of pixels' range"
    )
    cache_dir: str | None = option(FILES, None, path, "where decoded data is kept", "DIR", "the user's cache")

    epochs: int = option(TRAINING, 30, number(int, 1), "epochs of each phase")
    patience: int | None = option(
        TRAINING, None, number(int, 1), "end a training after so many epochs without a better one on validation"
    )
    batch_size: int = option(TRAINING, 64, number(int, 1), "samples of a step")
    optimizer: str = option(TRAINING, "adamw", one_of("adamw", "sgd"), "adamw or sgd")
    lr: float = option(TRAINING, 3e-3, number(float, above=0), "first learning rate")
    schedule: str = option(
        TRAINING,
        "cosine",
        one_of("cosine", "step", "constant"),
        "of the learning rate, epoch by epoch: cosine (to 0), step (see --lr-step) or constant",
    )
    lr_step: tuple[int, float] = option(
        TRAINING,
        (70, 0.1),
        pair("numbers EPOCHS,FACTOR", number(int, 1), number(float, above=0)),
        "of --schedule step: every so many epochs the learning rate is multiplied by this",
        "EPOCHS,FACTOR",
    )
    momentum: float = option(TRAINING, 0.9, number(float, 0, below=1), "of sgd")
    weight_decay: float | None = option(
        TRAINING, None, number(float, 0), "weight decay", "W", "0.01 for adamw, 0.0001 for sgd"
    )
    seed: int = option(TRAINING, 0, number(int, 0), "of initial weights and order of samples; all see the same dataset")

    anchor: str = option(
        UDI,
        "auto",
        text,
        "modality to freeze as the anchor, the only one then to be trained alone; or auto: the best on validation",
    )
    race: float | None = option(
        UDI,
        None,
        number(float, above=0, below=1),
        "choose the anchor after this fraction of its epochs, and train no other modality to the end",
        "F",
    )
    follower_init: str = option(
        UDI,
        "scratch",
        one_of("scratch", "anchor-phase"),
        "weights that followers start from: scratch, or anchor-phase (trained alone)",
    )
    teacher: str = option(
        UDI,
        "anchor",
        one_of("anchor", "fused"),
        "whom followers learn from: anchor, or fused: the fused prediction of all, by all (co-training, no longer one"
        " way)",
    )
    rounds: int = option(
        UDI, 1, number(int, 1), "of --teacher fused: how often followers are trained, each time by the last ones"
    )
    follower_loss: str = option(
        UDI,
        "label",
        one_of("label", "residual"),
        "L_cls of a follower: of its own logits (label), or of their sum with the anchor's (residual), so that it"
        " learns what the anchor does not know",
    )
    controller: str = option(
        UDI,
        "static",
        one_of("dynamic", "static"),
        "weights of L_con and L_com: static, or dynamic, from the losses' gradients",
    )
    alpha: tuple[float, float] | None = option(
        UDI,
        None,
        pair("weights CON,COM", number(float, 0), number(float, 0)),
        "the two weights of the static controller",
        "CON,COM",
        "1,1",
    )
    align_every: str | int = option(
        UDI, "epoch", steps_or_epoch, "when the dynamic one measures: every epoch, or every N steps", "epoch|N"
    )
    club: str = option(
        UDI,
        "marginal",
        one_of("marginal", "given-label"),
        "information that L_com bounds: what anchor and follower share (marginal), or share beyond the label"
        " (given-label)",
    )
    club_norm: str = option(
        UDI,
        "layer",
        one_of("layer", "none"),
        "normalisation of CLUB's inputs: layer (LayerNorm without parameters) or none",
    )
    q_depth: int = option(UDI, 1, number(int, 0), "hidden layers of q, the network that CLUB fits")
    q_width: int = option(UDI, 128, number(int, 1), "units of each")
    q_lr: float = option(UDI, 1.0, number(float, above=0), "q's learning rate, as a multiple of --lr")
    q_steps: int = option(UDI, 1, number(int, 1), "steps of q on each batch")
    q_warmup: int | None = option(
        UDI,
        None,
        number(int, 0),
        "steps in which q is only fitted, before its bound counts",
        shown="100, or a quarter of a shorter follower phase",
    )

    shared_weight: float = option(DIMML, 1.0, number(float, 0), "weight of the shared classifier's loss")
    contrast: str = option(
        DIMML,
        "duc",
        one_of("duc", "full"),
        "contrastive loss between modalities: duc (one way, on complementary dimensions) or full (both ways, on all)",
    )
    contrast_weight: float = option(DIMML, 1.0, number(float, 0), "its weight")
    contrast_temperature: float = option(DIMML, 10.0, number(float, above=0), "its temperature")
    contrast_warmup: float = option(
        DIMML,
        20 / 150,
        number(float, 0),
        "fraction of the epochs before it counts; then the effective dimensions are found",
        shown="20 of 150",
    )
    fusion_epochs: int = option(DIMML, 20, number(int, 1), "epochs of the fusion head")

    device: str = option(MACHINE, "auto", text, "auto (a GPU if there is one), cpu, cuda or cuda:i")
    engine: str = option(
        MACHINE,
        "auto",
        one_of("auto", "eager", "graph"),
        "how steps run: eager, graph (whole steps as CUDA graphs) or auto (graph on a GPU)",
    )
    data: str = option(
        MACHINE,
        "auto",
        one_of("auto", "device", "host"),
        "where samples live: device, host (prefetched), or auto: on the device if they fit",
    )
    amp: str = option(MACHINE, "none", one_of("none", "bf16"), "mixed precision: bf16 or none", "bf16")
    tf32: bool = option(MACHINE, False, flag, "float32 convolutions and matrix products by TF32 on a GPU")
    tensorboard: bool = option(MACHINE, False, flag, "write metrics as TensorBoard events, too, to the run folder")
    shard: bool = option(
        MACHINE,
        False,
        flag,
        "spread parameters, gradients and optimizer state over the processes of torchrun (FSDP2), for models that do"
        " not fit otherwise",
    )
    compile: bool = option(MACHINE, False, flag, "encoders by torch.compile")
    out: str | None = option(
        MACHINE, None, path, "the run folder to make", "DIR", "a new one under runs/; from Python none"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._set(field.name, checked(field, getattr(self, field.name)))
        choose("fusion rule", self.fusion, ("auto", *fusion_rules))
        if self.baselines is None:
            usual = {"udi": ("joint",), "dimml": ("udi", "ensemble", "joint")}
            self._set("baselines", usual.get(self.method, ()))
        for name in self.baselines or ():
            choose("baseline", name, methods)
        for encoder in (self.encoder or {}).values():
            if ":" not in encoder:
                choose("encoder", encoder, encoders)
        if self.controller != "static" and self.alpha is not None:
            raise UserError("--alpha needs --controller static")
        if self.controller != "dynamic" and self.align_every != "epoch":
            raise UserError("--align-every needs --controller dynamic")
        if self.controller == "static" and self.alpha is None:
            self._set("alpha", (1.0, 1.0))
        if self.race and self.anchor != "auto":
            raise UserError("--race chooses the anchor: it needs --anchor auto")
        if self.teacher != "fused" and self.rounds > 1:
            raise UserError("--rounds needs --teacher fused")
        if self.teacher == "fused" and (self.race or self.anchor != "auto"):
            raise UserError("--teacher fused trains all modalities: leave out --anchor and --race")
        if self.teacher == "fused" and self.follower_loss == "residual":
            raise UserError("--follower-loss residual needs --teacher anchor: there must be one that stays as it is")
        if self.weight_decay is None:
            self._set("weight_decay", 0.01 if self.optimizer == "adamw" else 1e-4)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def make(cls, **given: Any) -> "Options":
        """Of these, and what the dataset recommends; an error names the nearest option for one that does not exist."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            choose("option", name, known)
        recommended = dict(datasets.recommended.get(given.get("dataset", cls.dataset), {}))
        recommended.pop("fusion", None)  # for methods without a rule of their own: Run.fusion
        if given.get("controller") == "dynamic":  # which finds the weights itself
            recommended.pop("alpha", None)
        if given.get("teacher") == "fused" or given.get("race"):  # which need all modalities trained alone
            recommended.pop("anchor", None)
        return cls(**recommended | given)


def checked(field: dataclasses.Field, value: Any) -> Any:
    """The value as an option has it, or an error that names the option."""
    if value is None and field.default is None:
        return None
    try:
        return field.metadata["kind"](value)
    except ValueError as error:
        raise UserError(f"{field.name}: {error}") from None


# These may differ when a run is resumed: it may have moved to another machine.
MOVABLE = ("device", "data_root", "manifest", "cache_dir", "tensorboard", "data", "engine", "shard", "compile")


def spelled(name: str) -> str:
    """As the command line has it."""
    return "--" + name.replace("_", "-")


def filled(help: str) -> str:
    """A help text with the names that can be chosen."""
    lists = {"methods": methods, "datasets": datasets, "fusion_rules": fusion_rules, "encoders": encoders}
    recommended = [
        f"for {name} {' '.join(f'{spelled(option)} {as_text(value)}' for option, value in options.items())}"
        for name, options in datasets.recommended.items()
        if options
    ]
    return help.format(recommended="; ".join(recommended), **{kind: ", ".join(names) for kind, names in lists.items()})


def as_text(value: object) -> str:
    """As the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def resumed(folder: str, config: dict, given: dict) -> Options:
    """The options of the run in ``folder``; those given beside --resume must agree with them."""
    fields = {field.name: field for field in dataclasses.fields(Options)}
    try:
        options = Options(**{name: value for name, value in config.items() if name in fields})
        for name in ("method", "dataset", "epochs", "seed"):  # younger options have their defaults in an older folder
            if name not in config:
                raise UserError(f"it lacks {name}")
    except UserError as error:
        raise UserError(f"--resume {folder}: config.json is damaged: {error}") from None
    for name, value in given.items():
        value, saved = checked(fields[choose("option", name, fields)], value), getattr(options, name)
        if name not in MOVABLE and value != saved:
            raise UserError(f"{spelled(name)} {value} conflicts with --resume ({saved} there): leave it out")
    return dataclasses.replace(options, **{name: value for name, value in given.items() if name in MOVABLE})
