"""skew_kl's Triton launchers. NaN and bfloat16 are not as compiled in the interpreter, so these tests need neither."""

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
    on_device,
    run_again,
)  # fmt: skip

from udi_kernels import reference

if not RUNS_HERE:

    def test_interpreter():
        run_again(__file__)

else:
    pytest.importorskip("triton", reason="triton is not installed")
    from udi_kernels.triton import js_div

    if DEVICE == "cuda":
        pytestmark = pytest.mark.gpu


class TestSkewKL:
    __test__ = RUNS_HERE

    @staticmethod
    def run(
        x, y, *, alpha=0.1, reverse=False, temperature=1.0, weight=None, reduction=MEAN, grad=None, needs=(True, True)
    ):
        if grad is None:
            grad = torch.ones((x.shape[:-1].numel(),) if reduction == NONE else ())
        x, y, weight, grad = on_device(x, y, weight, grad)
        options = alpha, reverse, temperature, reduction
        loss, stats = js_div.skew_kl_fwd(x, y, weight, *options)
        return loss, *js_div.skew_kl_bwd(grad, x, y, weight, stats, *options, *needs)

    def check(self, x, y, slack=4, **options):
        ours = self.run(x, y, **options)
        reduction, grad = options.pop("reduction", MEAN), options.pop("grad", None)
        grad = torch.ones(()) if grad is None else grad
        plain, truth = (
            autograd(reference.skew_kl, (x, y), grad, d, reduction=REDUCTION[reduction], **options)
            for d in (torch.float32, torch.float64)
        )
        for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
            assert_as_good(a, b, c, x.dtype if i else torch.float32, slack)

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize(
        ("rows", "classes"), [(64, 6), (7, 1), (3, 41), (64, 101), (5, 1000), (3, 4100), (2, 40001)]
    )
    def test_random(self, rows, classes, dtype, reverse):
        x, y = (2 * torch.randn(rows, classes)).to(dtype), (2 * torch.randn(rows, classes)).to(dtype)
        self.check(x, y, reverse=reverse)

    @pytest.mark.parametrize("alpha", [0.0, 1e-30, 1e-6, 0.01, 0.3, 0.5, 0.7, 0.93, 0.999])
    @pytest.mark.parametrize("temperature", [1.0, *(pytest.param(t, marks=pytest.mark.slow) for t in (0.2, 5.0))])
    @pytest.mark.parametrize("distance", [1e-3, 0.1, 1.0, 10.0])
    def test_parameters(self, alpha, temperature, distance):
        x = torch.randn(48, 101)
        y = x + distance * torch.randn(48, 101)
        self.check(x, y, alpha=alpha, temperature=temperature, reduction=NONE, slack=8)

    @pytest.mark.parametrize("alpha", [0.1, 0.9, 0.999])
    @pytest.mark.parametrize("classes", [6, 5000])
    def test_nearly_equal_rows(self, alpha, classes):
        """Relative accuracy, where the value is 1e-9 and less."""
        x = torch.randn(6, classes)
        y = x + 1e-4 * torch.randn_like(x)
        got = self.run(x, y, alpha=alpha, reduction=NONE)[0].cpu().double()
        want = reference.skew_kl(x.double(), y.double(), alpha=alpha, reduction="none")
        torch.testing.assert_close(got, want, rtol=1e-3, atol=0)

    @pytest.mark.parametrize("classes", [31, 5000])
    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    @pytest.mark.parametrize("weighted", [False, True])
    def test_reductions_and_weights(self, reduction, weighted, classes):
        x, y = torch.randn(9, classes), torch.randn(9, classes)
        weight = torch.rand(18)[::2] if weighted else None
        grad = torch.rand(9) if reduction == NONE else torch.rand(())
        self.check(x, y, weight=weight, grad=grad, reduction=reduction, reverse=weighted, slack=8)

    @pytest.mark.parametrize(("rows", "classes"), [(40, 6), (9, 300), (3, 5000), (3, 40001)])
    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    def test_masked_rows_are_skipped(self, reduction, rows, classes):
        x, y, weight = torch.randn(rows, classes), torch.randn(rows, classes), torch.rand(rows) + 0.5
        weight[1::2] = 0
        kept = weight != 0
        want = self.run(x[kept], y[kept], weight=weight[kept], reduction=reduction)
        x[1::4], y[1::2] = float("nan"), -float("inf")
        got = self.run(x, y, weight=weight, reduction=reduction)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            each = i or reduction == NONE
            torch.testing.assert_close(a[kept] if each else a, b, rtol=1e-6, atol=0)
            assert not each or (a[~kept] == 0).all()

    @pytest.mark.parametrize("classes", [6, 5000])
    def test_infinite_logits(self, classes):
        inf = float("inf")
        x, y = torch.randn(4, classes), torch.randn(4, classes)
        x[0, 0] = y[0, 0] = y[1, 1] = x[2, 2] = -inf  # a class that neither side has, and only one
        x[3, 1:], y[3, :-1] = -inf, -inf  # disjoint
        for alpha in (1e-3, 0.1, 0.9):
            value, *grads = self.run(x, y, alpha=alpha, reduction=NONE)
            finite = [z.clamp_min(-300) for z in (x, y)]
            truth = autograd(reference.skew_kl, finite, torch.ones(()), torch.float64, alpha=alpha, reduction="none")
            for a, b in zip((value, *grads), truth, strict=True):
                torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-6)
            for z, dz in zip((x, y), grads, strict=True):
                assert (dz.cpu()[z == -inf] == 0).all()

    @pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9])
    @pytest.mark.parametrize("classes", [1, 6, 1000, 4097, 33000])
    def test_equal_rows_are_exactly_zero(self, classes, alpha):
        x = 3 * torch.randn(2, classes)
        x[0, 0] = -float("inf") if classes > 1 else 0.0
        for t in self.run(x, x.clone(), alpha=alpha, temperature=0.7, reduction=NONE):
            assert (t == 0).all()

    @pytest.mark.parametrize("classes", [6, 5000])
    def test_rows_are_never_negative(self, classes):
        x = torch.randn(300 if classes == 6 else 8, classes)
        for y in (x + 1e-6 * torch.randn_like(x), x + torch.randn(len(x), 1)):
            for alpha in (0.0, 0.1, 0.5, 0.9):
                assert (self.run(x, y, alpha=alpha, reduction=NONE)[0] >= 0).all()

    def test_strides_and_partial_needs(self):
        wide = torch.randn(6, 1013)
        self.check(wide[:, 3:1003], wide.flip(0)[:, 8:1008], reduction=SUM)
        first = torch.randn(3, 50, 4).mT
        got = self.run(first, first + 0.5 * first.flip(0), reverse=True)
        want = self.run(*(z.reshape(12, 50) for z in (first, first + 0.5 * first.flip(0))), reverse=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-5, atol=1e-7)
        x, y = torch.randn(5, 41), torch.randn(5, 41)
        for reverse in (False, True):
            _, dx, dy = self.run(x, y, reverse=reverse)
            for needs in ((True, False), (False, True)):
                got = self.run(x, y, reverse=reverse, needs=needs)[1:]
                for need, g, full in zip(needs, got, (dx, dy), strict=True):
                    assert torch.equal(g, full) if need else g.shape == (0,)
