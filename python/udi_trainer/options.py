"""How options are declared and chosen; those of every run. The command, the Python API and --resume share them.

A component declares its own options as a :class:`Group` in its own file and names the group by :func:`reads`. An option
that nothing in a run reads is refused.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UserError, choose
from .registry import check_trusted, datasets, encoders, fusion_rules, imported, methods

if TYPE_CHECKING:
    from .data.dataset import Dataset

F = TypeVar("F", bound=Callable)
G = TypeVar("G", bound="Group")

# --- kinds of values: each converts text of the command line, or a value; ValueError says what is wanted ---


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
    """Two values, each of its own kind; in text separated by a comma."""

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


def number_or_auto(x: Any) -> str | float:
    return x if x == "auto" else number(float, 0)(x)


def steps_or_epoch(x: Any) -> str | int:
    return x if x == "epoch" else number(int, 1)(x)


def text(x: Any) -> str:
    if not isinstance(x, str):
        raise ValueError(f"{x!r} is not a name")
    return x


def pathname(x: Any) -> str:
    """A path; ~ is the home folder, as --out=~/x reaches us unexpanded."""
    if not isinstance(x, str | os.PathLike) or "\0" in os.fspath(x) or not os.fspath(x):
        raise ValueError(f"{x!r} is not a path")
    return os.path.expanduser(os.fspath(x))


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


def epochs_by_modality(x: Any) -> dict[str, str | int]:
    """How many epochs, or "all", by modality; in text MODALITY or MODALITY=EPOCHS, separated by commas."""
    if isinstance(x, str):
        x = {name: epochs or "all" for name, _, epochs in (part.partition("=") for part in x.split(","))}
    if not isinstance(x, dict) or not all(isinstance(name, str) and name for name in x):
        raise ValueError(f"{x!r} is not a list such as audio,image=5")
    return {name: epochs if epochs == "all" else number(int, 1)(epochs) for name, epochs in x.items()}


def one_of(*choices: str) -> Callable:
    def parse(x):
        return choose("value", x, choices)

    return parse


# --- declaring options ---


def option(
    default: Any,
    kind: Callable,
    help: str,
    metavar: str | None = None,
    shown: str | None = None,
    *,
    needs: dict[str, Any] | None = None,
    implied: bool = False,
    movable: bool = False,
) -> Any:
    """An option of a :class:`Group`.

    Args:
        default: its value where neither the user nor the data set gives one.
        kind: from text or a value to the value; it raises ValueError.
        metavar, shown: the value and the default as ``--help`` shows them.
        needs: values of other options without which this one has no effect; it is then refused.
        implied: the others get these values unless they are given.
        movable: whether it may change when a run is resumed on another machine.
    """
    facts = {"kind": kind, "help": help, "metavar": metavar, "shown": shown, "needs": needs or {}, "movable": movable}
    facts["implies"] = needs if implied else {}
    return dataclasses.field(default=default, metadata=facts)


class Group:
    """Options that one component declares and reads: a frozen, keyword-only dataclass of :func:`option` fields.

    ``class MyOptions(Group, title="my method")``; the title is its heading in ``--help``. Values are checked when a
    group is made. Option names are flat: no two groups of a run may share one.

    Raises:
        UserError: names the option, what was given and what is wanted.
    """

    title = ""

    def __init_subclass__(cls, title: str = "") -> None:
        cls.title = title

    def __post_init__(self) -> None:
        for name, field in fields_of(type(self)).items():
            self._set(name, checked(field, getattr(self, name)))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def check(self, data: "Dataset") -> None:
        """Raises UserError where the options do not fit the data; called before anything is trained."""


def fields_of(group: type[Group]) -> dict[str, dataclasses.Field]:
    """The options of a group, by name."""
    return {field.name: field for field in dataclasses.fields(group) if "kind" in field.metadata}  # type: ignore


def checked(field: dataclasses.Field, value: Any) -> Any:
    """The value converted to the option's kind; the error names the option."""
    if value is None and field.default is None:
        return None
    try:
        return field.metadata["kind"](value)
    except ValueError as error:
        raise UserError(f"{field.name}: {error}") from None
    except (AttributeError, OverflowError, TypeError):  # a container, or a number that no float can hold
        raise UserError(f"{field.name}: {value!r:.60} is not a value for it") from None


