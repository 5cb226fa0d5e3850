"""The class-conditional bound: club_mi(given=)."""

from functools import partial

import pytest
import torch
from losses import assert_as_good_as_torch, run

from udi_kernels import CLUB, club_mi, reference

REDUCTIONS = ("none", "sum", "mean")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def draw(n, d, dtype=torch.float32, shift=0.0, device="cpu"):
    mu, logvar, y = (torch.randn(n, d) for _ in range(3))
    return [t.to(device, dtype) for t in (mu + shift, logvar, 0.7 * mu + 0.7 * y + shift)]


def draw_classes(n, classes, device="cpu"):
    """Some rows in none, and (if there are many classes) some alone in theirs."""
    return torch.randint(-1, classes, (n,), device=device)


def brute(mu, logvar, y, given):
    """By the definition: log q of the row's own sample less the mean over the others of its class."""

    def log_q(j, i):
        return -0.5 * ((y[j] - mu[i]).square() * (-logvar[i]).exp() + logvar[i]).sum(-1)

    rows = []
    for i, k in enumerate(given.tolist()):
        others = [j for j, other in enumerate(given.tolist()) if k >= 0 and other == k and j != i]
        rows.append(log_q(i, i) - log_q(others, i).mean() if others else 0 * mu[i].sum())
    return torch.stack(rows)


def brute_reduced(mu, logvar, y, given, reduction):
    rows = brute(mu, logvar, y, given)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (given >= 0).sum()}[reduction]


