"""What was built, and which backend serves each op on this machine."""

import argparse
import os
import platform
from importlib.util import find_spec
from typing import Any

import torch

from . import _build
from ._nvrtc import fill_cache
from ._ops import backend

OPS = {
    "losses": (
        "js_div",
        "js_div_topk",
        "linear_js_div",
        "skew_kl",
        "club_mi",
        "club_nll",
        "duc_loss",
        "certainty_fusion",
    ),
    "statistics": ("effective_dims",),
    "gradients": ("gramian", "weighted_sum"),
}


def build_info() -> dict[str, Any]:
    """Versions, the native libraries with compiler and path, and the backend of each op by device and dtype.

    Builds the libraries that are not built yet. Returns a dict that `json.dumps` takes.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    modules = {kind: _build.load(kind) for kind in devices}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if "cuda" in devices else None,
        "libraries": {
            kind: module and {"path": os.fspath(module.__file__), "compiler": module.compiler}
            for kind, module in modules.items()
        },
        "backends": {
            op: {
                f"{device} {str(dtype).removeprefix('torch.')}": backend(family, device, dtype)
                for device in devices
                for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
            }
            for family, ops in OPS.items()
            for op in ops
        },
    }


def _version(package: str) -> str | None:
    return __import__(package).__version__ if find_spec(package) else None


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m udi_kernels", description="Shows what was built and which backend serves each op."
    )
    parser.add_argument(
        "--compile", nargs="+", metavar="sm_XX", help="compile all CUDA kernels for these architectures into the cache"
    )
    if archs := parser.parse_args().compile:
        try:
            return fill_cache(archs)
        except _build.BuildError as e:
            raise SystemExit(f"udi_kernels: {e}") from None
    info = build_info()
    gpu = info["gpu"] or "no GPU found"
    print(f"udi_kernels on Python {info['python']}, torch {info['torch']}, triton {info['triton'] or 'not installed'}")
    print(f"machine: {info['machine']}, {info['cpu_capability']}; {gpu}\n")
    for kind, library in info["libraries"].items():
        print(f"{kind} library: " + (f"{library['path']}\n  by {library['compiler']}" if library else "not built"))
    print()
    columns = list(next(iter(info["backends"].values())))
    width = max(map(len, columns)) + 2
    print(" " * 18 + "".join(c.ljust(width) for c in columns).rstrip())
    for op, served in info["backends"].items():
        print(op.ljust(18) + "".join(served[c].ljust(width) for c in columns).rstrip())
    if "reference" in {b for served in info["backends"].values() for b in served.values()}:
        print("\nreference: plain torch, correct but slow")
