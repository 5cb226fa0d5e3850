from functools import partial

import pytest
import torch
from losses import assert_as_good_as_torch, run

from udi_kernels import certainty_fusion, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 3, 5), (3, 64, 6), (3, 20, 101), (2, 5, 1271), (7, 33, 41), (4, 1, 1)]


def plain(logits, temperature):
    """Head by head, as the paper's code has it."""
    probabilities = [z.softmax(1) for z in logits]
    weights = torch.stack([p.max(1).values for p in probabilities]).div(temperature).softmax(0)
    return sum(w[:, None] * z for w, z in zip(weights, logits, strict=True))


def draw(shape, dtype=torch.float32, device="cpu"):
    return [(3 * torch.randn(shape, device=device)).to(dtype)]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype, temperature, device):
    ops = [partial(op, temperature=temperature) for op in (certainty_fusion, reference.certainty_fusion)]
    assert_as_good_as_torch(*ops, lambda: draw(shape, dtype, device))


def test_parity_with_the_plain_form(device):
    inputs = draw((3, 20, 11), torch.float64, device)
    ours, theirs = run(partial(certainty_fusion, temperature=3.0), inputs), run(partial(plain, temperature=3.0), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_surest_head_wins_at_low_temperature(device):
    (logits,) = draw((3, 50, 7), device=device)
    surest = logits.softmax(-1).amax(-1).argmax(0)
    want = logits[surest, torch.arange(50, device=device)]
    torch.testing.assert_close(certainty_fusion(logits, temperature=1e-6), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 6, 16])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_few_classes_are_as_many(rows, classes, dtype, device):
    """A CPU computes rows of up to 16 classes together; impossible classes beyond change nothing."""
    (logits,) = draw((3, rows, classes), dtype, device)
    few = certainty_fusion(logits, temperature=0.3)
    many = certainty_fusion(torch.nn.functional.pad(logits, (0, 4), value=-float("inf")), temperature=0.3)
    assert (many[:, classes:] == -float("inf")).all()
    torch.testing.assert_close(few, many[:, :classes], rtol=0 if device == "cpu" else 1e-6, atol=0)


def test_hostile_logits(device):
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, -1e4, -1e4]], [[0.0, -float("inf"), 1.0]]], device=device)
    want = reference.certainty_fusion(logits.double())
    torch.testing.assert_close(certainty_fusion(logits), want.float())
    logits[1] = float("nan")
    assert certainty_fusion(logits).isnan().all()


def with_impossible_classes(dtype=torch.float32, device="cpu"):
    (logits,) = draw((3, 6, 20), dtype, device)
    logits[0] *= 20
    logits[..., 3] = logits[1, 2, 17] = logits[0, 4, 0] = -float("inf")
    return logits


