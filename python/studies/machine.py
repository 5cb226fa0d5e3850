"""The machine that a study runs on, and the version of the code."""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def find_slots(device: str | None, jobs: int | None) -> list[dict[str, str]]:
    """The environment variables of each parallel process, which gets one GPU or one core."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs or len(gpus))]
    if device and device.startswith("cuda:"):
        return [{}] * (jobs or 1)
    # Small models gain little from more threads, and parallel runs would compete for the cores.
    return [{"OMP_NUM_THREADS": "1"}] * (jobs or cores())


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def hardware() -> dict:
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": models[0] if models else platform.machine(), "cores": cores(), "gpus": gpus}


def git_version() -> str | None:
    """The commit of this code, with -dirty if there are uncommitted changes; None outside a repository."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
