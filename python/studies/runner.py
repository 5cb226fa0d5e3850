"""The runs of a study: one process and one folder per run; interrupted runs are resumed."""

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

PACKAGES = str(Path(__file__).parents[1])  # the programs import these packages, too, not installed ones


class Job:
    """One run: its command, and a folder with the program's output, its run folder and job.json."""

    def __init__(self, study: Study, variant: Variant, seed: int, extra: list[str], root: Path):
        self.study, self.variant, self.seed = study, variant, seed
        self.name = f"{variant}, seed {seed}"
        self.options = [*shlex.split(variant.options), "--seed", str(seed)]
        self.extra = study.extra(self.options, extra)
        self.options += self.extra
        self.resolved = json.loads(json.dumps(study.resolve(self.options)))  # in the form of job.json
        self.folder = root / re.sub(r"[^\w.,]+", "-", f"{variant} seed{seed}")
        self.out, self.file = self.folder / "run", self.folder / "job.json"
        self.saved = load(self.file) if self.file.exists() else {"options": {}, "commits": []}
        for name, old in self.saved["options"].items():
            new = self.resolved.get(name, old)
            if not study.may_differ(name) and old != new:
                raise UserError(
                    f"{self.folder} was run with a different --{name.replace('_', '-')} ({old}, now {new}):"
                    " choose another --out, or delete that folder"
                )

    def finished(self) -> bool:
        return (self.out / "metrics.json").exists()

    def start(self, slot: dict[str, str], commit: str | None):
        """Starts the program, or resumes an earlier run. ``slot``: environment variables that assign hardware to it."""
        self.slot, self.started = slot, time.monotonic()
        resume = (self.out / "config.json").exists()
        if not resume:
            shutil.rmtree(self.out, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        if commit and commit not in self.saved["commits"]:
            self.saved["commits"].append(commit)
        self.saved["options"] = self.resolved
        write_json(self.file, self.saved)
        path = os.pathsep.join(filter(None, (PACKAGES, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, self.study.program, *self.options, "--resume" if resume else "--out", self.out]
        with open(self.folder / "stdout.txt", "a") as out, open(self.folder / "stderr.txt", "w") as err:
            try:  # The process inherits the lock: if it outlives a killed study, it is not started a second time.
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.folder} is in use by another process: wait until it ends, or stop it") from None
            # In a new session the process gets Ctrl-C once, from stop(), and not also from the terminal.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | slot | {"PYTHONPATH": path},
                start_new_session=True,
            )

    def error(self) -> str:
        """The reason for the failure."""
        lines = (self.folder / "stderr.txt").read_text(errors="replace").strip().splitlines()
        return f"exit code {self.process.returncode}\n" + "\n".join(lines[-3:])

    def record(self) -> dict:
        """The record of this run in results.json."""
        metrics, log = load(self.out / "metrics.json"), self.out / "metrics.jsonl"
        history = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        record = {"variant": self.variant.name, "condition": self.variant.condition, "seed": self.seed}
        record |= {"options": self.variant.options, "commits": self.saved["commits"]}
        return record | self.study.keep(metrics, history)


def run_all(jobs: list[Job], slots: list[dict[str, str]], commit: str | None) -> list[dict]:
    """Runs the jobs, one per slot at a time, and returns the failures. Never leaves a process behind."""
    waiting, free, running, failed = jobs[::-1], list(slots), [], []
    try:
        with tqdm(total=len(jobs), unit="run", disable=None) as bar:
            while waiting or running:
                while waiting and free:
                    job = waiting.pop()
                    running.append(job)
                    job.start(free.pop(0), commit)
                bar.set_description("; ".join(job.name for job in running), refresh=False)
                time.sleep(0.1)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    free.append(job.slot)
                    bar.update()
                    if job.process.returncode == 0:
                        tqdm.write(f"{job.name}: {time.monotonic() - job.started:.0f} s")
                    else:
                        failed.append({"variant": str(job.variant), "seed": job.seed, "error": job.error()})
                        tqdm.write(f"{job.name} failed: {job.error()}", file=sys.stderr)
    finally:
        stop([job.process for job in running if hasattr(job, "process")])
    return failed


def stop(processes: list[subprocess.Popen]):
    """Stops processes as Ctrl-C does, so that they save checkpoints; kills those that do not end in time."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 10
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
