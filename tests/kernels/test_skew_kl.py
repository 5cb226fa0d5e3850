import itertools
import math
from functools import partial

import pytest
import torch
from losses import EPS, assert_as_good_as_torch, run
from torch._subclasses.fake_tensor import FakeTensorMode

from udi_kernels import js_div, reference, skew_kl

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INF = float("inf")
reverses = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def logits(rows, classes, dtype=torch.float32, device="cpu", apart=3.0):
    x = 2 * torch.randn(rows, classes, device=device)
    return [z.to(dtype) for z in (x, x + apart * torch.randn(rows, classes, device=device))]


def truth(input, target, weight=None, *, alpha=0.1, reverse=False, temperature=1.0, reduction="mean"):
    """By the definition, in float64."""
    q, p = ((z.double() / temperature).softmax(-1) for z in (input, target))
    if reverse:
        q, p = p, q
    m = alpha * p + (1 - alpha) * q
    rows = torch.where(p == 0, 0, p * (torch.where(p == 0, 1, p) / m).log()).sum(-1)
    w = torch.ones_like(rows) if weight is None else weight.double()
    rows = rows * w
    return rows if reduction == "none" else rows.sum() / (w.sum() if reduction == "mean" else 1)


@reverses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition(dtype, reverse, device, backend):
    """Values and gradients over all options, classes and strides."""
    options = itertools.product((0, 1e-3, 0.1, 0.5, 0.9), (1.0, 0.5, 4.0), (False, True), ("mean", "sum", "none"))
    for i, (alpha, temperature, weighted, reduction) in enumerate(options):
        classes = (5, 41, 200)[i % 3]
        x, y = logits(7, 2 * classes, dtype, device)
        x, y = ((x[:, ::2], y[:, 1::2]), (x[:, :classes], y[:, classes:]), (x[::2], y[::2]))[i // 3 % 3]
        weight = torch.rand(len(x), device=device) if weighted else None
        kind = dict(alpha=alpha, reverse=reverse, temperature=temperature, reduction=reduction)
        grad = torch.rand(len(x) if reduction == "none" else (), device=device)
        got = run(partial(skew_kl, weight=weight, **kind), (x, y), grad=grad)
        want = run(partial(truth, weight=weight, **kind), (x.double(), y.double()), grad=grad)
        for a, b in zip(got, want, strict=True):
            eps = max(EPS[a.dtype], 1e-14)  # the truth is of float64 too
            terms = b.abs().max().item() + grad.max().item() / temperature  # some cancel
            torch.testing.assert_close(a.double(), b, rtol=30 * eps, atol=30 * EPS[got[0].dtype] * terms + 6e-8)


@reverses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 7, 16, 41, 65, 101, 1271, 40000])
def test_accuracy(classes, dtype, reverse, device):
    rows = 37 if classes < 1000 else 3
    for alpha, temperature, apart in ((0.1, 1.0, 3.0), (0.0, 2.0, 1.0), (0.6, 0.5, 1e-2), (0.3, 1.0, 10.0)):
        options = dict(alpha=alpha, reverse=reverse, temperature=temperature, reduction="none")
        assert_as_good_as_torch(
            partial(skew_kl, **options),
            partial(reference.skew_kl, **options),
            lambda apart=apart: logits(rows, classes, dtype, device, apart),
        )


