"""Wherever PyTorch goes: function transforms, forward-mode AD, checkpointing, inference mode."""

from functools import partial

import pytest
import torch
from torch.func import grad, hessian, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from udi_kernels import club_mi, club_nll, js_div, reference, skew_kl

LOSSES = {
    "js_div": (js_div, reference.js_div, 2),
    "js_div, weighted": (
        lambda x, y: js_div(x, y, beta=0.3, temperature=2.0, weight=torch.arange(4).to(x.device)),
        lambda x, y: reference.js_div(x, y, beta=0.3, temperature=2.0, weight=torch.arange(4).to(x.device)),
        2,
    ),
    "js_div, KL": (partial(js_div, beta=0), partial(reference.js_div, beta=0), 2),
    "skew_kl": (partial(skew_kl, temperature=2.0), partial(reference.skew_kl, temperature=2.0), 2),
    "skew_kl, reverse": (partial(skew_kl, reverse=True), partial(reference.skew_kl, reverse=True), 2),
    "club_mi": (club_mi, reference.club_mi, 3),
    "club_mi, given": (
        partial(club_mi, given=torch.tensor([3, 0, 3, 3])),
        partial(reference.club_mi, given=torch.tensor([3, 0, 3, 3])),
        3,
    ),
    "club_nll": (club_nll, reference.club_nll, 3),
}


@pytest.fixture(params=LOSSES)
def loss(request):
    ours, plain, n = LOSSES[request.param]
    return ours, plain, [torch.randn(4, 5, dtype=torch.float64) for _ in range(n)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arguments", [0, 1, (0, 1)])
def test_grad_and_vjp(loss, arguments):
    ours, plain, inputs = loss
    close(grad(ours, arguments)(*inputs), grad(plain, arguments)(*inputs))
    value, pull = vjp(ours, *inputs)
    close(value, plain(*inputs))
    close(pull(torch.tensor(2.0).double()), vjp(plain, *inputs)[1](torch.tensor(2.0).double()))


def test_jvp_and_hessian(loss):
    ours, plain, inputs = loss
    tangents = [torch.randn_like(x) for x in inputs]
    close(jvp(ours, tuple(inputs), tuple(tangents)), jvp(plain, tuple(inputs), tuple(tangents)))
    close(hessian(ours)(*inputs), hessian(plain)(*inputs))
    close(
        grad(lambda *xs: grad(ours)(*xs).square().sum())(*inputs),
        grad(lambda *xs: grad(plain)(*xs).square().sum())(*inputs),
    )


def test_forward_mode(loss):
    ours, plain, inputs = loss
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, torch.randn_like(x)) for x in inputs]
        close(*(torch.autograd.forward_ad.unpack_dual(f(*duals)).tangent for f in (ours, plain)))


@pytest.mark.parametrize("in_dims", [0, 1])
def test_vmap(loss, in_dims):
    ours, plain, inputs = loss
    batches = [torch.randn(4, 6, 5, dtype=torch.float64).transpose(0, 1 - in_dims) for _ in inputs]
    for f, g in (
        (ours, plain),
        (grad(ours), grad(plain)),
        (lambda *x: ours(inputs[0], *x[1:]), lambda *x: plain(inputs[0], *x[1:])),
    ):
        close(vmap(f, in_dims)(*batches), vmap(g, in_dims)(*batches))
    shared = (None,) + (in_dims,) * (len(inputs) - 1)
    close(vmap(grad(ours), shared)(inputs[0], *batches[1:]), vmap(grad(plain), shared)(inputs[0], *batches[1:]))


def test_transforms_in_a_compiled_step(loss):
    ours, plain, inputs = loss
    compiled = torch.compile(lambda *xs: vmap(grad(ours))(*xs), fullgraph=True, backend="aot_eager")
    batches = [torch.stack([x, 2 * x, x.flip(0)]) for x in inputs]
    close(compiled(*batches), vmap(grad(plain))(*batches))


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_of_head_and_loss(loss, early_stop, use_reentrant):
    ours, _, inputs = loss
    head = torch.nn.Linear(5, 5).double()

    def step(x, *others):
        return ours(head(x), *(head(o) for o in others))

    def gradients(run):
        leaves = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(run(*leaves), [*leaves, *head.parameters()])

    want = gradients(step)
    with set_checkpoint_early_stop(early_stop):
        if use_reentrant:

            def run(*xs):
                leaves = [x.clone().requires_grad_() for x in inputs]
                checkpoint(step, *leaves, use_reentrant=True).backward()
                return [x.grad for x in leaves]

            got = run()
            head.zero_grad()
            assert all(map(torch.equal, got, want))
        else:
            got = gradients(lambda *xs: checkpoint(step, *xs, use_reentrant=False))
            assert all(map(torch.equal, got, want))
            loss_alone = gradients(lambda *xs: checkpoint(ours, *map(head, xs), use_reentrant=False))
            assert all(map(torch.equal, loss_alone, want))


def test_inputs_made_under_inference_mode(loss):
    ours, _, inputs = loss
    with torch.inference_mode():
        teacher = [x.clone() for x in inputs[1:]]
        assert not ours(*(x.clone() for x in inputs)).requires_grad
    leaf = inputs[0].clone().requires_grad_()
    got = torch.autograd.grad(ours(leaf, *teacher), leaf)
    assert torch.equal(got[0], torch.autograd.grad(ours(leaf, *inputs[1:]), leaf)[0])
    assert torch.equal(ours(inputs[0], *teacher), ours(*inputs))


def test_inference_weight():
    with torch.inference_mode():
        weight = torch.rand(4)
    x, y = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    for reduction in ("mean", "sum"):
        loss = js_div(x, y, weight=weight, reduction=reduction)
        want = js_div(x, y, weight=weight.clone(), reduction=reduction)
        assert torch.equal(torch.autograd.grad(loss, x)[0], torch.autograd.grad(want, x)[0])
