"""Forward + backward of the losses, gradients as UDI needs them: only for `input`, only for `y`."""

import pytest
import torch

import peers
from udi_kernels import club_mi, js_div

JS_DIV = {"udi_kernels": js_div, "eager": peers.js_div_eager, "torch.compile": torch.compile(peers.js_div_plain)}
CLUB = {
    "udi_kernels": club_mi,
    "eager": peers.club_mi_plain,
    "torch.compile": torch.compile(peers.club_mi_plain),
    "N x N x D": peers.club_mi_pairs,
}


def forward_backward(f, leaf, *args):
    leaf.grad = None
    f(*args).backward()


@pytest.mark.parametrize("provider", JS_DIV)
@pytest.mark.parametrize(
    "shape", [(64, 6), (64, 101), (1024, 1000), (1024, 32000)], ids=lambda s: "x".join(map(str, s))
)
def test_js_div(timed, benchmark, device, shape, provider):
    benchmark.group = f"js_div {shape} {device}"
    input, target = (torch.randn(shape, device=device) for _ in range(2))
    input.requires_grad_()
    torch.compiler.reset()
    timed(forward_backward, JS_DIV[provider], input, input, target)


@pytest.mark.parametrize("provider", CLUB)
@pytest.mark.parametrize("shape", [(64, 512), (512, 512), (4096, 512)], ids=lambda s: "x".join(map(str, s)))
def test_club_mi(timed, benchmark, device, shape, provider):
    if provider == "N x N x D" and shape[0] > 512:
        pytest.skip(f"N x N x D would need {shape[0] ** 2 * shape[1] * 4 / 2**30:.0f} GiB a tensor")
    benchmark.group = f"club_mi {shape} {device}"
    mu, logvar, y = (torch.randn(shape, device=device) for _ in range(3))
    y.requires_grad_()
    torch.compiler.reset()
    timed(forward_backward, CLUB[provider], y, mu, logvar.tanh(), y)
