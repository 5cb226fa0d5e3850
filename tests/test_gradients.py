import math

import pytest
import torch

import udi_kernels
from udi_kernels import GradientPlan, _ops, alignment_weights, gradients, gramian, reference, weighted_sum

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(7,), (64, 33, 3, 3), (), (0, 3), (1271,), (16384,), (41, 1, 5)]
gpu = pytest.mark.gpu


def draw(k, shapes=SHAPES, dtype=torch.float32, device="cpu"):
    return [[torch.randn(s, device=device).to(dtype) for s in shapes] for _ in range(k)]


def stack(grads):
    return [torch.stack(column) for column in zip(*grads, strict=True)]


def flat(grads):
    """(K, N), None as zeros."""
    like = [next((g for g in column if g is not None), torch.empty(0)) for column in zip(*grads, strict=True)]
    rows = [[torch.zeros_like(t) if g is None else g for g, t in zip(row, like, strict=True)] for row in grads]
    return torch.stack([torch.cat([g.flatten().to(like[0].device) for g in row]) for row in rows])


def assert_gramian(gram, grads):
    """Symmetric, and no further from float64 than a matrix product in the gradients' own dtype."""
    rows = flat(grads)
    truth = rows.double() @ rows.double().T
    wide = rows.dtype == torch.float64
    assert gram.shape == truth.shape and gram.dtype == (torch.float64 if wide else torch.float32)
    assert torch.equal(gram, gram.T)
    error, bound = ((g.double() - truth).norm().item() for g in (gram, rows @ rows.T))
    rounding = rows.shape[1] ** 0.5 * 2.3e-16 if wide else 6e-8  # of a double sum; of the float32 result
    assert error <= bound + rounding * truth.norm().item()


def assert_weighted_sum(out, grads, weights):
    """Each element no further from float64 than rounding of K float32 terms and of the result."""
    for result, column in zip(out, zip(*grads, strict=True), strict=True):
        terms = [(w, g) for w, g in zip(weights.double(), column, strict=True) if g is not None]
        if not terms:
            assert result is None
            continue
        dtype, shape = terms[0][1].dtype, terms[0][1].shape
        truth = sum(w * g.double() for w, g in terms)
        scale = sum((w * g.double()).abs() for w, g in terms)
        unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert result.dtype == dtype and result.shape == shape
        bound = 0.5 * torch.finfo(dtype).eps * truth.abs() + len(terms) * unit * scale + torch.finfo(dtype).tiny
        assert ((result.double() - truth).abs() <= bound).all()


def check(grads, weights=None, plan_of=None):
    """Both ops and the plan against float64, the plan bit by bit against the ops."""
    lists = plan_of or grads
    some = next(g for row in lists for g in row if g is not None)
    weights = torch.randn(len(grads), device=some.device) if weights is None else weights
    gram, out = gramian(lists), weighted_sum(lists, weights)
    assert_gramian(gram, grads)
    assert_weighted_sum(out, grads, weights)
    plan = GradientPlan(lists)
    assert torch.equal(plan.gramian(), gram)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plan.weighted_sum(weights), out, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9, 17, 32, 41])
def test_exact(k, dtype, device):
    check(draw(k, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 12])
def test_stacked(k, dtype, device):
    grads = draw(k, dtype=dtype, device=device)
    stacked = stack(grads)
    assert torch.equal(gramian(stacked), gramian(grads))
    weights = torch.randn(k, device=device)
    out = weighted_sum(grads, weights)
    for result in (weighted_sum(stacked, weights), GradientPlan(stacked).weighted_sum(weights)):
        assert all(map(torch.equal, result, out))
    assert torch.equal(GradientPlan(stacked).gramian(), gramian(grads))


