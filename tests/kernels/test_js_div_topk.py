import itertools
import math
from functools import partial

import pytest
import torch
from losses import EPS, run
from torch._subclasses.fake_tensor import FakeTensorMode

from udi_kernels import js_div, js_div_topk, reference
from udi_kernels._js_div_topk import TAILS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INF = float("inf")
BETAS = {"renormalize": (0, 0.1, 0.5, 0.9), "bucket": (0, 0.1, 0.5, 0.9, 1), "zero": (0, 0.1, 0.5, 0.9)}
tails = pytest.mark.parametrize("tail", TAILS)


def draw(rows, classes, k, dtype=torch.float32, device="cpu", apart=1.0):
    """Logits of a student, and a teacher's top k in random order."""
    x = (2 * torch.randn(rows, classes, device=device)).to(dtype)
    full = (x.double() + apart * torch.randn(rows, classes, device=device)).log_softmax(-1)
    logprobs, indices = full.topk(k, -1)
    order = torch.randperm(k, device=device)
    return x, indices[:, order], logprobs[:, order].to(dtype)


def truth(x, indices, logprobs, weight=None, *, tail="renormalize", beta=0.5, temperature=1.0, reduction="mean"):
    """By the definition, from a dense teacher, in float64."""
    q, real = (x.double() / temperature).softmax(-1), indices >= 0
    p = torch.where(real, logprobs.double().exp(), 0)
    if tail == "renormalize":
        p = p / p.sum(-1, keepdim=True)
    dense = torch.zeros_like(q).scatter_add(-1, indices.long().clamp_min(0), p)
    if tail == "bucket":
        chosen = torch.zeros(*q.shape[:-1], q.shape[-1] + 1, dtype=torch.bool, device=q.device)
        chosen = chosen.scatter(-1, torch.where(real, indices, q.shape[-1]).long(), True)[..., :-1]
        bucket = torch.where(chosen.all(-1, keepdim=True), 0, (1 - p.sum(-1, keepdim=True)).clamp_min(0))
        dense = torch.cat((dense, bucket), -1)
        q = torch.cat((torch.where(chosen, q, 0), torch.where(chosen, 0, q).sum(-1, keepdim=True)), -1)

    def kl(a, b):
        log = (torch.where(a == 0, 1, a) / torch.where(a == 0, 1, b)).log()
        return torch.where(a == 0, 0, a * log).sum(-1) + b.sum(-1) - a.sum(-1)

    m = beta * dense + (1 - beta) * q
    rows = {0: lambda: kl(dense, q), 1: lambda: kl(q, dense)}.get(
        beta, lambda: beta * kl(dense, m) + (1 - beta) * kl(q, m)
    )()
    w = torch.ones_like(rows) if weight is None else weight.double()
    rows = torch.where(w == 0, 0, rows * w)
    return rows if reduction == "none" else rows.sum() / (w.sum() if reduction == "mean" else 1)


