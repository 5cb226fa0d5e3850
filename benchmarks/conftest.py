import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def timed(benchmark, device):
    """Times f(*args), warmed up (compiled, if it compiles), to the end of the work on the device."""

    def run(f, *args):
        torch.manual_seed(0)
        name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
        benchmark.extra_info["device"] = name

        def call():
            result = f(*args)
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        call()
        benchmark(call)

    return run