def reads(*groups: type[Group]) -> Callable[[F], F]:
    """Declares the groups of options that a method or a data set reads: a decorator of its function."""

    def declare(function: F) -> F:
        function.reads = groups  # type: ignore[attr-defined]
        return function

    return declare


# --- recipes ---


@dataclass(frozen=True)
class Recipe:
    """Options for a purpose, and what speaks for them. Figures are points of test accuracy with 95% intervals."""

    name: str
    options: dict[str, Any]
    evidence: str

    def __str__(self) -> str:
        said = " ".join(f"{spelled(name)} {as_text(value)}" for name, value in self.options.items())
        return f"{self.name} ({said}): {self.evidence}"


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "all-labels",
            {"method": "ensemble"},
            "every pair has a label. Over 8 real sets, UDI - ensemble is -0.02 [-0.48, +0.43], at twice the cost",
        ),
        Recipe(
            "few-labels",
            {"method": "co-training", "rounds": 2, "alpha": (1.0, 0.0)},
            "many pairs have no label. Over 8 real sets, co-training - ensemble is +1.72 [0.78, 2.67]",
        ),
        Recipe(
            "few-labels-anchor",
            {"method": "udi", "alpha": (1.0, 0.0)},
            "the same where the anchor must stay as it is. Over 8 real sets, UDI - ensemble is +0.80 [0.10, 1.50]",
        ),
        Recipe(
            "shortcut",
            {"method": "udi", "follower_loss": "residual", "alpha": (0.0, 0.0)},
            "give --anchor M, the modality that is a shortcut, and use the follower. On random hues it is ahead of the"
            " digit alone by 10 to 39 (study shortcut)",
        ),
        Recipe(
            "shortcut-overfitted",
            {"method": "udi", "club": "given-label", "alpha": (0.0, 30.0)},
            "the same where a warning says that the anchor is overfitted: ahead by 10 to 23 (study shortcut)",
        ),
    )
}


def recipe_of(name: Any, method: str | Callable | None) -> dict[str, Any]:
    """The options of a recipe by name; none without a recipe."""
    if name is None:
        return {}
    recipe = RECIPES[choose("recipe", name, RECIPES)]
    if method not in (None, recipe.options["method"]):
        raise UserError(f"--recipe {name} is for method {recipe.options['method']}: leave out --method")
    return recipe.options


