"""skew_kl and js_div_topk of DTensors: value and gradients are those of one process with all rows."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_dtensor_js_div import process, spread

from udi_kernels import js_div_topk, skew_kl

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def losses(weight):
    """Functions of logits, and the logits: 3 rows over 4 processes, the first with NaN if it is masked."""
    input, target = (3 * torch.randn(3, 2, 5, dtype=torch.float64) for _ in range(2))
    logprobs, indices = target.log_softmax(-1).topk(2)
    if weight is not None:
        input[0, 0, 3] = torch.nan
    for reverse in (False, True):
        yield lambda x, y, r=reverse, **options: skew_kl(x, y, reverse=r, **options), [input, target], 2
    for tail in ("renormalize", "bucket"):

        def loss(x, i, p, tail=tail, **options):
            return js_div_topk(x, i, p, tail=tail, beta=0.3, **options)

        yield loss, [input, indices, logprobs], 1


def of_rows(size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    flat, two = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (size // 2, 2))
    layouts = [(flat, [Shard(0)]), (flat, [Replicate()]), (two, [Shard(1), Shard(0)])]
    masks = None, torch.tensor([[0.0, 2.0], [1.0, 0.5], [3.0, 0.0]], dtype=torch.float64)
    for (mesh, places), weight, reduction in itertools.product(layouts, masks, ("none", "sum", "mean")):
        for loss, tensors, differentiable in losses(weight):
            leaves = [t.clone().requires_grad_(n < differentiable) for n, t in enumerate(tensors)]
            want = loss(*leaves, weight=weight, reduction=reduction, temperature=1.7)
            ours = [
                t.requires_grad_(n < differentiable)
                for n, t in enumerate(spread(tensors, mesh, [places] * len(tensors)))
            ]
            placed = None if weight is None else distribute_tensor(weight, mesh, places)
            value = loss(*ours, weight=placed, reduction=reduction, temperature=1.7)
            assert isinstance(value, DTensor) and value.shape == want.shape
            torch.testing.assert_close(value.full_tensor(), want)
            found = torch.autograd.grad(value.sum(), ours[:differentiable])
            for g, truth in zip(found, torch.autograd.grad(want.sum(), leaves[:differentiable]), strict=True):
                assert g.placements == tuple(places)
                torch.testing.assert_close(g.full_tensor(), truth)
    x, rows = spread([tensors[0].nan_to_num()] * 2, flat, [[Shard(2)], [Shard(0)]])
    top = spread(tensors[1:], flat, [[Replicate()]] * 2)
    words = r"input must be sharded over rows, got placements \(Shard\(dim=2\),\); gather its last dimension by .redist"
    with pytest.raises(ValueError, match="skew_kl: " + words):
        skew_kl(x, x)
    with pytest.raises(ValueError, match="js_div_topk: " + words):
        js_div_topk(x, *top)
    with pytest.raises(ValueError, match="js_div_topk: logprobs must be sharded over rows"):
        js_div_topk(rows, top[0], top[1].redistribute(placements=[Shard(2)]))
    with pytest.raises(TypeError, match="skew_kl: target must be a DTensor as the others are, got Tensor"):
        skew_kl(rows, tensors[0])
    with pytest.raises(TypeError, match="js_div_topk: indices must be a DTensor as the others are, got Tensor"):
        js_div_topk(rows, *tensors[1:])
    gathered = x.redistribute(placements=[Replicate()])  # the remedy
    assert skew_kl(gathered, gathered).full_tensor() == skew_kl(rows, gathered).full_tensor() == 0


@pytest.mark.parametrize("processes", [2, 4])
def test_sharded_rows(processes, tmp_path):
    mp.spawn(process, (processes, str(tmp_path / "store"), of_rows), processes)