@reverses
@pytest.mark.parametrize("classes", [6, 101, 1271])
@pytest.mark.parametrize("alpha", [1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("apart", [1e-3, 1e-2, 1, 4])
def test_relative_accuracy(apart, alpha, classes, reverse, device):
    """For nearly equal rows and next to alpha = 1 value and gradients are small: what cancels would show."""
    x = torch.randn(48, classes, device=device)
    y = x + apart * torch.randn_like(x)
    kind = dict(alpha=alpha, reverse=reverse)
    want = run(partial(reference.skew_kl, **kind), (x.double(), y.double()))
    bounds = (3e-6, 1e-5, 1e-5) if apart > 0.1 else (2e-5, 1e-3, 1e-3)  # logits of 1e-7 accuracy are 1e-3 apart
    for ours, t, bound in zip(run(partial(skew_kl, **kind), (x, y)), want, bounds, strict=True):
        assert (ours - t).abs().max() < bound * t.abs().max()


def test_kl_at_alpha_0(device, backend):
    x, y = logits(9, 50, device=device)
    for reverse in (False, True):
        got = run(partial(skew_kl, alpha=0, reverse=reverse), (x, y))
        assert all(map(torch.equal, got, run(partial(js_div, beta=int(reverse)), (x, y))))


def test_reverse_exchanges_the_sides(device, backend):
    x, y = logits(9, 50, device=device)
    a, ax, ay = run(partial(skew_kl, alpha=0.7, reverse=True), (x, y))
    b, by, bx = run(partial(skew_kl, alpha=0.7), (y, x))
    assert torch.equal(a, b) and torch.equal(ax, bx) and torch.equal(ay, by)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_halves_of_js_div(alpha, device):
    x, y = logits(9, 50, torch.float64, device)
    halves = skew_kl(x, y, alpha=alpha), skew_kl(x, y, alpha=1 - alpha, reverse=True)
    torch.testing.assert_close(alpha * halves[0] + (1 - alpha) * halves[1], js_div(x, y, beta=alpha))


@reverses
def test_equal_rows_give_exactly_zero(reverse, device):
    for classes in (1, 6, 50, 1000):
        for alpha in (0, 1e-3, 0.1, 0.5, 0.7):
            x = torch.randn(9, classes, device=device) * 20
            x[0, 0] = -INF if classes > 1 else 0
            value, gx, gy = run(partial(skew_kl, alpha=alpha, reverse=reverse, reduction="none"), (x, x.clone()))
            assert (value == 0).all() and (gx == 0).all() and (gy == 0).all()


@reverses
@pytest.mark.parametrize("alpha", [0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("classes", [3, 300])
def test_rows_are_never_negative(classes, alpha, reverse, device, backend):
    x = torch.randn(2000, classes, device=device)
    for y in (x + 1e-6 * torch.randn_like(x), x + torch.randn(2000, 1, device=device)):
        assert (skew_kl(x, y, alpha=alpha, reverse=reverse, reduction="none") >= 0).all()
    x[1, 2] = math.nan
    assert skew_kl(x, y, alpha=alpha, reverse=reverse, reduction="none")[:3].isnan().tolist() == [False, True, False]


@reverses
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 0.9])
@pytest.mark.parametrize("classes", [6, 200])
def test_bounded_where_logits_are_infinite(classes, alpha, reverse, device, backend):
    x, y = logits(5, classes, device=device)
    x[0, 0] = y[0, 0] = y[1, 1] = x[2, 2] = -INF  # a class that neither side has, and only one
    x[3], y[3] = (torch.full((classes,), -INF).scatter(0, torch.tensor(i), 0.0) for i in (1, 2))  # disjoint
    x[4], y[4] = (torch.full((classes,), -200.0).scatter(0, torch.tensor(i), 0.0) for i in (1, 2))
    kind = dict(alpha=alpha, reverse=reverse, reduction="none")
    value, gx, gy = run(partial(skew_kl, **kind), (x, y))
    torch.testing.assert_close(value.double(), truth(x, y, **kind), rtol=1e-5, atol=1e-6)
    assert value.max() <= -math.log(alpha) * (1 + 1e-6)
    assert gx.isfinite().all() and gy.isfinite().all()
    assert (gx[x == -INF] == 0).all() and (gy[y == -INF] == 0).all()
    finite = [z.double().clamp_min(-600) for z in (x, y)]
    for got, want in zip((gx, gy), run(partial(truth, **kind), finite)[1:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@reverses
@pytest.mark.parametrize("alpha", [0, 0.1, 0.8])
@pytest.mark.parametrize("classes", [6, 300])
def test_masked_rows_hold_anything(classes, alpha, reverse, device, backend):
    x, y = logits(9, classes, device=device)
    weight = torch.tensor([1, 0, 2, 0, 1, 1, 0, 0, 3], device=device)
    kept = weight != 0
    x[1], y[3], x[6, 0], y[7, 1] = math.nan, INF, -INF, torch.finfo(torch.float32).min
    for reduction in ("mean", "sum", "none"):
        kind = dict(alpha=alpha, reverse=reverse, reduction=reduction)
        value, gx, gy = run(partial(skew_kl, weight=weight, **kind), (x, y))
        want, *grads = run(partial(skew_kl, weight=weight[kept], **kind), (x[kept], y[kept]))
        torch.testing.assert_close(value[kept] if reduction == "none" else value, want)
        for got, grad in zip((gx, gy), grads, strict=True):
            torch.testing.assert_close(got[kept], grad)
            assert (got[~kept] == 0).all()
        for t in run(partial(skew_kl, weight=torch.zeros_like(weight), **kind), (x, y)):
            assert (t == 0).all()


def test_nan_reaches_the_results(device, backend):
    for side in (0, 1):
        for reverse in (False, True):
            z = logits(3, 40, device=device)
            z[side][1, 3] = math.nan
            for t in run(partial(skew_kl, reverse=reverse, reduction="none"), z):
                assert t.isnan().reshape(3, -1).all(1).tolist() == [False, True, False]


def test_log_probabilities_and_other_vocabularies(device):
    """Of the docstring."""
    x, y = logits(7, 30, device=device)
    same = skew_kl(x.log_softmax(-1), y.log_softmax(-1))
    torch.testing.assert_close(same, skew_kl(x, y))
    wide = torch.randn(7, 40, device=device, requires_grad=True)
    loss = skew_kl(wide[..., :30], y)
    torch.testing.assert_close(loss.detach(), skew_kl(wide[..., :30].contiguous(), y).detach())
    loss.backward()
    assert (wide.grad[:, 30:] == 0).all() and wide.grad[:, :30].abs().sum() > 0


def test_gradcheck_and_double_backward(device):
    x, y = (t.requires_grad_() for t in logits(4, 5, torch.float64, device))
    for kind in (dict(alpha=0.3), dict(alpha=0.7, reverse=True, temperature=1.7, reduction="none")):
        assert torch.autograd.gradcheck(partial(skew_kl, **kind), (x, y))
        assert torch.autograd.gradgradcheck(partial(skew_kl, **kind), (x, y))


@pytest.mark.parametrize("shape", [(9, 6), (5, 130)])
def test_opcheck(shape, device):
    ops = torch.ops.udi_kernels
    x, y = logits(*shape, device=device)
    skew_kl(x, y)  # loads the kernels
    weight = torch.rand(shape[0], device=device)
    for a, b in ((x, y), (x.T, y.T)):
        for reduction, w, reverse in ((0, weight[: len(a)], False), (2, None, True)):
            w = w if w is None or len(w) == len(a) else None
            options = 0.3, reverse, 2.0, reduction
            torch.library.opcheck(ops.skew_kl.default, (a.detach().requires_grad_(), b, w, *options))
            torch.library.opcheck(ops.skew_kl_fwd.default, (a, b, w, *options))
            loss, stats = ops.skew_kl_fwd(a, b, w, *options)
            for needs in ((True, False), (True, True)):
                args = torch.ones_like(loss), a, b, w, stats, *options, *needs
                torch.library.opcheck(ops.skew_kl_bwd.default, args)


def test_compile_fullgraph(device):
    call = partial(skew_kl, alpha=0.2, reverse=True)
    compiled = torch.compile(lambda x, y: call(x * 2, y), fullgraph=True, backend="aot_eager")
    for shape in ((4, 8), (7, 8), (2, 3, 8)):
        x, y = torch.randn(shape, device=device), torch.randn(shape, device=device)
        for a, b in zip(run(compiled, (x, y)), run(lambda a, b: call(a * 2, b), (x, y)), strict=True):
            torch.testing.assert_close(a, b)


def test_partial_gradients_shapes_and_dtypes(device):
    x, y = (t.reshape(2, 3, 4, 10) for t in logits(24, 10, device=device))
    _, gx, gy = run(skew_kl, (x, y))
    assert torch.equal(run(skew_kl, (x, y), needs=(True, False))[1], gx)
    assert torch.equal(run(skew_kl, (x, y), needs=(False, True))[2], gy)
    assert skew_kl(x, y, reduction="none").shape == (2, 3, 4)
    assert torch.equal(
        skew_kl(x, y, reduction="none").flatten(), skew_kl(x.view(24, 10), y.view(24, 10), reduction="none")
    )
    half = x.bfloat16().requires_grad_()
    loss = skew_kl(half, y)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    empty = torch.empty(0, 5, device=device, requires_grad=True)
    assert skew_kl(empty, empty.detach()).isnan() and skew_kl(empty, empty.detach(), reduction="sum") == 0
    assert torch.autograd.grad(skew_kl(empty, empty.detach()), empty)[0].shape == (0, 5)


def test_dispatch_for_cuda():
    skew_kl(torch.zeros(1, 1), torch.zeros(1, 1))  # loads the kernels
    for dtype in (torch.float32, torch.float64):
        with FakeTensorMode():
            x = torch.zeros(4, 5, device="cuda", dtype=dtype)
            assert skew_kl(x, x, reduction="none").dtype == dtype


BAD = {
    "input .* torch.Tensor, got list": lambda x: skew_kl([1.0], x),
    "target .* float.*, got torch.int64": lambda x: skew_kl(x, x.long()),
    r"target .* \(3, 4\), got \(3, 5\)": lambda x: skew_kl(x, torch.zeros(3, 5), reverse=True),
    "at least one class": lambda x: skew_kl(x[:, :0], x[:, :0]),
    "alpha must be 0 or lie in .* got 1$": lambda x: skew_kl(x, x, alpha=1),
    "alpha .* got -0.1": lambda x: skew_kl(x, x, alpha=-0.1),
    "alpha .* got 1e-40": lambda x: skew_kl(x, x, alpha=1e-40),
    "alpha .* got nan": lambda x: skew_kl(x, x, alpha=math.nan),
    "alpha must be a number, got a tensor": lambda x: skew_kl(x, x, alpha=torch.tensor(0.5)),
    "reverse must be a bool, got str": lambda x: skew_kl(x, x, reverse="yes"),
    "reverse must be a bool, got int": lambda x: skew_kl(x, x, reverse=1),
    "temperature .* got 0": lambda x: skew_kl(x, x, temperature=0),
    "reduction .* got 'batchmean'": lambda x: skew_kl(x, x, reduction="batchmean"),
    r"weight .* \(3,\), one per row of input, got \(4,\)": lambda x: skew_kl(x, x, weight=torch.ones(4)),
    "weight gets no gradient": lambda x: skew_kl(x, x, weight=torch.ones(3, requires_grad=True)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, refused):
    refused(lambda: BAD[message](torch.zeros(3, 4)), f"^skew_kl: .*{message}")
