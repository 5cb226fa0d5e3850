import math

import pytest
import torch
from lists import SHAPES, assert_gramian, assert_weighted_sum, check, draw, stack

from udi_kernels import GradientPlan, _ops, alignment_weights, gramian, reference, weighted_sum

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9, 17, 32, 41])
def test_exact(k, dtype, device):
    check(draw(k, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 12])
def test_stacked(k, dtype, device):
    grads = draw(k, dtype=dtype, device=device)
    stacked = stack(grads)
    gram = gramian(stacked, stacked=True)  # on a GPU not gramian(grads) to the bit: slices are aligned otherwise
    assert_gramian(gram, grads)
    weights = torch.randn(k, device=device)
    out = weighted_sum(grads, weights)
    plan = GradientPlan(stacked, stacked=True)
    for result in (weighted_sum(stacked, weights, stacked=True), plan.weighted_sum(weights)):
        assert all(map(torch.equal, result, out))
    assert torch.equal(plan.gramian(), gram)


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
        torch.testing.assert_close(gramian([variant], stacked=True), gramian(grads))
        weights = torch.randn(3, device=device)
        assert torch.equal(weighted_sum([variant], weights, stacked=True)[0], weighted_sum(grads, weights)[0])
    same = stacked[:1].expand(3, 6, 4)
    assert torch.equal(gramian([same], stacked=True), gramian([grads[0]])[0, 0].expand(3, 3))


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
    assert gramian(stacked, stacked=True).shape == (2, 2)
    assert weighted_sum(stacked, torch.ones(2, device=device), stacked=True)[1] is None


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


def layouts(device):
    """The gradients of two losses in one weight, laid out differently, and the weight, as autograd makes them."""
    x = torch.randn(3, 6, device=device)
    weight = torch.randn(4, 6, device=device, requires_grad=True)
    losses = ((x @ weight.T).sin().sum(), torch.einsum("oi,bi->bo", weight, x).square().sum())
    yield "einsum", [torch.autograd.grad(loss, [weight]) for loss in losses], weight
    kernel = torch.randn(8, 3, 3, 3, device=device, requires_grad=True)
    images = torch.randn(4, 3, 9, 9, device=device)
    lists = []
    for x in (images, images.to(memory_format=torch.channels_last)):
        (grad,) = torch.autograd.grad(torch.nn.functional.conv2d(x, kernel).square().mean(), [kernel])
        lists.append([grad])
    yield "channels last", [[lists[0][0]], [lists[1][0].contiguous(memory_format=torch.channels_last)]], kernel
    decay = torch.autograd.grad(weight.sum(), [weight])
    yield "expanded", [[torch.randn(6, 4, device=device).t()], decay], weight
    yield "all expanded", [decay, decay], weight


def test_one_weight_in_two_layouts(device):
    weights = torch.tensor([0.3, -2.0], device=device)
    for name, grads, parameter in layouts(device):
        plain = [[g.contiguous() for g in row] for row in grads]
        assert name == "all expanded" or grads[0][0].stride() != grads[1][0].stride()
        for lists, same in ((grads, plain), (grads[::-1], plain[::-1])):
            torch.testing.assert_close(gramian(lists), gramian(same))
            want = weighted_sum(same, weights)
            torch.testing.assert_close(weighted_sum(lists, weights), want)
            assert all(t.requires_grad is False for t in weighted_sum(lists, weights, like=[parameter]))
            for layout in (parameter, parameter.detach().transpose(0, 1).contiguous().transpose(0, 1)):
                (result,) = weighted_sum(lists, weights, like=[layout])
                assert result.stride() == layout.stride()
                torch.testing.assert_close([result], want)
            for row in lists:  # out may have the layout of any dense gradient
                if row[0].numel() == row[0].untyped_storage().nbytes() // row[0].element_size():
                    out = [torch.empty_like(row[0])]
                    torch.testing.assert_close(weighted_sum(lists, weights, out=out), want)


def test_out_is_one_of_two_layouts(device, request):
    weights = torch.tensor([0.3, -2.0], device=device)
    for without_csrc in (False, True):
        if without_csrc:
            request.getfixturevalue("no_csrc")
        for i in (0, 1):
            grads = [[torch.randn(5, 5, device=device)], [torch.randn(5, 5, device=device).t()]]
            want = weighted_sum([[g.contiguous() for g in row] for row in grads], weights)
            torch.testing.assert_close(weighted_sum(grads, weights, out=grads[i]), want)
        square = torch.randn(5, 5, device=device)
        want = 0.3 * square - 2 * square.t()
        torch.testing.assert_close(weighted_sum([[square], [square.t()]], weights, out=[square])[0], want)


