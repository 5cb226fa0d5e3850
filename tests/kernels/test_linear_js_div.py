"""linear_js_div: the heads' products and js_div on whole logits give the same, in far more memory."""

import math

import pytest
import torch
from losses import EPS, assert_as_good_as_torch, run
from torch.nn.functional import cross_entropy, linear

import udi_kernels
from udi_kernels import LinearJSDiv, _linear_js_div, js_div, linear_js_div

DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
BETAS = 0.0, 0.1, 0.5, 0.8, 1.0


def draw(rows=11, classes=301, features=8, teacher=12, dtype=torch.float32, scale=1.0):
    """input, weight, bias, target, target_weight, target_bias"""
    shapes = (rows, features), (classes, features), (classes,), (rows, teacher), (classes, teacher), (classes,)
    return [(scale * torch.randn(shape)).to(dtype) for shape in shapes]


def plain(x, w, b, t, tw, tb, row_weight=None, labels=None, hard_weight=0.0, reduction="mean", normalizer=None, **kw):
    """On whole logits."""
    z, y = linear(x, w, b), linear(t, tw, tb)
    if normalizer is not None:
        reduction = "sum"
    loss = js_div(z, y, weight=row_weight, reduction=reduction, **kw)
    if labels is not None:
        wide = z.flatten(0, -2).to(loss.dtype)
        loss = loss + hard_weight * cross_entropy(wide, labels.flatten(), reduction=reduction)
    return loss if normalizer is None else loss / float(normalizer)


def both(tensors, needs=(True, True, True), grad=None, **options):
    """Values and gradients, ours and those of whole logits."""
    x, w, b, *teacher = tensors
    t, tw, tb = teacher

    def ours(x, w, b, chunk=4):
        return linear_js_div(x, w, t, tw, bias=b, target_bias=tb, chunk=chunk, **options)

    return (
        run(ours, (x, w, b), needs, grad),
        run(lambda x, w, b: plain(x, w, b, *teacher, **options), (x, w, b), needs, grad),
    )


def assert_close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", BETAS)
def test_as_good_as_whole_logits(dtype, beta, backend):
    teacher = []

    def heads():
        x, w, b, *teacher[:] = draw(dtype=dtype)
        return x, w, b

    def ours(x, w, b):
        t, tw, tb = (z.to(x.dtype) for z in teacher)
        return linear_js_div(x, w, t, tw, bias=b, target_bias=tb, beta=beta, temperature=1.7, chunk=4)

    def reference(x, w, b):
        t, tw, tb = (z.to(x.dtype) for z in teacher)
        return udi_kernels.reference.js_div(linear(x, w, b), linear(t, tw, tb), beta=beta, temperature=1.7)

    assert_as_good_as_torch(ours, reference, heads)


@pytest.mark.parametrize("classes", [1, 7, 16, 129, 1271])
@pytest.mark.parametrize("rows, chunk", [(1, 4), (4, 4), (5, 4), (9, 1), (9, 100)])
def test_chunks_and_sizes(classes, rows, chunk):
    tensors = draw(rows, classes, dtype=torch.float64)
    x, w, b, t, tw, tb = tensors
    ours = run(lambda x, w, b: linear_js_div(x, w, t, tw, bias=b, target_bias=tb, chunk=chunk), (x, w, b))
    assert_close(ours, run(lambda x, w, b: plain(x, w, b, t, tw, tb), (x, w, b)), 1e-11)