def test_stacked_slices_of_other_layouts(device):
    """Steps along K that are not the size of a gradient; slices that are dense but not contiguous, or not dense."""
    grads = draw(3, shapes=[(6, 4)], device=device)
    wide = torch.zeros(3, 7, 4, device=device)
    stacked = stack(grads)[0]
    wide[:, :6] = stacked
    transposed = stacked.transpose(1, 2).contiguous().transpose(1, 2)
    inner = stacked.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for variant in (wide[:, :6], transposed, inner):
        assert not variant.is_contiguous()
        torch.testing.assert_close(gramian([variant]), gramian(grads))
        weights = torch.randn(3, device=device)
        assert torch.equal(weighted_sum([variant], weights)[0], weighted_sum(grads, weights)[0])
    same = stacked[:1].expand(3, 6, 4)
    assert torch.equal(gramian([same]), gramian([grads[0]])[0, 0].expand(3, 3))


def test_none_is_zero(device):
    grads = draw(4, device=device)
    grads[0][1] = grads[2][0] = None
    for row in grads:
        row[5] = None
    grads[3] = [None] * len(SHAPES)
    check(grads)
    out = [torch.full(s, math.nan, device=device) for s in SHAPES]
    assert weighted_sum(grads, torch.ones(4, device=device), out=out)[5].eq(0).all()
    plan_out = [torch.full(s, math.nan, device=device) for s in SHAPES]
    GradientPlan(grads, out=plan_out).weighted_sum(torch.ones(4, device=device))
    assert all(map(torch.equal, plan_out, out))
    stacked = [torch.randn(2, 3, device=device), None]
    assert gramian(stacked).shape == (2, 2)
    assert weighted_sum(stacked, torch.ones(2, device=device))[1] is None


def test_empty(device):
    grads = [[torch.empty(0, 3, device=device)], [None]]
    assert torch.equal(gramian(grads), torch.zeros(2, 2, device=device))
    assert weighted_sum(grads, torch.ones(2, device=device))[0].shape == (0, 3)
    assert torch.equal(GradientPlan(grads).gramian(), torch.zeros(2, 2, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [3, 9])
def test_unaligned(k, dtype, device):
    """Views at any offset: the same in all lists, as in flat buffers, or another in each."""
    for offsets in ([1] * k, [5] * k, list(range(k))):
        grads = [[torch.randn(9001 + o, device=device).to(dtype)[o:]] for o in offsets]
        check(grads)
        out = [torch.empty(9008, dtype=dtype, device=device)[7:]]
        weights = torch.randn(k, device=device)
        assert torch.equal(weighted_sum(grads, weights, out=out)[0], weighted_sum(grads, weights)[0])


def test_more_tensors_than_a_table_holds(device):
    check(draw(3, shapes=[(i % 40,) for i in range(1500)], device=device))
    check(draw(32, shapes=[(i % 7,) for i in range(300)], device=device))


def test_mixed_dtypes(device):
    for dtypes in ([torch.bfloat16, torch.float32, torch.float16], [torch.float32, torch.float64]):
        grads = [[torch.randn(50, 3, device=device).to(t) for t in dtypes] for _ in range(3)]
        rows = torch.stack([torch.cat([g.flatten().double() for g in row]) for row in grads])
        torch.testing.assert_close(gramian(grads).double(), rows @ rows.T, rtol=3e-7, atol=1e-5)
        assert torch.equal(GradientPlan(grads).gramian(), gramian(grads))
        weights = torch.randn(3, device=device)
        assert_weighted_sum(weighted_sum(grads, weights), grads, weights)


def test_layouts(device):
    """Dense in any order of dimensions works as it is; what is not dense is copied; strides of size 1 mean nothing."""
    a, b = torch.randn(2, 8, 4, 5, 6, device=device)
    want = gramian([[a], [b]])
    channels_last = [[t.to(memory_format=torch.channels_last)] for t in (a, b)]
    assert GradientPlan(channels_last).gramian()[0, 1].item() == pytest.approx(want[0, 1].item(), rel=1e-5)
    weights = torch.randn(2, device=device)
    out = weighted_sum(channels_last, weights)[0]
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, weighted_sum([[a], [b]], weights)[0])

    sliced = torch.randn(8, 4, 5, 12, device=device)[..., ::2].copy_(a)
    expanded = torch.randn(8, 4, 5, 1, device=device).expand(8, 4, 5, 6)
    assert torch.equal(gramian([[sliced], [b]]), want)
    assert torch.equal(gramian([[b], [expanded]]), gramian([[b], [expanded.contiguous()]]))
    assert torch.equal(gramian([[expanded], [expanded]]), gramian([[expanded.contiguous()]]).expand(2, 2))

    ones = torch.randn(1, 3, 1, device=device)
    assert torch.equal(gramian([[ones], [ones.as_strided((1, 3, 1), (77, 1, 99))]]), gramian([[ones], [ones]]))


