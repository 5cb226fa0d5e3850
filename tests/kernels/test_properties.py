"""Random calls against float64: shapes, strides, dtypes, views, hostile values, transforms; right, or a clear error.

`pytest -m slow tests/kernels/test_properties.py` runs over 10,000 examples, the default a few hundred; both always the
same ones.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from losses import EPS
from torch.utils.checkpoint import checkpoint

from udi_kernels import GradientPlan, club_mi, club_nll, gramian, js_div, js_div_topk, reference, skew_kl, weighted_sum

DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
HOSTILE = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e4, -1e4, 6e4, 1e-7]


def campaign(examples, example):
    options = dict(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    settings(max_examples=examples, **options)(given(st.data())(example))()


def examples(slow):
    return pytest.mark.parametrize("examples", [60, pytest.param(slow, marks=pytest.mark.slow)])


def tensor(draw, shape, dtype, scale=1.0, hostile=()):
    """Random values in a layout drawn at random."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    t = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    for value in hostile:
        if t.numel():
            t.view(-1)[torch.randint(t.numel(), (1 + t.numel() // 20,), generator=generator)] = value
    layout = draw(st.sampled_from(["contiguous", "contiguous", "sliced", "permuted", "offset", "expanded", "negated"]))
    if layout == "sliced" and t.dim():
        return torch.stack([t, t], -1).flatten(-2)[..., ::2]
    if layout == "permuted" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        return torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape)
    if layout == "expanded" and t.dim() and len(t):
        return t[:1].expand_as(t)
    if layout == "negated":
        return torch._neg_view(-t)
    return t


def hostile_values(draw):
    return draw(st.lists(st.sampled_from(HOSTILE), max_size=2)) if draw(st.integers(0, 3)) == 0 else []


def evaluate(f, inputs, needs, seed):
    """Value and gradients; the incoming gradient is drawn for rows."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    value = f(*leaves)
    if not any(needs):
        return [value.detach()]
    grad = torch.rand(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, wanted, grad.to(value.dtype))]


def assert_right(ours, plain, truth, scale, rounding=None):
    """No further from float64 than four times what plain torch is, and some roundings of the terms.

    Gradients where a value is NaN or inf are not compared.
    """
    for i, (a, b, t) in enumerate(zip(ours, plain, truth, strict=True)):
        assert a.shape == t.shape and a.dtype == b.dtype
        if i and not truth[0].isfinite().all():
            return
        eps = EPS[a.dtype]
        a, b, t = a.double(), b.double(), t.double()
        finite = t.isfinite() & b.isfinite()  # elsewhere float32 overflows, or a NaN says so
        assert not a[t.isnan()].isfinite().any(), "NaN is lost"
        assert a[finite].isfinite().all(), "made up a NaN or inf"
        a, b, t = a[finite], b[finite], t[finite]
        if not a.numel():
            continue
        wide = rounding or (EPS[torch.float64] * 100 if eps < 1e-10 else EPS[torch.float32])
        allowed = 4 * (b - t).abs().max() + eps * t.abs() + 8 * wide * max(scale, t.abs().max().item()) + 1e-37
        if eps > 1e-5 and i:
            allowed = allowed + 6e-8  # subnormal float16
        assert ((a - t).abs() <= allowed).all(), f"{(a - t).abs().max()} off, allowed {allowed.max()}"


@st.composite
def js_div_calls(draw):
    classes = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 101, 127, 129, 300, 1271])))
    shape = (*draw(st.lists(st.integers(0, 5), max_size=3)), classes)
    scale, hostile = draw(st.sampled_from([1e-3, 1.0, 5.0, 100.0])), hostile_values(draw)
    dtype = draw(DTYPES)
    other = draw(DTYPES) if draw(st.integers(0, 3)) == 0 else dtype
    x = tensor(draw, shape, dtype, scale, hostile)
    y = tensor(draw, shape, other, scale, hostile)
    if draw(st.integers(0, 5)) == 0:
        y = x.to(other)
    weight = None
    if draw(st.booleans()):
        weight = tensor(draw, shape[:-1], torch.float32).abs()
        weight = weight.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bool, torch.int64, torch.half])))
    options = dict(
        beta=draw(st.sampled_from([0.5, 0.5, 0.1, 0.9, 0, 1, 1e-3])),
        temperature=draw(st.sampled_from([1.0, 1.0, 0.5, 3, 10.0])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
    )
    return x, y, weight, options


@examples(4000)
def test_js_div(examples):
    def example(data):
        x, y, weight, options = data.draw(js_div_calls())
        needs = data.draw(st.tuples(st.booleans(), st.booleans()))
        seed = data.draw(st.integers(0, 99))
        how = data.draw(st.sampled_from(["eager"] * 3 + ["checkpoint", "func"]))

        def ours(a, b):
            call = lambda u, v: js_div(u, v, weight=weight, **options)  # noqa: E731
            return checkpoint(call, a, b, use_reentrant=False) if how == "checkpoint" else call(a, b)

        def oracle(dtype):
            w = None if weight is None else weight.to(dtype)
            return lambda a, b: reference.js_div(a.to(dtype), b.to(dtype), weight=w, **options)

        wide = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
        plain = evaluate(oracle(wide), (x, y), needs, seed)
        truth = evaluate(oracle(torch.float64), (x.double(), y.double()), needs, seed)
        got = evaluate(ours, (x, y), needs, seed)
        scale = (
            1.0 if weight is None or options["reduction"] == "mean" else max([1.0, *weight.double().flatten().tolist()])
        )
        scale *= max(1, math.prod(x.shape[:-1])) if options["reduction"] == "sum" else 1
        scale *= max(1.0, truth[0].nan_to_num(0, 0, 0).abs().max().item()) if truth[0].numel() else 1.0  # a KL's terms
        assert_right(got, plain, truth, scale * max(1.0, 1 / options["temperature"]))
        if how == "func" and options["reduction"] != "none":
            value, pull = torch.func.vjp(ours, x, y)
            assert_right([value], plain[:1], truth[:1], scale)

    campaign(examples, example)


def js_div_scale(weight, options, truth, rows):
    """How large the terms of a result may be."""
    scale = max(1.0, truth[0].nan_to_num(0, 0, 0).abs().max().item()) if truth[0].numel() else 1.0
    if weight is not None and options["reduction"] != "mean":
        scale *= max([1.0, *weight.double().flatten().tolist()])
    return scale * (max(1, rows) if options["reduction"] == "sum" else 1) * max(1.0, 1 / options["temperature"])


@examples(2000)
def test_skew_kl(examples):
    def example(data):
        x, y, weight, options = data.draw(js_div_calls())
        options["alpha"] = {0.5: 0.1, 1: 0.6}.get(options.pop("beta"), 0.3)
        options["reverse"] = data.draw(st.booleans())
        needs = data.draw(st.tuples(st.booleans(), st.booleans()))
        seed = data.draw(st.integers(0, 99))

        def oracle(dtype):
            w = None if weight is None else weight.to(dtype)
            return lambda a, b: reference.skew_kl(a.to(dtype), b.to(dtype), weight=w, **options)

        wide = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
        plain = evaluate(oracle(wide), (x, y), needs, seed)
        truth = evaluate(oracle(torch.float64), (x.double(), y.double()), needs, seed)
        got = evaluate(lambda a, b: skew_kl(a, b, weight=weight, **options), (x, y), needs, seed)
        assert_right(got, plain, truth, js_div_scale(weight, options, truth, math.prod(x.shape[:-1])))

    campaign(examples, example)


@examples(2000)
def test_js_div_topk(examples):
    def example(data):
        x, y, weight, options = data.draw(js_div_calls())
        options["tail"] = data.draw(st.sampled_from(["renormalize", "bucket", "zero"]))
        if options["beta"] == 1:
            options["beta"] = 0.7
        k = data.draw(st.integers(1, x.shape[-1]))
        logprobs, indices = y.float().log_softmax(-1).topk(k)
        if indices.numel() and k > 1 and data.draw(st.booleans()):
            indices[..., data.draw(st.integers(0, k - 1))] = -1
        seed = data.draw(st.integers(0, 99))

        def oracle(dtype):
            w = None if weight is None else weight.to(dtype)
            return lambda a: reference.js_div_topk(a.to(dtype), indices, logprobs, weight=w, **options)

        plain = evaluate(oracle(reference.accumulation_dtype(x.dtype)), (x,), (True,), seed)
        truth = evaluate(oracle(torch.float64), (x.double(),), (True,), seed)
        got = evaluate(lambda a: js_div_topk(a, indices, logprobs, weight=weight, **options), (x,), (True,), seed)
        assert_right(got, plain, truth, js_div_scale(weight, options, truth, math.prod(x.shape[:-1])))

    campaign(examples, example)


@examples(3000)
def test_club(examples):
    def example(data):
        draw = data.draw
        shape = draw(st.tuples(st.integers(0, 70), st.integers(0, 40)))
        dtype, hostile = draw(DTYPES), hostile_values(draw)
        shift = draw(st.sampled_from([0.0, 0.0, 100.0]))
        mu, logvar, y = (tensor(draw, shape, dtype, draw(st.sampled_from([0.1, 1.0, 4.0])), hostile) for _ in range(3))
        mu, y = mu + shift, y + shift
        needs = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
        name = draw(st.sampled_from(["mean", "sum", "none", "nll"]))
        options = {} if name == "nll" else {"reduction": name}
        ours, plain = (club_nll, reference.club_nll) if name == "nll" else (club_mi, reference.club_mi)
        seed = draw(st.integers(0, 99))
        a, b, t = (
            evaluate(lambda *xs, f=f: f(*xs, **options), [x.to(d) for x in (mu, logvar, y)], needs, seed)
            for f, d in ((ours, dtype), (plain, dtype), (plain, torch.float64))
        )
        finite = [x.double()[x.isfinite()].abs().max().item() for x in (mu, y) if x.isfinite().any()]
        spread = [(x.double() - shift)[x.isfinite()].abs().max().item() for x in (mu, y) if x.isfinite().any()]
        w = (-logvar.double()).exp()
        w = w[w.isfinite()].max().item() if w.isfinite().any() else 1.0
        terms = max([1.0, *spread]) ** 2 * max(1.0, w) + (max([1.0, *finite]) if shift else 0.0)
        assert_right(a, b, t, terms * (max(1, math.prod(shape)) if name == "sum" else max(1, shape[1])))

    campaign(examples, example)


@examples(3500)
def test_gradients(examples):
    def example(data):
        draw = data.draw
        k, stacked = draw(st.integers(1, 6)), draw(st.integers(0, 3)) == 0
        shapes = draw(st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=4))
        dtypes, hostile = [draw(DTYPES) for _ in shapes], hostile_values(draw)
        if stacked:
            columns = [tensor(draw, (k, *s), d, 1.0, hostile) for s, d in zip(shapes, dtypes, strict=True)]
            grads, lists = columns, [[t[i] for t in columns] for i in range(k)]
        else:
            missing = st.integers(0, 6).map(lambda n: n == 0)
            grads = lists = [
                [
                    None if draw(missing) else tensor(draw, s, d, 1.0, hostile)
                    for s, d in zip(shapes, dtypes, strict=True)
                ]
                for _ in range(k)
            ]
        weights = tensor(draw, (k,), draw(DTYPES))
        try:
            gram = gramian(grads, stacked=stacked)
        except ValueError as e:
            assert all(g is None for row in lists for g in row), e
            return
        out = weighted_sum(grads, weights, stacked=stacked)
        double = [[None if g is None else g.double() for g in row] for row in lists]
        norm = max([1.0, *(reference.gramian(double).diagonal().nan_to_num(0, 0, 0))])
        wide = reference.accumulation_dtype(*(g.dtype for row in lists for g in row if g is not None))
        plain = reference.gramian([[None if g is None else g.to(wide) for g in row] for row in lists])
        narrow = any(g.dtype != torch.float64 for row in lists for g in row if g is not None)
        assert_right([gram], [plain], [reference.gramian(double)], float(norm), EPS[torch.float32] if narrow else None)
        truth = reference.weighted_sum(double, weights.double())
        for ours, want, theirs in zip(out, truth, reference.weighted_sum(lists, weights), strict=True):
            assert (ours is None) == (want is None)
            if want is not None:
                size = max([1.0, *(g.abs().max().nan_to_num(0, 0, 0) for g in (want,) if g.numel())])
                assert_right([ours], [theirs], [want], float(size) * 8)
        try:
            plan = GradientPlan(grads, stacked=stacked)
        except ValueError as e:
            assert "must be dense" in str(e) or "must have strides" in str(e)  # of two layouts
            return
        assert torch.equal(plan.gramian().nan_to_num(7), gram.nan_to_num(7))
        for a, b in zip(plan.weighted_sum(weights), out, strict=True):
            assert a is b is None or torch.equal(a.nan_to_num(7), b.nan_to_num(7))

    campaign(examples, example)


@examples(1000)
def test_what_does_not_fit_is_a_clear_error(examples):
    """Any mix of tensors and other things: a result, or TypeError or ValueError that begins with the op's name."""
    things = st.sampled_from(
        [
            torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(3, 4).double(), torch.zeros(4), torch.zeros(()),
            torch.zeros(0, 4), torch.zeros(3, 0), torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4) * 1j,
            torch.zeros(3, 4).to_sparse(), torch.zeros(3, 4, device="meta"), torch.ones(3), torch.ones(3).bool(),
            torch.ones(3, requires_grad=True), torch.zeros(3, 4).T, None, 3, 0.5, "mean", [1.0], torch.float32,
        ]
    )  # fmt: skip
    rows = st.lists(things, max_size=3)
    lists = st.one_of(things, rows, st.lists(rows, max_size=3))
    numbers, outs = st.sampled_from([0.5, 0, 2, "x", None]), st.one_of(st.none(), rows)
    reductions = st.sampled_from(["mean", "none", "avg", 3, None])
    flag = st.booleans()

    def example(data):
        draw = data.draw
        three = lambda: [draw(things) for _ in range(3)]  # noqa: E731
        calls = {
            "js_div": lambda x, y, w: js_div(x, y, weight=w, beta=draw(numbers), reduction=draw(reductions)),
            "skew_kl": lambda x, y, w: skew_kl(x, y, weight=w, alpha=draw(numbers), reverse=draw(flag)),
            "js_div_topk": lambda x, y, z: js_div_topk(x, y, z, tail=draw(st.sampled_from(["zero", "bucket", 3]))),
            "club_mi": lambda *xs: club_mi(*xs, reduction=draw(reductions)),
            "club_nll": club_nll,
            "gramian": lambda *_: gramian(draw(lists), stacked=draw(flag)),
            "weighted_sum": lambda w, *_: weighted_sum(draw(lists), w, out=draw(outs), stacked=draw(flag)),
            "GradientPlan": lambda *_: GradientPlan(draw(lists), out=draw(outs), stacked=draw(flag)),
        }
        name = draw(st.sampled_from(sorted(calls)))
        try:
            calls[name](*three())
        except (TypeError, ValueError) as e:
            assert str(e).startswith(f"{name}: "), e

    campaign(examples, example)