@pytest.mark.parametrize("beta", BETAS)
def test_target_may_be_logits(beta):
    x, w, b, t, tw, tb = draw(dtype=torch.float64)
    logits = linear(t, tw, tb)
    ours = run(lambda x, w, b: linear_js_div(x, w, logits, bias=b, beta=beta, chunk=4), (x, w, b))
    assert_close(ours, run(lambda x, w, b: plain(x, w, b, t, tw, tb, beta=beta), (x, w, b)), 1e-11)
    half = logits.float()  # of another dtype than the student's
    ours = run(lambda x, w, b: linear_js_div(x, w, half, bias=b, beta=beta, chunk=4), (x, w, b))
    assert_close(ours, run(lambda x, w, b: plain(x, w, b, t, tw, tb, beta=beta), (x, w, b)), 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_labels(dtype, beta, temperature, backend):
    tensors = draw(dtype=dtype)
    labels = torch.randint(301, (11,))
    labels[[2, 5]] = -100
    options = dict(beta=beta, temperature=temperature, labels=labels, hard_weight=0.3)
    assert_close(*both(tensors, **options), tolerance=1e-11 if dtype == torch.float64 else 2e-5)
    labels[:] = -100  # value and gradients of the cross-entropy are 0, where torch's are NaN and 0
    options.update(labels=labels, row_weight=torch.zeros(11))
    loss, *grads = run(lambda x, w, b: linear_js_div(x, w, *tensors[3:5], bias=b, **options), tensors[:3])
    assert loss == 0 and not any(g.any() for g in grads)


def test_rows_of_either_term(backend):
    """The divergence's rows are those of weight other than 0, the cross-entropy's those with a label."""
    x, w, b, t, tw, tb = tensors = draw(dtype=torch.float64)
    row_weight = torch.tensor([0, 1, 2, 0, 0.5, 0, 0, 3, 0, 1, 0])
    labels = torch.tensor([3, -100, 5, 300, -100, -100, 7, 0, -100, -100, 9])
    options = dict(row_weight=row_weight, labels=labels, hard_weight=2.0)
    expected = both(tensors, **options)[1]
    dead = (row_weight == 0) & (labels == -100)
    x[dead], t[row_weight == 0] = math.nan, math.inf
    ours = run(
        lambda x, w, b: linear_js_div(x, w, t, tw, bias=b, target_bias=tb, chunk=4, **options), (x, w, b)
    )  # fmt: skip
    assert_close(ours, expected, 1e-11)
    assert (ours[1][dead] == 0).all()


@pytest.mark.parametrize("weight", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_masked_rows_hold_anything(weight, reduction, backend):
    tensors = draw(dtype=torch.float64)
    row_weight = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0]).to(weight)
    expected = both(tensors, row_weight=row_weight, reduction=reduction)[1]
    for i in (0, 3):
        tensors[i][row_weight == 0] = math.nan
    x, w, b, t, tw, tb = tensors
    ours = run(
        lambda x, w, b: linear_js_div(
            x, w, t, tw, bias=b, target_bias=tb, row_weight=row_weight, reduction=reduction, chunk=4
        ),
        (x, w, b),
    )
    assert_close(ours, expected, 1e-11)


def test_masked_rows_cost_no_product(monkeypatch):
    """The heads see the rows that count only."""
    seen, call = [], _linear_js_div._Head.__call__
    monkeypatch.setattr(_linear_js_div._Head, "__call__", lambda head, x: (seen.append(len(x)), call(head, x))[1])
    x, w, _, t, tw, _ = draw(100)
    linear_js_div(x, w, t, tw, row_weight=torch.arange(100) % 10 == 0, chunk=4)
    assert sum(seen) == 2 * 10


@pytest.mark.parametrize("normalizer", [17, 17.0, torch.tensor(17), torch.tensor([17.0])])
def test_normalizer(normalizer, backend):
    tensors = draw(dtype=torch.float64)
    labels = torch.randint(301, (11,))
    labels[3] = -100
    options = dict(labels=labels, hard_weight=0.5, row_weight=labels != -100)
    assert_close(*both(tensors, normalizer=normalizer, **options), 1e-11)


def test_accumulated_steps_give_the_gradient_of_the_whole_batch():
    x, w, b, t, tw, tb = draw(dtype=torch.float64)
    mask = torch.arange(11) % 3 > 0
    whole = run(lambda w: linear_js_div(x, w, t, tw, row_weight=mask), (w,))[1]
    w.requires_grad_()
    for part in (slice(0, 4), slice(4, 11)):
        linear_js_div(x[part], w, t[part], tw, row_weight=mask[part], normalizer=mask.sum()).backward()
    torch.testing.assert_close(w.grad, whole)


