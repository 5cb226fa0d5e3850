import math
import time
from functools import partial

import combinations
import pytest
import torch
import torch.nn.functional as F
from losses import EPS, assert_as_good_as_torch, distance, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from udi_kernels import js_div, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INF = float("inf")


def logits(rows, classes, dtype=torch.float32, device="cpu", scale=3.0):
    return [(torch.randn(rows, classes, device=device) * scale).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 7, 16, 41, 64, 65, 101, 1271, 40000])
def test_accuracy(classes, dtype, device):
    rows = 37 if classes < 1000 else 3
    for beta, temperature in ((0.5, 1.0), (0.1, 2.0), (0.9, 0.5)):
        options = dict(beta=beta, temperature=temperature, reduction="none")
        assert_as_good_as_torch(
            partial(js_div, **options),
            partial(reference.js_div, **options),
            lambda: logits(rows, classes, dtype, device),
        )


def hostile(device):
    big = torch.randn(8, 50, device=device) * 1e4
    onehot = torch.eye(8, 50, device=device) * 1e4
    some_inf = torch.randn(8, 50, device=device)
    other_inf = torch.randn(8, 50, device=device)
    some_inf[:, ::3] = -INF
    other_inf[:, ::2] = -INF  # both, one, the other, neither
    deep = torch.zeros(8, 50, device=device)
    deep[:, 1:] = -200  # both sides underflow everywhere but at class 0
    near = torch.randn(8, 50, device=device)
    return {
        "large": (big, torch.randn(8, 50, device=device) * 1e4),
        "one-hot": (onehot, onehot.roll(1, 1)),
        "one-hot against flat": (onehot, torch.zeros(8, 50, device=device)),
        "-inf": (some_inf, other_inf),
        "both underflow": (deep, deep + torch.randn(8, 50, device=device)),
        "nearly equal": (near, near + 1e-3 * torch.randn(8, 50, device=device)),
        "shifted by 1e3": (near + 1000, torch.randn(8, 50, device=device) - 1000),
    }


@pytest.mark.parametrize("name", hostile("cpu"))
@pytest.mark.parametrize("wide", [False, True], ids=["50 classes", "500 classes"])
def test_hostile_inputs(name, wide, device):
    rows = partial(js_div, reduction="none"), partial(reference.js_div, reduction="none")
    assert_as_good_as_torch(*rows, lambda: [t.repeat(1, 10 if wide else 1) for t in hostile(device)[name]])


def test_equal_rows_give_exactly_zero(device):
    for classes in (1, 6, 50, 1000):
        for beta in (0.5, 0.1, 0.7):
            x = torch.randn(9, classes, device=device) * 20
            x[0, 0] = -INF if classes > 1 else 0
            value, gx, gy = run(partial(js_div, beta=beta, reduction="none"), (x, x.clone()))
            assert (value == 0).all() and (gx == 0).all() and (gy == 0).all()


def test_never_negative_and_never_above_its_maximum(device):
    x = torch.randn(500, 40, device=device) * 10
    for step in (1e-7, 1e-5, 1e-3, 1.0, 1e3):
        value = js_div(x, x + step * torch.randn_like(x), reduction="none")
        assert value.min() >= 0 and value.max() <= math.log(2) * (1 + 1e-6)


def test_shift_invariance(device):
    x, y = (t.round(decimals=2) for t in logits(20, 30, torch.float64, device))
    assert distance(js_div(x, y, reduction="none"), js_div(x + 512, y - 256, reduction="none")) < 1e-12


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_definition(beta, device):
    """beta KL(p||m) + (1 - beta) KL(q||m), m = beta p + (1 - beta) q: liger-kernel's generalized JSD, same beta."""
    x, y = logits(11, 13, torch.float64, device)
    q, p = x.softmax(-1), y.softmax(-1)
    m = beta * p + (1 - beta) * q
    kl = lambda a: F.kl_div(m.log(), a, reduction="batchmean")  # noqa: E731
    torch.testing.assert_close(js_div(x, y, beta=beta), beta * kl(p) + (1 - beta) * kl(q))


