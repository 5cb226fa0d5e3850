"""CLUB's Triton launchers."""

import functools

import pytest
import torch
from interpreted import (
    DEVICE,
    MEAN,
    NONE,
    REDUCTION,
    RUNS_HERE,
    SUM,
    assert_as_good,
    autograd,
    far_apart,
    on_device,
    run_again,
)  # fmt: skip

from udi_kernels import reference

if not RUNS_HERE:

    def test_interpreter():
        run_again(__file__)

else:
    pytest.importorskip("triton", reason="triton is not installed")
    from udi_kernels.triton import club

    if DEVICE == "cuda":
        pytestmark = pytest.mark.gpu


class TestClub:
    __test__ = RUNS_HERE
    names = "loss", "mu", "logvar", "y"

    @staticmethod
    def run(mu, logvar, y, *, reduction=MEAN, grad=None, needs=(True, True, True)):
        if grad is None:
            grad = torch.ones((mu.shape[0],) if reduction == NONE else ())
        mu, logvar, y, grad = on_device(mu, logvar, y, grad)
        loss, stats = club.club_mi_fwd(mu, logvar, y, None, reduction)
        assert loss.dtype == stats.dtype == torch.float32 and stats.shape == (5, mu.shape[1])
        return loss, *club.club_mi_bwd(grad, mu, logvar, y, None, stats, reduction, *needs)

    @staticmethod
    def run_nll(mu, logvar, y, *, weight=None, grad=None, needs=(True, True, True)):
        mu, logvar, y, weight, grad = on_device(mu, logvar, y, weight, torch.ones(()) if grad is None else grad)
        return club.club_nll_fwd(mu, logvar, y, weight), *club.club_nll_bwd(grad, mu, logvar, y, weight, *needs)

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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("shape", [(64, 512), (7, 41), (301, 3)])
    def test_weighted_likelihood(self, shape, dtype):
        inputs, weight, grad = self.inputs(*shape, dtype), torch.rand(shape[0]), torch.tensor(1.7)
        weight[::3] = 0
        plain, truth = (
            autograd(functools.partial(reference.club_nll, weight=weight), inputs, grad, d)
            for d in (torch.float32, torch.float64)
        )
        share = weight / weight.sum()
        ours = self.run_nll(*inputs, weight=share, grad=grad)
        for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
            assert_as_good(a, b, c, dtype if i else torch.float32)
        for t in inputs:
            t[::3] = torch.nan
        assert all(map(torch.equal, self.run_nll(*inputs, weight=share, grad=grad), ours))
        assert not any(t.any() for t in self.run_nll(*inputs, weight=torch.zeros_like(share)))

    @pytest.mark.parametrize("logvar", [-90.0, -6e4, -torch.inf])
    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    def test_tiny_variances_and_no_residual(self, reduction, logvar):
        inputs = [torch.full((2100, 7), x) for x in (2.0, logvar, 2.0)]
        for given in (torch.arange(2100) // 2, torch.arange(2100) // 700):
            assert not any(t.any() for t in TestGiven.run(*inputs, given, reduction=reduction))
        assert not any(t.any() for t in self.run(*inputs, reduction=reduction))
        value, d_mu, d_logvar, d_y = self.run_nll(*inputs)
        assert value.item() == pytest.approx(7 * logvar) and not d_mu.any() and not d_y.any()
        torch.testing.assert_close(d_logvar.cpu(), torch.full((2100, 7), 1 / 2100))

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

    def test_rows_far_apart(self):
        inputs, near = self.inputs(3, 9), torch.tensor([1.0, 0.5, 2.0])
        a = self.run(*inputs, reduction=NONE, grad=far_apart(near))
        assert all(map(torch.equal, a, self.run(*inputs, reduction=NONE, grad=near)))

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


class TestGiven:
    """The class-conditional bound."""

    __test__ = RUNS_HERE

    @staticmethod
    def run(mu, logvar, y, given, *, reduction=MEAN, grad=None, needs=(True, True, True)):
        if grad is None:
            grad = torch.ones((mu.shape[0],) if reduction == NONE else ())
        mu, logvar, y, given, grad = on_device(mu, logvar, y, given, grad)
        classes = reference.club_classes(given)
        loss, stats = club.club_mi_fwd(mu, logvar, y, classes, reduction)
        assert loss.dtype == stats.dtype == torch.float32 and stats.shape == (0, 5, mu.shape[1])
        return loss, *club.club_mi_bwd(grad, mu, logvar, y, classes, stats, reduction, *needs)

    @staticmethod
    def inputs(N, D, classes, dtype=torch.float32, shift=0.0):
        given = torch.randint(-1, classes, (N,))
        mu, logvar, y = TestClub.inputs(N, D)
        return *(t.to(dtype) for t in (mu + shift * given[:, None], logvar, y + shift * given[:, None])), given

    def check(self, mu, logvar, y, given, *, reduction, grad, slack=4):
        inputs = mu, logvar, y
        options = dict(given=given, reduction=REDUCTION[reduction])
        plain, truth = (autograd(reference.club_mi, inputs, grad, d, **options) for d in (torch.float32, torch.float64))
        # As for the bound without classes: the value and d y are differences of terms that may cancel.
        index, N = reference.club_classes(given)[1, :-1], max(1, int((given >= 0).sum()))
        own, none = index.clamp_min(0), (index < 0)[:, None]
        same = (own[:, None] == own) & ~none
        means = same.double() @ y.double() / same.sum(1, keepdim=True).clamp_min(1)
        weight = (-logvar.double()).exp().masked_fill(none, 0)
        spread = sum(((t.double() - means).square() * weight).sum(-1) for t in (mu, y))
        spread = 2 * (spread.max(), spread.sum(), spread.sum() / N)[reduction].item()
        pull = 2 * (grad * ((mu.double() - y.double()) * weight).abs().amax(1)).max().item()
        scales = spread, None, None, pull / N if reduction == MEAN else pull
        ours = self.run(*inputs, given, reduction=reduction, grad=grad)
        for i, (a, b, c, scale) in enumerate(zip(ours, plain, truth, scales, strict=True)):
            assert_as_good(a, b, c, mu.dtype if i else torch.float32, slack, scale)

    @pytest.mark.parametrize(
        ("dtype", "reduction"),
        [(torch.float32, r) for r in (NONE, SUM, MEAN)] + [(torch.float16, MEAN), (torch.bfloat16, NONE)],
        ids=str,
    )
    @pytest.mark.parametrize(("shape", "classes"), [((50, 130), 4), ((7, 41), 2), ((61, 3), 30), ((6, 1271), 1)])
    def test_random(self, shape, classes, reduction, dtype):
        grad = torch.rand(shape[0]) if reduction == NONE else torch.rand(())
        self.check(*self.inputs(*shape, classes, dtype), reduction=reduction, grad=grad)

    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    def test_classes_far_from_each_other(self, reduction):
        grad = torch.rand(70) if reduction == NONE else torch.rand(())
        self.check(*self.inputs(70, 33, 5, shift=1e4), reduction=reduction, grad=grad)

    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    def test_rows_without_negatives(self, reduction):
        """They are 0 whatever they hold; so is all of a batch without classes."""
        *inputs, given = self.inputs(30, 9, 6)
        given[0], given[1] = 10**12, -7
        none = (given < 0) | (given == 10**12)
        want = self.run(*inputs, given, reduction=reduction)
        ours = self.run(*(t.masked_fill(none[:, None], torch.nan) for t in inputs), given, reduction=reduction)
        assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))
        assert not any(t.cpu()[none].any() for t in (ours if reduction == NONE else ours[1:]))
        for nobody in (torch.full((30,), -1), torch.arange(30)):
            assert not any(t.any() for t in self.run(*inputs, nobody, reduction=reduction))

    def test_strided_rows_and_expanded_gradient(self):
        wide, given = torch.randn(40, 300), torch.arange(40) % 3
        inputs = wide[:, 1:130], wide[:, 131:260], wide.flip(0)[:, 7:136]
        a = self.run(*inputs, given, reduction=NONE, grad=torch.tensor(0.7, dtype=torch.float64).expand(40))
        b = self.run(*(t.clone() for t in inputs), given, reduction=NONE, grad=torch.full((40,), 0.7))
        for ours, plain in zip(a, b, strict=True):
            torch.testing.assert_close(ours, plain)

    @pytest.mark.parametrize("reduction", [NONE, MEAN])
    def test_partial_needs(self, reduction):
        inputs = self.inputs(17, 9, 3)
        full = self.run(*inputs, reduction=reduction)[1:]
        for i in range(8):
            needs = tuple(bool(i >> k & 1) for k in range(3))
            for need, got, want in zip(
                needs, self.run(*inputs, reduction=reduction, needs=needs)[1:], full, strict=True
            ):
                assert torch.equal(got, want) if need else got.shape == (0,)

    @pytest.mark.parametrize("shape", [(0, 5), (4, 0), (1, 3)])
    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    def test_empty(self, shape, reduction):
        loss, *grads = self.run(
            *(torch.ones(shape) for _ in range(3)), torch.zeros(shape[0]).long(), reduction=reduction
        )
        assert loss.shape == ((shape[0],) if reduction == NONE else ()) and not loss.any()
        assert all(g.shape == shape and not g.any() for g in grads)

    def test_repeats_are_identical(self):
        inputs = self.inputs(60, 70, 5)
        for reduction in (NONE, MEAN):
            a, b = (self.run(*inputs, reduction=reduction) for _ in range(2))
            assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
