"""js_div(inplace_backward=True): the gradient takes the input's memory, or the call is refused."""

from functools import partial

import pytest
import torch
from losses import EPS
from torch.autograd.forward_ad import dual_level, make_dual
from torch.utils.checkpoint import checkpoint

from udi_kernels import js_div, reference

over_input = partial(js_div, inplace_backward=True)
SHAPES = {  # of the logits and of what they are made from, and the dimension of the classes
    "(R, 6)": ((7, 6), -1),
    "(R, 300)": ((7, 300), -1),
    "(B, T, C)": ((2, 3, 130), -1),
    "(N, C, H, W)": ((2, 5, 3, 2), 1),
    "(C, R)": ((40, 7), 0),
    "(A, C, B)": ((2, 200, 3), 1),
}


def logits(*shape, dtype=torch.float32, device="cpu", scale=2):
    return [(scale * torch.randn(shape, device=device)).to(dtype) for _ in range(2)]


def made_from(leaf):
    """What a layer makes: no leaf, with memory of its own."""
    return leaf * 1


def gradients(loss, x, y, grad=None, needs=(True, True), **options):
    """Value and gradients, and the input after the backward pass."""
    leaves = [
        t.clone(memory_format=torch.preserve_format).requires_grad_(n) for t, n in zip((x, y), needs, strict=True)
    ]
    input = made_from(leaves[0])
    value = loss(input, leaves[1], **options)
    value.backward(torch.ones_like(value) if grad is None else grad)
    return value.detach(), *(leaf.grad for leaf in leaves), input.detach()


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 0.9, 1])
@pytest.mark.parametrize("name", SHAPES)
def test_gradient_takes_the_memory_of_the_input(name, beta, device, backend):
    shape, dim = SHAPES[name]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x, y = logits(*shape, dtype=dtype, device=device)
        weight = torch.rand(x.movedim(dim, -1).shape[:-1], device=device)
        weight.view(-1)[::3] = 0
        for options in ({}, dict(weight=weight), dict(weight=weight > 0, reduction="none"), dict(reduction="sum")):
            options |= dict(beta=beta, temperature=1.7, dim=dim)
            value, gx, gy, input = gradients(over_input, x, y, **options)
            assert torch.equal(input, gx)
            for a, b in zip((value, gx, gy), gradients(js_div, x, y, **options), strict=False):
                assert torch.equal(a, b)
            if "weight" in options:
                assert (gx.movedim(dim, -1)[weight == 0] == 0).all()
            del options["dim"]
            wide = [t.movedim(dim, -1).double() for t in (x, y)]
            _, truth, *_ = gradients(
                reference.js_div, *wide, grad=torch.ones_like(value, dtype=torch.float64), **options
            )
            bound = 32 * EPS[dtype if dtype.itemsize == 2 else value.dtype]
            torch.testing.assert_close(
                gx.movedim(dim, -1).double(), truth, rtol=bound, atol=bound * truth.abs().max().item()
            )


@pytest.mark.parametrize("beta", [0.5, 1])
def test_no_memory_but_the_input(beta, device, backend):
    x, y = logits(4, 50, device=device)
    leaf, seen = x.requires_grad_(), []
    input = made_from(leaf)
    input.register_hook(seen.append)
    over_input(input, y, beta=beta).backward()
    assert seen[0].data_ptr() == input.data_ptr()


@pytest.mark.parametrize("permutation", [(1, 0), (0, 2, 1), (2, 0, 1)])
def test_layouts(permutation, device, backend):
    """Those of an op's result, whose strides follow its input's."""
    shape = (5, 140) if len(permutation) == 2 else (5, 140, 3)
    x, y = (t.permute(permutation) for t in logits(*shape, device=device))
    weight = torch.arange(x[..., 0].numel(), device=device).view(x.shape[:-1]) % 3
    for target in (y, y.contiguous()):
        _, gx, gy, input = gradients(over_input, x, target, weight=weight)
        assert input.stride() == x.stride() and torch.equal(input, gx)
        for a, b in zip((gx, gy), gradients(js_div, x, target, weight=weight)[1:], strict=False):
            assert torch.equal(a, b)


def test_three_strides_need_a_copy():
    x, y = (t.permute(2, 1, 0, 3) for t in logits(2, 3, 4, 6))
    message = r"^js_div: inplace_backward .* at most two strides, got \(6, 24, 72, 1\)"
    with pytest.raises(ValueError, match=message):
        gradients(over_input, x, y)


def test_needs(device, backend):
    x, y = logits(5, 200, device=device)
    _, gx, gy, _ = gradients(js_div, x, y)
    assert torch.equal(gradients(over_input, x, y, needs=(True, False))[1], gx)
    leaf, target = x.clone().requires_grad_(), y.clone().requires_grad_()
    input = made_from(leaf)
    loss = over_input(input, target)
    for _ in range(2):  # the target's gradient alone is written over nothing
        assert torch.equal(torch.autograd.grad(loss, target, retain_graph=True)[0], gy)
        assert torch.equal(input, x)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], gx) and torch.equal(input, gx)


def test_gradient_of_the_loss_in_the_memory_of_the_input(device, backend):
    x, y = logits(4, 40, device=device)
    x[:, 0] = torch.rand(4, device=device)
    want = gradients(js_div, x, y, reduction="none", grad=x[:, 0].clone())[1]
    input = made_from(leaf := x.requires_grad_())
    over_input(input, y, reduction="none").backward(input.detach()[:, 0])
    assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows(shape, device, backend):
    x, y = logits(*shape, device=device)
    value, gx, gy, _ = gradients(over_input, x, y, reduction="sum")
    assert value == 0 and gx.shape == gy.shape == shape


