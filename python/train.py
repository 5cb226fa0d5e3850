"""Two-phase training of Unidirectional Dynamic Interaction, and of its baselines: ``python python/train.py --help``."""

import argparse
import functools
import json
import math
import platform
import shlex
import sys
from pathlib import Path

try:
    import torch

    import udi_kernels
    from common import UserError, choose
    from data import corrupt, datasets
    from fusion import rules
    from methods import methods
    from report import draw, need_matplotlib, table
    from run import Run, new_folder, write_json
except ModuleNotFoundError as missing:
    print(f'train.py: {missing.name} is not installed: pip install -e ".[train]"', file=sys.stderr)
    sys.exit(2)

# These may differ when a run is resumed: it may have moved to another machine.
MOVABLE = ("device", "data_root", "data", "engine", "compile")


def main(argv=None):
    run = None
    try:
        options, folder = parse(sys.argv[1:] if argv is None else argv)
        need_matplotlib()
        for name in (options.method, *options.baselines):
            methods.find(name)  # before any is trained: what it needs may be missing
        device = find_device(options.device)
        data = datasets.find(options.dataset)(options.data_root)
        if options.noise:
            data = corrupt(data, *options.noise)
        if options.anchor != "auto":
            choose("anchor", options.anchor, data.modalities)
        set_threads(data, options.batch_size)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
        if folder is None:
            folder = new_folder(options.out, f"{options.dataset}-{options.method}-seed{options.seed}")
            write_json(folder / "config.json", vars(options) | environment(device))
        print(f"{options.method} on {options.dataset}, seed {options.seed}, {device}; run folder {folder}", flush=True)
        run = Run(folder, options, data, device)
        metrics = train(run)
        print("\n" + table(metrics))
        print(f"\n{metrics['seconds']['total']:.1f} s; see {folder}/report.png and metrics.json")
        return 0
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resume = f"; go on with: python {sys.argv[0]} --resume {shlex.quote(str(run.folder))}" if run else ""
        print(f"\ntrain.py: interrupted{resume}", file=sys.stderr)
        return 130


def train(run):
    """The method and its baselines; what they reach is written to the run folder."""
    options = run.options
    metrics = {"method": options.method, "dataset": options.dataset, "seed": options.seed, "device": str(run.device)}
    metrics |= {"anchor": None, **methods.find(options.method)(run)}
    metrics["baselines"] = {name: methods.find(name)(run)["fused"] for name in options.baselines}
    seconds = {"anchor_phase": 0.0, "follower_phase": 0.0}
    for rows in run.rows.values():
        phase = f"{rows[0]['phase']}_phase"
        seconds[phase] = seconds.get(phase, 0) + sum(row["seconds"] for row in rows)
    metrics["seconds"] = seconds | {"total": run.elapsed()}
    write_json(run.folder / "metrics.json", metrics)
    draw(metrics, run.rows, run.folder / "report.png")
    return metrics


