"""Times calls on CPUs and GPUs, and replays the samples into pytest-benchmark.

The providers of a case are interleaved, one sample of each in turn, so disturbances affect all of them. A sample is the
time of a call with cold inputs: many megabytes were accessed since their last use. The test of each provider then
replays its samples into pytest-benchmark with a clock that advances only by measured times. On a CPU there is also a
"hot" time: that of a call right after others with the same inputs, with warm caches and allocator.
"""

import gc
import itertools
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

ROUNDS = (3, 5, 100)  # samples per provider: minimum if a sample takes seconds, minimum, maximum
MAX_SETS = 64  # input sets that calls rotate through
HOT = 5  # consecutive calls with the same inputs; the last one is timed


class Unavailable(Exception):
    """The reason why a provider cannot be measured."""


class CPU:
    kind = "cpu"
    seconds = 4  # of sampling per case
    rotation = 128 << 20  # bytes of inputs between two uses of a set; inputs below 1/64 of it stay in a cache

    def __init__(self):
        self.name = cpu_name()
        self._turn = itertools.count()
        self._measure_ceilings(1 << 26)

    def _measure_ceilings(self, elements):
        """Measures bytes per second of a copy (read and written) and of a sum (read), beyond all caches."""
        source = torch.randn(elements, device=self.kind)
        target = torch.empty_like(source)
        calls = [partial(target.copy_, source)], [source.sum]
        copy, read = map(min, interleave([self.sampler(c)[0] for c in calls], seconds=1.5))
        self.copy_bandwidth, self.read_bandwidth = 8 * elements / copy, 4 * elements / read

    @staticmethod
    def hot_sampler(call):
        def sample():
            for _ in range(HOT - 1):
                call()
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return sample

    def free_memory(self):
        """Bytes available without swapping, minus a reserve."""
        available = [int(line.split()[1]) << 10 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
        return 0.8 * (available[0] if available else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2)

    def sampler(self, calls):
        """A function that returns one sample, and a description of the method."""

        def sample():
            call = calls[next(self._turn) % len(calls)]  # one counter for all providers, so every set is cold
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return sample, "wall time of a call"

    def peak_memory(self, call):
        """Peak bytes of tensors allocated during the call, from torch's profiler."""
        with torch.profiler.profile(profile_memory=True) as profile:
            call()
        with tempfile.TemporaryDirectory() as folder:
            profile.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
        return max(itertools.accumulate((size for _, size in changes), initial=0))

    def host_seconds(self, call):
        return None  # the host does all the work


class CUDA:
    kind = "cuda"
    seconds = 1
    hot_sampler = None  # consecutive kernels on a stream use the L2 anyway

    def __init__(self):
        properties = torch.cuda.get_device_properties()
        self.name = properties.name
        self.rotation = 3 * properties.L2_cache_size
        self._flush = torch.randn(max(1 << 28, self.rotation), device="cuda")
        self._pool = torch.cuda.graph_pool_handle()  # shared by all graphs, which never run concurrently
        self._measure_ceilings(1 << 28)

    _measure_ceilings = CPU._measure_ceilings

    def free_memory(self):
        gc.collect()
        torch.cuda.empty_cache()
        return 0.9 * torch.cuda.mem_get_info()[0]

    def sampler(self, calls):
        """A function that returns one sample, and a description: all calls once, in a CUDA graph if possible."""
        run, how = self._capture(calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample():
            # Reading a gigabyte evicts the caches, including dirty lines, and takes longer than the host's launches.
            self._flush.sum()
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3 / len(calls)

        return sample, how

    def _capture(self, calls):
        def run():
            for call in calls:
                call()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                run()
                torch.cuda.set_sync_debug_mode("error")  # most calls that cannot be captured fail here already
                try:
                    run()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                run()
            return graph.replay, "CUDA graph replay"
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize()
            self._pool = torch.cuda.graph_pool_handle()
            return run, f"eager calls, no CUDA graph: {str(error).splitlines()[0]}"

    def peak_memory(self, call):
        """Peak bytes of tensors allocated during the call."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def host_seconds(self, call):
        """Time until an eager call returns, with an empty queue."""
        samples = []
        for _ in range(11):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return statistics.median(samples)


def interleave(samplers, seconds):
    """Samples of each sampler, interleaved, in about this many seconds.

    The order changes in every round, so that none always follows the same one. A sampler that has used its share of the
    time stops, and the faster ones continue.
    """
    samples, spent = [[] for _ in samplers], [0.0 for _ in samplers]
    running, order = list(range(len(samplers))), random.Random(0)
    slow_minimum, minimum, maximum = ROUNDS

    def needs_more(i):
        required = minimum if spent[i] < 2 * seconds else slow_minimum
        return len(samples[i]) < required or (len(samples[i]) < maximum and spent[i] < seconds / len(samplers))

    while running:
        order.shuffle(running)
        for i in running:
            start = time.perf_counter()
            samples[i].append(samplers[i]())
            spent[i] += time.perf_counter() - start
        running = [i for i in running if needs_more(i)]
    return samples


def measure(case, names, device):
    """{provider: (samples, extra_info)}; an exception for providers that could not be measured."""
    torch.compiler.reset()
    try:
        sets = _draw(case, device)
    except Unavailable as reason:
        return dict.fromkeys(names, reason)
    expected, running, failed = None, [], {}
    for name in names:
        for variant, bind in case.providers[name].variants.items():
            try:
                _check_memory(device, case.providers[name].memory * case.elements * 4)
                calls = [bind(*inputs) for inputs in sets]
                result = [t.detach().float() for t in _tensors(calls[0]())]
                if not case.providers[name].beside:
                    expected = expected or result
                    _check_equal(result, expected, case.dtype)
                running.append((name, variant, calls[0], *device.sampler(calls)))
            except Unavailable as reason:
                failed[name] = reason.with_traceback(None)
            except torch.OutOfMemoryError:
                failed[name] = Unavailable("out of memory")
            except Exception:  # measure the others; stored as text, because frames keep tensors alive
                failed[name] = AssertionError(traceback.format_exc())
            calls = result = None
    gc.collect()
    gc.disable()
    try:
        samples = interleave([sample for *_, sample, _ in running], device.seconds)
        hot = [None] * len(running)
        if device.hot_sampler:
            samplers = [device.hot_sampler(call) for _, _, call, *_ in running]
            hot = [1e6 * _median(s) for s in interleave(samplers, device.seconds / 2)]
    finally:
        gc.enable()

    best = {}  # the index of each provider's fastest variant
    for i, (name, *_) in enumerate(running):
        if name not in best or _median(samples[i]) < _median(samples[best[name]]):
            best[name] = i
    results = {}
    for name, i in best.items():
        _, variant, call, _, how = running[i]
        info = _extra_info(case, name, variant, how, sets, call, samples[i], device)
        results[name] = samples[i], info | {"hot_us": hot[i]}
    # An unavailable variant does not matter if another one works; a wrong variant does.
    return results | {n: e for n, e in failed.items() if n not in results or not isinstance(e, Unavailable)}


def _draw(case, device):
    size = case.elements * case.dtype.itemsize
    _check_memory(device, size)
    sets = min(MAX_SETS, 1 + device.rotation // size)
    generator = torch.Generator(device.kind).manual_seed(0)  # a failed capture may leave the default one unusable
    return [case.draw(partial(_randn, generator, device.kind, case.dtype)) for _ in range(sets)]


def _randn(generator, device, dtype, *shape):
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _check_memory(device, size):
    free = device.free_memory()
    if size > free:
        raise Unavailable(f"needs about {size / 2**30:.1f} GiB, {free / 2**30:.1f} are free")


def _tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _check_equal(result, expected, dtype):
    """Asserts that results agree within the precision of plain arithmetic in this dtype."""
    tolerance = 2e-3 if dtype == torch.float32 else 5e-2
    for a, b in zip(result, expected, strict=True):
        error = ((a - b).norm() / b.norm()).item()
        assert error < tolerance, f"the result has a relative error of {error:.1e}, more than {tolerance:.0e}"


def _extra_info(case, name, variant, how, sets, call, samples, device):
    seconds, host = _median(samples), device.host_seconds(call)
    rotated = len(sets) * case.elements * case.dtype.itemsize
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "mode": case.mode,
        "provider": name,
        "variant": variant,
        "beside": case.providers[name].beside,
        "quick": case.rank == 0,
        "device": device.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "timing": how,
        "input_sets": len(sets),
        "cold": rotated >= device.rotation,
        "necessary_bytes": case.bytes,
        "bandwidth": case.bytes / seconds,
        "copy_bandwidth": device.copy_bandwidth,
        "read_bandwidth": device.read_bandwidth,
        "copy_fraction": case.bytes / device.copy_bandwidth / seconds,
        "host_us": None if host is None else host * 1e6,
        "peak_memory": device.peak_memory(call),
        "kept_memory": _kept_memory(call, sets[0]),
    }


def _kept_memory(call, inputs):
    """Bytes that the forward pass keeps for the backward pass, other than the inputs; None if it cannot be seen."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            call()
    except ValueError:  # inplace_backward refuses these hooks
        return None
    own = {t.untyped_storage().data_ptr() for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)}
    return sum(nbytes for address, nbytes in kept.items() if address not in own)


_median = statistics.median


def cpu_name():
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    simd = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads, {simd}"


def commit():
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return run.stdout.strip() or None


def _lines(path):
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


# --- replay -----------------------------------------------------------------------------------------------------

_now = 0.0


def clock():
    """The timer that pytest-benchmark reads. Only `replay` advances it."""
    return _now


def replay(benchmark, samples):
    """Makes `samples` the rounds of this benchmark, for pytest-benchmark's statistics, tables and comparisons."""

    def advance(seconds):
        global _now
        _now = seconds

    def rewind():
        global _now
        _now = 0.0
        return (next(remaining),), {}

    remaining = iter(samples)
    benchmark.pedantic(advance, setup=rewind, rounds=len(samples))
