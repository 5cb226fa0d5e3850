"""Several threads at once, and processes forked after use."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from lists import draw

from udi_kernels import GradientPlan, club_mi, gramian, js_div, weighted_sum


def test_threads_calling_at_once():
    """Also the same plan: on a CPU its calls share nothing but what they read."""
    x, y = torch.randn(300, 101), torch.randn(300, 101)
    grads, weights = draw(3), torch.randn(3)
    plan = GradientPlan(grads)

    def step(_):
        leaf = x.clone().requires_grad_()
        loss = js_div(leaf, y) + club_mi(y, y.tanh(), leaf)
        loss.backward()
        return [loss.detach(), leaf.grad, gramian(grads), plan.gramian(), *weighted_sum(grads, weights)]

    want = step(0)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(step, range(64)):
            assert all(map(torch.equal, got, want))


FORK = """
import os, sys, torch
from udi_kernels import GradientPlan, gramian, js_div
torch.set_num_threads(2)
x = torch.randn(400, 300)
def results():
    leaf = x.clone().requires_grad_()
    js_div(leaf, x.roll(1, 0)).backward()
    return [leaf.grad, gramian([[x], [leaf.grad]]), plan.gramian()]
plan = GradientPlan([[x], [x.roll(1, 0)]])
want = results()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as DataLoader's workers do: OpenMP's threads do not survive a fork
    os._exit(0 if all(map(torch.equal, results(), want)) else 3)
assert os.waitpid(child, 0)[1] == 0
assert all(map(torch.equal, results(), want))
print("fine")
"""


def test_fork_after_use():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # else autograd has threads, and torch refuses to fork
    run = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, env=env)
    assert run.stdout == "fine\n", run.stderr