def equal(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n, d, classes", [(40, 19, 7), (60, 300, 2), (50, 33, 40), (7, 5, 1), (30, 4, 9)])
def test_brute_force(n, d, classes, reduction, device, backend):
    inputs, given = draw(n, d, torch.float64, device=device), draw_classes(n, classes, device)
    grad = torch.rand(n if reduction == "none" else (), dtype=torch.float64, device=device)
    ours = run(partial(club_mi, given=given, reduction=reduction), inputs, grad=grad)
    for x, want in zip(ours, run(lambda *xs: brute_reduced(*xs, given, reduction), inputs, grad=grad), strict=True):
        torch.testing.assert_close(x, want, rtol=1e-12, atol=1e-12 * want.abs().max().item())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, d, classes", [(1, 5, 1), (64, 512, 10), (300, 7, 100), (1000, 130, 3), (200, 33, 4), (70, 1271, 20)]
)
def test_accuracy(n, d, classes, dtype, reduction, device):
    given = draw_classes(n, classes, device)
    ours, plain = partial(club_mi, given=given), partial(reference.club_mi, given=given)
    assert_as_good_as_torch(
        partial(ours, reduction=reduction),
        partial(plain, reduction=reduction),
        lambda: draw(n, d, dtype, device=device),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shifted_features(reduction, device):
    """Far from 0, and every class far from the others."""
    given = draw_classes(500, 20, device)

    def far():
        mu, logvar, y = draw(500, 30, device=device)
        shift = 1e3 * given[:, None]
        return mu + shift, logvar, y + shift

    ours, plain = partial(club_mi, given=given), partial(reference.club_mi, given=given)
    assert_as_good_as_torch(partial(ours, reduction=reduction), partial(plain, reduction=reduction), far)
    inputs = draw(500, 30, torch.float64, device=device)
    there = [t + 2.0**20 * (i != 1) for i, t in enumerate(inputs)]
    f = partial(ours, reduction=reduction)
    for a, b in zip(run(f, inputs), run(f, there), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_one_class_is_the_bound_without_the_row_itself(device):
    inputs = draw(50, 20, torch.float64, device=device)
    for given in (torch.zeros(50, dtype=torch.int64), torch.full((50,), 2**63 - 1)):
        ours = run(partial(club_mi, given=given.to(device)), inputs)
        for x, want in zip(ours, run(lambda *xs: 50 / 49 * club_mi(*xs), inputs), strict=True):
            torch.testing.assert_close(x, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_numbers_of_classes(dtype, device, backend):
    """Any integers, any strides; only which rows share one matters."""
    inputs, given = draw(60, 9, device=device), draw_classes(60, 8, device).clamp_min(0)
    want = run(partial(club_mi, given=given), inputs)
    wide = torch.stack((given, given + 1), 1).to(dtype)
    assert equal(run(partial(club_mi, given=wide[:, 0]), inputs), want)
    if dtype == torch.int64:
        many = torch.tensor([5, 10**12, 0, 2**63 - 1, 77, 3, 2**62, 9], device=device)[given]
        for x, other in zip(run(partial(club_mi, given=many), inputs), want, strict=True):
            torch.testing.assert_close(x, other)


def test_rows_in_no_class_play_no_part(device, backend):
    """Whatever they hold."""
    inputs, given = draw(80, 21, device=device), draw_classes(80, 12, device)
    given[:2], given[2] = torch.tensor([-1, -(10**12)]), 99  # and one alone in its class
    none = given < 0
    for reduction in REDUCTIONS:
        full = run(partial(club_mi, given=given, reduction=reduction), inputs)
        kept = run(partial(club_mi, given=given[~none], reduction=reduction), [t[~none] for t in inputs])
        poisoned = [torch.where(none[:, None] | (given == 99)[:, None], torch.nan, t) for t in inputs]
        assert equal(run(partial(club_mi, given=given, reduction=reduction), poisoned), full)
        for x, want in zip(full, kept, strict=True):
            torch.testing.assert_close(x[~none] if x.dim() else x, want)
            assert not x.dim() or not x[none].any() and not x[2].any()


@pytest.mark.parametrize("given", [[-1] * 6, list(range(6)), [-1, 3, -5, 1, 0, -1]])
def test_no_negatives_at_all(given, device, backend):
    for reduction in REDUCTIONS:
        f = partial(club_mi, given=torch.tensor(given, device=device), reduction=reduction)
        value, *grads = run(f, draw(6, 5, device=device))
        assert (value == 0).all() and not any(g.any() for g in grads)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape, device, backend):
    leaves = [torch.empty(shape, device=device, requires_grad=True) for _ in range(3)]
    for reduction in REDUCTIONS:
        loss = club_mi(*leaves, given=torch.zeros(shape[0], dtype=torch.int64, device=device), reduction=reduction)
        assert not loss.any() and loss.shape == ((shape[0],) if reduction == "none" else ())
        assert all(g.shape == shape for g in torch.autograd.grad(loss.sum(), leaves))


def test_permuted_rows(device):
    inputs, given = draw(200, 40, torch.float64, device=device), draw_classes(200, 30, device)
    order = torch.randperm(200, device=device)
    want = run(partial(club_mi, given=given, reduction="none"), inputs)
    got = run(partial(club_mi, given=given[order], reduction="none"), [t[order] for t in inputs])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b[order], rtol=1e-10, atol=1e-12)


def test_strides(device):
    a, b = torch.randn(30, 120, device=device), torch.randn(40, 30, device=device)
    given = draw_classes(30, 4, device)
    for inputs in ([a[:, :40], a[:, 40:80], b.T], [a[:1, :40].expand(30, 40), b.T, a[:, 1::3]]):
        for reduction in REDUCTIONS:
            f = partial(club_mi, given=given, reduction=reduction)
            leaves = [t.detach().requires_grad_() for t in inputs]
            value = f(*leaves)
            got = value, *torch.autograd.grad(value.sum(), leaves)
            assert equal(got, run(f, [t.contiguous() for t in inputs]))


def test_partial_requires_grad(device):
    inputs, given = draw(30, 50, device=device), draw_classes(30, 4, device)
    for reduction in REDUCTIONS:
        f = partial(club_mi, given=given, reduction=reduction)
        want = run(f, inputs)
        for i in range(3):
            got = run(f, inputs, needs=[j == i for j in range(3)])
            assert torch.equal(got[1 + i], want[1 + i]) and sum(g is not None for g in got[1:]) == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_and_double_backward(reduction, device, backend):
    inputs = [t.requires_grad_() for t in draw(9, 3, torch.float64, device=device)]
    f = partial(club_mi, given=torch.tensor([4, 1, -1, 4, 4, 1, 0, -7, 1], device=device), reduction=reduction)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("classes", [2, 50, 3000])
def test_bit_identical_repeats_and_threads(classes, device):
    inputs, given = draw(5000, 70, device=device), draw_classes(5000, classes, device)
    threads = torch.get_num_threads()
    try:
        for reduction in REDUCTIONS:
            results = []
            for n in (1, 2, 2):
                torch.set_num_threads(n)
                results.append(run(partial(club_mi, given=given, reduction=reduction), inputs))
            assert all(equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(threads)


def test_opcheck(device):
    ops = torch.ops.udi_kernels
    inputs = [t[::2] for t in draw(16, 21, device=device)]
    given = torch.tensor([3, 1, 0, 0, 3, 8, 8, 1], device=device)  # pairs fill all statistics
    club_mi(*inputs, given=given)  # loads the kernels
    torch.library.opcheck(ops.club_classes.default, (given,))
    classes = ops.club_classes(given)
    leaves = [t.detach().requires_grad_() for t in inputs]
    for reduction in range(3):
        torch.library.opcheck(ops.club_mi.default, (*leaves, given, reduction))
        torch.library.opcheck(ops.club_mi_fwd.default, (*inputs, classes, reduction))
        loss, stats = ops.club_mi_fwd(*inputs, classes, reduction)
        for needs in ((True, True, True), (False, False, True)):
            args = (torch.ones_like(loss), *inputs, classes, stats, reduction, *needs)
            torch.library.opcheck(ops.club_mi_bwd.default, args)


def test_classes(device):
    """Both who count them agree, up to the numbers."""
    given = torch.tensor([7, -3, 10**12, 7, 2, -1, 2, 7], device=device)
    club_mi(*[torch.zeros(8, 1, device=device)] * 3)  # loads the kernels
    for classes in (torch.ops.udi_kernels.club_classes(given), reference.club_classes(given)):
        order, index, begin = classes
        assert order[-1] == 6 and index[-1] == 3 and begin[3:].tolist() == [8] * 6
        assert sorted(order[:-1].tolist()) == list(range(8)) and order[:2].tolist() == [1, 5]
        rows = [order[begin[k] : begin[k + 1]].tolist() for k in range(3)]
        assert sorted(rows) == [[0, 3, 7], [2], [4, 6]]
        assert all((index[:-1] == k).nonzero().flatten().tolist() == rows[k] for k in range(3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, device):
    def f(mu, logvar, y, given):
        return club_mi(mu, logvar.tanh(), y, given=given) + club_mi(mu, logvar, y * 2, given=given, reduction="sum")

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, d in ((4, 8), (17, 8), (9, 3)):
        inputs, given = draw(n, d, device=device), draw_classes(n, 3, device)
        for a, b in zip(*(run(partial(g, given=given), inputs) for g in (compiled, f)), strict=True):
            torch.testing.assert_close(a, b)


def test_module(device):
    torch.manual_seed(0)
    q = CLUB(7, 5, 16).double().to(device)
    x, y = torch.randn(2, 30, 7, dtype=torch.float64, device=device)
    given = draw_classes(30, 4, device)
    want = brute_reduced(*q.get_mu_logvar(x), y[:, :5], given, "mean")
    torch.testing.assert_close(q(x, y[:, :5], given), want)
    torch.testing.assert_close(q(x, y[:, :5], given=given), want)


X = torch.zeros(3, 4)
BAD = {
    r"given must be a torch.Tensor, got list": [0, 0, 1],
    r"given must be of integers, got torch.float32; pass given.long\(\)": torch.zeros(3),
    r"given must be of integers, got torch.bool; pass given.long\(\)": torch.zeros(3, dtype=torch.bool),
    r"given must be of integers, got torch.uint64; pass given.long\(\)": torch.zeros(3, dtype=torch.uint64),
    r"given must have shape \(3,\), one class per row of mu, got \(4,\)": torch.zeros(4, dtype=torch.int64),
    r"given must have shape \(3,\), one class per row of mu, got \(3, 4\)": torch.zeros(3, 4, dtype=torch.int64),
    r"given must be on cpu as mu is, got meta; pass given.to\(mu.device\)": torch.zeros(
        3, dtype=torch.int64, device="meta"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, refused):
    refused(lambda: club_mi(X, X, X, given=BAD[message]), f"^club_mi: {message}")