def test_no_rows(backend):
    x, w, b, t, tw, tb = draw(0)
    for reduction, value in (("mean", math.nan), ("sum", 0.0)):
        loss, *grads = run(lambda x, w, b, r=reduction: linear_js_div(x, w, t, tw, bias=b, reduction=r), (x, w, b))
        assert loss.item() == value or (math.isnan(loss) and math.isnan(value))
        assert [g.shape for g in grads] == [x.shape, w.shape, b.shape] and not any(g.nan_to_num().any() for g in grads)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_partial_requires_grad(needs, backend):
    assert_close(*both(draw(dtype=torch.float64), needs), 1e-11)


def test_no_gradient_is_made_where_none_is_required():
    x, w, _, t, tw, _ = draw()
    calls = []
    fwd = torch.ops.udi_kernels.linear_js_div_fwd

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is fwd:
                calls.append([t.numel() for t in out])
            return out

    with Seen():
        loss = linear_js_div(x, w, t, tw)
        with torch.no_grad():
            linear_js_div(x.requires_grad_(), w.requires_grad_(), t, tw)
    assert not loss.requires_grad and calls == [[1, 0, 0, 0]] * 2


def test_leading_dimensions_and_views(backend):
    x, w, b, t, tw, tb = draw(24, dtype=torch.float64)
    flat = both((x, w, b, t, tw, tb))[1]
    ours, _ = both((x.view(2, 3, 4, 8), w, b, t.view(2, 3, 4, 12), tw, tb))
    assert_close([ours[0], ours[1].view(24, 8), *ours[2:]], flat, 1e-11)
    # (B, T, H) less the last token, whose rows have two strides, and heads stored transposed
    x, t = x.view(4, 6, 8), t.view(4, 6, 12)
    w, tw = w.T.contiguous().T, tw.T.contiguous().T
    assert_close(*both((x[:, :-1], w, b, t[:, :-1], tw, tb)), 1e-11)
    assert_close(*both((x.transpose(0, 1), w, b, t.transpose(0, 1), tw, tb)), 1e-11)
    mask = torch.rand(4, 5) < 0.5
    assert_close(*both((x[:, 1:], w, b, t[:, :-1], tw, tb), row_weight=mask), 1e-11)
    logits = linear(t, tw, tb)[:, :-1]
    ours = run(lambda x, w, b: linear_js_div(x, w, logits, bias=b, chunk=4), (x[:, :-1], w, b))
    assert_close(ours, both((x[:, :-1], w, b, t[:, :-1], tw, tb))[1], 1e-11)


