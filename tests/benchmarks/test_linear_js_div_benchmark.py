"""The benchmark of linear_js_div: its providers agree, and its memory is what a call takes."""

import sys

import pytest
import torch

import linear_js_div
from measure import Unavailable


def test_providers_compute_the_same():
    inputs = linear_js_div.draw(40, 300, torch.float32)
    results = {}
    for name, loss in linear_js_div.providers().items():
        if "compile" in name or "masked" in name:
            continue
        try:
            linear_js_div.step(loss, *inputs)
        except Unavailable:
            continue
        results[name] = loss(*inputs).item(), inputs[0].grad.clone(), inputs[1].grad.clone()
    first = results["logits + js_div"]
    assert len(results) >= 8
    for other in results.values():
        assert other[0] == pytest.approx(first[0], rel=1e-4)
        for a, b in zip(other[1:], first[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_call_in_a_process():
    """One chunk: both logits and the gradients, together 73 MB."""
    peak = linear_js_div.peak_in_a_process("linear_js_div, 256 rows", "200x20000", "float32")
    gradients, logits = 4 * (200 + 20000) * linear_js_div.STUDENT, 4 * 200 * 20000
    assert 0.95 < peak / (2 * logits + gradients) < 1.15
