"""CLUB's Triton launchers."""

import functools

import pytest
import torch
from interpreted import DEVICE, MEAN, NONE, REDUCTION, RUNS_HERE, SUM, assert_as_good, autograd, on_device, run_again

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
