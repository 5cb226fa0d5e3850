"""The cases state their true sizes, and providers with different results are not compared."""

import math
from functools import partial

import pytest
import torch

import measure
from cases import CASES, Case, Provider
from shapes import MODELS


@pytest.mark.parametrize(
    "model, parameters, tensors",
    [
        ("ResNet-18", 11_689_512, 62),
        ("ResNet-50", 25_557_032, 161),
        ("ViT-B/16", 86_567_656, 152),
        ("ViT-L/16", 304_326_632, 296),
    ],
)
def test_parameter_lists(model, parameters, tensors):
    assert (sum(map(math.prod, MODELS[model])), len(MODELS[model])) == (parameters, tensors)


def test_an_input_set_has_the_size_that_its_case_states():
    for case in CASES.values():
        if case.elements < 1e6:
            inputs = case.draw(partial(torch.zeros, dtype=case.dtype))
            assert sum(t.numel() for t in inputs if t.is_floating_point()) == case.elements


class Still(measure.CPU):
    """A CPU whose bandwidths are not measured."""

    seconds = 0.05

    def _measure_ceilings(self, elements):
        self.copy_bandwidth = self.read_bandwidth = 1e9


def test_only_equal_results_are_compared():
    def absent(x):
        raise measure.Unavailable("not installed")

    providers = {
        "ours": Provider({"": partial(partial, torch.sum)}, 0),
        "variants": Provider({"a": lambda x: lambda: (x + x).sum() / 2, "b": partial(partial, torch.sum)}, 1),
        "wrong": Provider({"": lambda x: lambda: x.sum() * 1.01}, 0),
        "absent": Provider({"": absent}, 0),
        "beside": Provider({"": lambda x: lambda: x[:2]}, 0, beside=True),
        "huge": Provider({"": partial(partial, torch.sum)}, 1e9),
    }
    case = Case("sum", "1000000", torch.float32, "", 0, 10**6, 4 * 10**6, lambda randn: [1 + randn(10**6)], providers)
    results = measure.measure(case, list(providers), Still())
    assert isinstance(results["wrong"], AssertionError)
    assert isinstance(results["absent"], measure.Unavailable)
    assert "GiB" in str(results["huge"])
    ours, variants = results["ours"], results["variants"]
    assert min(len(ours[0]), len(variants[0]), len(results["beside"][0])) >= 3
    assert results["beside"][1]["beside"] and not ours[1]["beside"]
    assert ours[1]["cold"] and ours[1]["input_sets"] * 4e6 > measure.CPU.rotation
    assert ours[1]["peak_memory"] < 100 and variants[1]["variant"] in "ab"


def test_kept_memory_is_that_of_no_input():
    x = torch.randn(1000, requires_grad=True)
    assert measure._kept_memory(lambda: (x[:500] * x[:500]).sum(), [[x]]) == 0
    assert measure._kept_memory(lambda: x.exp().sum(), [[x]]) == x.nbytes
