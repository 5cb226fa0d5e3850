"""Studies: many training runs, and what they say together, as tables and plots."""

import argparse
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

try:
    import torch
    from tqdm import tqdm

    from common import UserError
    from report import need_matplotlib
    from run import write_json
    from studies import studies
    from train import Parser, number
except ModuleNotFoundError as missing:
    print(f'experiments.py: {missing.name} is not installed: pip install -e ".[train]"', file=sys.stderr)
    sys.exit(2)

HERE = Path(__file__).resolve().parent


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    command = f"python python/experiments.py {shlex.join(argv)}"
    try:
        options, extra = parse(argv)
        need_matplotlib()
        study = studies.find(options.study)()
        folder = options.out or Path("results") / options.study
        if options.report:
            results = load(folder / "results.json")
        else:
            commit = describe()
            seeds = options.seeds or list(range(study.seeds))
            jobs = [Job(study, v, seed, extra, folder / "runs") for v in study.variants for seed in seeds]
            slots = find_slots(jobs[0].settled.get("device"), options.jobs)
            failed = run_all([job for job in jobs if not job.finished()], slots, commit)
            results = {"study": options.study, "command": command, "options": extra, "seeds": seeds}
            results |= {"commit": commit, "hardware": hardware(), "torch": torch.__version__}
            results |= {"runs": [job.record() for job in jobs if job.finished()], "failed": failed}
            write_json(folder / "results.json", results)
        publish(study, results, folder)
        return 1 if results["failed"] else 0
    except UserError as error:
        print(f"experiments.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nexperiments.py: interrupted; go on with the same command: {command}", file=sys.stderr)
        return 130


def parse(argv):
    """The options, and those that are the trainer's."""
    epilog = "studies:\n" + "".join(f"  {name:<12} {study.__doc__}\n" for name, study in studies.items())
    parser = Parser(
        prog="experiments.py",
        description="Runs a study: trains its variants with several seeds, and writes results.json, table.md and plots."
        "\nThe same command goes on where it was stopped. Options that are not below go to every run, such as"
        "\n--data-root DIR, --epochs N, --device D; python python/train.py --help explains them.",
        epilog=epilog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("study", metavar="NAME", help="what to study, one of those below")
    parser.add_argument("--seeds", type=seeds, metavar="N", help="0 to N-1, or a list such as 0,3,7 (default: 5 or the"
        " study's own number)")  # fmt: skip
    parser.add_argument("--jobs", type=number(int, 1), metavar="N", help="runs at once (default: one a GPU or core)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: results/NAME)")
    parser.add_argument("--report", action="store_true", help="only write table and plots anew, from results.json")
    options, extra = parser.parse_known_args(argv)
    for flag in ("--seed", "--resume"):
        if any(x == flag or x.startswith(f"{flag}=") for x in extra):
            raise UserError(f"{flag} is for a single run: a study takes --seeds, and resumes by itself")
    if options.report and (extra or options.seeds):
        raise UserError(f"--report takes results.json as it is: leave out {' '.join(extra) or '--seeds'}")
    return options, extra


def seeds(text):
    """``5``: 0 to 4; ``0,3,7``: these; ``3,``: only this."""
    if "," not in text:
        return list(range(number(int, 1)(text)))
    return list(dict.fromkeys(number(int, 0)(part) for part in text.split(",") if part))


class Job:
    """One run: its command, and its folder with the program's output, the program's own folder, and job.json."""

    def __init__(self, study, variant, seed, extra, root):
        self.study, self.variant, self.seed = study, variant, seed
        self.name = f"{variant}, seed {seed}"
        self.options = [*shlex.split(variant.options), *extra, "--seed", str(seed)]
        self.settled = study.settle(self.options)
        self.folder = root / re.sub(r"[^\w.,]+", "-", f"{variant} seed{seed}")
        self.out, self.file = self.folder / "run", self.folder / "job.json"
        self.saved = load(self.file) if self.file.exists() else {"options": {}, "commits": []}
        for name, was in self.saved["options"].items():
            now = self.settled.get(name, was)
            if name not in study.movable and was != now:
                raise UserError(
                    f"{self.folder} was run with another --{name.replace('_', '-')} ({was}, now {now}):"
                    " choose another --out, or delete that folder"
                )

    def finished(self):
        return (self.out / "metrics.json").exists()

    def start(self, slot, commit):
        """Starts the program, or goes on with what an earlier one left. ``slot``: what it has of the machine."""
        self.slot, self.began = slot, time.monotonic()
        begun = (self.out / "config.json").exists()
        if not begun:
            shutil.rmtree(self.out, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        if commit and commit not in self.saved["commits"]:
            self.saved["commits"].append(commit)
        self.saved["options"] = self.settled
        write_json(self.file, self.saved)
        command = [sys.executable, self.study.program, *self.options, "--resume" if begun else "--out", self.out]
        with open(self.folder / "stdout.txt", "a") as out, open(self.folder / "stderr.txt", "w") as err:
            try:  # The process inherits this lock: nobody starts it again beside one that outlived a killed study.
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.folder} is in use by another process: let it end, or end it") from None
            # In a session of its own, Ctrl-C reaches it once, through stop(), and not from the terminal too.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=os.environ | slot, start_new_session=True
            )

    def error(self):
        """Why it failed."""
        lines = (self.folder / "stderr.txt").read_text(errors="replace").strip().splitlines()
        return f"exit code {self.process.returncode}\n" + "\n".join(lines[-3:])

    def record(self):
        metrics, log = load(self.out / "metrics.json"), self.out / "metrics.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        record = {"variant": self.variant.name, "condition": self.variant.condition, "seed": self.seed}
        record |= {"options": shlex.split(self.variant.options), "commits": self.saved["commits"]}
        return record | self.study.figures(metrics, rows)


