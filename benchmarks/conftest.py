import time

import pytest
import torch

import measure
from cases import CASES


def pytest_addoption(parser):
    group = parser.getgroup("udi_kernels benchmarks")
    group.addoption("--full", action="store_true", help="run all cases (default: a quick selection)")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    group.addoption("--budget", type=float, metavar="SECONDS", help="skip the least informative cases after this time")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        deselected = [item for item in items if CASES[item.callspec.params["case"]].rank]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


@pytest.fixture(scope="session")
def device(request):
    kind = request.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return measure.CUDA() if kind == "cuda" else measure.CPU()


@pytest.fixture(scope="session")
def measured(request, device):
    """Measures a case by name: all of its selected providers together."""
    start, budget, results = time.monotonic(), request.config.getoption("--budget"), {}

    def get(name):
        if name not in results:
            if budget and time.monotonic() - start > budget:
                pytest.skip(f"the budget of {budget:.0f} s is used up")
            selected = [item.callspec.params for item in request.session.items]
            providers = [params["provider"] for params in selected if params["case"] == name]
            results[name] = measure.measure(CASES[name], providers, device)
        return results[name]

    return get


def pytest_benchmark_update_machine_info(machine_info):
    """Keeps what determines the speed and removes the name of the machine and its kernel."""
    for key in ("node", "release", "python_build", "python_compiler"):
        machine_info.pop(key)
    cpu = machine_info["cpu"]
    machine_info["cpu"] = {key: cpu[key] for key in ("brand_raw", "arch", "count") if key in cpu}