def test_the_weights_gradient_has_its_strides():
    x, w, b, t, tw, tb = draw()
    for weight in (w, w.T.contiguous().T):
        leaf = weight.detach().requires_grad_()
        (grad,) = torch.autograd.grad(linear_js_div(x, leaf, t, tw), leaf)
        assert grad.stride() == weight.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_again(dtype):
    x, w, b, t, tw, _ = draw(40, dtype=dtype)
    first, second = (run(lambda x, w, b: linear_js_div(x, w, t, tw, bias=b, chunk=8), (x, w, b)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_small_factors_keep_float16_gradients():
    """Gradients are made for factors near 1; a loss scale comes after them."""
    x, w, b, t, tw, tb = draw(dtype=torch.float16)
    grad = torch.tensor(2.0**20)
    ours = run(lambda x, w, b: linear_js_div(x, w, t, tw, bias=b, normalizer=2.0**24), (x, w, b), grad=grad)
    whole = run(lambda x, w, b: linear_js_div(x, w, t, tw, bias=b, normalizer=1), (x, w, b), grad=torch.tensor(1 / 16))
    for a, b in zip(ours[1:], whole[1:], strict=True):
        assert torch.equal(a, b) and b.any()


def test_equal_heads_give_exactly_0():
    x, w, b, *_ = draw()
    loss, *grads = run(
        lambda x, w, b: linear_js_div(x, w, x.detach(), w.detach(), bias=b, target_bias=b.detach()), (x, w, b)
    )
    assert loss == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize("sizes, rows", [
    ((32000, 512, 4, "cpu"), 256), ((262144, 512, 4, "cpu"), 128), ((1000, 64, 4, "cpu"), 128),
    ((128256, 4096, 2, "cpu"), 523), ((128256, 4096, 2, "cuda"), 1024),
])  # fmt: skip
def test_chosen_chunk(sizes, rows):
    assert _linear_js_div.chunk_rows(*sizes) == rows


def test_module():
    x, w, b, t, tw, tb = draw()
    labels = torch.randint(301, (11,))
    options = dict(beta=0.2, temperature=2.0, hard_weight=0.5, ignore_index=-1, reduction="sum", chunk=3)
    module = LinearJSDiv(**options)
    expected = linear_js_div(x, w, t, tw, bias=b, target_bias=tb, labels=labels, row_weight=labels > 9, **options)
    assert module(x, w, t, tw, bias=b, target_bias=tb, labels=labels, row_weight=labels > 9) == expected
    assert "beta=0.2" in repr(module) and not list(module.parameters())


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_target_may_be_the_top_classes(beta, dtype, backend):
    """Renormalized log-probabilities, at a temperature of their own; -1 is padding."""
    x, w, b, *_ = draw(dtype=dtype)
    logits = 3 * torch.randn(11, 301, dtype=torch.float64)
    logprobs, indices = (logits / 2).log_softmax(1).topk(20)
    logprobs[0, 5:], indices[0, 5:] = -math.inf, -1
    dense = torch.full_like(logits, -math.inf)
    for row, column, value in zip(dense, indices, logprobs, strict=True):
        row[column[column >= 0]] = 2 * value[column >= 0]
    target = indices.int(), logprobs.to(torch.float64 if dtype == torch.float64 else torch.float32)
    options = dict(beta=beta, temperature=2.0)
    ours = run(lambda x, w, b: linear_js_div(x, w, target, bias=b, chunk=4, **options), (x, w, b))
    whole = run(lambda x, w, b: js_div(linear(x, w, b), dense, **options), (x, w, b))
    assert_close(ours, whole, {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype])


def test_top_classes_of_views_and_masks():
    x, w, _, *_ = draw(24, dtype=torch.float64)
    indices = torch.rand(4, 6, 301).topk(9).indices
    logprobs = torch.randn(4, 6, 9, dtype=torch.float64).log_softmax(-1)
    dense = torch.full((4, 6, 301), -math.inf, dtype=torch.float64).scatter(2, indices, logprobs)
    mask = torch.rand(4, 5) < 0.6
    x = x.view(4, 6, 8)[:, :-1]
    for options in ({}, dict(row_weight=mask)):
        pair = indices[:, 1:], logprobs[:, 1:]
        ours = run(lambda x, w, p=pair, o=options: linear_js_div(x, w, p, chunk=4, **o), (x, w))
        assert_close(ours, run(lambda x, w, o=options: linear_js_div(x, w, dense[:, 1:], **o), (x, w)), 1e-11)


X, W, B, T, TW, TB = draw()
K = torch.arange(33).view(11, 3)


@pytest.mark.parametrize("change, error, words", [
    (dict(input=[1.0]), TypeError, "input must be a torch.Tensor, got list"),
    (dict(input=X.long()), TypeError, "input must not be of torch.int64"),
    (dict(input=X[0]), ValueError, r"weight must be \(V, H\)"),
    (dict(weight=W.T), ValueError, r"weight must be \(V, H\) with V > 0 for an input \(..., H\), got \(8, 301\)"),
    (dict(weight=W[:0]), ValueError, r"weight must be \(V, H\) with V > 0"),
    (dict(weight=W.half()), TypeError, "weight must be torch.float32 as input is, got torch.float16"),
    (dict(target=T[:-1]), ValueError, r"target must have shape \(11, 12\), got \(10, 12\)"),
    (dict(target_weight=None), ValueError, r"target must have shape \(11, 301\), got \(11, 12\)"),
    (dict(target_weight=TW[:-1]), ValueError, r"target_weight must have shape \(301, 12\)"),
    (dict(target_weight=TW.double()), TypeError, "target_weight must be torch.float32 as target is"),
    (dict(target=T.clone().requires_grad_()), ValueError, r"target gets no gradient; pass target.detach\(\)"),
    (dict(target_weight=TW.clone().requires_grad_()), ValueError, "target_weight gets no gradient"),
    (dict(bias=B[:-1]), ValueError, r"bias must have shape \(301,\)"),
    (dict(target=X @ W.T, target_weight=None, target_bias=TB), ValueError, "target_bias needs target_weight"),
    (dict(beta=1.5), ValueError, r"beta must lie in \[0, 1\], got 1.5"),
    (dict(beta=torch.tensor(0.5)), TypeError, "beta must be a number, got a tensor"),
    (dict(temperature=0.0), ValueError, r"temperature must lie in \[1e-37, 1e37\]"),
    (dict(row_weight=torch.ones(3)), ValueError, r"row_weight must have shape \(11,\), got \(3,\)"),
    (dict(row_weight=torch.ones(11, dtype=torch.complex64)), TypeError, "row_weight must not be of torch.complex64"),
    (dict(hard_weight=1.0), ValueError, "hard_weight needs labels"),
    (dict(hard_weight=-1.0), ValueError, "hard_weight must be 0 or positive"),
    (dict(labels=torch.zeros(11)), TypeError, "labels must not be of torch.float32"),
    (dict(ignore_index=0.5), TypeError, "ignore_index must be an integer"),
    (dict(reduction="none"), ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
    (dict(normalizer=2.0, reduction="sum"), ValueError, "a normalizer needs reduction 'mean'"),
    (dict(normalizer=torch.ones(2)), ValueError, "normalizer must have one element"),
    (dict(normalizer="1"), TypeError, "normalizer must be a number"),
    (dict(chunk=0), ValueError, "chunk must be positive, got 0"),
    (dict(chunk=2.0), TypeError, "chunk must be an integer"),
    (dict(target=T.to_sparse()), ValueError, "target must be dense"),
    (dict(target=(K, T)), ValueError, "target_weight needs hidden states"),
    (dict(target=(K, T[:, :3]), target_weight=None, beta=1.0), ValueError, "beta must be below 1"),
    (dict(target=(T, T), target_weight=None), TypeError, "target must not be of torch.float32"),
    (dict(target=(K, T), target_weight=None), ValueError, r"logprobs must have shape \(11, 3\), got \(11, 12\)"),
    (dict(target=(K + 270, T[:, :3]), target_weight=None), ValueError, r"target's indices must lie in \[0, 301\)"),
    (dict(target=(K, T, T)), TypeError, "target must be a torch.Tensor, got tuple"),
])  # fmt: skip
def test_errors(change, error, words, backend):
    arguments = dict(input=X, weight=W, target=T, target_weight=TW) | change
    with pytest.raises(error, match=f"linear_js_div: {words}"):
        linear_js_div(**arguments)


@pytest.mark.parametrize("label", [301, -1])
def test_labels_out_of_range(label):
    labels = torch.zeros(11, dtype=torch.int64)
    labels[4] = label
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 301\) or be ignore_index, got {label}"):
        linear_js_div(X, W, T, TW, labels=labels, hard_weight=1.0)
    linear_js_div(X, W, T, TW, labels=labels, hard_weight=1.0, ignore_index=label)
    linear_js_div(X, W, T, TW, labels=labels)  # not read


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_extreme_logits(scale):
    tensors = draw(dtype=torch.float32, scale=scale)
    labels = torch.randint(301, (11,))
    ours, theirs = both(tensors, labels=labels, hard_weight=1.0)
    truth = both([t.double() for t in tensors], labels=labels, hard_weight=1.0)[1]
    for a, b, t in zip(ours, theirs, truth, strict=True):
        error, yardstick = ((z.double() - t).norm() for z in (a, b))
        assert error <= 1.1 * yardstick + 4 * EPS[torch.float32] * t.norm()