@pytest.mark.parametrize("k", [3, 9])
def test_out_may_be_one_of_the_lists(k, device):
    weights = torch.randn(k, device=device)
    for i in (0, k - 1):
        grads = draw(k, device=device)
        want = weighted_sum(grads, weights)
        version = grads[i][0]._version
        out = weighted_sum(grads, weights, out=grads[i])
        assert all(a is b for a, b in zip(out, grads[i], strict=True))
        assert all(map(torch.equal, out, want))
        assert out[0]._version > version
        grads = draw(k, device=device)
        want = weighted_sum(grads, weights)
        assert all(map(torch.equal, GradientPlan(grads, out=grads[i]).weighted_sum(weights), want))


def test_plan_sees_new_contents(device):
    grads = draw(3, device=device)
    plan = GradientPlan(grads)
    first = plan.gramian()
    kept = first.clone()
    weights = torch.ones(3, device=device)
    out = plan.weighted_sum(weights)
    torch._foreach_mul_(grads[0], 2)
    assert torch.equal(plan.gramian(), gramian(grads)) and torch.equal(first, kept)
    assert plan.weighted_sum(weights.double()) is out is plan.out
    assert all(map(torch.equal, out, weighted_sum(grads, weights)))


def test_weights_of_any_kind(device):
    grads = draw(3, device=device)
    want = weighted_sum(grads, torch.tensor([1.0, 0.0, -0.5], device=device))
    strided = torch.tensor([1.0, 7, 0, 7, -0.5], device=device, dtype=torch.float64)[::2]
    for weights in (strided, strided.half(), strided.bfloat16()):
        assert all(map(torch.equal, weighted_sum(grads, weights), want))
        assert all(map(torch.equal, GradientPlan(grads).weighted_sum(weights), want))


def test_nan_and_infinity_show(device):
    grads = [[torch.ones(3000, device=device)], [torch.ones(3000, device=device)]]
    grads[1][0][2999] = math.nan
    gram = gramian(grads)
    assert gram[0, 0] == 3000 and gram[0, 1].isnan() and gram[1, 1].isnan()
    grads[1][0][2999] = math.inf
    assert gramian(grads)[1, 1] == math.inf
    assert weighted_sum(grads, torch.tensor([1.0, 0.0], device=device))[0][2999].isnan()