def assert_close(got, want, grad, temperature):
    """The terms of a gradient are as large as the incoming one over T; some cancel."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        wide = max(EPS[got[0].dtype], 1e-14)
        terms = b.abs().max().item() + grad.abs().max().item() / (temperature if i else 1)
        eps = EPS[a.dtype] if i else 0
        torch.testing.assert_close(
            a.double(), b.double(), rtol=30 * wide + 2 * eps, atol=20 * wide * terms + 6e-8 * (eps > 1e-5)
        )


@tails
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("classes", "k"), [(5, 2), (41, 7), (300, 16), (300, 33)])
def test_definition(classes, k, dtype, tail, device, backend):
    for i, (beta, temperature, weighted, reduction) in enumerate(
        itertools.product(BETAS[tail], (1.0, 2.5), (False, True), ("mean", "sum", "none"))
    ):
        x, indices, logprobs = draw(8, 2 * classes, k, dtype, device)
        if i % 2:
            x, indices = x[:, ::2], torch.arange(k, device=device).expand(8, k)
        if i // 2 % 2:
            x, indices, logprobs = x[::2], indices[::2], logprobs[1::2]
        indices, logprobs = indices.clone(), logprobs.clone()
        indices[1, -1], logprobs[1, -1] = -1, -INF
        logprobs[3, 0] = -INF
        weight = torch.tensor([0.5, 0, 2, 1, 0, 3, 0.1, 1], device=device)[: len(x)] if weighted else None
        kind = dict(tail=tail, beta=beta, temperature=temperature, reduction=reduction)
        if beta == 1:
            logprobs[3, 0] = -3.0  # else infinite
        grad = torch.rand(len(x) if reduction == "none" else (), device=device)
        got = run(partial(js_div_topk, indices=indices, logprobs=logprobs, weight=weight, **kind), (x,), grad=grad)
        want = run(partial(truth, indices=indices, logprobs=logprobs, weight=weight, **kind), (x.double(),), grad=grad)
        assert_close(got, want, grad, temperature)


@tails
def test_all_classes_are_js_div(tail, device, backend):
    """With K = C every tail is js_div, in value and gradient."""
    x = torch.randn(9, 40, dtype=torch.float64, device=device)
    y = torch.randn_like(x)
    indices = torch.rand(x.shape, device=device).argsort(-1)
    logprobs = y.log_softmax(-1).gather(-1, indices)
    for beta in BETAS[tail]:
        got = run(partial(js_div_topk, indices=indices, logprobs=logprobs, tail=tail, beta=beta, temperature=2.0), (x,))
        want = run(partial(js_div, target=2 * y, beta=beta, temperature=2.0), (x,))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("beta", [0, 0.3, 0.5])
def test_renormalize_is_js_div_of_a_scattered_teacher(beta, device):
    x, indices, logprobs = draw(9, 200, 8, torch.float64, device)
    dense = torch.full_like(x, -INF).scatter(-1, indices, logprobs)
    got = run(partial(js_div_topk, indices=indices, logprobs=logprobs, beta=beta), (x,))
    want = run(partial(js_div, target=dense, beta=beta), (x,))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@tails
@pytest.mark.parametrize("classes", [6, 3000])
def test_never_negative(classes, tail, device, backend):
    k = min(classes, 16)
    for apart in (0.0, 1e-6, 1e-3):
        x, indices, logprobs = draw(1000, classes, k, device=device, apart=apart)
        for beta in BETAS[tail]:
            assert (js_div_topk(x, indices, logprobs, tail=tail, beta=beta, reduction="none") >= 0).all()


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_small_tails_keep_their_digits(beta):
    """On a CPU the other classes are added up by themselves, not as 1 less the K."""
    x = torch.randn(64, 1000)
    x[:, :8] += 22  # the others have 1e-8 of the mass
    indices = torch.arange(8).expand(64, 8)
    logprobs = (x[:, :8] + 0.5 * torch.randn(64, 8)).log_softmax(-1) - 1e-3
    _, grad = run(partial(js_div_topk, indices=indices, logprobs=logprobs, tail="bucket", beta=beta), (x,))
    want = run(partial(truth, indices=indices, logprobs=logprobs, tail="bucket", beta=beta), (x.double(),))[1]
    torch.testing.assert_close(grad[:, 8:].double(), want[:, 8:], rtol=1e-4, atol=0)


@tails
@pytest.mark.parametrize("classes", [6, 300])
def test_masked_rows_hold_anything(classes, tail, device, backend):
    x, indices, logprobs = draw(8, classes, 3, device=device)
    weight = torch.tensor([1, 0, 2, 0, 0, 1, 3, 0], device=device)
    kept = weight != 0
    x[1], x[3, 0], logprobs[4], logprobs[7] = math.nan, INF, math.nan, -INF
    indices[7] = 10**6
    for beta, reduction in itertools.product(BETAS[tail], ("mean", "sum", "none")):
        call = partial(js_div_topk, tail=tail, beta=beta, reduction=reduction)
        value, gx = run(partial(call, indices=indices, logprobs=logprobs, weight=weight), (x,))
        want, gw = run(partial(call, indices=indices[kept], logprobs=logprobs[kept], weight=weight[kept]), (x[kept],))
        torch.testing.assert_close(value[kept] if reduction == "none" else value, want)
        torch.testing.assert_close(gx[kept], gw)
        assert (gx[~kept] == 0).all()
        for t in run(partial(call, indices=indices, logprobs=logprobs, weight=torch.zeros_like(weight)), (x,)):
            assert (t == 0).all()


def test_padding(device, backend):
    x, indices, logprobs = draw(3, 50, 4, torch.float64, device)
    padded = torch.cat((indices[:, :2], torch.full_like(indices, -1), indices[:, 2:]), -1)
    whatever = torch.cat(
        (logprobs[:, :2], torch.tensor([[-INF, 5.0, math.nan, 0.0]] * 3, device=device), logprobs[:, 2:]), -1
    )
    for tail in TAILS:
        got = run(partial(js_div_topk, indices=padded, logprobs=whatever, tail=tail), (x,))
        want = run(partial(js_div_topk, indices=indices, logprobs=logprobs, tail=tail), (x,))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)
    nothing = partial(js_div_topk, x, torch.full_like(indices, -1), logprobs, reduction="none")
    assert nothing().isnan().all()
    torch.testing.assert_close(nothing(tail="bucket"), torch.zeros(3, device=device).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(nothing(tail="zero", beta=0), torch.ones(3, device=device).double())
    torch.testing.assert_close(nothing(tail="zero"), torch.full((3,), 0.5 * math.log(2), device=device).double())


def test_nan_and_infinite_logits(device, backend):
    for tail in TAILS:
        x, indices, logprobs = draw(6, 40, 4, device=device)
        x[1, 3], x[2, 5], x[3], logprobs[4, 1] = math.nan, INF, -INF, math.nan
        value, gx = run(partial(js_div_topk, indices=indices, logprobs=logprobs, tail=tail, reduction="none"), (x,))
        assert value.isnan().tolist() == gx.isnan().all(1).tolist() == [False, True, True, True, True, False]
    x, indices, logprobs = draw(3, 40, 4, device=device)
    x[0, indices[0, 1]], x[1, 20:] = -INF, -INF
    for tail, beta in (("zero", 0.5), ("bucket", 0.3), ("renormalize", 0.5)):
        call = partial(js_div_topk, indices=indices, logprobs=logprobs, tail=tail, beta=beta, reduction="none")
        value, gx = run(call, (x,))
        want = run(
            partial(truth, indices=indices, logprobs=logprobs, tail=tail, beta=beta, reduction="none"),
            (x.double().clamp_min(-600),),
        )
        torch.testing.assert_close(value.double(), want[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gx.double(), want[1], rtol=1e-4, atol=1e-6)
        assert (gx[x == -INF] == 0).all()
    assert js_div_topk(x, indices, logprobs, beta=0, reduction="none")[0] == INF


@pytest.mark.parametrize("bad", [7, 1000, -2])
def test_indices_out_of_range_or_twice(bad):
    x, indices, logprobs = draw(4, 7, 3)
    for wrong, words in ((bad, r"indices must lie in \[0, 7\)"), (indices[2, 0].item(), "must be different")):
        other = indices.clone()
        other[2, 1] = wrong
        with pytest.raises(RuntimeError, match=f"js_div_topk: .*{words}"):
            js_div_topk(x, other, logprobs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int64])
def test_indices_of_any_integers(dtype, device, backend):
    x, indices, logprobs = draw(4, 50, 5, device=device)
    assert torch.equal(js_div_topk(x, indices.to(dtype), logprobs), js_div_topk(x, indices, logprobs))


def layouts(device, dtype=torch.float32):
    wide = torch.randn(5, 9, 40, device=device).to(dtype)
    return {
        "all but the last": wide[:4, :6],
        "(T, B, V)": torch.randn(6, 4, 40, device=device).to(dtype).transpose(0, 1),
        "channels first": torch.randn(4, 40, 6, device=device).to(dtype).mT,
        "one row": wide[:1, :1].expand(4, 6, 40),
        "three strides": torch.randn(3, 3, 4, 40, device=device).to(dtype)[:2, :2].transpose(1, 2),
        "a row": wide[0, 0],
    }


@pytest.mark.parametrize("name", layouts("cpu"))
def test_layouts(name, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = layouts(device, dtype)[name]
        indices = torch.rand(x.shape, device=device).argsort(-1)[..., :3]
        logprobs = torch.randn(x.shape, device=device).log_softmax(-1)[..., :3]
        weight = torch.rand(x.shape[:-1], device=device)
        for reduction in ("none", "mean"):
            call = partial(js_div_topk, tail="bucket", reduction=reduction)
            value = call(x := x.detach().requires_grad_(), indices, logprobs, weight=weight)
            rows = [t.reshape(-1, t.shape[-1]) for t in (x.detach(), indices, logprobs)]
            flat = rows[0].clone().requires_grad_()
            want = call(flat, *rows[1:], weight=weight.reshape(-1))
            assert value.shape == (x.shape[:-1] if reduction == "none" else ())
            torch.testing.assert_close(value.reshape(want.shape), want)
            a, b = torch.autograd.grad(value.sum(), x)[0], torch.autograd.grad(want.sum(), flat)[0]
            torch.testing.assert_close(a, b.reshape(a.shape))


def test_nothing_is_kept_but_the_inputs(device):
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x, indices, logprobs = draw(64, 5000, 8, device=device)
    view = x.requires_grad_()[:, :-1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        js_div_topk(view, indices.clamp_max(4990), logprobs)
    assert sum(size for at, size in found.items() if at != x.untyped_storage().data_ptr()) < 0.01 * x.nbytes


@tails
def test_gradcheck_and_double_backward(tail, device):
    x, indices, logprobs = draw(4, 6, 3, torch.float64, device)
    for beta in BETAS[tail][:3]:
        call = partial(js_div_topk, indices=indices, logprobs=logprobs, tail=tail, beta=beta, temperature=1.7)
        assert torch.autograd.gradcheck(call, (x.requires_grad_(),))
        assert torch.autograd.gradgradcheck(call, (x,))
    turned = x.detach().reshape(2, 2, 6).transpose(0, 1).requires_grad_()
    indices, logprobs = (z.reshape(2, 2, 3).transpose(0, 1) for z in (indices, logprobs))
    call = partial(js_div_topk, indices=indices, logprobs=logprobs, tail=tail, weight=torch.rand(2, 2, device=device))
    assert torch.autograd.gradgradcheck(call, (turned,))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms(transform):
    x, indices, logprobs = draw(4, 6, 3, torch.float64)
    for tail in TAILS:
        ours, plain = (
            partial(f, indices=indices, logprobs=logprobs, tail=tail) for f in (js_div_topk, reference.js_div_topk)
        )
        if transform == "grad":
            a, b = torch.func.grad(ours)(x), torch.func.grad(plain)(x)
        elif transform == "jvp":
            a, b = (torch.func.jvp(f, (x,), (x.roll(1, 0),))[1] for f in (ours, plain))
        else:
            a, b = (torch.vmap(f)(torch.stack((x, 2 * x))) for f in (ours, plain))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 6), (2, 3, 130)])
def test_opcheck(shape, device):
    ops = torch.ops.udi_kernels
    x = torch.randn(shape, device=device)
    indices = torch.rand(shape, device=device).argsort(-1)[..., :4]
    logprobs = torch.randn(shape, device=device).log_softmax(-1)[..., :4]
    js_div_topk(x, indices, logprobs)  # loads the kernels
    for tail, reduction, w in ((0, 0, None), (1, 2, torch.rand(shape[:-1], device=device)), (2, 1, None)):
        options = tail, 0.3, 2.0, reduction
        torch.library.opcheck(ops.js_div_topk.default, (x.clone().requires_grad_(), indices, logprobs, w, *options))
        rows = [z.reshape(-1, 4).contiguous() for z in (indices, logprobs)] + [w if w is None else w.reshape(-1)]
        torch.library.opcheck(ops.js_div_topk_fwd.default, (x, *rows, *options))
        loss, stats = ops.js_div_topk_fwd(x, *rows, *options)
        for need in (True, False):
            args = torch.ones_like(loss), x, *rows, stats, *options, need
            torch.library.opcheck(ops.js_div_topk_bwd.default, args)


def test_compile_fullgraph(device):
    call = partial(js_div_topk, tail="zero", beta=0.3)
    compiled = torch.compile(lambda x, i, p: call(x * 2, i, p), fullgraph=True, backend="aot_eager")
    for shape in ((4, 8), (7, 8), (2, 3, 8)):
        x = torch.randn(shape, device=device)
        pairs = x.argsort(-1)[..., :3], x.log_softmax(-1)[..., :3]
        for a, b in zip(
            run(lambda a, p=pairs: compiled(a, *p), (x,)), run(lambda a, p=pairs: call(a * 2, *p), (x,)), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_dtypes_and_empty_batches(device):
    x, indices, logprobs = draw(4, 9, 3, device=device)
    assert js_div_topk(x.double(), indices, logprobs).dtype == torch.float64
    half = x.bfloat16().requires_grad_()
    loss = js_div_topk(half, indices, logprobs)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    assert js_div_topk(x, indices, logprobs.double()).dtype == torch.float32
    empty = x[:0].requires_grad_()
    assert js_div_topk(empty, indices[:0], logprobs[:0]).isnan()
    loss = js_div_topk(empty, indices[:0], logprobs[:0], reduction="sum")
    assert loss == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 9)
    threads = torch.get_num_threads()
    x, indices, logprobs = draw(300, 501, 20)
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(run(partial(js_div_topk, indices=indices, logprobs=logprobs), (x,)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dispatch_for_cuda():
    js_div_topk(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1))  # loads the kernels
    for dtype in (torch.float32, torch.float64):
        with FakeTensorMode():
            x, index = torch.zeros(4, 5, device="cuda", dtype=dtype), torch.zeros(4, 2, device="cuda", dtype=torch.long)
            assert js_div_topk(x, index, x[:, :2], reduction="none").dtype == dtype


X, INDEX, LOGP = torch.zeros(3, 4), torch.arange(2).expand(3, 2), torch.zeros(3, 2) - 1
BAD = {
    "input .* torch.Tensor, got list": lambda: js_div_topk([1.0], INDEX, LOGP),
    "indices .* torch.Tensor, got NoneType": lambda: js_div_topk(X, None, LOGP),
    "indices must be integers, got torch.float32": lambda: js_div_topk(X, LOGP, LOGP),
    "logprobs must be float.*, got torch.int64": lambda: js_div_topk(X, INDEX, INDEX),
    r"indices must have shape \(..., K\).* got \(2, 2\) and \(3, 4\)": lambda: js_div_topk(X, INDEX[:2], LOGP),
    r"indices must have shape .* got \(3, 0\)": lambda: js_div_topk(X, INDEX[:, :0], LOGP[:, :0]),
    r"logprobs must have indices's shape \(3, 2\), got \(3, 1\)": lambda: js_div_topk(X, INDEX, LOGP[:, :1]),
    "logprobs gets no gradient": lambda: js_div_topk(X, INDEX, LOGP.clone().requires_grad_()),
    "at least one class": lambda: js_div_topk(X[:, :0], INDEX, LOGP),
    "indices must be on cpu .* got meta": lambda: js_div_topk(X, INDEX.to("meta"), LOGP),
    "logprobs must be dense": lambda: js_div_topk(X, INDEX, LOGP.to_sparse()),
    "tail must be one of 'renormalize', 'bucket', 'zero', got 'other'": lambda: js_div_topk(
        X, INDEX, LOGP, tail="other"
    ),
    "beta must be below 1": lambda: js_div_topk(X, INDEX, LOGP, beta=1),
    "beta must be below 1 unless": lambda: js_div_topk(X, INDEX, LOGP, beta=1.0, tail="zero"),
    "beta .* got -0.1": lambda: js_div_topk(X, INDEX, LOGP, beta=-0.1),
    "temperature .* got 0": lambda: js_div_topk(X, INDEX, LOGP, temperature=0),
    "reduction .* got 'batchmean'": lambda: js_div_topk(X, INDEX, LOGP, reduction="batchmean"),
    r"weight .* \(3,\), .* got \(4,\)": lambda: js_div_topk(X, INDEX, LOGP, weight=torch.ones(4)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, refused):
    refused(BAD[message], f"^js_div_topk: .*{message}")
