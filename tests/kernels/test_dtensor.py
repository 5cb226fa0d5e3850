"""DTensor gradients in two processes: every rank has the result of the whole gradients."""

import os
import socket
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

WORKER = """
import os, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
import udi_kernels
from udi_kernels import GradientPlan, gramian, weighted_sum

torch.manual_seed(0)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
whole = [[torch.randn(s) for s in ((5, 3), (4, 7), (3,), (1, 2))] for _ in range(3)]
whole[1][2] = None
places = [[Shard(0)], [Shard(1)], [Replicate()], [Shard(0)]]  # uneven shards; rank 1 has nothing of the last
grads = [[t if t is None else distribute_tensor(t, mesh, p) for t, p in zip(row, places)] for row in whole]
weights = torch.tensor([1.0, -0.5, 2.0])

calls = 0
reduce = dist.all_reduce
def counted(*args, **kwargs):
    global calls
    calls += 1
    return reduce(*args, **kwargs)
dist.all_reduce = counted
gram = gramian(grads)
assert calls == 1 and type(gram) is torch.Tensor
truth = gramian(whole)
torch.testing.assert_close(gram, truth)
both = [torch.empty_like(gram) for _ in range(2)]
dist.all_gather(both, gram)
assert torch.equal(*both)
exact = [[t if t is None else t.double() for t in row] for row in grads]
torch.testing.assert_close(gramian(exact), gramian([[t if t is None else t.double() for t in row] for row in whole]))

want = weighted_sum(whole, weights)
out = [torch.zeros_like(t) for t in grads[0]]
for sums in (weighted_sum(grads, weights), weighted_sum(grads, weights, out=out)):
    for s, t, g in zip(sums, want, grads[0]):
        assert s.placements == g.placements and s.shape == g.shape and torch.equal(s.full_tensor(), t)

turned = [distribute_tensor(t.t().contiguous(), mesh, [p]) for t, p in zip(whole[0][:2], (Shard(1), Shard(0)))]
like = [turned[0].t(), turned[1].t(), *grads[0][2:]]  # transposed parameters, sharded as the gradients
for s, t, p in zip(weighted_sum(grads, weights, like=like), want, like):
    assert s.stride() == p.stride() and s.to_local().stride() == p.to_local().stride()
    assert torch.equal(s.full_tensor(), t)

mixed = [[row[0], whole[i][1]] for i, row in enumerate(grads)]  # beside plain tensors, which all ranks have
truth = gramian([row[:2] for row in whole])
torch.testing.assert_close(gramian(mixed), truth)
assert torch.equal(gramian([[row[2]] for row in grads]), gramian([[row[2]] for row in whole]))

def refused(error, words, call):
    try:
        call()
    except error as e:
        assert words in str(e), e
    else:
        raise AssertionError(words)

refused(TypeError, "GradientPlan: grads[0][0] must be a plain tensor, whose memory the plan reads, got a DTensor",
        lambda: GradientPlan(grads))
other = [[distribute_tensor(row[0], mesh, [p])] for row, p in zip(whole, (Shard(0), Shard(1)))]
refused(ValueError, "gramian: grads[1][0] must have placements (Shard(dim=0),) as grads[0][0]", lambda: gramian(other))
part = [[DTensor.from_local(row[0], mesh, [Partial()])] for row in whole]
refused(ValueError, "a sum that is not made yet; call .redistribute()", lambda: gramian(part))
refused(ValueError, "weighted_sum: like[0] must have placements (Shard(dim=0),) as parameter 0's gradient",
        lambda: weighted_sum([row[:1] for row in grads], weights, like=[whole[0][0]]))
refused(ValueError, "must be lists where they are DTensors", lambda: gramian(grads[0][:2], stacked=True))

model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
single = [p.detach().clone().requires_grad_() for p in model.parameters()]
x = torch.randn(8, 6)
def losses(out):
    return out.square().mean(), out.abs().mean(), out.sin().sum()
from torch.distributed.fsdp import fully_shard
plain = [torch.autograd.grad(l, list(model.parameters()), retain_graph=True) for l in losses(model(x))]
fully_shard(model)
lists = []
for i in range(3):
    losses(model(x))[i].backward()
    lists.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
torch.testing.assert_close(gramian(lists), gramian(plain))
for p, g in zip(model.parameters(), weighted_sum(lists, weights, like=model.parameters())):
    assert type(g) is DTensor and not g.requires_grad and g.placements == p.placements
    p.grad = g
torch.optim.SGD(model.parameters(), lr=0.1).step()

with_2_dims = init_device_mesh("cpu", (1, 2))
hybrid = [[distribute_tensor(t, with_2_dims, [Replicate(), Shard(0)]) for t in row[:2]] for row in whole]
torch.testing.assert_close(gramian(hybrid), truth)
dist.barrier()
dist.destroy_process_group()
print("fine", flush=True)
os._exit(0)  # DTensor's caches keep gloo's threads, and one that lets go of a tensor while Python ends would abort
"""


def test_two_processes(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env["MASTER_PORT"] = str(free.getsockname()[1])
    command = [sys.executable, script]
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=240)
        assert rank.returncode == 0 and out == "fine\n", err