def test_like(backend):
    grads = draw(3)
    for row in grads:
        row[4] = None
    weights = torch.randn(3)
    parameters = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES]
    parameters[1].data = parameters[1].data.to(memory_format=torch.channels_last)
    parameters[5].data = parameters[5].data.double()
    want, got = weighted_sum(grads, weights), weighted_sum(grads, weights, like=iter(parameters))
    torch.testing.assert_close(got, want)
    assert got[4] is None and got[5].dtype == torch.float32
    assert all(t.stride() == p.stride() for t, p in zip(got, parameters, strict=True) if t is not None)
    stacked = stack(grads := draw(3, shapes=[(4, 5)]))
    (got,) = weighted_sum(stacked, weights, like=[torch.empty(5, 4).t()], stacked=True)
    assert got.stride() == (1, 4)
    torch.testing.assert_close([got], weighted_sum(grads, weights))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_like_trains_with_a_fused_optimizer(name):
    """It steps as the optimizer that is not fused, which takes a gradient by its indices."""
    torch.manual_seed(0)
    x, start = torch.randn(3, 6), torch.randn(4, 6)
    steps = []
    for fused in (False, True):
        weight = torch.nn.Parameter(start.clone())
        optimizer = getattr(torch.optim, name)([weight], lr=0.1, fused=fused)
        outputs = torch.einsum("oi,bi->bo", weight, x)
        grads = [
            torch.autograd.grad(loss, [weight], retain_graph=True) for loss in (outputs.square().sum(), outputs.sum())
        ]
        assert not grads[0][0].is_contiguous()
        (weight.grad,) = weighted_sum(grads, torch.tensor([1.0, 0.5]), like=[weight])
        optimizer.step()
        steps.append(weight.detach())
    torch.testing.assert_close(*steps)


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


@pytest.mark.parametrize("planned", [False, True])
def test_out_may_be_any_gradient_of_its_parameter(planned, backend):
    """Of another list for each parameter, a slice of a stack, or next to a gradient in the same memory."""
    grads = draw(3)
    weights = torch.randn(3)
    want = weighted_sum(grads, weights)
    written = [row[p] for p, row in enumerate((grads * 3)[: len(SHAPES)])]
    sums = GradientPlan(grads, out=written).weighted_sum if planned else lambda w: weighted_sum(grads, w, out=written)
    torch.testing.assert_close(sums(weights), want)

    stacked = torch.randn(3, 5)
    want = weighted_sum([stacked], weights, stacked=True)
    out = [stacked[1]]
    if planned:
        GradientPlan([stacked], out=out, stacked=True).weighted_sum(weights)
    else:
        weighted_sum([stacked], weights, out=out, stacked=True)
    torch.testing.assert_close([stacked[1]], want)

    memory = torch.randn(12)
    neighbours = [[memory[:4]], [memory[8:]]]
    want = weighted_sum(neighbours, weights[:2])
    if planned:
        GradientPlan(neighbours, out=[memory[4:8]]).weighted_sum(weights[:2])
    else:
        weighted_sum(neighbours, weights[:2], out=[memory[4:8]])
    torch.testing.assert_close([memory[4:8]], want)


def test_weights_in_the_memory_of_out(device):
    grads = [[torch.randn(100_000, device=device)] for _ in range(3)]
    out = torch.randn(100_000, device=device)
    for place in (0, 70_000):
        weights = out[place : place + 3]
        want = weighted_sum(grads, weights.clone())[0]
        assert torch.equal(weighted_sum(grads, weights, out=[out])[0], want)
        plan = GradientPlan(grads, out=[out])
        want = weighted_sum(grads, weights.clone())[0]
        assert torch.equal(plan.weighted_sum(weights)[0], want)


