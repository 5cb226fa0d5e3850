"""The Triton launchers against float64, and against the same formulas in plain torch of the same precision.

Without a GPU they run in Triton's interpreter, which must be chosen before Triton is first imported: `test_interpreter`
runs this file again in a process of its own.  With a GPU they run there, in this process.
"""

import functools
import os
import subprocess
import sys

import pytest
import torch

from udi_kernels import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS_HERE = INTERPRETED or DEVICE == "cuda"
EPS = torch.finfo(torch.float32).eps
# Rounding of 16-bit results, relative and (subnormals) absolute.  The interpreter's conversion cuts off; a GPU rounds.
CUT = 2 if INTERPRETED else 1
ROUNDING = {torch.float32: (0, 0), torch.float16: (CUT * 2**-11, CUT * 2**-25), torch.bfloat16: (CUT * 2**-8, 0)}

if not RUNS_HERE:

    def test_interpreter():
        pytest.importorskip("triton", reason="triton is not installed")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        assert " passed" in run.stdout

else:
    pytest.importorskip("triton", reason="triton is not installed")
    from udi_kernels.triton import club, js_div

    if DEVICE == "cuda":
        pytestmark = pytest.mark.gpu

NONE, SUM, MEAN = range(3)
REDUCTION = ("none", "sum", "mean")


def assert_as_good(ours, plain, truth, dtype, slack=4, scale=None):
    """The largest error is at most twice that of plain float32 torch plus `slack` roundings of the largest value.

    Twice, because both are the largest of a few random roundings; 16-bit results have their own rounding on top.
    """
    assert ours.shape == truth.shape
    ours, plain, truth = (t.detach().cpu().double() for t in (ours, plain, truth))
    scale = truth.abs().max().item() if scale is None else scale
    relative, absolute = ROUNDING[dtype]
    theirs, error = (plain - truth).abs().max(), (ours - truth).abs()
    allowed = 2 * theirs + slack * EPS * scale + relative * truth.abs() + absolute
    assert torch.isfinite(ours).all()
    assert (error <= allowed).all(), f"error {error.max():.2e}, plain torch {theirs:.2e}, values to {scale:.2e}"


def autograd(function, inputs, grad, dtype, **options):
    """Value and gradients by autograd of the reference, in `dtype`."""
    leaves = [t.cpu().to(dtype, copy=True).requires_grad_() for t in inputs]
    value = function(*leaves, **options)
    return value.detach(), *torch.autograd.grad(value, leaves, grad.cpu().to(dtype).expand_as(value))


def on_device(*tensors):
    return tuple(t.to(DEVICE) if t is not None else None for t in tensors)


