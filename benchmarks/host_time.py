"""Host time of the GPU launchers, without a GPU: microseconds from the call to the launch.

    python benchmarks/host_time.py [--calls 300]
    python benchmarks/host_time.py --split [--calls 300]

Everything but the GPU is real: graph nodes, launchers, Triton's driver and launcher, and the launcher of csrc/cuda.
They run on a libcuda.so.1 that does nothing (built here with the C compiler), with CPU memory, without a device guard
and without torch's streams. "by Triton": each kernel launched by `kernel[grid](...)`, for comparison.

--split: the parts of small calls on a CPU, with one thread. Each part is the difference of two calls of which one
contains the other. Dispatch is a call of the kernel with a single element: it includes the memory of results.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUCCEED = """
    cuInit cuCtxGetCurrent cuCtxSetCurrent cuCtxGetDevice cuCtxGetLimit cuCtxSetLimit cuDeviceGet cuDeviceGetCount
    cuDevicePrimaryCtxRetain cuDriverGetVersion cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorString
    cuLaunchKernelEx cuModuleGetFunction cuModuleLoadData cuModuleUnload cuOccupancyMaxActiveClusters
    cuStreamIsCapturing cuTensorMapEncodeIm2col cuTensorMapEncodeTiled
    aoti_torch_get_current_cuda_stream cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuLaunchKernel cuMemsetD32Async
    cuThreadExchangeStreamCaptureMode
"""
LIBCUDA = """
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 16 ? 132 : 232448; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, unsigned long shared) {
  *blocks = 2;
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
int cuPointerGetAttribute(unsigned long long *data, int attribute, unsigned long long p) { *data = p; return 0; }
"""


def stub_driver():
    """Activates Triton's CUDA driver for an sm_90 GPU that does not exist."""
    folder = tempfile.mkdtemp()
    source = Path(folder) / "cuda.c"
    source.write_text(LIBCUDA + "".join(f"int {name}() {{ return 0; }}\n" for name in SUCCEED.split()))
    library = f"{folder}/libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", source, "-o", library], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    import ctypes

    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)  # later loads of this soname find it
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    class Driver(driver.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
            self.get_current_device, self.get_current_stream = lambda: 0, lambda device: 0
            self.get_device_capability = lambda device: (9, 0)

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())


def serve_cpu_by_triton():
    """Registers the Triton launchers of the losses for CPU tensors."""
    import plugin  # noqa: F401  registers the gradient ops' CUDA launcher for CPU tensors
    import torch

    from udi_kernels.triton import club, js_div

    library = torch.library.Library("udi_kernels", "IMPL")
    for module, names in ((js_div, ("js_div",)), (club, ("club_mi", "club_nll"))):
        for name in (f"{n}_{way}" for n in names for way in ("fwd", "bwd")):
            library.impl(name, getattr(module, name), "CPU", allow_override=True)
    return library


def median(call, calls):
    for _ in range(20):
        call()
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1000)
    return statistics.median(times)


def fastest(cases, calls):
    """Microseconds of each call: the fastest of interleaved runs of 20."""
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(calls):
        for name, call in cases.items():
            start = time.perf_counter_ns()
            for _ in range(20):
                call()
            best[name] = min(best[name], (time.perf_counter_ns() - start) / 20e3)
    return best