def parse(argv):
    """The options, and the folder of the run to resume, if that is asked for."""
    layout = functools.partial(argparse.HelpFormatter, max_help_position=26, width=110)
    parser = Parser(prog="train.py", description=__doc__.split(":")[0] + ".", formatter_class=layout)
    defaults = {}

    def add(flag, default, help, **kind):
        defaults[flag[2:].replace("-", "_")] = default
        shown = default if isinstance(default, int | float | str) and default is not False else None
        help += f" (default: {shown})" if shown is not None else ""
        if "action" not in kind:
            kind.setdefault("metavar", "N" if "type" in kind else "NAME")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=help, **kind)

    add("--method", "udi", f"what to train: {', '.join(methods)}")
    add("--dataset", "cgdigits", f"on what: {', '.join(datasets)}")
    add("--data-root", None, "folder of the dataset's files, where it needs any", metavar="DIR")
    add("--noise", None, "corrupt the training split (not validation, not test): add Gaussian noise of this standard "
        "deviation to inputs (a fraction of pixels' range), make this fraction of labels wrong; the same for all seeds",
        metavar="INPUT,LABEL", type=pair("amounts INPUT,LABEL", number(float, 0), number(float, 0, below=1)),
    )  # fmt: skip
    add("--epochs", 30, "epochs of each phase", type=number(int, 1))
    add("--batch-size", 64, "samples of a step", type=number(int, 1))
    add("--lr", 3e-3, "first learning rate of AdamW; it falls to 0 along a cosine", type=number(float, above=0))
    add("--seed", 0, "of initial weights and order of samples; all see the same dataset", type=number(int, 0))
    add("--anchor", "auto", "modality to freeze as the anchor, the only one then to be trained alone; or auto: the best"
        " on validation")  # fmt: skip
    add("--controller", "static", "weights of L_con and L_com: static, or dynamic, from the losses' gradients")
    add("--alpha", None, "the two weights of the static controller (default: 1,1)",
        type=pair("weights CON,COM", number(float, 0), number(float, 0)), metavar="CON,COM")  # fmt: skip
    add("--align-every", "epoch", "when the dynamic one measures: every epoch, or every N steps", type=schedule,
        metavar="epoch|N")  # fmt: skip
    add("--club-norm", "layer", "normalisation of CLUB's inputs: layer (LayerNorm without parameters) or none")
    add("--q-depth", 1, "hidden layers of q, the network that CLUB fits", type=number(int, 0))
    add("--q-width", 128, "units of each", type=number(int, 1))
    add("--q-lr", 1.0, "q's learning rate, as a multiple of --lr", type=number(float, above=0))
    add("--q-steps", 1, "steps of q on each batch", type=number(int, 1))
    add("--fusion", "auto", f"fusion rule: {', '.join(rules)}; auto: best on validation")
    add("--follower-init", "scratch", "weights that followers start from: scratch, or anchor-phase (trained alone)")
    add("--baselines", None, "methods to train beside it, or none (default: joint for udi)", type=names, metavar="A,B")
    add("--race", None, "choose the anchor after this fraction of its epochs, and train no other modality to the end",
        type=number(float, above=0, below=1), metavar="F")  # fmt: skip
    add("--device", "auto", "auto (a GPU if there is one), cpu, cuda or cuda:i")
    add("--engine", "auto", "how steps run: eager, graph (whole steps as CUDA graphs) or auto (graph on a GPU)")
    add("--data", "auto", "where samples live: device, host (prefetched), or auto: on the device if they fit")
    add("--amp", "none", "mixed precision: bf16 or none", nargs="?", const="bf16", metavar="bf16")
    add("--tf32", False, "float32 convolutions and matrix products by TF32 on a GPU", action="store_true")
    add("--compile", False, "encoders by torch.compile", action="store_true")
    add("--out", None, "the run folder to make (default: a new one under runs/)", metavar="DIR")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, with its options")
    given = vars(parser.parse_args(argv))
    folder = given.pop("resume")
    if folder is not None:
        return resume(folder, given, defaults)

    options = argparse.Namespace(**defaults | given)
    choose("method", options.method, methods)
    choose("dataset", options.dataset, datasets)
    choose("controller", options.controller, ("dynamic", "static"))
    choose("CLUB normalisation", options.club_norm, ("layer", "none"))
    choose("fusion rule", options.fusion, ("auto", *rules))
    choose("initialisation of followers", options.follower_init, ("scratch", "anchor-phase"))
    choose("engine", options.engine, ("auto", "eager", "graph"))
    choose("place of data", options.data, ("auto", "device", "host"))
    choose("mixed precision", options.amp, ("none", "bf16"))
    if options.baselines is None:
        options.baselines = ["joint"] if options.method == "udi" else []
    for name in options.baselines:
        choose("baseline", name, methods)
    for name, controller in (("alpha", "static"), ("align_every", "dynamic")):
        if name in given and options.controller != controller:
            raise UserError(f"--{name.replace('_', '-')} needs --controller {controller}")
    if options.controller == "static":
        options.alpha = options.alpha or [1.0, 1.0]
    if options.race and options.anchor != "auto":
        raise UserError("--race chooses the anchor: it needs --anchor auto")
    return options, None


def resume(folder, given, defaults):
    """The options of the run in ``folder``; options given beside --resume must agree with them."""
    config = Path(folder) / "config.json"
    try:
        saved = defaults | json.loads(config.read_text())
    except (OSError, ValueError):
        raise UserError(f"--resume {folder}: no run to resume, {config} is missing or damaged") from None
    for name, value in given.items():
        if name not in MOVABLE and value != saved[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} conflicts with --resume ({saved[name]} there): leave it out")
    return argparse.Namespace(**{name: given.get(name, saved[name]) for name in defaults}), Path(folder)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def number(kind, least=None, above=None, below=math.inf):
    """An argument type: a finite number of this kind within its bounds."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        low = (least is not None and value < least) or (above is not None and value <= above)
        if not math.isfinite(value) or low or value >= below:
            bound = f"of at least {least}" if least is not None else f"above {above}"
            bound += f" and below {below}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'} {bound}")
        return value

    return parse


def pair(what, *kinds):
    """An argument type: two numbers, separated by a comma, each an argument type of its own."""

    def parse(text):
        parts = text.split(",")
        if len(parts) != 2:
            raise argparse.ArgumentTypeError(f"{text!r} is not two {what} such as 0.5,0.5")
        return [kind(part) for kind, part in zip(kinds, parts, strict=True)]

    return parse


def names(text):
    return [] if text == "none" else text.split(",")


def schedule(text):
    return text if text == "epoch" else number(int, 1)(text)


def find_device(name):
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


def set_threads(data, batch_size):
    """One thread for steps of about a millisecond: more gain nothing there, and on a busy machine wait for each other.

    Measured on cgdigits with 2 cores: as quick with one as with two when idle, 40 times quicker beside a compiler.
    """
    if batch_size * sum(view.shape(data.train).numel() for view in data.modalities.values()) < 2**16:
        torch.set_num_threads(1)


def environment(device):
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


if __name__ == "__main__":
    sys.exit(main())
