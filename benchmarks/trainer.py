"""The trainer's speed: UDI compared with joint training and with UDI in plain PyTorch, on the same data and encoders.

    python benchmarks/trainer.py [--encoder cnn|resnet18] [--epochs N] [--samples N] [--out DIR] [--help]

Runs are interleaved, and results are medians over rounds. Data is random, because time does not depend on it, with
MNIST's shapes (cnn), or 224x224 RGB and spectrograms of the same size (resnet18).
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

import measure
from eager_udi import EagerUDI
from udi_trainer import Dataset, Modality, Run, Split
from udi_trainer.command import parse
from udi_trainer.console import log
from udi_trainer.data.digits import colored_and_gray
from udi_trainer.methods.follower import Follower
from udi_trainer.methods.frozen import Frozen
from udi_trainer.methods.unimodal import Alone
from udi_trainer.registry import methods
from udi_trainer.run import choose_device
from udi_trainer.run_folder import RunFolder
from udi_trainer.training.loop import Stage

PLAIN = "UDI in plain PyTorch"
OTHER = "other operators"
GROUPS = {  # parts of the names of operators, or of what called them, in small letters
    "convolutions": ("conv",),
    "pooling": ("max_pool", "maxpool"),
    "matrix products": ("mm",),
    "losses": ("udi", "norm", "softmax", "nll"),
    "optimizer": ("optimizer", "adam"),
}
RUNS = {
    "joint training": ["--method", "joint"],
    "UDI, named anchor": ["--anchor", "first"],
    "UDI, anchor by race": ["--race", "0.2"],
    "UDI, anchor auto": [],
    PLAIN: [],
}


def dataset(encoder, samples):
    """Random samples for training; validation and test have a twelfth as many each."""
    generator = torch.Generator().manual_seed(0)

    def split(size, *shapes):
        def draw(shape):
            return torch.randint(256, (size, *shape), dtype=torch.uint8, generator=generator)

        return torch.randint(10, (size,), generator=generator), [draw(shape) for shape in shapes]

    sizes = samples, samples // 12, samples // 12
    if encoder == "cnn":
        splits = [(pixels, labels) for labels, (pixels,) in (split(size, (28, 28)) for size in sizes)]
        return colored_and_gray(*splits, mean=0.5, std=0.3)
    shapes = {"rgb": (3, 224, 224), "spectrogram": (1, 224, 224)}
    modalities = {m: Modality("resnet18", (m,), lambda x: x / 255) for m in shapes}
    parts = (split(size, *shapes.values()) for size in sizes)
    splits = (Split(labels, dict(zip(shapes, views, strict=True))) for labels, views in parts)
    return Dataset(10, modalities, *splits)


def new_run(arguments, options, samples, epochs=None):
    argv = ["--epochs", epochs or arguments.epochs, "--batch-size", arguments.batch_size, *options]
    argv += ["--amp", arguments.amp, "--engine", arguments.engine] + (["--tf32"] if arguments.tf32 else [])
    argv = [next(iter(samples.modalities)) if a == "first" else str(a) for a in argv]
    argv += [] if "--method" in argv else ["--controller", "dynamic"]
    options, _ = parse([*argv, "--baselines", "none"], "trainer.py")
    return Run(options, samples, choose_device(arguments.device), RunFolder(Path(tempfile.mkdtemp())))


class EagerSteps(logging.Handler):
    """Collects the trainer's messages about steps that run eagerly instead of as CUDA graphs."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        if "eager steps" in record.getMessage():
            self.messages.append(record.getMessage())