def split(calls):
    import torch
    from torch.nn.functional import mse_loss

    from peers import certainty_fusion_heads, certainty_fusion_stacked
    from udi_kernels import certainty_fusion, js_div

    torch.set_num_threads(1)
    ops, options = torch.ops.udi_kernels, (None, 0.5, 1.0, 2)
    x, y, z, grad, one = torch.randn(64, 6), torch.randn(64, 6), torch.randn(3, 64, 6), torch.ones(()), torch.ones(1, 1)
    leaf = x.clone().requires_grad_()
    loss = js_div(leaf, y)
    stats, of_one = (ops.js_div_fwd(a, b, *options)[1] for a, b in ((x, y), (one, one)))

    def backward(a, b, stats):
        with torch._C._AutoDispatchBelowAutograd():  # as a graph node calls it
            ops.js_div_bwd.default(grad, a, b, None, stats, *options[1:], True, False)

    us = fastest(
        {
            "call": lambda: js_div(x, y),
            "op": lambda: ops.js_div.default(x, y, *options),
            "kernel": lambda: ops.js_div_fwd.default(x, y, *options),
            "dispatch": lambda: ops.js_div_fwd.default(one, one, *options),
            "recorded": lambda: js_div(leaf, y),
            "backward": lambda: torch.autograd.grad(loss, leaf, retain_graph=True),
            "backward kernel": lambda: backward(x, y, stats),
            "backward dispatch": lambda: backward(one, one, of_one),
            "both": lambda: torch.autograd.grad(js_div(leaf, y), leaf),
            "mse_loss": lambda: torch.autograd.grad(mse_loss(leaf, y), leaf),
            "fusion": lambda: certainty_fusion(z),
            "fusion op": lambda: ops.certainty_fusion.default(z, 1.0),
            "fusion kernel": lambda: ops.certainty_fusion_fwd.default(z, 1.0),
            "fusion dispatch": lambda: ops.certainty_fusion_fwd.default(one[None], 1.0),
            "heads": lambda: certainty_fusion_heads(z),
            "stacked": lambda: certainty_fusion_stacked(z),
        },
        calls,
    )

    def line(name, parts):
        print(f"{name:32}" + ", ".join(f"{part} {value:.1f}" for part, value in parts.items()))

    def forward(prefix, whole):
        op, kernel, dispatch = (us[prefix + part] for part in ("op", "kernel", "dispatch"))
        return {"Python": us[whole] - op, "checks": op - kernel, "dispatch": dispatch, "kernel": kernel - dispatch}

    print("microseconds, the fastest of interleaved runs")
    line("js_div 64x6, forward", forward("", "call") | {"autograd": us["recorded"] - us["call"]})
    kernel, dispatch = us["backward kernel"], us["backward dispatch"]
    line(
        "js_div 64x6, backward",
        {"autograd": us["backward"] - kernel, "dispatch": dispatch, "kernel": kernel - dispatch},
    )
    line("js_div 64x6, both", {"whole": us["both"], "mse_loss": us["mse_loss"], "ratio": us["both"] / us["mse_loss"]})
    line("certainty_fusion 3x64x6", forward("fusion ", "fusion"))
    eager = min(us["heads"], us["stacked"])
    line("certainty_fusion 3x64x6", {"whole": us["fusion"], "eager": eager, "ratio": eager / us["fusion"]})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--split", action="store_true")
    arguments = parser.parse_args()
    calls = arguments.calls
    if arguments.split:
        return split(calls)
    stub_driver()
    library = serve_cpu_by_triton()
    import torch
    from torch.nn.functional import mse_loss

    from shapes import MODELS
    from udi_kernels import GradientPlan, club_mi, club_nll, js_div
    from udi_kernels.triton import Launch, club
    from udi_kernels.triton import js_div as launchers

    x, y = torch.randn(64, 6), torch.randn(64, 6)
    mu, logvar, z = (torch.randn(64, 512) for _ in range(3))
    leaf, leaf_z = x.clone().requires_grad_(), z.clone().requires_grad_()
    _, stats = launchers.js_div_fwd(x, y, None, 0.5, 1.0, 2)
    grad = torch.ones(())
    cases = {
        "js_div 64x6, launcher forward": lambda: launchers.js_div_fwd(x, y, None, 0.5, 1.0, 2),
        "js_div 64x6, launcher backward": lambda: launchers.js_div_bwd(
            grad, x, y, None, stats, 0.5, 1.0, 2, True, False
        ),
        "js_div 64x6, forward + backward": lambda: torch.autograd.grad(js_div(leaf, y), leaf),
        "club_mi 64x512, forward + backward": lambda: torch.autograd.grad(club_mi(mu, logvar, leaf_z), leaf_z),
        "club_nll 64x512, forward + backward": lambda: torch.autograd.grad(club_nll(mu, logvar, leaf_z), leaf_z),
        "club_mi 64x512, launcher forward": lambda: club.club_mi_fwd(mu, logvar, z, None, 2),
    }
    plan = GradientPlan([[torch.zeros(shape) for shape in MODELS["ResNet-18"]] for _ in range(3)])
    weights = torch.ones(3)
    launched = {
        "torch's mse_loss 64x6, forward + backward": lambda: torch.autograd.grad(mse_loss(leaf, y), leaf),
        "GradientPlan of ResNet-18, K=3, gramian": plan.gramian,
        "GradientPlan of ResNet-18, K=3, weighted_sum": lambda: plan.weighted_sum(weights),
    }
    cached, by_triton = Launch.__call__, lambda self, *tensors: self._by_triton(tensors)
    print(f"{'microseconds, median of ' + str(calls):45}{'cached':>10}{'by Triton':>12}")
    for name, call in cases.items():
        figures = []
        for way in (cached, by_triton):
            Launch.__call__ = way
            figures.append(median(call, calls))
        Launch.__call__ = cached
        print(f"{name:45}{figures[0]:10.1f}{figures[1]:12.1f}", flush=True)
    for name, call in launched.items():
        print(f"{name:45}{median(call, calls):10.1f}", flush=True)
    del library


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cuda_on_cpu")]
    main()