@pytest.mark.parametrize("k", [3, 12])
def test_threads_do_not_change_a_bit(k):
    grads = draw(k, shapes=[(100_003,), (64, 64, 3, 3), (10,)])
    weights = torch.randn(k)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            results.append([gramian(grads), *weighted_sum(grads, weights)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_reference_serves_where_no_kernel_does(monkeypatch):
    grads = draw(3)
    grads[1][1] = None
    for row in grads:
        row[0] = None
    weights = torch.randn(3)
    gram, out = gramian(grads), weighted_sum(grads, weights)
    stacked, stacked_out = gramian(stack(draw(2))).shape, weighted_sum(stack([grads[0][2:]] * 2), torch.ones(2))
    monkeypatch.setattr(gradients, "served", lambda *_: False)
    plan = GradientPlan(grads)
    for result in (gramian(grads), plan.gramian()):
        torch.testing.assert_close(result, gram, rtol=1e-5, atol=1e-3)
    for result in (weighted_sum(grads, weights), plan.weighted_sum(weights)):
        torch.testing.assert_close(result[1:], out[1:])
        assert result[0] is None
    assert plan.weighted_sum(weights) is plan.out
    poisoned = [torch.full(s, math.nan) for s in SHAPES]
    assert weighted_sum(grads, weights, out=poisoned)[0].eq(0).all()
    assert gramian(stack(draw(2))).shape == stacked
    torch.testing.assert_close(weighted_sum(stack([grads[0][2:]] * 2), torch.ones(2)), stacked_out)


@pytest.mark.parametrize("name", ["gramian", "weighted_sum"])
def test_opcheck(name, device):
    if _ops.backend("gradients", device, torch.float32) == "reference":
        pytest.skip("no native library here")
    grads = draw(3, shapes=[(5, 4), (3,)], dtype=torch.bfloat16, device=device)
    grads[0][1] = None
    lists = [t for row in grads for t in row]
    stacked = stack(draw(3, shapes=[(5, 4), (3,)], dtype=torch.bfloat16, device=device))
    permuted = [t if t is None or t.dim() < 2 else t.t().contiguous().t() for t in lists]
    op = getattr(torch.ops.udi_kernels, name).default
    for tensors, is_stacked in ((lists, False), (permuted, False), (stacked, True)):
        if name == "gramian":
            torch.library.opcheck(op, (tensors, 3, is_stacked))
        else:
            out = [torch.empty_like(t[0] if is_stacked else t) for t in (tensors if is_stacked else tensors[2:4])]
            torch.library.opcheck(op, (out, tensors, torch.randn(3, device=device), is_stacked))


def test_compile_in_one_graph(device):
    grads = draw(3, device=device)
    grads[1][0] = None

    def step(grads, out):
        gram = gramian(grads)
        weights = alignment_weights(gram)
        return gram, weights, weighted_sum(grads, weights), weighted_sum(grads, weights, out=out)

    compiled = torch.compile(step, fullgraph=True)
    for tensors in (grads, stack(draw(3, device=device))):
        out = [torch.empty(s, device=device) for s in SHAPES]
        again = [torch.empty(s, device=device) for s in SHAPES]
        gram, weights, fresh, written = compiled(tensors, out)
        want = step(tensors, again)
        assert torch.equal(gram, want[0])
        torch.testing.assert_close(weights, want[1])
        assert all(a is b for a, b in zip(written, out, strict=True))
        torch.testing.assert_close([*fresh, *out], [*want[2], *again])


def test_autocast_has_no_influence(device):
    grads = draw(3, device=device)
    weights = torch.randn(3, device=device)
    want = [gramian(grads), *weighted_sum(grads, weights)]
    with torch.autocast(device, dtype=torch.bfloat16):
        assert all(map(torch.equal, [gramian(grads), *weighted_sum(grads, weights)], want))


a, b = torch.ones(3, 4), torch.ones(3, 4)
leaf = torch.ones(3, 4, requires_grad=True)
BAD_GRADS = [
    (a, TypeError, "grads must be a sequence, got a tensor"),
    ([], ValueError, "grads must hold at least one tensor"),
    ([[], []], ValueError, "grads must hold at least one tensor"),
    ([[None], [None]], ValueError, "grads must hold at least one tensor"),
    ([3], TypeError, r"grads\[0\] must be a sequence of tensors, got int"),
    ([[a], [a, b]], ValueError, r"grads\[1\] must have length 1 as grads\[0\] has, got 2"),
    ([[a], [3]], TypeError, r"grads\[1\]\[0\] must be a tensor or None, got int"),
    ([[a], [torch.ones(4, 3)]], ValueError, r"grads\[1\]\[0\] must have shape \(3, 4\) as grads\[0\]\[0\] has, got"),
    ([[None, a], [None, a.half()]], ValueError, r"grads\[1\]\[1\] must have dtype torch.float32 .* got torch.float16"),
    ([[a], [torch.ones(4, 3).t()]], ValueError, r"grads\[1\]\[0\] must have strides \(4, 1\) .* got \(1, 3\).*contig"),
    ([[a.long()]], TypeError, r"grads\[0\]\[0\] must be float16, .* got torch.int64"),
    ([[a.to_sparse()]], ValueError, r"grads\[0\]\[0\] must be dense, got torch.sparse_coo; call .to_dense"),
    ([[a], [a.to("meta")]], ValueError, r"grads\[1\]\[0\] must be on cpu as the others are, got meta"),
    ([[a, a.to("meta")]], ValueError, r"grads\[0\]\[1\] must be on cpu as the others are, got meta"),
    ([[a], [leaf]], ValueError, r"grads\[1\]\[0\] must not require grad .* detach"),
    ([a, 3], TypeError, r"grads\[1\] must be a tensor or None, got int"),
    ([a, b[0, 0]], ValueError, r"grads\[1\] must have shape \(K, \*shape\), got \(\)"),
    ([a, b[:2]], ValueError, r"grads\[1\] must have size K of the first dimension 3 as grads\[0\] has, got 2"),
    ([a[:0]], ValueError, r"grads\[0\] must hold at least one gradient, got shape \(0, 4\)"),
]
w = torch.ones(2)
BAD_SUMS = [
    ([1.0, 1.0], None, TypeError, "weights must be a torch.Tensor, got list"),
    (torch.ones(3), None, ValueError, r"weights must have shape \(2,\), got \(3,\)"),
    (torch.ones(2, device="meta"), None, ValueError, "weights must be on cpu as the others are, got meta"),
    (torch.ones(2, requires_grad=True), None, ValueError, "weights must not require grad"),
    (w, [], ValueError, "out must have length 1, one per parameter, got 0"),
    (w, [None], TypeError, r"out\[0\] must be a tensor, got None"),
    (w, [a.t()], ValueError, r"out\[0\] must have shape \(3, 4\) .* got \(4, 3\)"),
    (w, [a.half()], ValueError, r"out\[0\] must have dtype torch.float32 .* got torch.float16"),
    (w, [torch.ones(3, 8)[:, ::2]], ValueError, r"out\[0\] must have strides \(4, 1\) .* got \(8, 2\)"),
    (w, [leaf], ValueError, r"out\[0\] must not require grad"),
]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("call", [gramian, lambda g: weighted_sum(g, w), GradientPlan], ids=["gramian", "sum", "plan"])
@pytest.mark.parametrize("grads, error, message", BAD_GRADS)
def test_bad_gradients(call, grads, error, message, native, monkeypatch):
    if not native:
        monkeypatch.setattr(gradients, "served", lambda *_: False)
    with pytest.raises(error, match=f"^(gramian|weighted_sum|GradientPlan): {message}"):
        call(grads)


@pytest.mark.parametrize("weights, out, error, message", BAD_SUMS)
def test_bad_weights_and_out(weights, out, error, message):
    with pytest.raises(error, match=f"^weighted_sum: {message}"):
        weighted_sum([[a], [b]], weights, out=out)
    with pytest.raises(error, match=f"^GradientPlan: {message}"):
        GradientPlan([[a], [b]], out=out).weighted_sum(weights)


def test_plan_refuses_what_it_would_have_to_copy():
    with pytest.raises(ValueError, match=r"GradientPlan: grads\[1\]\[0\] must be dense, got shape \(3, 4\) with"):
        GradientPlan([[a], [torch.ones(3, 1).expand(3, 4)]])
    with pytest.raises(ValueError, match=r"GradientPlan: grads\[0\] must be dense"):
        GradientPlan([torch.ones(2, 3, 8)[..., ::2]])


def test_gradients_that_require_grad_under_no_grad():
    with torch.no_grad():
        assert gramian([[leaf], [leaf]])[0, 1] == 12
        assert weighted_sum([[leaf]], torch.ones(1))[0].requires_grad is False


def test_alignment_weights(device):
    gram = torch.tensor([[4.0, 2, -3, 6], [2, 1, 0, 0], [-3, 0, 9, 0], [6, 0, 0, 36]], device=device)
    torch.testing.assert_close(alignment_weights(gram), torch.tensor([1, 0.25, 0, 0.75], device=device))
    torch.testing.assert_close(alignment_weights(gram, anchor=1), torch.tensor([1.0, 1, 0, 0], device=device))
    # cosines 1 and 0.5
    want = torch.tensor([1, 2 / 3, 0, 1 / 3], device=device)
    torch.testing.assert_close(alignment_weights(gram, cosine=True), want)
    opposed = torch.tensor([[1.0, -1], [-1, 1]], device=device)
    assert alignment_weights(opposed).tolist() == [1, 0]
    assert alignment_weights(torch.zeros(3, 3, device=device), cosine=True).tolist() == [1, 0, 0]
    assert alignment_weights(torch.ones(1, 1, dtype=torch.float64, device=device)).tolist() == [1]


@pytest.mark.parametrize(
    "gram, anchor, error, message",
    [
        ([[1.0]], 0, TypeError, "gram must be a torch.Tensor, got list"),
        (torch.ones(2, 3), 0, ValueError, r"gram must have shape \(K, K\), got \(2, 3\)"),
        (torch.ones(2, 2), 2, ValueError, r"anchor must lie in \[0, 2\), got 2"),
        (torch.ones(2, 2), -1, ValueError, r"anchor must lie in \[0, 2\), got -1"),
    ],
)
def test_alignment_weights_bad_input(gram, anchor, error, message):
    with pytest.raises(error, match=f"^alignment_weights: {message}"):
        alignment_weights(gram, anchor=anchor)


def test_alignment_weights_can_be_differentiated():
    gram = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(alignment_weights, gram)


def test_controller_from_autograd():
    """As UDI uses it: gradients of three losses in a model's parameters, unused ones None."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 2))
    unused = torch.nn.Parameter(torch.zeros(4))
    y = model(torch.randn(16, 5))
    losses = [y.square().mean(), (y - 1).abs().mean(), y[:, 0].mean()]
    params = [*model.parameters(), unused]
    grads = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses]
    truth = reference.gramian([[g if g is None else g.double() for g in row] for row in grads])
    torch.testing.assert_close(gramian(grads).double(), truth, rtol=1e-6, atol=1e-9)
    weights = udi_kernels.alignment_weights(gramian(grads))
    for p, g in zip(params, weighted_sum(grads, weights), strict=True):
        p.grad = g
    assert unused.grad is None and params[0].grad.shape == params[0].shape


@gpu
def test_no_call_waits_for_the_gpu():
    grads = draw(3, device="cuda")
    weights = torch.ones(3, device="cuda")
    plan = GradientPlan(grads)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            alignment_weights(gramian(grads), cosine=True)
            weighted_sum(grads, weights)
            plan.gramian()
            plan.weighted_sum(weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("k", [3, 8, 32])
def test_bit_identical_on_a_side_stream_and_again(k):
    grads = draw(k, shapes=[(300_001,), (64, 64, 3, 3), (10,)], device="cuda")
    weights = torch.randn(k, device="cuda")
    want = [gramian(grads), *weighted_sum(grads, weights)]
    stream = torch.cuda.Stream()
    for _ in range(5):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = [gramian(grads), *weighted_sum(grads, weights)]
        torch.cuda.current_stream().wait_stream(stream)
        assert all(map(torch.equal, again, want))


@gpu
@pytest.mark.parametrize("k", [3, 32])
@pytest.mark.parametrize("planned", [False, True])
def test_graph_capture_and_replay(k, planned):
    grads = draw(k, device="cuda")
    weights = torch.randn(k, device="cuda")
    out = [torch.empty_like(t) for t in grads[0]]
    plan = GradientPlan(grads, out=out)

    def step():
        if planned:
            plan.weighted_sum(weights)
            return plan.gramian()
        weighted_sum(grads, weights, out=out)
        return gramian(grads)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram = step()
    for _ in range(3):
        for row in grads:
            for t in row:
                t.normal_()
        for t in (gram, *out):
            t.fill_(math.nan)
        graph.replay()
        assert torch.equal(gram, gramian(grads))
        assert all(map(torch.equal, out, weighted_sum(grads, weights)))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device():
    grads = draw(3, device="cuda:1")
    assert torch.cuda.current_device() == 0
    check(grads)
    assert torch.cuda.current_device() == 0


@gpu
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 1024
    if torch.cuda.mem_get_info()[0] < 3 * 2 * n:
        pytest.skip("needs 13 GB of GPU memory")
    ones = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    assert gramian([[ones], [ones]]).tolist() == [[n, n], [n, n]]
    out = weighted_sum([[ones], [ones]], torch.tensor([1.0, 2.0], device="cuda"))[0]
    assert (out[-2048:] == 3).all() and (out[:2048] == 3).all()