@contextlib.contextmanager
def eager_steps():
    """Hides all output in this context; yields a list of the messages about eager steps."""
    handler, level = EagerSteps(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield handler.messages
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def whole_run(name, run):
    """Seconds, seconds per epoch by stage, and messages about stages that ran eagerly although CUDA graphs were on."""
    start = time.perf_counter()
    with eager_steps() as eager:
        if name == PLAIN:
            trainer = EagerUDI(run)
            trainer.fit()
        else:
            trainer = run
            methods.find(run.options.method)(run)
    seconds = time.perf_counter() - start
    shutil.rmtree(run.folder.path)
    stages = {stage: statistics.median(row["seconds"] for row in rows) for stage, rows in trainer.history.items()}
    return {"seconds": seconds, "epoch_seconds": stages, "eager": eager}


def steps(run, rounds=30):
    """Median seconds of a follower's step, with and without the controller, and of a step of the encoder alone."""
    first, second = run.data.modalities
    anchor, alone = run.make(Alone, modality=first), run.make(Alone, modality=second)
    follower = run.make(Follower, modality=second, teacher=Frozen(run, first, anchor.model, anchor.width))
    stages = [Stage(task, run) for task in (alone, follower)]
    for stage in stages:
        stage.restore()
    kinds = {"encoder alone": (stages[0], 0)}
    for kind, align in (("follower", False), ("controller", True)):
        flags = {"align": align, "fitted": True}
        kinds[kind] = stages[1], next(n for n in itertools.count() if follower.flags(n) == flags)
    index = torch.arange(run.batch_size)
    seconds = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, (stage, number) in kinds.items():
            stage.task.model.train()
            with stage.on_stream():
                (batch,) = stage.feed.batches(index, len(index))
                synchronize(run.device)
                start = time.perf_counter()
                stage.engine.step(batch, number)
                synchronize(run.device)
                seconds[kind].append(time.perf_counter() - start)
    stage, number = kinds["follower"]
    result = {kind: statistics.median(values) for kind, values in seconds.items()}
    result |= {"operators": operators(stage, number, index), "steps_per_epoch": run.steps}
    if run.device.type == "cpu":
        result["shares"] = shares(stage, number, index)
    return result | {"gpu_busy": gpu_busy(stage) if run.device.type == "cuda" else None}


def gpu_busy(stage):
    """The fraction of a follower's epoch in which a kernel runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        start = time.perf_counter()
        for _ in stage.epoch_steps():
            pass
        synchronize(stage.run.device)
        seconds = time.perf_counter() - start
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / seconds


def operators(stage, number, index):
    """The number of kernels (GPU) or of innermost operators (CPU) in an eager step of a follower."""
    gpu = stage.run.device.type == "cuda"
    (batch,) = stage.feed.batches(index, len(index))
    activities = [torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        stage.task.step(stage.feed.complete(batch), **stage.task.flags(number))
        synchronize(stage.run.device)
    cuda = torch.autograd.DeviceType.CUDA
    if gpu:
        return sum(event.device_type == cuda for event in profile.events())
    return sum(
        event.name.startswith(("aten::", "udi_kernels::")) and not event.cpu_children for event in profile.events()
    )


def shares(stage, number, index, count=30):
    """The share of each group of operators in a follower's eager step on the CPU: medians over steps."""
    steps = []
    for _ in range(count):
        (batch,) = stage.feed.batches(index, len(index))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            stage.engine.step(batch, number)
        seconds = dict.fromkeys((*GROUPS, OTHER), 0.0)
        for event in profile.events():
            seconds[group_of(event)] += event.self_cpu_time_total
        steps.append({group: t / sum(seconds.values()) for group, t in seconds.items()})
    medians = {group: statistics.median(step[group] for step in steps) for group in steps[0]}
    return {group: share / sum(medians.values()) for group, share in medians.items()}


def group_of(event):
    """The group of an operator, or of the innermost caller that has one."""
    while event:
        for group, parts in GROUPS.items():
            if any(part in event.name.lower() for part in parts):
                return group
        event = event.cpu_parent
    return OTHER


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(result):
    """The Markdown table."""
    runs, step, batch = result["runs"], result["step"], result["batch_size"]
    joint = runs["joint training"]["seconds"]
    lines = [
        f"{result['encoder']}, {result['samples']} samples, batch {batch}, {result['epochs']} epochs of each phase, "
        f"amp {result['amp']}; {result['hardware']}; torch {result['torch']}, commit {result['commit']}; medians of "
        f"{result['rounds']} rounds. {engine(result)}",
        "",
    ]
    lines += ["| run | whole run | against joint training | seconds per epoch |", "|---|---:|---:|---|"]
    for name, figures in runs.items():
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in figures["epoch_seconds"].items())
        lines.append(f"| {name} | {figures['seconds']:.1f} s | {figures['seconds'] / joint:.2f}× | {stages} |")
    plain, ours = runs[PLAIN]["seconds"], runs["UDI, anchor auto"]["seconds"]
    # The controller's step comes once an epoch.
    extra = step["follower"] - step["encoder alone"] + (step["controller"] - step["follower"]) / step["steps_per_epoch"]
    lines += [
        "",
        f"UDI with anchor auto is {plain / ours:.2f}× as fast as in plain PyTorch.",
        f"A follower's step takes {1e3 * step['follower']:.2f} ms ({batch / step['follower']:.0f} samples/s; "
        f"{step['operators']} launches), {1e3 * step['controller']:.2f} ms with the controller; the encoder's own "
        f"training step {1e3 * step['encoder alone']:.2f} ms. Losses, q's fit and controller (once an epoch): "
        f"{100 * extra / step['follower']:.1f}% of the follower's step.",
    ]
    if "shares" in step:
        parts = ", ".join(f"{group} {100 * share:.0f}%" for group, share in step["shares"].items())
        lines.append(f"Of the time in a follower's operators: {parts}.")
    if step["gpu_busy"]:
        lines.append(f"A kernel runs in {100 * step['gpu_busy']:.0f}% of a follower's epoch.")
    return "\n".join(lines)