def run_all(jobs, slots, commit):
    """Runs the jobs, one in each slot at a time; returns what failed. However it ends, no process is left behind."""
    waiting, free, active, failed = jobs[::-1], list(slots), [], []
    try:
        with tqdm(total=len(jobs), unit="run", disable=None) as bar:
            while waiting or active:
                while waiting and free:
                    job = waiting.pop()
                    active.append(job)
                    job.start(free.pop(0), commit)
                bar.set_description("; ".join(job.name for job in active), refresh=False)
                time.sleep(0.1)
                for job in [job for job in active if job.process.poll() is not None]:
                    active.remove(job)
                    free.append(job.slot)
                    bar.update()
                    if job.process.returncode == 0:
                        tqdm.write(f"{job.name}: {time.monotonic() - job.began:.0f} s")
                    else:
                        failed.append({"variant": str(job.variant), "seed": job.seed, "error": job.error()})
                        tqdm.write(f"{job.name} failed: {job.error()}", file=sys.stderr)
    finally:
        stop([job.process for job in active if hasattr(job, "process")])
    return failed


def stop(processes):
    """As Ctrl-C does, which lets each end its checkpoint; without mercy those that do not end."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 10
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def find_slots(device, jobs):
    """The environment of each process that may run at once: a GPU for each, or a core for each."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs or len(gpus))]
    if device and device.startswith("cuda:"):
        return [{}] * (jobs or 1)
    # More threads than one help such small models little, and several runs on the same cores wait for each other.
    return [{"OMP_NUM_THREADS": "1"}] * (jobs or cores())


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def hardware():
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": models[0] if models else platform.machine(), "cores": cores(), "gpus": gpus}


def describe():
    """The commit of this code, with -dirty if it has been changed since; None outside a repository."""
    git = ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def load(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def publish(study, results, folder):
    """Prints the table, and writes it and the plots into the folder."""
    failed = [f"Failed: {f['variant']}, seed {f['seed']}: {f['error'].splitlines()[-1]}" for f in results["failed"]]
    if not results["runs"]:
        raise UserError(f"no run of {results['study']} ended well. " + " ".join(failed[:1]))
    text = "\n\n".join([study.tables(results["runs"]), *study.notes(results["runs"]), *failed])
    plots = "\n\n".join(f"![]({name})" for name in study.draw(results["runs"], folder))
    machine = results["hardware"]
    commits = ", ".join(sorted({commit for run in results["runs"] for commit in run["commits"]})) or "unknown"
    on = f"{machine['cpu']}, {machine['cores']} cores" + "".join(f", {gpu}" for gpu in machine["gpus"])
    head = f"# {results['study']}\n\n{study.__doc__}\n\n```\n{results['command']}\n```\n\n"
    head += f"Commit {commits}; torch {results['torch']}; {on}.\n\n"
    (folder / "table.md").write_text(f"{head}{text}\n\n{plots}\n")
    print(f"{text}\n\nsee {folder}: table.md, results.json, plots")


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):  # kill, or a closed terminal, ends a study as Ctrl-C does
        signal.signal(ending, signal.default_int_handler)
    sys.exit(main())
