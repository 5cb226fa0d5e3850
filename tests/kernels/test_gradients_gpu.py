import math

import pytest
import torch
from lists import check, draw

from udi_kernels import GradientPlan, alignment_weights, gramian, weighted_sum

pytestmark = pytest.mark.gpu


def test_no_call_waits_for_the_gpu():
    grads = draw(3, device="cuda")
    weights = torch.ones(3, device="cuda")
    plan = GradientPlan(grads)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            alignment_weights(gramian(grads), cosine=True)
            weighted_sum(grads, weights)
            plan.gramian()
            plan.weighted_sum(weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("k", [3, 8, 32])
def test_bit_identical_on_a_side_stream_and_again(k):
    grads = draw(k, shapes=[(300_001,), (64, 64, 3, 3), (10,)], device="cuda")
    weights = torch.randn(k, device="cuda")
    want = [gramian(grads), *weighted_sum(grads, weights)]
    stream = torch.cuda.Stream()
    for _ in range(5):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = [gramian(grads), *weighted_sum(grads, weights)]
        torch.cuda.current_stream().wait_stream(stream)
        assert all(map(torch.equal, again, want))


@pytest.mark.parametrize("k", [3, 32])
@pytest.mark.parametrize("planned", [False, True])
def test_graph_capture_and_replay(k, planned):
    grads = draw(k, device="cuda")
    weights = torch.randn(k, device="cuda")
    out = [torch.empty_like(t) for t in grads[0]]
    plan = GradientPlan(grads, out=out)

    def step():
        if planned:
            plan.weighted_sum(weights)
            return plan.gramian()
        weighted_sum(grads, weights, out=out)
        return gramian(grads)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram = step()
    for _ in range(3):
        for row in grads:
            for t in row:
                t.normal_()
        for t in (gram, *out):
            t.fill_(math.nan)
        graph.replay()
        assert torch.equal(gram, gramian(grads))
        assert all(map(torch.equal, out, weighted_sum(grads, weights)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device():
    grads = draw(3, device="cuda:1")
    assert torch.cuda.current_device() == 0
    check(grads)
    assert torch.cuda.current_device() == 0


def test_more_than_2_to_the_31_elements():
    n = 2**31 + 1024
    if torch.cuda.mem_get_info()[0] < 3 * 2 * n:
        pytest.skip("needs 13 GB of GPU memory")
    ones = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    assert gramian([[ones], [ones]]).tolist() == [[n, n], [n, n]]
    out = weighted_sum([[ones], [ones]], torch.tensor([1.0, 2.0], device="cuda"))[0]
    assert (out[-2048:] == 3).all() and (out[:2048] == 3).all()