def test_one_backward_pass(device, backend):
    x, y = logits(4, 9, device=device)
    input = made_from(x.requires_grad_())
    loss = over_input(input, y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="^js_div: inplace_backward allows one backward pass"):
        loss.backward()
    loss = over_input(input := made_from(x), y)
    with pytest.raises(RuntimeError, match="^js_div: inplace_backward has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(input, x)


@pytest.mark.parametrize("other", [torch.square, lambda z: z.view(-1).square(), lambda z: z * z.detach()])
def test_others_that_saved_the_input_get_autograds_error(other, device, backend):
    x, y = logits(4, 9, device=device)
    input = made_from(x.requires_grad_())
    others, version = other(input).sum(), input._version
    over_input(input, y).backward(retain_graph=True)
    assert input._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        others.backward()


def test_an_op_that_saved_its_result_gets_autograds_error(device, backend):
    x, y = logits(4, 9, device=device)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        over_input(x.requires_grad_().exp(), y).backward()


def test_others_that_saved_nothing_of_it_go_on(device, backend):
    x, y = logits(4, 9, device=device)
    labels = torch.arange(4, device=device)

    def total(loss):
        leaf = x.clone().requires_grad_()
        input = made_from(leaf)
        (loss(input, y) + torch.nn.functional.cross_entropy(input, labels) + (3 * input).sum()).backward()
        return leaf.grad

    assert torch.equal(total(over_input), total(js_div))


@pytest.mark.parametrize("recorded", [True, False])
def test_without_autograd_it_has_no_effect(recorded, device, backend):
    """As in evaluation: the logits are leaves there, and stay."""
    x, y = logits(4, 9, device=device)
    with torch.set_grad_enabled(recorded):
        assert torch.equal(over_input(x, y), js_div(x, y))
    with torch.inference_mode():
        assert torch.equal(over_input(x.clone(), y), js_div(x, y))
    half = x.bfloat16()
    with torch.no_grad():
        assert torch.equal(over_input(half.requires_grad_(), y), js_div(half, y))


class Subclass(torch.Tensor):
    pass


class Overlapping(torch.autograd.Function):
    """Its result is expanded, and no view."""

    @staticmethod
    def forward(ctx, z):
        out = torch.empty_strided(z.shape, (0, 1))
        out[0] = z[0]
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad


def hooked(z, y):
    with torch.autograd.graph.save_on_cpu():
        over_input(z, y)


REFUSED = {
    "needs input to be the result of an op and no view, got a leaf": lambda z, y: over_input(
        z.detach().requires_grad_(), y
    ),
    "needs input .* no view, got a view": lambda z, y: over_input(z[:, :3], y[:, :3]),
    "needs input .*, got a view": lambda z, y: over_input(z.view(4, 3), y.view(4, 3)),
    ".* got a view": lambda z, y: over_input(z[:1].expand(3, 4), y),
    "needs input .* and no view, got a view": lambda z, y: over_input(z.T, y.T, dim=0),
    "needs input without overlaps, got strides .0, 1.": lambda z, y: over_input(Overlapping.apply(z), y),
    "needs .* the result of an op .* got a leaf": lambda z, y: over_input(y, y.clone().requires_grad_()),
    "needs target to be torch.float32 as input is, got torch.bfloat16": lambda z, y: over_input(z, y.bfloat16()),
    "needs target to have its own memory, got input's": lambda z, y: over_input(z, z.detach()),
    "needs weight to have its own memory, got input's": lambda z, y: over_input(z, y, weight=z.detach()[:, 0]),
    "needs input to be a plain torch.Tensor, got Subclass": lambda z, y: over_input(z.as_subclass(Subclass), y),
    "needs to keep input itself, got hooks of saved tensors": hooked,
    "needs .* hooks of saved tensors, such as a checkpoint's": lambda z, y: checkpoint(
        lambda z: over_input(z * 2, y), z, use_reentrant=False
    ),
    "needs plain autograd, got a function transform": lambda z, y: torch.func.grad(lambda z: over_input(z * 2, y))(z),
    "must be a bool, got int": lambda z, y: js_div(z, y, inplace_backward=1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message, refused):
    x, y = logits(3, 4)
    refused(lambda: REFUSED[message](made_from(x.requires_grad_()), y), f"^js_div: inplace_backward {message}")


def test_bad_arguments_are_told_first(refused):
    x = torch.zeros(3, 4)
    refused(lambda: over_input(x, [1.0]), "^js_div: target must be a torch.Tensor, got list")
    refused(lambda: over_input(x, x[:2]), "^js_div: target must have")


def test_forward_mode(backend):
    x, y = logits(3, 4)
    with dual_level():
        dual = make_dual(made_from(x.requires_grad_()), y)
        with pytest.raises(RuntimeError, match="forward AD|jvp"):
            over_input(made_from(dual), y)


def test_reentrant_checkpoint(backend):
    """It records nothing at first, and then all again."""
    x, y = logits(3, 40)

    def gradient(loss):
        leaf = x.clone().requires_grad_()
        checkpoint(lambda z: loss(z * 2, y), leaf, use_reentrant=True).backward()
        return leaf.grad

    assert torch.equal(gradient(over_input), gradient(js_div))


def test_compile(backend):
    torch._dynamo.reset()
    x, y = logits(3, 40)

    def loss(leaf, y, op=over_input):
        return op(made_from(leaf), y)

    with pytest.raises(Exception, match="js_div: inplace_backward needs eager mode, got torch.compile"):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x.clone().requires_grad_(), y)
    torch._dynamo.reset()
    leaf, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.compile(loss, backend="aot_eager")(leaf, y).backward()  # eager from the loss on
    loss(plain, y, js_div).backward()
    torch.testing.assert_close(leaf.grad, plain.grad)
