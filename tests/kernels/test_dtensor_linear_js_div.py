"""linear_js_div in several processes: heads sharded over classes, and heads of FSDP2 and DDP modules."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_linear_js_div import draw
from torch import nn

from udi_kernels import linear_js_div

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def process(rank, size, file, check):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    torch.manual_seed(0)
    check(size)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # see test_dtensor_js_div.py


@pytest.fixture(params=[2, 4])
def run(request, tmp_path):
    return lambda check: mp.spawn(process, (request.param, str(tmp_path / "store"), check), request.param)


def of_classes(size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    x, w, b, t, tw, tb = draw(9, 5, dtype=torch.float64)  # over 4 processes 2, 2, 1 and 0 classes
    logits = t @ tw.T + tb
    row_weight = torch.tensor([1.0, 0, 2, 1, 0, 1, 1, 0.5, 1])
    labels = torch.tensor([0, 1, 2, 3, -100, 4, -100, 2, 1])
    meshes = [(init_device_mesh("cpu", (size,)), 0), (init_device_mesh("cpu", (size // 2, 2)), 1)]
    hard = dict(labels=labels, hard_weight=0.7, row_weight=row_weight)
    for (mesh, d), beta, temperature in itertools.product(meshes, (0.0, 0.3, 0.5, 0.8, 1.0), (1.0, 2.0)):
        copies = [Replicate()] * mesh.ndim
        sharded = [Shard(0) if i == d else Replicate() for i in range(mesh.ndim)]
        by_class = [Shard(1) if i == d else Replicate() for i in range(mesh.ndim)]

        def spread(tensor, places, mesh=mesh):
            return distribute_tensor(tensor.clone(), mesh, places)

        for options, whole in itertools.product(({}, hard), (False, True)):
            options = options | dict(beta=beta, temperature=temperature, chunk=4)
            leaves = [z.clone().requires_grad_() for z in (x, w, b)]
            teacher = (logits, None) if whole else (t, tw)
            heads = dict(bias=leaves[2]) | ({} if whole else dict(target_bias=tb))
            want = linear_js_div(leaves[0], leaves[1], *teacher, **heads, **options)
            ours = [spread(z, p).requires_grad_() for z, p in zip((x, w, b), (copies, sharded, sharded), strict=True)]
            teacher = (spread(logits, by_class), None) if whole else (spread(t, copies), spread(tw, sharded))
            heads = dict(bias=ours[2]) | ({} if whole else dict(target_bias=spread(tb, sharded)))
            placed = {k: spread(v, copies) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            loss = linear_js_div(ours[0], ours[1], *teacher, **heads, **placed)
            assert isinstance(loss, DTensor) and all(p.is_replicate() for p in loss.placements)
            torch.testing.assert_close(loss.full_tensor(), want)
            grads = torch.autograd.grad(3 * loss, ours)
            assert grads[0].placements[d].is_partial()
            assert [g.placements for g in grads[1:]] == [tuple(sharded)] * 2
            for g, truth in zip(grads, torch.autograd.grad(3 * want, leaves), strict=True):
                torch.testing.assert_close(g.full_tensor(), truth)
    # The teacher's top classes; the last row's are in one process, and padding.
    logprobs, indices = logits.log_softmax(1).topk(3)
    logprobs[-1, 1:], indices[-1, 1:] = -torch.inf, -1
    for (mesh, d), beta in itertools.product(meshes, (0.0, 0.3, 0.5, 0.8)):
        copies = [Replicate()] * mesh.ndim
        sharded = [Shard(0) if i == d else Replicate() for i in range(mesh.ndim)]
        leaves = [z.clone().requires_grad_() for z in (x, w)]
        want = linear_js_div(*leaves, (indices, logprobs), row_weight=row_weight, beta=beta, chunk=4)
        ours = [distribute_tensor(z, mesh, p).requires_grad_() for z, p in ((x, copies), (w, sharded))]
        *top, kept = (distribute_tensor(z, mesh, copies) for z in (indices, logprobs, row_weight))
        loss = linear_js_div(*ours, tuple(top), row_weight=kept, beta=beta, chunk=4)
        torch.testing.assert_close(loss.full_tensor(), want)
        for g, truth in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(want, leaves), strict=True):
            torch.testing.assert_close(g.full_tensor(), truth)
    with pytest.raises(TypeError, match="linear_js_div: target must be a DTensor as the others are"):
        linear_js_div(*ours, (indices, logprobs))
    with pytest.raises(ValueError, match=r"linear_js_div: target's indices must lie in \[0, 5\)"):
        linear_js_div(*ours, (top[0] + 3, top[1]))
    # Rows that are sharded are gathered; replicated heads need no exchange.
    mesh = meshes[0][0]
    for places in ([Shard(0)], [Replicate()]):
        x_, w_ = (distribute_tensor(z, mesh, p) for z, p in ((x, [Shard(0)]), (w, places)))
        teacher = distribute_tensor(t, mesh, [Replicate()]), distribute_tensor(tw, mesh, places)
        torch.testing.assert_close(linear_js_div(x_, w_, *teacher).full_tensor(), linear_js_div(x, w, t, tw))
    with pytest.raises(TypeError, match="linear_js_div: input must be a DTensor as the others are"):
        linear_js_div(x, distribute_tensor(w, mesh, [Shard(0)]), t, tw)


def test_heads_sharded_over_classes(run):
    run(of_classes)


class Student(nn.Module):
    """A module whose forward returns the loss, so that FSDP2 gathers the head for it."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8, dtype=torch.float64), nn.Linear(8, 30, dtype=torch.float64)

    def forward(self, x, target, kept, normalizer):
        hidden = self.body(x).tanh()
        return linear_js_div(
            hidden, self.head.weight, target, bias=self.head.bias, row_weight=kept, normalizer=normalizer
        )


def data_parallel(size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    x, target = torch.randn(4 * size, 8, dtype=torch.float64), torch.randn(4 * size, 30, dtype=torch.float64)
    kept = torch.arange(4 * size) % 3 > 0
    student = Student()
    student(x, target, kept, None).backward()
    truth = [p.grad.clone() for p in student.parameters()]
    part = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    for wrap in (DistributedDataParallel, lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (size,)))):
        student.zero_grad()
        wrapped = wrap(student)
        wrapped(x[part], target[part], kept[part], kept.sum() / size).backward()
        for p, grad in zip(student.parameters(), truth, strict=True):
            torch.testing.assert_close(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad, grad)


def test_data_parallel(run):
    run(data_parallel)
