"""CUDA graphs of the Triton launchers."""

import pytest
import torch
from interpreted import DEVICE, MEAN

if DEVICE == "cuda":
    from udi_kernels.triton import club, js_div


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [(64, 6), (64, 101), (300, 1000), (80, 5000), (3, 40001)])
def test_graph_capture_without_synchronisation(shape):
    """Replayed over poisoned outputs, a captured forward and backward gives the bits of an eager one."""

    def step():
        loss, stats = js_div.js_div_fwd(x, y, None, 0.5, 1.0, MEAN)
        value, columns = club.club_mi_fwd(x, y, z, None, MEAN)
        nll = club.club_nll_fwd(x, y, z)
        grads = js_div.js_div_bwd(loss, x, y, None, stats, 0.5, 1.0, MEAN, True, True)
        grads += club.club_mi_bwd(value, x, y, z, None, columns, MEAN, True, True, True)
        return loss, value, nll, *grads, *club.club_nll_bwd(nll, x, y, z, True, True, True)

    x, y, z = (torch.randn(*shape, device=DEVICE) for _ in range(3))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