# --- the options of every run ---


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions(Group, title="what to train"):
    method: str = option("udi", text, "method: {methods}; or module:function, a method of your own")
    dataset: str = option(
        "fewdigits", text, "data set: {datasets}; options that they recommend, unless given: {recommended}"
    )
    noise: tuple[float, float] | None = option(
        None,
        pair("amounts INPUT,LABEL", number(float, 0), number(float, 0, below=1)),
        "corrupt the training split (not validation, not test): add Gaussian noise of this standard deviation to"
        " inputs (a fraction of pixels' range), and make this fraction of labels wrong; the same for all seeds",
        "INPUT,LABEL",
    )
    labels: int | float | None = option(
        None,
        count_or_fraction,
        "labels that the training split keeps: how many, or what fraction; drawn by the seed, stratified by class."
        " UDI's L_con and L_com, and self-training, learn from the other samples too; the rest from the labelled ones,"
        " in as many steps",
        "N|F",
        "all",
    )
    recipe: str | None = option(
        None,
        one_of(*RECIPES),
        "named options for a purpose, unless others are given: {recipes}",
    )
    baselines: tuple[str, ...] | None = option(
        None,
        names,
        "methods to train for comparison, or none; on small data scikit-learn's come with any but none",
        "A,B",
        "the method's own: {baselines}",
    )
    encoder: dict[str, str] | None = option(
        None,
        assignments,
        "encoders that replace the modalities' own: {encoders}, or module:Class, called with a sample's shape",
        "MODALITY=NAME,...",
    )
    encoder_weights: dict[str, str] | None = option(
        None, assignments, "files of initial weights for encoders, such as torchvision's", "MODALITY=FILE,..."
    )
    freeze: dict[str, str | int] | None = option(
        None,
        epochs_by_modality,
        "encoders that stay as they are in the first EPOCHS epochs of a stage, or in all; with --encoder-weights, a"
        " final layer that the file lacks is trained",
        "MODALITY[=EPOCHS],...",
    )
    features: int = option(64, number(int, 1), "width of the encoders' features")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Group, title="training"):
    epochs: int = option(
        None, number(int, 1), "epochs of each phase", shown="30, or on small data as many as make 400 steps"
    )
    steps: int | None = option(None, number(int, 1), "steps of each phase, rounded up to epochs; instead of --epochs")
    patience: int | None = option(
        None, number(int, 1), "end a stage after this many epochs without an improvement on validation"
    )
    batch_size: int = option(
        None, number(int, 1), "samples per step", shown="64; 8, 16 or 32 where that makes 16 steps an epoch"
    )
    optimizer: str = option("adamw", one_of("adamw", "sgd"), "optimizer: adamw or sgd")
    lr: float = option(3e-3, number(float, above=0), "initial learning rate")
    schedule: str = option(
        "cosine",
        one_of("cosine", "step", "constant"),
        "learning rate schedule, by epoch: cosine (to 0), step (see --lr-step) or constant",
    )
    lr_step: tuple[int, float] = option(
        (70, 0.1),
        pair("numbers EPOCHS,FACTOR", number(int, 1), number(float, above=0)),
        "with --schedule step: multiply the learning rate by FACTOR every EPOCHS epochs",
        "EPOCHS,FACTOR",
        needs={"schedule": "step"},
    )
    warmup: float = option(
        0.0,
        number(float, 0),
        "epochs of warm-up, such as 5 or 0.5: the learning rate rises from 0 to the schedule's, linearly by step",
        "EPOCHS",
    )
    clip_grad: float | None = option(
        None, number(float, above=0), "scale the gradients of a network down to this norm if theirs is larger", "NORM"
    )
    class_weights: str = option(
        "none",
        one_of("balanced", "none"),
        "weights of the classes in the classification loss: none; or balanced: inverse to a class's number of labelled"
        " training samples, with mean 1 over these",
    )
    select: str | None = option(
        None,
        one_of("acc", "macro-f1", "nll"),
        "what chooses anchor, epoch and fusion rule on validation: acc, macro-f1 or nll (mean negative log-likelihood)",
        shown="acc for anchor and epoch",
    )
    momentum: float = option(0.9, number(float, 0, below=1), "momentum of sgd", needs={"optimizer": "sgd"})
    weight_decay: float | str | None = option(
        None,
        number_or_auto,
        "weight decay; auto: of 0.01, 0.3 and 3 the best on validation, for each modality trained alone and its"
        " follower, and for joint training",
        "W|auto",
        "0.01 for adamw, 0.0001 for sgd",
    )
    refit: bool = option(
        False,
        flag,
        "after the run, a final fit: train method and baselines once more on training and validation together, with all"
        " that validation chose (anchor, epochs, weight decay, fusion rule); its predictor is the one saved",
    )
    seed: int = option(
        0, number(int, 0), "seed of initial weights and of the order of samples; also of --labels and --resplit"
    )


@dataclass(frozen=True, kw_only=True)
class MachineOptions(Group, title="machine"):
    device: str = option("auto", text, "device: auto (a GPU if there is one), cpu, cuda or cuda:i", movable=True)
    engine: str = option(
        "auto",
        one_of("auto", "eager", "graph"),
        "how steps run: eager, graph (whole steps as CUDA graphs) or auto (graph on a GPU)",
        movable=True,
    )
    data: str = option(
        "auto",
        one_of("auto", "device", "host"),
        "where samples live: device, host (prefetched), or auto: on the device if they fit",
        movable=True,
    )
    amp: str = option(
        "none",
        one_of("none", "bf16", "fp16"),
        "mixed precision: none, bf16, or fp16 with loss scaling, for GPUs without bf16",
        "bf16|fp16",
    )
    tf32: bool = option(False, flag, "float32 convolutions and matrix products in TF32 on a GPU")
    tensorboard: bool = option(False, flag, "also write metrics to the run folder as TensorBoard events", movable=True)
    shard: bool = option(
        False,
        flag,
        "shard parameters, gradients and optimizer state over the processes of torchrun (FSDP2), for models that do"
        " not fit otherwise",
        movable=True,
    )
    compile: bool = option(False, flag, "compile encoders with torch.compile", movable=True)
    out: str | None = option(None, pathname, "run folder to create", "DIR", "a new one under runs/; none from Python")


