"""The machine that a study runs on, and the state of the code."""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def find_slots(device: str | None, jobs: int | None) -> list[dict[str, str]]:
    """The environment of each process that may run at once: a GPU for each, or a core for each."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs or len(gpus))]
    if device and device.startswith("cuda:"):
        return [{}] * (jobs or 1)
    # More threads than one help such small models little, and several runs on the same cores wait for each other.
    return [{"OMP_NUM_THREADS": "1"}] * (jobs or cores())


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def hardware() -> dict:
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": models[0] if models else platform.machine(), "cores": cores(), "gpus": gpus}


def describe() -> str | None:
    """The commit of this code, with -dirty if it has been changed since; None outside a repository."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
