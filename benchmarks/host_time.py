"""Host time of the GPU launchers, without a GPU: microseconds from the call to the launch.

    python benchmarks/host_time.py [--calls 300]

Everything but the GPU is real: graph nodes, launchers, Triton's driver and launcher, and the launcher of csrc/cuda.
They run on a libcuda.so.1 that does nothing (built here with the C compiler), with CPU memory, without a device guard
and without torch's streams. "by Triton": each kernel launched by `kernel[grid](...)`, for comparison.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300)
    calls = parser.parse_args().calls
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