@pytest.mark.parametrize("beta", [1e-6, 0.01, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("apart", [1e-2, 1, 4])
@pytest.mark.parametrize("classes", [6, 101, 1271])
def test_exact_near_the_ends(beta, apart, classes, device):
    """Value and gradients are as small as beta or 1 - beta there: what cancels in the mixture would show."""
    x = torch.randn(48, classes, device=device)
    y = x + apart * torch.randn_like(x)
    truth = run(partial(reference.js_div, beta=beta), (x.double(), y.double()))
    for ours, t in zip(run(partial(js_div, beta=beta), (x, y)), truth, strict=True):
        assert (ours - t).abs().max() < 5e-6 * t.abs().max()


@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("classes", [1, 6, 101, 1271])
def test_ends_are_the_two_kl_divergences(beta, classes, device):
    def kl(x, y, reduction="none"):
        log_q, log_p = (x.log_softmax(-1), y.log_softmax(-1))[:: -1 if beta else 1]
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)

    count = 37 if classes < 1000 else 7  # so many that no single row decides the error
    x, y = logits(count, classes, torch.float64, device)
    for ours, theirs in zip(
        run(rows := partial(js_div, beta=beta, reduction="none"), (x, y)), run(kl, (x, y)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for dtype in DTYPES:
        for scale in (3.0, 1e-3):
            assert_as_good_as_torch(
                rows,
                partial(reference.js_div, beta=beta, reduction="none"),
                lambda dtype=dtype, scale=scale: [
                    t + y.to(dtype) for t in logits(count, classes, dtype, device, scale)
                ],
            )
    same, gx, gy = run(rows, (x.float(), x.float()))
    assert (same == 0).all() and (gx == 0).all() and (gy == 0).all()
    assert torch.autograd.gradcheck(rows, [t[:3, :7].clone().requires_grad_() for t in (x, y)])
    assert torch.autograd.gradgradcheck(rows, [t[:3, :7].clone().requires_grad_() for t in (x, y)])


@pytest.mark.parametrize("classes", [6, 200])
def test_kl_where_logits_are_infinite(classes, device):
    x, y = logits(4, classes, device=device)
    x[0, 0] = y[0, 0] = -INF  # neither has the class: it counts for nothing
    y[1, 1] = -INF  # the teacher has not
    x[2, 2] = -INF  # the student cannot follow
    forward, reverse = (js_div(x, y, beta=beta, reduction="none").tolist() for beta in (0, 1))
    assert forward[2] == INF and reverse[1] == INF
    for values, inf in ((forward, 2), (reverse, 1)):
        assert all(math.isfinite(v) and v > 0 for i, v in enumerate(values) if i != inf)
    without = js_div(x[:1, 1:], y[:1, 1:], beta=0).item()
    assert forward[0] == pytest.approx(without, rel=1e-6)


@pytest.mark.parametrize("classes", [6, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kl_where_logits_are_masked_by_the_lowest_number(dtype, classes, device, backend):
    x, y = logits(4, classes, dtype, device)
    x[:, 1] = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).min
    for beta, a, b in ((0, x, y), (1, y, x)):
        for temperature in (1.0, 2.0):
            options = dict(beta=beta, temperature=temperature, reduction="none")
            value = js_div(a, b, **options).double()
            p = (y.double() / temperature).softmax(-1)[:, 1]
            torch.testing.assert_close(value, -p * x[:, 1].double() / temperature, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [6, 200])
def test_gradient_to_an_impossible_class(classes, device, backend):
    """q - p, also where the value is inf, as by torch's own functions."""
    x, y = logits(4, classes, device=device)
    x[1, 2] = y[2, 3] = x[3, 1] = y[3, 1] = -INF
    for temperature in (1.0, 0.5):
        options = dict(beta=0, temperature=temperature, reduction="sum")
        value, gx, _ = run(partial(js_div, **options), (x, y), needs=(True, False))
        q, p = (x / temperature).softmax(-1), (y / temperature).softmax(-1)
        torch.testing.assert_close(gx, (q - p) / temperature, rtol=1e-5, atol=1e-6)
        assert value == INF


@pytest.mark.parametrize("classes", [6, 200])
@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
def test_temperatures(beta, classes, device, backend):
    x, y = logits(5, classes, device=device)
    for temperature in (1e-37, 1e-20, 1e-3, 1e3, 1e37):
        options = dict(beta=beta, temperature=temperature)
        got, want = (
            run(partial(js_div, **options), (x, y)),
            run(partial(reference.js_div, **options), (x.double(), y.double())),
        )
        assert got[0].isfinite() or want[0] > 1e37
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-4, atol=3e-8) if want[0] < 1e37 else None
        assert not got[1].isnan().any() or want[0] > 1e37


@pytest.mark.slow
def test_all_combinations_of_sentinels_masks_and_beta(device, backend):
    def call(x, y, weight, beta, reduction, grad):
        x, y, grad, weight = (t if t is None else t.to(device) for t in (x, y, grad, weight))
        results = run(partial(js_div, weight=weight, beta=beta, reduction=reduction), (x, y), grad=grad)
        return (t.cpu() for t in results)

    assert len(combinations.COMBINATIONS) == 2448
    for combination in combinations.COMBINATIONS:
        try:
            combinations.check(call, *combination)
        except AssertionError as e:
            raise AssertionError(combination) from e


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.bfloat16, torch.float64])
def test_weight_of_any_dtype(dtype, device):
    x, y = logits(6, 9, device=device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device=device)
    for reduction in ("mean", "sum", "none"):
        got = run(partial(js_div, weight=mask.to(dtype), reduction=reduction), (x, y))
        assert all(map(torch.equal, got, run(partial(js_div, weight=mask.float(), reduction=reduction), (x, y))))
    labels = torch.where(mask == 1, 3, -100)
    assert torch.equal(js_div(x, y, weight=labels != -100), js_div(x, y, weight=mask.float()))
    assert js_div(x, y, weight=torch.zeros_like(mask, dtype=dtype)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_parity_with_liger(beta):
    liger = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    x, y = logits(64, 5000, device="cuda")
    theirs = liger.LigerJSD(beta=beta)
    a = run(partial(js_div, beta=beta), (x, y), needs=(True, False))
    b = run(lambda u, v: theirs(u.log_softmax(-1), v.log_softmax(-1)), (x, y), needs=(True, False))
    for ours, other in zip(a[:2], b[:2], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-7)


def test_weights_and_reductions(device):
    x, y = logits(12, 9, torch.float64, device)
    w = torch.rand(12, device=device, dtype=torch.float64)
    w[::3] = 0
    for reduction in ("mean", "sum", "none"):
        for weight in (None, w):
            options = dict(weight=weight, reduction=reduction)
            grad = torch.rand(12 if reduction == "none" else (), device=device, dtype=torch.float64)
            ours = run(partial(js_div, **options), (x, y), grad=grad)
            theirs = run(partial(reference.js_div, **options), (x, y), grad=grad)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)
    assert js_div(x.float(), y.float(), weight=w).dtype == torch.float32  # whatever the dtype of the weight
    masked = run(partial(js_div, weight=w), (x, y))
    assert (masked[1][::3] == 0).all()
    torch.testing.assert_close(masked[0], js_div(x[w > 0], y[w > 0], weight=w[w > 0]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_value_is_the_same_without_a_graph(weighted, reduction, device):
    x, y = torch.randn(2, 5, 4, 6, device=device)
    f = partial(js_div, y, weight=x[..., 0] > 0 if weighted else None, reduction=reduction)
    want, alone = f(x.clone().requires_grad_()), f(x)
    assert want.grad_fn is not None and alone.grad_fn is None
    with torch.no_grad():
        recorded = f(x.clone().requires_grad_())
    with torch.inference_mode():
        inferred = f(x.clone())
    for found in (alone, recorded, inferred):
        assert found.shape == want.shape and torch.equal(found, want)


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("classes", [6, 300])
def test_all_weights_zero(classes, beta, device, backend):
    """As cross_entropy's gradients where nothing is supervised."""
    x, y = logits(9, classes, device=device)
    y[3], x[4, 0] = math.nan, -INF
    for dtype in (torch.bool, torch.float32, torch.int64):
        weight = torch.zeros(9, dtype=dtype, device=device)
        for reduction in ("mean", "sum", "none"):
            for result in run(partial(js_div, beta=beta, weight=weight, reduction=reduction), (x, y)):
                assert (result == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [6, 300])
def test_sums_of_weights(classes, dtype, device, backend):
    x, y = logits(64, classes, dtype, device)
    rows = js_div(x, y, reduction="none")
    plain = run(js_div, (x, y))
    big = run(partial(js_div, weight=torch.full((64,), 1e37, device=device)), (x, y))  # their sum is inf in float32
    for a, b in zip(big, plain, strict=True):
        torch.testing.assert_close(a, b)
    signs = torch.ones(64, device=device)
    signs[1::2] = -1  # a sum of 0: a division by 0, as the formula says
    value = js_div(x, y, weight=signs)
    assert value.isinf() and value.sign() == (rows * signs).sum().sign()
    small = torch.rand(64, device=device) + 0.5
    small[::2] *= -0.1
    torch.testing.assert_close(js_div(x, y, weight=small), (rows * small).sum() / small.sum(), rtol=1e-5, atol=0)


def spoilt(x, y):
    """Rows that a mask may hide: NaN, infinite, and legal ones whose KL is infinite; on either side, or on both."""
    nothing = torch.full_like(x[0], -INF)
    one = torch.randn_like(x[0])
    one[1] = -INF
    hidden = [one * math.nan, one.abs() * INF, nothing, one]
    pairs = [(a, b) for a in (*hidden, x[0]) for b in (*hidden, y[0])]
    return (torch.stack(side) for side in zip(*pairs, strict=True))


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("classes", [6, 101, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_weight_0_is_as_if_it_were_not_there(dtype, classes, beta, device, backend):
    x, y = logits(7, classes, dtype, device)
    u, v = spoilt(x, y)
    order = torch.randperm(7 + len(u), device=device)
    where = order.argsort()[:7]  # of the rows that count
    many = [torch.cat(pair)[order] for pair in ((x, u), (y, v))]
    weight = torch.cat([torch.tensor([1.0, 2, 0.5, -0.25, 3, 1e-3, 1], device=device), u.new_zeros(len(u)).float()])
    for w, few in ((weight, weight[:7]), (weight > 0, weight[:7] > 0)):
        for reduction in ("mean", "sum", "none"):
            options = dict(beta=beta, temperature=0.7, reduction=reduction)
            got = run(partial(js_div, weight=w[order], **options), many)
            want = run(partial(js_div, weight=few, **options), (x, y))
            if reduction == "none":
                assert got[0].count_nonzero() == want[0].count_nonzero()
                got[0] = got[0][where]
            for grad in got[1:]:
                assert grad.count_nonzero() == grad[where].count_nonzero()  # exactly 0 elsewhere
            for a, b in zip(got, (want[0], *want[1:]), strict=True):
                a = a[where] if a.dim() == 2 else a
                bound = 64 * EPS[a.dtype]  # torch's own functions round by a row's place
                torch.testing.assert_close(a, b, rtol=bound, atol=bound * b.abs().max().item())


def test_nothing_reaches_a_masked_row(device, backend):
    """A weight of 0 stops even a gradient that is NaN or inf, as that of sqrt at 0 is."""
    x, y = logits(3, 6, device=device)
    weight = torch.tensor([1.0, 0, 1], device=device)
    options = dict(weight=weight, reduction="none")
    for bad in (math.nan, INF):
        _, gx, gy = run(partial(js_div, **options), (x, y), grad=torch.tensor([1, bad, 1], device=device))
        assert gx.isfinite().all() and gy.isfinite().all() and (gx[1] == 0).all() and (gy[1] == 0).all()


def test_masked_rows_are_skipped():
    """A tenth of the rows takes a tenth of the time, but for the gradient's zeros."""
    x, y = logits(256, 8000)
    few = torch.arange(256) % 10 == 0
    x.requires_grad_()

    def seconds(weight):
        def once():
            start = time.thread_time()
            js_div(x, y, weight=weight)
            return time.thread_time() - start

        return min(once() for _ in range(9))

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # on a busy machine, threads mostly wait for each other
        assert seconds(few) < 0.4 * seconds(torch.ones_like(few))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("classes", [3, 300])
def test_rows_are_never_negative(classes, beta, device, backend):
    """Each is clamped before its weight; NaN stays."""
    x = torch.randn(4000, classes, device=device)
    for y in (x + 1e-6 * torch.randn_like(x), x + torch.randn(4000, 1, device=device)):
        rows = js_div(x, y, beta=beta, reduction="none")
        assert (rows >= 0).all()
        signed = js_div(x, y, beta=beta, weight=torch.full((4000,), -1.0, device=device), reduction="none")
        assert torch.equal(signed, -rows)
    x[1, 2] = math.nan
    assert js_div(x, y, beta=beta, reduction="none")[:3].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("classes", [6, 101])
def test_strides(classes, device):
    base = torch.randn(14, 3 * classes, device=device)
    other = torch.randn(classes, 14, device=device)
    views = {
        "column slice": (base[:, classes : 2 * classes], base[:, 2 * classes :]),
        "row step": (base[::2, :classes], base[1::2, :classes]),
        "transposed": (base[:, :classes], other.T),
        "column step": (base[:, ::3], base[:, 1::3]),
        "expanded": (base[:1, :classes].expand(14, classes), other.T),
    }
    for x, y in views.values():
        want = run(partial(js_div, reduction="none"), (x.contiguous(), y.contiguous()))
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        value = js_div(x, y, reduction="none")
        grads = torch.autograd.grad(value, (x, y), torch.ones_like(value))
        for got, expected in zip((value, *grads), want, strict=True):
            if device == "cpu":
                assert torch.equal(got, expected)
            else:  # narrower loads there give threads other classes to add up
                torch.testing.assert_close(got, expected)


def layouts(classes, device, dtype=torch.float32):
    """Rows whose leading dimensions have two strides, or more; classes that are not adjacent; mixtures of these."""
    plain = torch.randn(4, 6, classes, device=device).to(dtype)
    wide = torch.randn(5, 9, classes, device=device).to(dtype)
    turned = torch.randn(6, 4, classes, device=device).to(dtype).transpose(0, 1)
    nchw = torch.randn(4, classes, 2, 3, device=device).to(dtype)
    rows = torch.randn(classes, 24, device=device).to(dtype).T.reshape(4, 6, classes)
    four = torch.randn(3, 3, 4, classes, device=device).to(dtype)[:2, :2]
    return {
        "all but the last": (wide[:4, :6], plain),
        "all but the first": (wide[1:, 3:], wide[:4, 2:8]),
        "(T, B, V)": (turned, plain),
        "different strides": (wide[:4, 1:7], turned),
        "channels first": (nchw.permute(0, 2, 3, 1), plain.reshape(4, 2, 3, classes)),
        "both channels first": (nchw.permute(0, 2, 3, 1), nchw.flip(1).permute(0, 2, 3, 1)),
        "columns": (rows, plain),
        "three strides": (four.transpose(1, 2), four.permute(1, 2, 0, 3)[:2, :4, :2]),
        "one row": (plain[:1, :1, :].expand(4, 6, classes), wide[:4, :6]),
    }


@pytest.mark.parametrize("classes", [6, 300])
@pytest.mark.parametrize("name", layouts(6, "cpu"))
def test_layouts(name, classes, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, y = layouts(classes, device, dtype)[name]
        weight = torch.rand(x.shape[:-1], device=device) - 0.3
        weight[..., 1] = 0
        for options in (dict(reduction="none"), dict(weight=weight, beta=0.3), dict(beta=0, weight=weight > 0)):
            call = partial(js_div, **options)
            want = run(call, (x.contiguous(), y.contiguous()))
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            value = call(x, y)
            for a, b in zip((value, *torch.autograd.grad(value.sum(), (x, y))), want, strict=True):
                torch.testing.assert_close(a, b, rtol=16 * EPS[a.dtype], atol=16 * EPS[a.dtype] * b.abs().max().item())


@pytest.mark.parametrize("dim", [0, 1, -2, 2, 3, -1])
@pytest.mark.parametrize("classes", [5, 150])
def test_dim(dim, classes, device, backend):
    x, y = (t.reshape(2, 3, 2, classes).movedim(-1, dim).contiguous() for t in logits(12, classes, device=device))
    weight = torch.rand(x.movedim(dim, -1).shape[:-1], device=device)
    got = run(partial(js_div, weight=weight, dim=dim), (x, y))
    want = run(
        lambda a, b: js_div(*(t.movedim(dim, -1).reshape(12, -1) for t in (a, b)), weight=weight.flatten()), (x, y)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert js_div(x, y, dim=dim, reduction="none").shape == weight.shape


def test_double_backward_of_layouts():
    inputs, targets = (layouts(3, "cpu", torch.float64) for _ in range(2))  # of their own memory
    for name in inputs.keys() - {"one row"}:  # gradgradcheck changes one element at a time
        x, y = (t[:2, :2].detach().requires_grad_() for t in (inputs[name][0], targets[name][1]))
        weight = torch.rand(x.shape[:-1], dtype=torch.float64)
        for reduction in ("none", "mean"):
            assert torch.autograd.gradgradcheck(partial(js_div, weight=weight, reduction=reduction), (x, y)), name


@pytest.mark.parametrize("classes", [6, 800])
def test_nothing_is_kept_but_the_inputs(classes, device):
    """Storages that autograd keeps and that are no input's, over the size of the logits."""

    def kept(*inputs, **options):
        own, found = {t.untyped_storage().data_ptr() for t in inputs}, {}

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            js_div(*inputs, **options)
        return sum(size for at, size in found.items() if at not in own) / inputs[0].nbytes

    bound = 0.1 if classes > 6 else 7 / 6 + 0.01  # the statistics
    for x, y in layouts(classes, device).values():
        assert kept(x.requires_grad_(), y) < bound
    x = torch.randn(64, classes, device=device, requires_grad=True)
    mask = torch.arange(64, device=device) % 2 == 0
    assert kept(x, torch.randn(64, classes, device=device, dtype=torch.bfloat16), weight=mask) < bound * 1.2
    image = torch.randn(2, classes, 8, 4, device=device, requires_grad=True)
    assert kept(image, image.detach() + 1, dim=1) < bound


def test_gradients_of_channels_first_are_laid_out_like_the_logits(device):
    x = torch.randn(2, 7, 4, 5, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(js_div(x, torch.randn_like(x), dim=1), x)
    assert grad.is_contiguous()


def test_expanded_grad_output(device):
    x, y = logits(6, 40, device=device)
    x.requires_grad_()
    js_div(x, y, reduction="none").sum().backward()  # sum's gradient has stride 0
    assert torch.equal(x.grad, run(partial(js_div, reduction="sum"), (x, y))[1])


def test_leading_dimensions(device):
    x, y = (t.reshape(2, 3, 4, 10) for t in logits(24, 10, device=device))
    w = torch.rand(2, 3, 4, device=device)
    rows = js_div(x, y, weight=w, reduction="none")
    assert rows.shape == (2, 3, 4)
    flat = js_div(x.reshape(24, 10), y.reshape(24, 10), weight=w.reshape(24), reduction="none")
    assert torch.equal(rows.reshape(24), flat)
    permuted = js_div(x.permute(1, 0, 2, 3), y.permute(1, 0, 2, 3), reduction="none")
    assert torch.equal(permuted, js_div(x, y, reduction="none").permute(1, 0, 2))
    assert js_div(x[0, 0, 0], y[0, 0, 0], reduction="none").shape == ()


def test_partial_requires_grad_and_retain_graph(device):
    x, y = logits(5, 70, device=device)
    _, gx, gy = run(js_div, (x, y))
    assert torch.equal(run(js_div, (x, y), needs=(True, False))[1], gx)
    assert torch.equal(run(js_div, (x, y), needs=(False, True))[2], gy)
    assert not js_div(x, y).requires_grad
    x.requires_grad_()
    loss = js_div(x, y)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, gx) and torch.equal(second, gx)


def test_gradcheck_and_double_backward(device):
    x, y = (t.requires_grad_() for t in logits(4, 5, torch.float64, device))
    assert torch.autograd.gradcheck(partial(js_div, beta=0.3, temperature=1.7), (x, y))
    assert torch.autograd.gradgradcheck(partial(js_div, beta=0.3, temperature=1.7), (x, y))
    (first,) = torch.autograd.grad(js_div(x, y.detach()), x, create_graph=True)  # where only one needs a gradient
    (again,) = torch.autograd.grad(reference.js_div(x, y.detach()), x, create_graph=True)
    ours, theirs = (torch.autograd.grad(g.square().sum(), x)[0] for g in (first, again))
    torch.testing.assert_close(ours, theirs)


def test_dtypes_devices_and_autocast(device):
    x, y = logits(4, 5, device=device)
    assert js_div(x, y).dtype == torch.float32 and js_div(x.double(), y.double()).dtype == torch.float64
    half = x.bfloat16().requires_grad_()
    loss = js_div(half, y)  # mixed, as autocast makes them
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(js_div(x, y), js_div(x, y))
        linear = torch.nn.Linear(5, 5, device=device)
        loss = js_div(linear(x), y)
    loss.backward()
    assert loss.dtype == torch.float32 and linear.weight.grad is not None


def test_empty_batch(device):
    x = torch.empty(0, 5, device=device, requires_grad=True)
    y = torch.empty(0, 5, device=device)
    assert js_div(x, y, reduction="sum") == 0 and js_div(x, y).isnan() and js_div(x, y, reduction="none").shape == (0,)
    for reduction in ("sum", "mean"):
        assert torch.autograd.grad(js_div(x, y, reduction=reduction), x)[0].shape == (0, 5)
    assert js_div(x, y, weight=torch.empty(0, device=device)).isnan()
    strided = torch.empty(0, 10, device=device)[:, ::2]
    assert js_div(strided, strided, reduction="sum") == 0


def test_bit_identical_repeats(device):
    x, y = logits(300, 501, device=device)
    first = run(js_div, (x, y))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(js_div, (x, y)), strict=True))


def test_threads_do_not_change_the_result():
    x, y = logits(300, 501)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(run(js_div, (x, y)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(9, 6), (5, 130)])
def test_opcheck(shape, device):
    ops = torch.ops.udi_kernels
    x, y = logits(*shape, device=device)
    js_div(x, y)  # loads the kernels
    w = torch.rand(shape[0], device=device)
    z = torch.randn(shape[0], 4, shape[1], device=device)
    for a, b in ((x, y), (x[::2], y[::2])):
        for reduction in range(3):
            weight = w[: len(a)] if reduction < 2 else None
            torch.library.opcheck(ops.js_div.default, (a.detach().requires_grad_(), b, weight, 0.4, 2.0, reduction))
            torch.library.opcheck(ops.js_div_fwd.default, (a, b, weight, 0.4, 2.0, reduction))
            loss, stats = ops.js_div_fwd(a, b, weight, 0.4, 2.0, reduction)
            for needs in ((True, False), (False, True), (True, True)):
                args = (torch.ones_like(loss), a, b, weight, stats, 0.4, 2.0, reduction, *needs)
                torch.library.opcheck(ops.js_div_bwd.default, args)
    for a, b in ((z[:, :3], z[:, 1:]), (z.transpose(0, 1), z.transpose(0, 1)), (z.mT, z.mT.contiguous()), (x.T, y.T)):
        weight = torch.rand(a.shape[:-1].numel(), device=device)
        loss, stats = ops.js_div_fwd(a, b, weight, 0.4, 2.0, 2)
        torch.library.opcheck(ops.js_div.default, (a.detach().requires_grad_(), b, None, 0.4, 2.0, 0))
        torch.library.opcheck(ops.js_div_fwd.default, (a, b, weight, 0.4, 2.0, 2))
        args = (torch.ones_like(loss), a, b, weight, stats, 0.4, 2.0, 2, True, True)
        torch.library.opcheck(ops.js_div_bwd.default, args)


def test_compile_fullgraph(device):
    compiled = torch.compile(
        lambda x, y, w: js_div(x * 2, y, beta=0.3, weight=w, reduction="mean"), fullgraph=True, backend="aot_eager"
    )
    for shape in ((4, 8), (7, 8), (2, 3, 8)):  # new sizes, then a new rank
        x, y = torch.randn(shape, device=device), torch.randn(shape, device=device)
        w = torch.rand(shape[:-1], device=device)
        ours = run(lambda a, b, w=w: compiled(a, b, w), (x, y))
        eager = run(lambda a, b, w=w: js_div(a * 2, b, beta=0.3, weight=w), (x, y))
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)


def test_dispatch_for_cuda():
    """What serves there, told by fake tensors: the kernels, and for float64 the reference, which makes no such call."""
    js_div(torch.zeros(1, 1), torch.zeros(1, 1))  # loads the kernels
    for dtype, other, kernels in ((torch.float32, torch.float64, 1), (torch.float64, torch.float32, 0)):
        with FakeTensorMode(), Calls() as calls:
            x, w = torch.zeros(4, 5, device="cuda", dtype=dtype), torch.ones(4, device="cuda", dtype=other)
            loss = js_div(x, x, weight=w)
        assert loss.dtype == dtype and calls.names.count("udi_kernels::js_div_fwd") == kernels


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


BAD = {
    "input .* torch.Tensor, got list": lambda x: js_div([1.0], x),
    "target .* float.*, got torch.int64": lambda x: js_div(x, x.long()),
    r"target .* \(3, 4\), got \(3, 5\)": lambda x: js_div(x, torch.zeros(3, 5)),
    "at least one class": lambda x: js_div(x[:, :0], x[:, :0]),
    r"got \(\)": lambda x: js_div(x[0, 0], x[0, 0]),
    "target must be on cpu .* got meta": lambda x: js_div(x, x.to("meta")),
    "target must be dense, got torch.sparse_coo; call .to_dense": lambda x: js_div(x, x.to_sparse()),
    "weight must be dense, got torch.sparse_coo": lambda x: js_div(x, x, weight=x[:, 0].to_sparse()),
    "beta .* got 1.5": lambda x: js_div(x, x, beta=1.5),
    "beta .* got -0.1": lambda x: js_div(x, x, beta=-0.1),
    "beta must be a number, got str": lambda x: js_div(x, x, beta="0.5"),
    "beta .* got nan": lambda x: js_div(x, x, beta=math.nan),
    "beta must be a number, got a tensor": lambda x: js_div(x, x, beta=torch.tensor(0.5, requires_grad=True)),
    "temperature must be a number, got a tensor": lambda x: js_div(x, x, temperature=torch.tensor(2.0)),
    r"temperature must lie in \[1e-37, 1e37\], got 9e-38": lambda x: js_div(x, x, temperature=9e-38),
    r"temperature must lie in \[1e-37, 1e37\], got 1.1e\+37": lambda x: js_div(x, x, temperature=1.1e37),
    "temperature .* out of range": lambda x: js_div(x, x, temperature=10**400),
    "beta must be a number, got bool": lambda x: js_div(x, x, beta=True),
    "beta must be a number, got complex": lambda x: js_div(x, x, beta=0.5 + 0j),
    "input must be dense, got a nested tensor": lambda x: js_div(torch.nested.nested_tensor([x[0], x[1]]), x),
    "target must be dense, got a nested tensor": lambda x: js_div(x, torch.nested.nested_tensor([x[0], x[1]])),
    "target must be dense, got torch.sparse_csc": lambda x: js_div(x, x.to_sparse_csc()),
    "temperature .* got 0": lambda x: js_div(x, x, temperature=0),
    "temperature .* got -1": lambda x: js_div(x, x, temperature=-1.0),
    "dim must be a dimension of input, which has 2, got 2": lambda x: js_div(x, x, dim=2),
    "dim must be an integer, got float": lambda x: js_div(x, x, dim=1.0),
    "reduction .* got 'batchmean'": lambda x: js_div(x, x, reduction="batchmean"),
    r"weight .* \(3,\), one per row of input, got \(4,\)": lambda x: js_div(x, x, weight=torch.ones(4)),
    "weight must be .* bool or an integer, got torch.complex64": lambda x: js_div(x, x, weight=x[:, 0] * 1j),
    "weight must be on cpu as input is, got meta": lambda x: js_div(x, x, weight=x[:, 0].to("meta")),
    "weight gets no gradient": lambda x: js_div(x, x, weight=torch.ones(3, requires_grad=True)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, refused):
    refused(lambda: BAD[message](torch.zeros(3, 4)), f"^js_div: .*{message}")