@pytest.mark.parametrize("temperature", [1e-37, 1e-3, 1.0, 1e37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_impossible_classes(dtype, temperature, device, backend):
    """Their fused logit is -inf; value and gradient of the others are as if these outputs did not exist."""
    logits = with_impossible_classes(dtype, device)
    impossible = (logits == -float("inf")).any(0)
    f = partial(certainty_fusion, temperature=temperature)
    for grad in (torch.ones(6, 20, device=device), torch.ones(6, 20, device=device).masked_fill(impossible, 0)):
        value, found = run(f, [logits], grad=grad)
        assert (value[impossible] == -float("inf")).all() and value[~impossible].isfinite().all()
        leaf = logits.double().requires_grad_()
        s = leaf.softmax(-1).amax(-1, keepdim=True)
        weights = ((s - s.amax(0).detach()) / temperature).softmax(0)
        truth = (weights * leaf.masked_fill(impossible, 0)).sum(0)
        want = torch.autograd.grad(truth, leaf, grad.masked_fill(impossible, 0).double())[0]
        tolerance = 2e-2 if dtype.itemsize == 2 else 1e-4 / min(1, temperature * 100) if temperature > 1e-37 else 1e-4
        torch.testing.assert_close(value[~impossible].double(), truth[~impossible], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)
    loss = torch.nn.functional.cross_entropy(f(logits.float().requires_grad_()), torch.full((6,), 9, device=device))
    assert loss.isfinite()


def test_temperatures_at_the_ends(device, backend):
    (logits,) = draw((3, 50, 7), device=device)
    logits[1] = logits[0]
    surest = logits.softmax(-1).amax(-1)
    weights = (surest == surest.amax(0)).float()
    weights /= weights.sum(0)
    for temperature, w in ((1e-37, weights), (1e37, torch.full_like(weights, 1 / 3))):
        value, grad = run(partial(certainty_fusion, temperature=temperature), [logits])
        torch.testing.assert_close(value, (w[..., None] * logits).sum(0))
        torch.testing.assert_close(grad, w[..., None].expand_as(logits))


def test_equal_largest_logits_share_the_gradient(device):
    logits = torch.tensor([[[2.0, 2.0, 1.0]], [[0.0, 3.0, 3.0]]], device=device)
    grad = torch.tensor([[1.0, -1.0, 0.5]], device=device)
    ours, want = (run(f, [logits.double()], grad=grad) for f in (certainty_fusion, reference.certainty_fusion))
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b)


def test_strides_and_expanded_gradient(device):
    base = torch.randn(40, 3, 22, device=device)
    for view in (base.transpose(0, 1)[:, :, :11], base.permute(1, 2, 0), base[:1].expand(5, 3, 22)):
        want = run(lambda z: certainty_fusion(z).sum(), [view.contiguous()])
        leaf = view.detach().requires_grad_()
        value = certainty_fusion(leaf).sum()
        got = value, torch.autograd.grad(value, leaf)[0]
        torch.testing.assert_close(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_gradcheck_and_double_backward(device):
    (logits,) = draw((3, 4, 5), torch.float64, device)
    f = partial(certainty_fusion, temperature=0.7)
    assert torch.autograd.gradcheck(f, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(f, logits)


def test_retain_graph_empty_and_bit_identical(device):
    (logits,) = draw((3, 500, 10), device=device)
    leaf = logits.requires_grad_()
    out = certainty_fusion(leaf)
    first, second = (torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(out, certainty_fusion(leaf))
    empty = torch.empty(3, 0, 5, device=device, requires_grad=True)
    out = certainty_fusion(empty)
    assert out.shape == (0, 5) and torch.autograd.grad(out.sum(), empty)[0].shape == (3, 0, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_and_compile(dtype, device):
    (logits,) = draw((3, 8, 5), dtype, device)
    want = certainty_fusion(logits, temperature=2.0)
    assert want.dtype == dtype
    ops = torch.ops.udi_kernels
    torch.library.opcheck(ops.certainty_fusion.default, (logits.detach().requires_grad_(), 2.0))
    torch.library.opcheck(ops.certainty_fusion_fwd.default, (logits, 2.0))
    torch.library.opcheck(ops.certainty_fusion_bwd.default, (torch.ones_like(want), logits, 2.0, True))
    compiled = torch.compile(partial(certainty_fusion, temperature=2.0), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, [logits]), run(partial(certainty_fusion, temperature=2.0), [logits]))


BAD = {
    "logits must be a torch.Tensor, got list": lambda z: certainty_fusion([z, z]),
    "logits must be float.*, got torch.int64": lambda z: certainty_fusion(z.long()),
    r"logits must have shape \(M, N, C\) .* got \(3, 4\)": lambda z: certainty_fusion(z[0]),
    r"logits must have .* at least one head and class, got \(0, 3, 4\)": lambda z: certainty_fusion(z[:0]),
    r"logits must have .* at least one head and class, got \(2, 3, 0\)": lambda z: certainty_fusion(z[..., :0]),
    r"temperature must lie in \[1e-37, 1e37\], got -1": lambda z: certainty_fusion(z, temperature=-1),
    r"temperature must lie in \[1e-37, 1e37\], got 9e-38": lambda z: certainty_fusion(z, temperature=9e-38),
    r"temperature must lie in \[1e-37, 1e37\], got 1.1e\+37": lambda z: certainty_fusion(z, temperature=1.1e37),
    "temperature must be a number": lambda z: certainty_fusion(z, temperature=torch.ones(())),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, refused):
    refused(lambda: BAD[message](torch.zeros(2, 3, 4)), f"^certainty_fusion: {message}")
