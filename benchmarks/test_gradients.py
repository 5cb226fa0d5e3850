"""Gram matrix and weighted sum of three gradients of ResNet-18."""

import pytest
import torch

import peers
from udi_kernels import GradientPlan, gramian, weighted_sum


def resnet18():
    """Shapes of ResNet-18's 62 parameters."""
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    for planes, before in ((64, 64), (128, 64), (256, 128), (512, 256)):
        for i in (before, planes):
            shapes += [(planes, i, 3, 3), (planes,), (planes,), (planes, planes, 3, 3), (planes,), (planes,)]
            if i != planes:
                shapes += [(planes, i, 1, 1), (planes,), (planes,)]
    return [*shapes, (1000, 512), (1000,)]


@pytest.fixture
def grads(device):
    return [[torch.randn(shape, device=device) for shape in resnet18()] for _ in range(3)]


GRAMIAN = {
    "udi_kernels": lambda grads: lambda: gramian(grads),
    "udi_kernels, plan": lambda grads: GradientPlan(grads).gramian,
    "cat + matmul": lambda grads: lambda: peers.gramian_cat(grads),
    "dot products": lambda grads: lambda: peers.gramian_dots(grads),
    "torch.compile": lambda grads: (lambda f: lambda: f(grads))(torch.compile(peers.gramian_cat)),
}
WEIGHTED_SUM = {
    "udi_kernels": lambda grads, w: lambda: weighted_sum(grads, w),
    "udi_kernels, plan": lambda grads, w: (lambda plan: lambda: plan.weighted_sum(w))(GradientPlan(grads)),
    "foreach": lambda grads, w: lambda: peers.weighted_sum_foreach(grads, w),
    "eager": lambda grads, w: lambda: peers.weighted_sum_loop(grads, w),
    "torch.compile": lambda grads, w: (lambda f: lambda: f(grads, w))(torch.compile(peers.weighted_sum_loop)),
}


@pytest.mark.parametrize("provider", GRAMIAN)
def test_gramian(timed, benchmark, device, grads, provider):
    benchmark.group = f"gramian ResNet-18 K=3 {device}"
    torch.compiler.reset()
    timed(GRAMIAN[provider](grads))


@pytest.mark.parametrize("provider", WEIGHTED_SUM)
def test_weighted_sum(timed, benchmark, device, grads, provider):
    benchmark.group = f"weighted_sum ResNet-18 K=3 {device}"
    torch.compiler.reset()
    timed(WEIGHTED_SUM[provider](grads, torch.rand(3, device=device)))
