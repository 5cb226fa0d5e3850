"""CUDA graphs of the Triton launchers."""

import pytest
import torch
from interpreted import DEVICE, MEAN, assert_replays

from udi_kernels import reference

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
        classes = reference.club_classes(given)
        conditional, columns = club.club_mi_fwd(x, y, z, classes, MEAN)
        grads += club.club_mi_bwd(value, x, y, z, classes, columns, MEAN, True, True, True)
        return loss, value, nll, conditional, *grads, *club.club_nll_bwd(nll, x, y, z, True, True, True)

    x, y, z = (torch.randn(*shape, device=DEVICE) for _ in range(3))
    given = torch.randint(-1, 7, shape[:1], device=DEVICE)
    assert_replays(step)
