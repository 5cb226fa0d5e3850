"""Runs of a study: each a process of its own, with a folder that is taken up where it was left."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from udi_trainer.errors import UserError
from udi_trainer.run_folder import write_json

from .records import load
from .study import Study, Variant

HERE = str(Path(__file__).parents[1])  # whose packages the programs import, too, whatever else is installed


class Job:
    """One run: its command, and its folder with the program's output, the program's own folder, and job.json."""

    def __init__(self, study: Study, variant: Variant, seed: int, extra: list[str], root: Path):
        self.study, self.variant, self.seed = study, variant, seed
        self.name = f"{variant}, seed {seed}"
        self.options = [*shlex.split(variant.options), "--seed", str(seed)]
        self.extra = study.extra(self.options, extra)
        self.options += self.extra
        self.settled = json.loads(json.dumps(study.settle(self.options)))  # as job.json has them
        self.folder = root / re.sub(r"[^\w.,]+", "-", f"{variant} seed{seed}")
        self.out, self.file = self.folder / "run", self.folder / "job.json"
        self.saved = load(self.file) if self.file.exists() else {"options": {}, "commits": []}
        for name, was in self.saved["options"].items():
            now = self.settled.get(name, was)
            if not study.may_differ(name) and was != now:
                raise UserError(
                    f"{self.folder} was run with another --{name.replace('_', '-')} ({was}, now {now}):"
                    " choose another --out, or delete that folder"
                )

    def finished(self) -> bool:
        return (self.out / "metrics.json").exists()

    def start(self, slot: dict[str, str], commit: str | None):
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
        path = os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, self.study.program, *self.options, "--resume" if begun else "--out", self.out]
        with open(self.folder / "stdout.txt", "a") as out, open(self.folder / "stderr.txt", "w") as err:
            try:  # The process inherits this lock: nobody starts it again beside one that outlived a killed study.
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.folder} is in use by another process: let it end, or end it") from None
            # In a session of its own, Ctrl-C reaches it once, through stop(), and not from the terminal too.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | slot | {"PYTHONPATH": path},
                start_new_session=True,
            )

    def error(self) -> str:
        """Why it failed."""
        lines = (self.folder / "stderr.txt").read_text(errors="replace").strip().splitlines()
        return f"exit code {self.process.returncode}\n" + "\n".join(lines[-3:])

    def record(self) -> dict:
        """What results.json keeps of it."""
        metrics, log = load(self.out / "metrics.json"), self.out / "metrics.jsonl"
        history = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        record = {"variant": self.variant.name, "condition": self.variant.condition, "seed": self.seed}
        record |= {"options": self.variant.options, "commits": self.saved["commits"]}
        return record | self.study.keep(metrics, history)


def run_all(jobs: list[Job], slots: list[dict[str, str]], commit: str | None) -> list[dict]:
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


def stop(processes: list[subprocess.Popen]):
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
