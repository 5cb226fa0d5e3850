import pickle
from functools import partial

import pytest
import torch
from losses import assert_as_good_as_torch, run

from udi_kernels import CLUB, club_mi, club_nll, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 5), (2, 1), (64, 512), (300, 7), (33, 41), (1000, 130), (5, 1271), (70, 300)]
OPS = {
    "mean": (club_mi, reference.club_mi),
    "none": (partial(club_mi, reduction="none"), partial(reference.club_mi, reduction="none")),
    "sum": (partial(club_mi, reduction="sum"), partial(reference.club_mi, reduction="sum")),
    "nll": (club_nll, reference.club_nll),
}


def plain(mu, logvar, y):
    """The N x N x D form of the CLUB paper's code."""
    positive = -((mu - y) ** 2) / 2 / logvar.exp()
    negative = -((y.unsqueeze(0) - mu.unsqueeze(1)) ** 2).mean(1) / 2 / logvar.exp()
    return (positive.sum(-1) - negative.sum(-1)).mean()


def draw(n, d, dtype=torch.float32, device="cpu", shift=0.0, correlated=True):
    mu, logvar, y = (torch.randn(n, d, device=device) for _ in range(3))
    return [(mu + shift).to(dtype), logvar.to(dtype), (0.7 * mu * correlated + 0.7 * y + shift).to(dtype)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,d", SHAPES)
def test_accuracy(n, d, dtype, op, device):
    assert_as_good_as_torch(*OPS[op], lambda: draw(n, d, dtype, device))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n,d", [(64, 40), (1000, 30)])
def test_shifted_features(n, d, op, device):
    assert_as_good_as_torch(*OPS[op], lambda: draw(n, d, device=device, shift=1e3))


@pytest.mark.parametrize("op", ["mean", "none"])
def test_outlier_in_the_first_row(op, device):
    """A shift by an arbitrary row would be far from the data here, and cancellation would follow."""

    def outlier():
        mu, logvar, y = draw(4096, 9, device=device)
        y[0] = 1e3
        return mu, logvar, y

    assert_as_good_as_torch(*OPS[op], outlier)


def test_wide_variances(device):
    """exp(-logvar) from 1e-38, through subnormal numbers, to 1e38."""

    def wide():
        mu, logvar, y = draw(50, 20, device=device)
        return mu, logvar.sign() * torch.linspace(0, 87, 20, device=device), y

    for op in OPS.values():
        assert_as_good_as_torch(*op, wide)


@pytest.mark.parametrize("shift", [0, 1e3])
def test_parity_with_the_plain_form(shift, device):
    inputs = draw(40, 13, torch.float64, device, shift)
    for ours, theirs in zip(run(club_mi, inputs), run(plain, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_value_for_correlated_gaussians(device):
    """With the true conditional the bound is D rho²/(1 - rho²) nats (and the information -D/2 log(1 - rho²))."""
    n, d, rho2 = 20000, 16, 0.6
    x = torch.randn(n, d, device=device)
    y = rho2**0.5 * x + (1 - rho2) ** 0.5 * torch.randn_like(x)
    logvar = torch.full_like(x, 1 - rho2).log()
    assert club_mi(rho2**0.5 * x, logvar, y).item() == pytest.approx(d * rho2 / (1 - rho2), rel=0.03)


def test_reductions_agree(device):
    inputs = draw(50, 20, torch.float64, device)
    rows = club_mi(*inputs, reduction="none")
    assert rows.shape == (50,)
    torch.testing.assert_close(rows.mean(), club_mi(*inputs))
    torch.testing.assert_close(rows.sum(), club_mi(*inputs, reduction="sum"))


def test_strides(device):
    a, b = torch.randn(30, 120, device=device), torch.randn(40, 30, device=device)
    views = [a[:, :40], a[:, 40:80], b.T], [a[:1, :40].expand(30, 40), b.T, a[:, 1::3]]
    for inputs in views:
        for op, _ in OPS.values():
            want = run(op, [t.contiguous() for t in inputs])
            leaves = [t.detach().requires_grad_() for t in inputs]
            value = op(*leaves)
            got = value, *torch.autograd.grad(value.sum(), leaves)  # sum's gradient has stride 0
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_partial_requires_grad_and_retain_graph(device):
    inputs = draw(30, 50, device=device)
    for op, _ in OPS.values():
        want = run(op, inputs)
        for i in range(3):
            needs = [j == i for j in range(3)]
            got = run(op, inputs, needs=needs)
            assert torch.equal(got[1 + i], want[1 + i]) and sum(g is not None for g in got[1:]) == 1
        leaves = [t.clone().requires_grad_() for t in inputs]
        loss = op(*leaves).sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(torch.equal(f, s) for f, s in zip(first, torch.autograd.grad(loss, leaves), strict=True))
        assert not op(*inputs).requires_grad


@pytest.mark.parametrize("op", OPS)
def test_gradcheck_and_double_backward(op, device):
    inputs = [t.requires_grad_() for t in draw(5, 3, torch.float64, device)]
    assert torch.autograd.gradcheck(OPS[op][0], inputs)
    assert torch.autograd.gradgradcheck(OPS[op][0], inputs)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape, device):
    leaves = [torch.empty(shape, device=device, requires_grad=True) for _ in range(3)]
    empty_batch = shape[0] == 0
    assert club_mi(*leaves, reduction="none").tolist() == [0.0] * shape[0]
    assert club_mi(*leaves, reduction="sum") == 0
    for loss in (club_mi(*leaves), club_nll(*leaves)):
        assert loss.isnan() if empty_batch else loss == 0
        assert all(g.shape == shape for g in torch.autograd.grad(loss, leaves))


def test_mixed_dtypes_and_autocast(device):
    mu, logvar, y = draw(8, 5, device=device)
    half = mu.bfloat16().requires_grad_()
    loss = club_mi(half, logvar.half(), y)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    q = CLUB(5, 5, 8).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        q.learning_loss(mu, y).backward()
        assert q(mu, y).dtype == torch.float32
    assert all(p.grad is not None for p in q.parameters())


def test_bit_identical_repeats_and_threads(device):
    inputs = draw(5000, 70, device=device)
    threads = torch.get_num_threads()
    try:
        for op, _ in OPS.values():
            results = []
            for n in (1, 2, 2):
                torch.set_num_threads(n)
                results.append(run(op, inputs))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_opcheck(device):
    ops = torch.ops.udi_kernels
    inputs = [t[::2] for t in draw(18, 21, device=device)]
    club_mi(*inputs)  # loads the kernels
    every = [(True, True, True), (False, False, True), (True, True, False)]
    leaves = [t.detach().requires_grad_() for t in inputs]
    torch.library.opcheck(ops.club_nll.default, (*leaves, None))
    torch.library.opcheck(ops.club_nll.default, (*leaves, torch.arange(9, device=device)))
    for reduction in range(3):
        torch.library.opcheck(ops.club_mi.default, (*leaves, None, reduction))
        torch.library.opcheck(ops.club_mi_fwd.default, (*inputs, None, reduction))
        loss, stats = ops.club_mi_fwd(*inputs, None, reduction)
        for needs in every:
            args = (torch.ones_like(loss), *inputs, None, stats, reduction, *needs)
            torch.library.opcheck(ops.club_mi_bwd.default, args)
    for weight in (None, torch.full((9,), 1 / 9, device=device)):
        torch.library.opcheck(ops.club_nll_fwd.default, (*inputs, weight))
        for needs in every:
            torch.library.opcheck(ops.club_nll_bwd.default, (torch.ones((), device=device), *inputs, weight, *needs))


def test_compile_fullgraph(device):
    def f(mu, logvar, y):
        return club_mi(mu, logvar.tanh(), y) + club_nll(mu, logvar, y * 2)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for shape in ((4, 8), (7, 8), (9, 3)):
        inputs = draw(*shape, device=device)
        for a, b in zip(run(compiled, inputs), run(f, inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_module_is_a_drop_in():
    torch.manual_seed(0)
    q = CLUB(7, 5, 16).double()
    assert list(q.state_dict()) == [
        f"{net}.{layer}.{kind}" for net in ("p_mu", "p_logvar") for layer in (0, 2) for kind in ("weight", "bias")
    ]
    x, y = torch.randn(30, 7).double(), torch.randn(30, 5).double()
    mu, logvar = q.get_mu_logvar(x)
    assert logvar.abs().max() < 1  # the last layer is a tanh
    torch.testing.assert_close(q(x, y), plain(mu, logvar, y))
    loglikeli = (-((mu - y) ** 2) / logvar.exp() - logvar).sum(1).mean(0)
    torch.testing.assert_close(q.loglikeli(x, y), loglikeli)
    torch.testing.assert_close(q.learning_loss(x, y), -loglikeli)


@pytest.mark.parametrize("module", ["udi_kernels", "udi_kernels.club"])
def test_pickles_by_both_names(module):
    """Those of today, and those of version 0.1."""
    q = CLUB(7, 5, 16)
    data = pickle.dumps(q, protocol=0)
    assert b"cudi_kernels\nCLUB\n" in data
    loaded = pickle.loads(data.replace(b"cudi_kernels\nCLUB\n", f"c{module}\nCLUB\n".encode()))
    assert type(loaded) is CLUB and torch.equal(loaded.p_mu[0].weight, q.p_mu[0].weight)


BAD = {
    "mu must be a torch.Tensor, got float": lambda f, x: f(1.0, x, x),
    "y must be float.*, got torch.int32": lambda f, x: f(x, x, x.int()),
    r"mu must have shape \(N, D\), got \(4,\)": lambda f, x: f(x[0], x[0], x[0]),
    r"logvar must have mu's shape \(3, 4\), got \(4,\)": lambda f, x: f(x, x[0], x),
    r"y must have mu's shape \(3, 4\), got \(3, 3\)": lambda f, x: f(x, x, x[:, :3]),
    "y must be on cpu as mu is, got meta": lambda f, x: f(x, x, x.to("meta")),
    "y must be dense, got torch.sparse_coo; call .to_dense": lambda f, x: f(x, x, x.to_sparse()),
}


@pytest.mark.parametrize("f", [club_mi, club_nll])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, f, refused):
    refused(lambda: BAD[message](f, torch.zeros(3, 4)), f"^{f.__name__}: {message}")


def test_bad_reduction(refused):
    x = torch.zeros(3, 4)
    refused(lambda: club_mi(x, x, x, reduction="avg"), "^club_mi: reduction .* got 'avg'", ValueError)


@pytest.mark.parametrize("logvar", [-87.9, -90.0, -800.0, -6e4, -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_variances_and_no_residual(dtype, logvar, backend):
    """Where exp(-logvar) overflows, a residual of 0 still counts 0."""
    for n in (2, 5, 300):
        leaves = [torch.full((n, 3), x, dtype=dtype, requires_grad=True) for x in (2.0, logvar, 2.0)]
        for given in (None, torch.arange(n) // 2, torch.zeros(n, dtype=torch.int64)):
            # Autograd of the reference adds up the weights of all rows, in float32.
            for reduction in ("mean", "sum", "none") if backend == "csrc" else ("mean",):
                value = club_mi(*leaves, given=given, reduction=reduction)
                assert (value == 0).all()
                assert all((g == 0).all() for g in torch.autograd.grad(value.sum(), leaves))
        value = club_nll(*leaves)
        torch.testing.assert_close(value, 3 * leaves[1][0, 0].to(value.dtype))
        d_mu, d_logvar, d_y = torch.autograd.grad(value, leaves)
        assert (d_mu == 0).all() and (d_y == 0).all() and (d_logvar == torch.tensor(1 / n, dtype=dtype)).all()


def test_tiny_variances_and_residuals(backend):
    """Beyond the range the weight of a residual stays e^88, in the gradients too."""
    mu, y = torch.zeros(4, 1), torch.tensor([0.0, 1e-19, -1e-19, 0.0])[:, None]
    want = [run(f, [mu, torch.full((4, 1), -88.0), y]) for f in (club_nll, club_mi)]
    got = [run(f, [mu, torch.full((4, 1), -95.0), y]) for f in (club_nll, club_mi)]
    torch.testing.assert_close(got[0][0], want[0][0] - 7)
    torch.testing.assert_close(got[1][0], want[1][0])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[1:], b[1:])


WEIGHTS = {
    "bool": torch.tensor([True, False, True, True, False]),
    "int8": torch.tensor([3, 0, -1, 2, 0], dtype=torch.int8),
    "bfloat16": torch.tensor([0.5, 0.0, 2.0, 1.5, 0.0], dtype=torch.bfloat16),
    "float32": torch.tensor([0.3, 0.0, 1.7, 1e-30, 0.0]),
    "float64": torch.tensor([0.3, 0.0, 1.7, 1e-300, 0.0], dtype=torch.float64),
    "huge": torch.tensor([3e38, 0.0, 3e38, 3e38, 0.0]),
    "expanded": torch.ones(1).expand(5),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_likelihood(dtype, weight, device, backend):
    """Value and gradients are those of the rows that count, whatever the others hold."""
    inputs, weight = draw(5, 21, dtype, device), WEIGHTS[weight].to(device)

    def formula(mu, logvar, y):
        kept = weight != 0
        mu, logvar, y = (t.double()[kept] for t in (mu, logvar, y))
        rows = ((y - mu).square() * (-logvar).exp() + logvar).sum(1)
        return (rows * weight[kept].double()).sum() / weight.double().sum()

    grad = torch.tensor(0.7, device=device)
    want = run(formula, inputs, grad=grad)
    tolerance = {2: 1e-2, 4: 1e-5, 8: 1e-12}[dtype.itemsize]
    for bad in (0.0, float("nan"), float("inf"), -float("inf")):
        filled = [t.masked_fill((weight == 0)[:, None], bad) for t in inputs]
        got = run(partial(club_nll, weight=weight), filled, grad=grad)
        assert not any(g[weight == 0].any() for g in got[1:])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def test_mask_of_everything(device, backend):
    leaves = [torch.full((4, 3), float("nan"), device=device, requires_grad=True) for _ in range(3)]
    mask = torch.zeros(4, dtype=torch.bool, device=device)
    for value in (club_nll(*leaves, weight=mask), club_mi(*leaves, given=torch.where(mask, 0, -1))):
        assert value == 0 and not any(g.any() for g in torch.autograd.grad(value, leaves))
    none = [t[:0] for t in leaves]
    assert club_nll(*none, weight=mask[:0]).isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mask_of_the_bound(reduction, device, backend):
    """given=where(mask, 0, -1): the rows that it keeps, as one class."""
    inputs, mask = draw(60, 21, device=device), torch.rand(60, device=device) < 0.6
    given = torch.where(mask, 0, -1)
    want = run(partial(club_mi, given=torch.zeros_like(given[mask]), reduction=reduction), [t[mask] for t in inputs])
    for bad in (float("nan"), float("inf"), 1e30):
        filled = [t.masked_fill(~mask[:, None], bad) for t in inputs]
        value, *grads = run(partial(club_mi, given=given, reduction=reduction), filled)
        torch.testing.assert_close(value[mask] if reduction == "none" else value, want[0])
        assert reduction != "none" or not value[~mask].any()
        for got, kept in zip(grads, want[1:], strict=True):
            torch.testing.assert_close(got[mask], kept)
            assert not got[~mask].any()


def test_weighted_double_backward_and_compile(device):
    inputs = [t.requires_grad_() for t in draw(5, 3, torch.float64, device)]
    f = partial(club_nll, weight=torch.tensor([1, 0, 2, 0, 3], device=device))
    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)
    compiled = torch.compile(lambda *x: club_nll(*x, weight=x[0][:, 0] > 0), fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs), run(lambda *x: club_nll(*x, weight=x[0][:, 0] > 0), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_the_bound_leaves_a_fixed_q_alone():
    q, x, y = CLUB(4, 3, 8), torch.randn(20, 4), torch.randn(20, 3, requires_grad=True)
    q(x, y).backward()  # the authors' way
    assert all(p.grad.any() for p in q.p_mu.parameters())
    want, y.grad = y.grad, None
    q.zero_grad()
    q.requires_grad_(False)
    q(x, y).backward()
    assert all(p.grad is None for p in q.parameters()) and torch.equal(y.grad, want)
    q.requires_grad_(True)
    weight = torch.arange(20) % 2
    rows = [t[1::2].detach() for t in (x, y)]
    torch.testing.assert_close(q.learning_loss(x, y, weight), q.learning_loss(*rows))


BAD_WEIGHTS = {
    "weight must be a torch.Tensor, got list": [1, 0, 1],
    r"weight must have shape \(3,\), one per row of mu, got \(2,\)": torch.ones(2),
    "weight must be .* bool or an integer, got torch.complex64": torch.ones(3, dtype=torch.complex64),
    "weight must be on cpu as mu is, got meta": torch.ones(3, device="meta"),
    "weight must be dense, got torch.sparse_coo; call .to_dense": torch.ones(3).to_sparse(),
    r"weight gets no gradient: pass weight.detach\(\)": torch.ones(3, requires_grad=True),
}


@pytest.mark.parametrize("message", BAD_WEIGHTS)
def test_bad_weight(message, refused):
    x = torch.zeros(3, 4)
    refused(lambda: club_nll(x, x, x, weight=BAD_WEIGHTS[message]), f"^club_nll: {message}")