@pytest.mark.parametrize("planned", [False, True])
def test_autograd_notices_what_is_written(planned, backend):
    grads, weights = draw(2, shapes=[(4,), (3, 2)]), torch.ones(2)
    out = [torch.ones(4), torch.ones(3, 2)]
    sums = GradientPlan(grads, out=out).weighted_sum if planned else lambda w: weighted_sum(grads, w, out=out)
    versions, read = [t._version for t in out], [t._version for row in grads for t in row]
    x = torch.ones(4, requires_grad=True)
    y = (x * out[0]).sum()
    sums(weights)
    assert all(t._version > version for t, version in zip(out, versions, strict=True))
    assert [t._version for row in grads for t in row] == read
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_autograd_notices_a_plan_s_own_output(backend):
    plan = GradientPlan(draw(2, shapes=[(4,)]))
    x = torch.ones(4, requires_grad=True)
    y = (x * plan.weighted_sum(torch.ones(2))[0]).sum()
    plan.gramian()
    y.backward(retain_graph=True)  # gramian writes to none of the plan's tensors
    plan.weighted_sum(torch.ones(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


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


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [3, 1000, 9001])
@pytest.mark.parametrize("scales", [(1e-25, 1e-25), (1e25, 1e25), (1e25, 1e-25), (1e-22, 1e15), (1e30, 0)], ids=str)
def test_no_product_overflows_or_underflows(scales, n, dtype, stacked, backend):
    """Beside a float64 gradient the result is float64, so it can hold such products."""
    rows = [(s * torch.randn(n)).to(dtype) for s in scales]
    wide = [torch.full((5,), s, dtype=torch.float64) for s in scales]
    truth = torch.stack([torch.cat([r.double(), w]) for r, w in zip(rows, wide, strict=True)])
    truth = truth @ truth.T
    lists = stack([[r, w] for r, w in zip(rows, wide, strict=True)]) if stacked else list(zip(rows, wide, strict=True))
    torch.testing.assert_close(gramian(lists, stacked=stacked), truth, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(GradientPlan(lists, stacked=stacked).gramian(), truth, rtol=1e-12, atol=1e-300)


def test_large_products_that_cancel(backend):
    a, b = torch.full((3000,), 1e25), torch.full((3000,), 1e25)
    b[1::2] = -1e25
    assert gramian([[a], [b]]).tolist() == [[math.inf, 0], [0, math.inf]]
    a[1] = 1  # 2e25 and more remain of 3e53
    truth = (a.double() @ b.double()).item()
    lists = [[a, torch.zeros(1, dtype=torch.float64)], [b, torch.zeros(1, dtype=torch.float64)]]
    assert gramian(lists)[0, 1].item() == pytest.approx(truth, rel=1e-12)


def test_tiny_products_among_others(backend):
    """Blocks are multiplied each in its own type, and rows of zeros beside tiny ones change nothing."""
    a, b = torch.randn(2, 5000)
    a[1024:2048] *= 1e-25
    b[:1024] = b[2048:] = 0
    zero = torch.zeros(1, dtype=torch.float64)
    rows = torch.stack([a, b, torch.zeros(5000)]).double()
    got = gramian([[a, zero], [b, zero], [torch.zeros(5000), zero], [None, zero]])
    torch.testing.assert_close(got[:3, :3], rows @ rows.T, rtol=1e-6, atol=1e-35)
    assert got[0, 1] != 0 and got[2].eq(0).all() and got[3].eq(0).all()


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


def test_reference_serves_where_csrc_does_not(request):
    grads = draw(3)
    grads[1][1] = None
    for row in grads:
        row[0] = None
    weights = torch.randn(3)
    columns = stack(draw(2))
    gram, out = gramian(grads), weighted_sum(grads, weights)
    stacked_gram = gramian(columns, stacked=True)
    stacked_out = weighted_sum(columns, torch.ones(2), stacked=True)
    request.getfixturevalue("no_csrc")
    plan = GradientPlan(grads)
    for result in (gramian(grads), plan.gramian()):
        torch.testing.assert_close(result, gram, rtol=1e-5, atol=1e-3)
    for result in (weighted_sum(grads, weights), plan.weighted_sum(weights)):
        torch.testing.assert_close(result[1:], out[1:])
        assert result[0] is None
    assert plan.weighted_sum(weights) is plan.out
    poisoned = [torch.full(s, math.nan) for s in SHAPES]
    assert weighted_sum(grads, weights, out=poisoned)[0].eq(0).all()
    torch.testing.assert_close(gramian(columns, stacked=True), stacked_gram, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(weighted_sum(columns, torch.ones(2), stacked=True), stacked_out)


@pytest.mark.parametrize("name", ["gramian", "weighted_sum", "weighted_sum_out"])
def test_opcheck(name, device):
    if _ops.backend("gradients", device, torch.float32) == "reference":
        pytest.skip("no native library here")
    grads = draw(3, shapes=[(5, 4), (3,)], dtype=torch.bfloat16, device=device)
    grads[0][1] = None
    lists = [t for row in grads for t in row]
    stacked = stack(draw(3, shapes=[(5, 4), (3,)], dtype=torch.bfloat16, device=device))
    permuted = [t if t is None or t.dim() < 2 else t.t().contiguous().t() for t in lists]
    op = getattr(torch.ops.udi_kernels, name).default
    weights = torch.randn(3, device=device)
    for tensors, k in ((lists, 3), (permuted, 3), (stacked, None)):
        out = [torch.empty_like(t if k else t[0]) for t in (tensors[2:4] if k else tensors)]
        like = [torch.empty_like(t).requires_grad_() for t in out]
        args = {"gramian": (tensors, k, False), "weighted_sum": (tensors, k, weights)}
        torch.library.opcheck(op, args[name] if name in args else (out, tensors, k, weights))
        if name == "weighted_sum":
            torch.library.opcheck(op, (tensors, k, weights, like))


def test_compile_in_one_graph(device):
    grads = draw(3, device=device)
    grads[1][0] = None

    def step(grads, out, **options):
        gram = gramian(grads, **options)
        weights = alignment_weights(gram)
        fresh = weighted_sum(grads, weights, like=out, **options)
        return gram, weights, fresh, weighted_sum(grads, weights, out=out, **options)

    compiled = torch.compile(step, fullgraph=True)
    for tensors, options in ((grads, {}), (stack(draw(3, device=device)), {"stacked": True})):
        out = [torch.empty(s, device=device) for s in SHAPES]
        again = [torch.empty(s, device=device) for s in SHAPES]
        gram, weights, fresh, written = compiled(tensors, out, **options)
        want = step(tensors, again, **options)
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


def test_gradients_that_require_grad_under_no_grad():
    leaf = torch.ones(3, 4, requires_grad=True)
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


def test_alignment_weights_at_the_ends_of_the_range(device):
    vectors = torch.tensor([[1.0, 2, 3], [2, 1, 0], [1, 1, 1]], dtype=torch.float64)
    plain, cosines = (alignment_weights(vectors @ vectors.T, cosine=cosine) for cosine in (False, True))
    ends = {torch.float32: (4e18, 3e-20), torch.bfloat16: (4e18, 3e-19), torch.float64: (3e153, 1e-154)}
    for dtype, scales in ends.items():
        for scale in scales:
            gram = (scale * vectors) @ (scale * vectors).T
            for cosine, want in ((False, plain), (True, cosines)):
                got = alignment_weights(gram.to(dtype).to(device), cosine=cosine)
                tolerance = {"rtol": 0.02, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 0}
                torch.testing.assert_close(got.double().cpu(), want, **tolerance)
    large = torch.full((64, 64), 3e38, device=device)
    assert alignment_weights(large)[1:].tolist() == pytest.approx([1 / 63] * 63)
    assert alignment_weights(torch.full((64, 64), 6e4, dtype=torch.float16, device=device)).isfinite().all()
    mixed = torch.tensor([[1.0, 3e38, 1e-38, 3e38]] * 4, device=device)
    assert alignment_weights(mixed).tolist() == [1, 0.5, 0, 0.5]


def test_cosine_is_free_of_scales(device):
    vectors = torch.tensor([[1.0, 2, 3], [2, 1, 0], [1, 1, 1]], dtype=torch.float64)
    want = alignment_weights(vectors @ vectors.T, cosine=True).float()
    for scales in ((1e18, 1e-18, 1), (1e-18, 1e18, 1e18), (1e-18, 1e-18, 1e18), (1e-19, 4e18, 4e18)):
        scaled = vectors * torch.tensor(scales, dtype=torch.float64)[:, None]
        gram = (scaled @ scaled.T).float().to(device)
        torch.testing.assert_close(alignment_weights(gram, cosine=True).cpu(), want)


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
    weights = alignment_weights(gramian(grads))
    for p, g in zip(params, weighted_sum(grads, weights), strict=True):
        p.grad = g
    assert unused.grad is None and params[0].grad.shape == params[0].shape
