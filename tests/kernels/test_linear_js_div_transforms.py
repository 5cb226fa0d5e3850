"""linear_js_div under autocast, torch.compile, checkpointing, tied weights and repeated backward passes."""

import pytest
import torch
from losses import run
from test_linear_js_div import assert_close, draw, plain
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from udi_kernels import js_div, linear_js_div


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16])
def test_autocast_computes_products_in_its_dtype(dtype, teacher):
    """As the composite does, with gradients of the parameters summed in float32."""
    x, w, b, t, tw, tb = draw(40, 301, 16)
    t, tw, tb = (z.to(teacher) for z in (t, tw, tb))

    def ours(x, w, b):
        with torch.autocast("cpu", dtype):
            return linear_js_div(x, w, t, tw, bias=b, target_bias=tb, chunk=8)

    def theirs(x, w, b):
        with torch.autocast("cpu", dtype):
            return js_div(linear(x, w, b), linear(t, tw, tb))

    truth = run(lambda x, w, b: plain(x, w, b, t.double(), tw.double(), tb.double()), [z.double() for z in (x, w, b)])
    for a, c, z in zip(run(ours, (x, w, b)), run(theirs, (x, w, b)), truth, strict=True):
        assert a.dtype == torch.float32
        assert (a - z).norm() <= 1.1 * (c - z).norm() + 2e-3 * z.norm()


def test_autocast_needs_one_dtype_of_neither_head():
    x, w, _, t, tw, _ = draw()
    with pytest.raises(TypeError, match="weight must be torch.bfloat16 as input is"):
        linear_js_div(x.bfloat16(), w, t, tw)
    with torch.autocast("cpu", torch.bfloat16):
        linear_js_div(x.bfloat16(), w, t.half(), tw)


def test_autocast_leaves_float64_alone():
    x, w, _, t, tw, _ = draw(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_js_div(x, w, t, tw) == linear_js_div(x, w, t, tw)
        assert linear_js_div(x, w, t, tw).dtype == torch.float64


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend, mask):
    x, w, b, t, tw, tb = draw(dtype=torch.float64)
    labels = torch.randint(301, (11,))
    options = dict(row_weight=labels > 100, labels=labels, hard_weight=0.5, normalizer=labels.sum()) if mask else {}

    def step(x, w, b):
        return 3 * linear_js_div(x * 2, w, t, tw, bias=b, target_bias=tb, chunk=4, **options)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert_close(run(compiled, (x, w, b)), run(step, (x, w, b)), 1e-12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, w, b), step(x, w, b))


def test_compile_under_autocast():
    x, w, b, t, tw, _ = draw()

    def step(x, w, b):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_js_div(x, w, t, tw, bias=b, chunk=4)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, (x, w, b)), run(step, (x, w, b)), 1e-6)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_opcheck(needs):
    x, w, b, t, tw, tb = draw()
    soft, scale = torch.rand(11), torch.tensor(2.0)
    arguments = (x, w, b, t, None, tw, tb, soft, None, None, scale, False, 0.5, 1.0, 4, None, *needs)
    torch.library.opcheck(torch.ops.udi_kernels.linear_js_div_fwd, arguments)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    x, w, _, t, tw, _ = draw(dtype=torch.float64)

    def plainly(x, w):
        return linear_js_div(x.tanh(), w, t, tw, chunk=4)

    saved = run(lambda x, w: checkpoint(plainly, x, w, use_reentrant=reentrant), (x, w))
    assert_close(saved, run(plainly, (x, w)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_retain_graph(dtype):
    """A pass that keeps the graph changes nothing that the next one reads."""
    x, w, b, t, tw, _ = draw(dtype=dtype)
    leaves = [z.requires_grad_() for z in (x, w, b)]
    loss = linear_js_div(x, w, t, tw, bias=b, chunk=4)
    first = torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)
    copies = [g.clone() for g in first]
    loss.backward(torch.tensor(3.0), retain_graph=True)
    loss.backward(torch.tensor(3.0))
    for g, copy, leaf in zip(first, copies, leaves, strict=True):
        assert torch.equal(g, copy) and torch.equal(leaf.grad, copy + copy)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_are_the_users():
    """What backward returns is no memory that a later pass changes."""
    x, w, _, t, tw, _ = draw()
    for z in (x, w):
        z.requires_grad_()
    (linear_js_div(x, w, t, tw) + linear_js_div(2 * x, w, t, tw)).backward()
    separate = [run(lambda x, w, s=s: linear_js_div(s * x, w, t, tw), (x, w))[1:] for s in (1, 2)]
    for leaf, a, b in zip((x, w), *separate, strict=True):
        torch.testing.assert_close(leaf.grad, a + b)


def test_second_derivative_is_refused():
    x, w, _, t, tw, _ = draw()
    x.requires_grad_()
    for loss in (linear_js_div(x, w, t, tw), linear_js_div(x.tanh(), w, t, tw) ** 2):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.testing.assert_close(grad.detach(), grad.detach().clone())
        with pytest.raises(RuntimeError, match="linear_js_div: has no second derivative"):
            torch.autograd.grad(grad.square().sum() + x.sum(), x)


def test_function_transforms_take_the_reference():
    x, w, _, t, tw, _ = draw(dtype=torch.float64)
    grad = torch.func.grad(lambda x: linear_js_div(x, w, t, tw))(x)
    torch.testing.assert_close(grad, run(lambda x: linear_js_div(x, w, t, tw), (x,))[1])


def test_tied_weights():
    """One weight as embedding and head; and as the teacher's head too."""
    embedding = nn.Embedding(301, 8, dtype=torch.float64)
    tokens = torch.randint(301, (11,))
    t = torch.randn(11, 8, dtype=torch.float64)
    weight = embedding.weight

    def loss(head):
        return head(embedding(tokens).tanh(), weight, t, weight.detach())

    (ours,) = torch.autograd.grad(loss(lambda *a: linear_js_div(*a, chunk=4)), weight)
    (theirs,) = torch.autograd.grad(loss(lambda x, w, t, tw: js_div(linear(x, w), linear(t, tw))), weight)
    torch.testing.assert_close(ours, theirs)


def test_nothing_as_large_as_the_logits_is_kept():
    kept = []
    x, w, b, t, tw, _ = draw(64, 301)
    for z in (x, w, b):
        z.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda z: (kept.append(z.numel()), z)[1], lambda z: z):
        linear_js_div(x, w, t, tw, bias=b, chunk=8).backward()
    assert max(kept) == w.numel() and sum(kept) == 2 * (x.numel() + w.numel() + b.numel()) + 1


def test_inference_tensors():
    x, w, _, t, tw, _ = draw()
    with torch.inference_mode():
        y = linear(t, tw)
        expected = linear_js_div(x, w, t, tw)
    loss = linear_js_div(x, w.requires_grad_(), y)
    torch.testing.assert_close(loss.detach(), expected.clone())
    loss.backward()