BATCH, STEPS = 64, 400  # samples per step, and the least number of steps of a phase, unless options say otherwise
DECAYS = (0.01, 0.3, 3.0)  # of --weight-decay auto
SCIKIT = ("sklearn-late", "sklearn-concat")  # baselines of every run on small data
RESERVED = ("encoders", "help", "progress", "resume", "trust")  # arguments of `train` and flags of the command


@dataclass(frozen=True, kw_only=True)
class Options(MachineOptions, TrainingOptions, ExperimentOptions):
    """The options of a run: those that every run reads, and the groups that its method, baselines and data set declare.

    ``options.epochs`` is one of the former, ``options.of(UDIOptions).anchor`` one of the latter.
    """

    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for encoder in (self.encoder or {}).values():
            if ":" not in encoder:
                choose("encoder", encoder, encoders)
        for name in self.baselines or ():
            choose("baseline", name, methods)
        if self.baselines is None:
            self._set("baselines", own_baselines(self.method))
        if self.weight_decay is None:
            self._set("weight_decay", 0.01 if self.optimizer == "adamw" else 1e-4)

    def of(self, group: type[G]) -> G:
        """The run's options of this group; its defaults where nothing in the run declares the group."""
        return next((own for own in self.groups if isinstance(own, group)), None) or group()

    def flat(self) -> dict[str, Any]:
        """All values by name, as in config.json."""
        return {name: getattr(part, name) for part in (self, *self.groups) for name in fields_of(type(part))}

    def fields(self) -> dict[str, dataclasses.Field]:
        """All declarations by name."""
        return {name: field for part in (self, *self.groups) for name, field in fields_of(type(part)).items()}

    def replace(self, **changes: Any) -> "Options":
        """The same with other values of some options."""
        return self.of_flat(self.flat() | changes, map(type, self.groups))

    def sized(self, count: int) -> "Options":
        """The same with the batch size and the epochs that suit this number of training samples."""
        size = self.batch_size or min(BATCH, max(8, 2 ** int(math.log2(max(1, count / 16)))))
        per_epoch = max(1, count // size)
        epochs = self.epochs or math.ceil((self.steps or max(STEPS, 30 * per_epoch)) / per_epoch)
        return self.replace(batch_size=size, epochs=epochs)

    @classmethod
    def of_flat(cls, values: dict[str, Any], groups: Iterable[type[Group]]) -> "Options":
        """The options among these values, and these groups of them."""

        def pick(group: type[Group]) -> dict[str, Any]:
            return {name: values[name] for name in fields_of(group) if name in values}

        return cls(groups=tuple(group(**pick(group)) for group in groups), **pick(cls))

    @classmethod
    def make(
        cls,
        *,
        method: str | Callable | None = None,
        dataset: Any = ExperimentOptions.dataset,
        **given: Any,
    ) -> "Options":
        """Options that the user gives, completed by a recipe and by what the data set recommends.

        Args:
            method: a name, module:function, or a function; by default the recipe's, or udi.
            dataset: a name, or a :class:`Dataset`, which reads and recommends nothing.

        Raises:
            UserError: an option does not exist, or nothing in the run reads it.
        """
        recipe = recipe_of(given.get("recipe"), method)
        method = method or recipe.get("method", ExperimentOptions.method)
        if not isinstance(method, str) and not callable(method):
            raise UserError(f"method must be a name or a function, got {type(method).__name__}")
        if not isinstance(dataset, str) and not hasattr(dataset, "modalities"):
            raise UserError(f"dataset must be a name or a Dataset, got {type(dataset).__name__}")
        name = method if isinstance(method, str) else name_of(method)
        if given.get("steps") is not None and given.get("epochs") is not None:
            raise UserError("--steps and --epochs both say how long to train: give one of them")
        functions = readers(method, given.get("baselines"), dataset)
        groups = groups_of(functions)
        own = fields_of(cls) | {n: field for group in groups for n, field in fields_of(group).items()}
        on = {"method": name, "dataset": dataset if isinstance(dataset, str) else dataset.name}
        for n in given:
            if n not in own:
                choose("option", n, own | all_fields())
                raise UserError(f"{spelled(n)} has no effect on this run: it belongs to {who_reads(n)}")
        recommended = datasets.recommended.get(dataset, {}) if isinstance(dataset, str) else {}
        # A recommended fusion rule is for methods without a rule of their own: Run.fusion asks for it.
        kept = {n: value for n, value in recommended.items() if n in own and n not in given and n != "fusion"}
        kept |= {n: value for n, value in recipe.items() if n in own and n not in given}
        kept = {n: value for n, value in kept.items() if compatible(n, own, given)} | given
        for n in [*kept]:
            kept = own[n].metadata["implies"] | kept
        options = cls.of_flat(kept | on, groups)
        values = options.flat()
        read = [{n for group in declared(function) for n in fields_of(group)} for function in functions]
        for n in given:
            for other, wanted in own[n].metadata["needs"].items():
                alone = any(n in names and other not in names for names in read)  # has an effect without the other
                if values[n] != own[n].default and not alone and values[other] != wanted:
                    raise UserError(f"{spelled(n)} needs {spelled(other)} {as_text(wanted)}")
        return options


def compatible(name: str, own: dict[str, dataclasses.Field], given: dict[str, Any]) -> bool:
    """Whether a recommended option agrees with what it needs, and with what the given options need."""
    needs = own[name].metadata["needs"].items()
    unmet = any(given.get(other, wanted) != wanted for other, wanted in needs)
    needed = any(name in own[n].metadata["needs"] for n, value in given.items() if value != own[n].default)
    return not (unmet or needed)


# --- who reads what ---


def name_of(method: Callable) -> str:
    return getattr(method, "__name__", type(method).__name__)


def own_baselines(method: str) -> tuple[str, ...]:
    """The baselines that a registered method brings along, and scikit-learn's."""
    return (*methods.recommended.get(method, {}).get("baselines", ()), *SCIKIT)


def readers(method: str | Callable, baselines: Any, dataset: Any) -> list[Callable]:
    """The method, its baselines and the data set, as far as they are functions."""
    chosen = checked(fields_of(ExperimentOptions)["baselines"], baselines)
    names = own_baselines(method) if chosen is None and isinstance(method, str) else chosen or ()
    own = methods.get(method) if isinstance(method, str) else method  # find_method checks its modules
    found = [own or find_method(method), *(methods[choose("baseline", name, methods)] for name in names)]
    return [*found, *([datasets[dataset]] if isinstance(dataset, str) and dataset in datasets else [])]


def find_method(method: str | Callable) -> Callable:
    """A registered method, module:function, or the function itself."""
    if callable(method):
        return method
    if ":" in method:
        return imported(method, "give a method of your own as module:function")
    return methods.find(method)


def groups_of(functions: Iterable[Callable]) -> list[type[Group]]:
    """The groups that these functions declare, each once; an error where one takes a name that is in use."""
    groups = list(dict.fromkeys(group for function in functions for group in declared(function)))
    everything: set[type[Group]] = {Options, *groups, *all_groups()}
    for group in groups:
        for name in fields_of(group):
            others = [other for other in everything - {group} if name in fields_of(other)]
            if others or name in RESERVED:
                owner = others[0].title or "every run" if others else "train"
                raise UserError(f"option {name} of {group.__name__} is taken by {owner!r}: choose another name")
    return groups


def all_groups() -> list[type[Group]]:
    """The groups of everything that is registered."""
    functions = [*methods.values(), *datasets.values()]
    return list(dict.fromkeys(group for function in functions for group in declared(function)))


def declared(function: Callable) -> tuple[type[Group], ...]:
    return getattr(function, "reads", ())


def all_fields() -> dict[str, dataclasses.Field]:
    groups: list[type[Group]] = [Options, *all_groups()]
    return {name: field for group in groups for name, field in fields_of(group).items()}


def who_reads(name: str) -> str:
    """The methods and data sets that read an option, in words."""
    kinds = {"method": methods, "data set": datasets}
    words = []
    for kind, registry in kinds.items():
        found = [n for n, f in registry.items() if any(name in fields_of(group) for group in declared(f))]
        words += [f"{kind}{'s' if len(found) > 1 else ''} {', '.join(found)}"] if found else []
    return " and ".join(words)


def movable(name: str) -> bool:
    """Whether a resumed run may have another value of this option: it may have moved to another machine."""
    field = all_fields().get(name)
    return field is not None and field.metadata["movable"]


# --- as text ---


def spelled(name: str) -> str:
    """The option's flag on the command line."""
    return "--" + name.replace("_", "-")


def filled(help: str) -> str:
    """A help text with the names that can be chosen."""
    lists: dict[str, Iterable[str]] = {"methods": methods, "datasets": datasets, "encoders": encoders}
    lists |= {"fusion_rules": fusion_rules}
    said = {kind: ", ".join(names) for kind, names in lists.items()}
    said["recommended"] = "; ".join(
        f"for {name} {' '.join(f'{spelled(option)} {as_text(value)}' for option, value in options.items())}"
        for name, options in datasets.recommended.items()
        if options
    )
    said["recipes"] = "; ".join(map(str, RECIPES.values()))
    own = {m: methods.recommended.get(m, {}).get("baselines") for m in methods}
    said["baselines"] = "; ".join(f"{', '.join(others)} for {m}" for m, others in own.items() if others)
    for word, words in said.items():
        help = help.replace(f"{{{word}}}", words)
    return help


def as_text(value: object) -> str:
    """The value as the command line takes it."""
    if isinstance(value, dict):
        value = tuple(f"{name}={part}" for name, part in value.items())
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


# --- resuming ---


def saved_options(config: dict[str, Any], method: str | Callable | None = None) -> Options:
    """The options of a config.json; those that nothing in the run reads are ignored."""
    functions = readers(method or config["method"], config.get("baselines"), config["dataset"])
    return Options.of_flat(upgraded(config), groups_of(functions))


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """Saved options as this version names them: self-training once borrowed its weight from UDI's alpha."""
    alpha = config.get("alpha") or (1.0,)
    return {"self_training_weight": alpha[0]} | config


def own_modules(values: dict[str, Any]) -> list[str]:
    """The user's own modules that options name: of a method, of encoders."""
    encoder = values.get("encoder")
    specs = [values.get("method"), *(encoder.values() if isinstance(encoder, dict) else ())]
    return sorted({spec.partition(":")[0] for spec in specs if isinstance(spec, str) and ":" in spec})


def resumed(
    folder: str,
    config: dict[str, Any],
    given: dict[str, Any],
    *,
    method: Callable | None = None,
    encoders: Collection[str] = (),
    trust: Collection[str] = (),
) -> Options:
    """The options of the run in ``folder``; those given with --resume must agree with them.

    Modules that config.json names are imported only if they are given again or in ``trust``. ``method`` is given as a
    function, and ``encoders`` (their modalities) as objects.
    """
    damaged = f"--resume {folder}: config.json is damaged"
    try:
        for name, field in all_fields().items():
            if name in config:
                checked(field, config[name])
            elif name in ("method", "dataset", "epochs", "seed"):  # others have their defaults in an older folder
                raise UserError(f"it lacks {name}")
    except UserError as error:
        raise UserError(f"{damaged}: {error}") from None
    if given.get("method", config["method"]) != config["method"]:
        saved = config["method"]
        raise UserError(f"--method {given['method']} conflicts with --resume ({saved} there): leave it out")
    own = {"method": None if method else config["method"], "encoder": config.get("encoder")}
    if isinstance(own["encoder"], dict):
        own["encoder"] = {m: spec for m, spec in own["encoder"].items() if m not in encoders}
    again = {name: checked(field, given[name]) for name, field in fields_of(ExperimentOptions).items() if name in given}
    for module in own_modules(own):
        check_trusted(f"{folder}/config.json", module, [*trust, *own_modules(again)], "give it again")
    try:
        options = saved_options(config, method)
    except UserError as error:
        raise UserError(f"{damaged}: {error}") from None
    values, fields = options.flat(), all_fields() | options.fields()
    for name, value in given.items():
        value = checked(fields[choose("option", name, fields)], value)
        if name not in values:
            raise UserError(f"{spelled(name)} has no effect on this run: it belongs to {who_reads(name)}")
        if not fields[name].metadata["movable"] and value != values[name]:
            raise UserError(f"{spelled(name)} {value} conflicts with --resume ({values[name]} there): leave it out")
    return options.replace(**{name: value for name, value in given.items() if fields[name].metadata["movable"]})