class TestJSDiv:
    __test__ = RUNS_HERE

    @staticmethod
    def run(x, y, *, weight=None, beta=0.5, temperature=1.0, reduction=MEAN, grad=None, needs=(True, True)):
        if grad is None:
            grad = torch.ones((x.shape[0],) if reduction == NONE else ())
        x, y, weight, grad = on_device(x, y, weight, grad)
        loss, stats = js_div.js_div_fwd(x, y, weight, beta, temperature, reduction)
        dx, dy = js_div.js_div_bwd(grad, x, y, weight, stats, beta, temperature, reduction, *needs)
        assert loss.dtype == stats.dtype == torch.float32 and stats.shape == (6, x.shape[0])
        return loss, dx, dy

    def check(self, x, y, slack=4, **options):
        ours = self.run(x, y, **options)
        reduction, grad = options.pop("reduction", MEAN), options.pop("grad", None)
        grad = torch.ones(()) if grad is None else grad
        plain, truth = (
            autograd(reference.js_div, (x, y), grad, d, reduction=REDUCTION[reduction], **options)
            for d in (torch.float32, torch.float64)
        )
        # The terms of a divergence are of first order in the difference, the divergence itself of second.
        scale = truth[0].abs().max().sqrt().item()
        for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
            assert_as_good(a, b, c, x.dtype if i else torch.float32, slack, None if i else scale)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("rows", "classes"),
        [(64, 6), (1, 2), (7, 1), (33, 7), (3, 41), (64, 101), (5, 1000), (3, 1271), (2, 4096), (3, 4100), (2, 40001)],
    )
    def test_random(self, rows, classes, dtype):
        torch.manual_seed(rows + classes)
        x, y = (2 * torch.randn(rows, classes)).to(dtype), (2 * torch.randn(rows, classes)).to(dtype)
        self.check(x, y)

    @pytest.mark.parametrize(
        ("beta", "temperature"), [(0.01, 1.0), (0.1, 5.0), (0.5, 0.2), (0.5, 1.0), (0.93, 0.2), (0.999, 5.0)]
    )
    @pytest.mark.parametrize("distance", [1e-3, 0.1, 1.0, 10.0])
    def test_parameters(self, beta, temperature, distance):
        torch.manual_seed(0)
        x = torch.randn(48, 101)
        y = x + distance * torch.randn(48, 101)
        self.check(x, y, beta=beta, temperature=temperature, reduction=NONE, slack=8)

    @pytest.mark.parametrize("classes", [31, 5000])
    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    @pytest.mark.parametrize("weighted", [False, True])
    def test_reductions_and_weights(self, reduction, weighted, classes):
        torch.manual_seed(1)
        x, y = torch.randn(9, classes), torch.randn(9, classes)
        weight = torch.rand(18)[::2] if weighted else None
        grad = torch.rand(9) if reduction == NONE else torch.rand(())
        if weighted and reduction == MEAN:  # the public function normalises the weights and asks for the sum
            ours = self.run(x, y, weight=weight / weight.sum(), grad=grad, reduction=SUM)
            options = dict(weight=weight, reduction="mean")
            plain = autograd(reference.js_div, (x, y), grad, torch.float32, **options)
            truth = autograd(reference.js_div, (x, y), grad, torch.float64, **options)
            for a, b, c in zip(ours, plain, truth, strict=True):
                assert_as_good(a, b, c, torch.float32, slack=8)
        else:
            self.check(x, y, weight=weight, grad=grad, reduction=reduction, slack=8)

    def hostile(self, classes):
        inf = float("inf")
        rows = torch.randn(8, classes), torch.randn(8, classes)
        for x, y in (rows, rows[::-1]):
            x[0], y[0] = 1e4 * torch.randn(classes).sign(), 1e4 * torch.randn(classes).sign()
            x[1], y[1] = -1e4, -1e4  # one-hot, elsewhere both sides underflow
            x[1, 0] = y[1, classes - 1] = 1e4
            x[2, 1:] = -inf  # exactly one-hot
            x[3, ::2] = -inf
            y[3, ::3] = -inf  # -inf on one side, on both, on none
            x[4], y[4] = 1e4 + torch.arange(classes) % 3, -1e4 + torch.arange(classes) % 2  # large and close together
            x[5] = torch.finfo(torch.float32).min  # a row masked by the usual trick is uniform
            x[6, :-1] = -200.0  # underflows, but not to -inf
        return rows

    @pytest.mark.parametrize(("classes", "beta"), [(6, 0.5), (41, 0.5), (41, 0.1), (4101, 0.9), (36865, 0.5)])
    def test_hostile(self, classes, beta):
        torch.manual_seed(2)
        x, y = self.hostile(classes)
        ours = self.run(x, y, beta=beta, reduction=NONE)
        truth = self.run_reference(x, y, torch.float64, beta)
        plain = self.run_reference(x, y, torch.float32, beta)
        for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
            assert_as_good(a, b, c, torch.float32, slack=8, scale=1.0 if i else None)
        for z, dz in zip((x, y), ours[1:], strict=True):
            assert (dz.cpu()[z == -float("inf")] == 0).all()

    @staticmethod
    def run_reference(x, y, dtype, beta):
        """By the formulas: autograd of the reference meets inf - inf at logits of -inf."""
        log_q, log_p = (z.to(dtype).log_softmax(-1) for z in (x, y))
        finite = [torch.where(z == -float("inf"), -1e30, z) for z in (log_q, log_p)]
        d = finite[1] - finite[0]
        below, above = d.clamp(max=0), d.clamp(min=0)
        L = torch.log1p(beta * torch.expm1(below)) + torch.log1p((1 - beta) * torch.expm1(-above))
        q, p = log_q.exp(), log_p.exp()
        over_q, over_p = -above - L, below - L
        kl_q, kl_p = (q * over_q).sum(-1, keepdim=True), (p * over_p).sum(-1, keepdim=True)
        value = (beta * kl_p + (1 - beta) * kl_q).squeeze(-1)
        return value, (1 - beta) * q * (over_q - kl_q), beta * p * (over_p - kl_p)

    @pytest.mark.parametrize("classes", [5, 5000])
    def test_undefined_rows_are_nan_and_others_are_not(self, classes):
        inf, nan = float("inf"), float("nan")
        x, y = torch.randn(7, classes), torch.randn(7, classes)
        x[0] = -inf
        y[1] = -inf
        x[2, 1] = inf
        y[3, 2] = nan
        x[4, 0] = nan
        loss, dx, dy = (t.cpu() for t in self.run(x, y, reduction=NONE))
        assert loss[:5].isnan().all() and dx[:5].isnan().all() and dy[:5].isnan().all()
        assert not (loss[5:].isnan().any() or dx[5:].isnan().any() or dy[5:].isnan().any())

    @pytest.mark.parametrize("classes", [1, 6, 1000, 4097, 33000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_equal_rows_are_exactly_zero(self, classes, dtype):
        x = (3 * torch.randn(2, classes)).to(dtype)
        x[0, 0] = -float("inf") if classes > 1 else 0.0
        for t in self.run(x, x.clone(), beta=0.3, temperature=0.7, reduction=NONE):
            assert (t == 0).all()
        loss, *_ = self.run(x, x + 4.0, reduction=NONE)
        assert (loss.cpu() >= -1e-9).all()

    @pytest.mark.parametrize("classes", [1000, 5000])
    def test_strided_and_expanded_rows(self, classes):
        torch.manual_seed(3)
        wide = torch.randn(6, classes + 13)
        self.check(wide[:, 3 : classes + 3], wide.flip(0)[:, 8 : classes + 8], reduction=SUM)
        x, y = torch.randn(1, classes).expand(6, -1), torch.randn(6, classes)
        ours = self.run(x, y)
        truth = self.run(x.contiguous(), y)
        assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))

    def test_expanded_gradient(self):
        x, y = torch.randn(5, 9), torch.randn(5, 9)
        a = self.run(x, y, reduction=NONE, grad=torch.tensor(0.7, dtype=torch.float64).expand(5))
        b = self.run(x, y, reduction=NONE, grad=torch.full((5,), 0.7))
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))

    def test_partial_needs(self):
        x, y = torch.randn(5, 41), torch.randn(5, 41)
        _, dx, dy = self.run(x, y)
        for needs in ((True, False), (False, True), (False, False)):
            got = self.run(x, y, needs=needs)[1:]
            for need, g, full in zip(needs, got, (dx, dy), strict=True):
                assert torch.equal(g, full) if need else g.shape == (0,)

    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    def test_empty_batch(self, reduction):
        loss, dx, dy = self.run(torch.empty(0, 5), torch.empty(0, 5), reduction=reduction)
        assert dx.shape == dy.shape == (0, 5)
        assert loss.shape == ((0,) if reduction == NONE else ())
        assert loss.isnan() if reduction == MEAN else (loss == 0).all()

    @pytest.mark.parametrize("shape", [(300, 6), (40, 101), (9, 4100), (2, 40000)])
    def test_repeats_are_identical(self, shape):
        x, y = torch.randn(*shape), torch.randn(*shape)
        first, second = self.run(x, y), self.run(x, y)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestClub:
    __test__ = RUNS_HERE
    names = "loss", "mu", "logvar", "y"

    @staticmethod
    def run(mu, logvar, y, *, reduction=MEAN, grad=None, needs=(True, True, True)):
        if grad is None:
            grad = torch.ones((mu.shape[0],) if reduction == NONE else ())
        mu, logvar, y, grad = on_device(mu, logvar, y, grad)
        loss, stats = club.club_mi_fwd(mu, logvar, y, reduction)
        assert loss.dtype == stats.dtype == torch.float32 and stats.shape == (5, mu.shape[1])
        return loss, *club.club_mi_bwd(grad, mu, logvar, y, stats, reduction, *needs)

    @staticmethod
    def run_nll(mu, logvar, y, *, grad=None, needs=(True, True, True)):
        mu, logvar, y, grad = on_device(mu, logvar, y, torch.ones(()) if grad is None else grad)
        return club.club_nll_fwd(mu, logvar, y), *club.club_nll_bwd(grad, mu, logvar, y, *needs)

    def check(self, mu, logvar, y, *, reduction=MEAN, grad=None, slack=4):
        inputs, dtype = (mu, logvar, y), mu.dtype
        g = torch.ones(()) if grad is None else grad
        plain, truth = (
            autograd(reference.club_mi, inputs, g, d, reduction=REDUCTION[reduction])
            for d in (torch.float32, torch.float64)
        )
        # The value is a difference of two expectations, which may cancel: its roundings are of their size.
        N, centred = len(mu), [t.double() - y.double().mean(0) for t in (mu, y)]
        spread = ((centred[0].square() + centred[1].square()) * (-logvar.double()).exp()).sum(-1)
        spread = (spread.max(), spread.sum(), spread.sum() / N)[reduction].item()
        # So is d y: the pull of a row's own mu, less the mean of that of all.
        pull = (g * ((mu.double() - y.double()) * (-logvar.double()).exp()).abs().amax(1)).max().item()
        scales = spread, None, None, pull / N if reduction == MEAN else pull
        ours = self.run(*inputs, reduction=reduction, grad=grad)
        for i, (a, b, c, scale) in enumerate(zip(ours, plain, truth, scales, strict=True)):
            assert_as_good(a, b, c, dtype if i else torch.float32, slack, scale)
        g = torch.tensor(1.7)
        plain, truth = (autograd(reference.club_nll, inputs, g, d) for d in (torch.float32, torch.float64))
        for i, (a, b, c) in enumerate(zip(self.run_nll(*inputs, grad=g), plain, truth, strict=True)):
            assert_as_good(a, b, c, dtype if i else torch.float32, slack)

    @staticmethod
    def inputs(N, D, dtype=torch.float32, shift=0.0, spread=1.0, seed=0):
        torch.manual_seed(seed)
        mu, y, logvar = torch.randn(N, D) + shift, torch.randn(N, D) + shift, spread * torch.randn(N, D)
        return [t.to(dtype) for t in (mu, logvar, y)]

    @pytest.mark.parametrize(
        ("dtype", "reduction"),
        [(torch.float32, r) for r in (NONE, SUM, MEAN)] + [(torch.float16, MEAN), (torch.bfloat16, NONE)],
        ids=str,
    )
    @pytest.mark.parametrize("shape", [(64, 512), (7, 41), (1, 5), (2, 1), (301, 3), (5, 1271), (5, 2048)])
    def test_random(self, shape, reduction, dtype):
        grad = torch.rand(shape[0]) if reduction == NONE else torch.rand(())
        self.check(*self.inputs(*shape, dtype), reduction=reduction, grad=grad)

    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    @pytest.mark.parametrize("shift", [1e3, -1e5])
    def test_shifted_features(self, reduction, shift):
        self.check(*self.inputs(200, 65, shift=shift), reduction=reduction)

    def test_widely_spread_variances(self):
        self.check(*self.inputs(200, 65, spread=15.0))
        mu, logvar, y = self.inputs(20, 65)
        logvar[:5] = float("inf")  # weight 0
        logvar[5:8] = 87.0
        logvar[8] = -60.0
        loss, *grads = self.run(mu, logvar, y, reduction=NONE)
        assert torch.isfinite(loss).all() and all(torch.isfinite(g).all() for g in grads)
        assert (loss.cpu()[:5] == 0).all() and (grads[0].cpu()[:5] == 0).all()

    def test_one_row_is_exactly_zero(self):
        for reduction in (NONE, SUM, MEAN):
            loss, *_ = self.run(*self.inputs(1, 77), reduction=reduction)
            assert (loss == 0).all()

    def test_constant_features(self):
        mu, logvar, _ = self.inputs(50, 9)
        self.check(mu, logvar, torch.full((50, 9), 3.25))

    def test_strided_and_expanded_rows(self):
        wide = torch.randn(40, 300)
        mu, logvar, y = wide[:, 1:130], wide[:, 131:260], wide.flip(0)[:, 7:136]
        self.check(mu, logvar, y)
        row = torch.randn(1, 129)
        ours = self.run(row.expand(40, -1), row.expand(40, -1), y)
        truth = self.run(row.repeat(40, 1), row.repeat(40, 1), y)
        assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))

    def test_expanded_gradient(self):
        inputs = self.inputs(33, 9)
        a = self.run(*inputs, reduction=NONE, grad=torch.tensor(0.7, dtype=torch.float64).expand(33))
        b = self.run(*inputs, reduction=NONE, grad=torch.full((33,), 0.7))
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))

    @pytest.mark.parametrize("reduction", [NONE, MEAN])
    def test_partial_needs(self, reduction):
        inputs = self.inputs(33, 41)
        for run in (lambda needs: self.run(*inputs, reduction=reduction, needs=needs)[1:],) + (
            (lambda needs: self.run_nll(*inputs, needs=needs)[1:],) if reduction == MEAN else ()
        ):
            full = run((True, True, True))
            for i in range(8):
                needs = tuple(bool(i >> k & 1) for k in range(3))
                for need, got, want in zip(needs, run(needs), full, strict=True):
                    assert torch.equal(got, want) if need else got.shape == (0,)

    @pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    def test_empty(self, shape, reduction):
        inputs = [torch.empty(shape) for _ in range(3)]
        loss, *grads = self.run(*inputs, reduction=reduction)
        want = reference.club_mi(*inputs, reduction=REDUCTION[reduction])
        torch.testing.assert_close(loss.cpu(), want, rtol=0, atol=0, equal_nan=True)
        assert all(g.shape == shape for g in grads)
        nll, *grads = self.run_nll(*inputs)
        torch.testing.assert_close(nll.cpu(), reference.club_nll(*inputs), rtol=0, atol=0, equal_nan=True)
        assert all(g.shape == shape for g in grads)

    @pytest.mark.parametrize("shape", [(100, 130), (2100, 7)])
    def test_repeats_are_identical(self, shape):
        inputs = self.inputs(*shape)
        for run in (self.run, functools.partial(self.run, reduction=NONE), self.run_nll):
            assert all(torch.equal(a, b) for a, b in zip(run(*inputs), run(*inputs), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [(64, 6), (64, 101), (300, 1000), (80, 5000), (3, 40001)])
def test_graph_capture_without_synchronisation(shape):
    """Replayed over poisoned outputs, a captured forward and backward gives the bits of an eager one."""

    def step():
        loss, stats = js_div.js_div_fwd(x, y, None, 0.5, 1.0, MEAN)
        value, columns = club.club_mi_fwd(x, y, z, MEAN)
        nll = club.club_nll_fwd(x, y, z)
        grads = js_div.js_div_bwd(loss, x, y, None, stats, 0.5, 1.0, MEAN, True, True)
        grads += club.club_mi_bwd(value, x, y, z, columns, MEAN, True, True, True)
        return loss, value, nll, *grads, *club.club_nll_bwd(nll, x, y, z, True, True, True)

    x, y, z = (torch.randn(*shape, device=DEVICE) for _ in range(3))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