def engine(result):
    """How steps ran, with the exceptions."""
    if result["engine"] == "eager":
        return "Steps ran eagerly."
    exceptions = dict.fromkeys(text for part in (*result["runs"].values(), result["step"]) for text in part["eager"])
    return "Steps ran as CUDA graphs" + (f", but: {'; '.join(exceptions)}." if exceptions else ".")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=("cnn", "resnet18"), default="cnn")
    parser.add_argument("--epochs", type=int, default=5, help="epochs per phase (default: 5)")
    parser.add_argument("--samples", type=int, help="training samples (default: 12000 for cnn, 512 for resnet18)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="rounds; results are medians over them (default: 3)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engine", default="auto", help="auto, eager or graph")
    parser.add_argument("--amp", default="none", help="bf16 or none")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for trainer-ENCODER.json and .md")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.tf32

    samples = dataset(arguments.encoder, arguments.samples or {"cnn": 12_000, "resnet18": 512}[arguments.encoder])
    rounds = []
    with tqdm(total=(1 + arguments.rounds) * len(RUNS), disable=None) as bar:
        for name, options in RUNS.items():
            bar.set_description(f"warm-up: {name}")
            whole_run(name, new_run(arguments, options, samples, epochs=1))
            bar.update()
        for _ in range(arguments.rounds):
            rounds.append({})
            for name, options in RUNS.items():
                bar.set_description(name)
                rounds[-1][name] = whole_run(name, new_run(arguments, options, samples))
                bar.update()

    def median(name):
        results = [r[name] for r in rounds]
        names = dict.fromkeys(stage for r in results for stage in r["epoch_seconds"])  # the anchor may change
        stages = {
            s: statistics.median(r["epoch_seconds"][s] for r in results if s in r["epoch_seconds"]) for s in names
        }
        eager = list(dict.fromkeys(text for r in results for text in r["eager"]))
        seconds = statistics.median(r["seconds"] for r in results)
        return {"seconds": seconds, "epoch_seconds": stages, "eager": eager}

    run = new_run(arguments, [], samples)
    result = {name: value for name, value in vars(arguments).items() if name != "out"}
    result |= {
        "samples": len(samples.train),
        "device": str(run.device),
        "engine": run.engine,
        "hardware": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else measure.cpu_name(),
        "torch": torch.__version__,
        "commit": measure.commit(),
        "runs": {name: median(name) for name in RUNS},
    }
    with eager_steps() as eager:
        result["step"] = steps(run)
    result["step"]["eager"] = eager
    shutil.rmtree(run.folder.path)
    print(report(result))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"trainer-{arguments.encoder}.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / f"trainer-{arguments.encoder}.md").write_text(report(result) + "\n")


if __name__ == "__main__":
    main()
