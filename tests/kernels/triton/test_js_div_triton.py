"""js_div's Triton launchers."""

import random

import combinations
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
from udi_kernels._distributed import joined_sums
from udi_kernels._js_div import gradient_like

if not RUNS_HERE:

    def test_interpreter():
        run_again(__file__)

    @pytest.mark.slow
    def test_interpreter_slow():
        run_again(__file__, "-m", "slow")

else:
    pytest.importorskip("triton", reason="triton is not installed")
    from udi_kernels.triton import js_div

    if DEVICE == "cuda":
        pytestmark = pytest.mark.gpu


class TestJSDiv:
    __test__ = RUNS_HERE

    @staticmethod
    def run(x, y, *, weight=None, beta=0.5, temperature=1.0, reduction=MEAN, grad=None, needs=(True, True)):
        if grad is None:
            grad = torch.ones((x.shape[:-1].numel(),) if reduction == NONE else ())
        x, y, weight, grad = on_device(x, y, weight, grad)
        loss, stats = js_div.js_div_fwd(x, y, weight, beta, temperature, reduction)
        dx, dy = js_div.js_div_bwd(grad, x, y, weight, stats, beta, temperature, reduction, *needs)
        shares = weight is not None and reduction == MEAN
        assert loss.dtype == stats.dtype == torch.float32 and stats.shape == (6 + shares, x.shape[:-1].numel())
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
        ("beta", "temperature"),
        [(1e-6, 1.0), (0.01, 1.0), (0.1, 5.0), (0.5, 0.2), (0.5, 1.0), (0.93, 0.2), (0.999, 5.0), (1 - 1e-6, 1.0)],
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
        self.check(x, y, weight=weight, grad=grad, reduction=reduction, slack=8)

    @pytest.mark.parametrize(
        ("rows", "classes", "beta"),
        [(40, 6, 0.0), (40, 6, 0.3), (40, 6, 0.5), (40, 6, 1.0), (9, 300, 0.5), (3, 5000, 0.0), (3, 40001, 0.5)],
    )
    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    def test_masked_rows_are_skipped(self, reduction, beta, rows, classes):
        """NaN in tl.max is not as compiled here, so nothing but an unread row can pass."""
        torch.manual_seed(rows)
        x, y, weight = torch.randn(rows, classes), torch.randn(rows, classes), torch.rand(rows) + 0.5
        weight[1::2] = 0
        kept = weight != 0
        grad = torch.rand(rows) if reduction == NONE else torch.rand(())
        want = self.run(
            x[kept], y[kept], weight=weight[kept], beta=beta, reduction=reduction,
            grad=grad[kept] if reduction == NONE else grad,
        )  # fmt: skip
        for bad in (float("nan"), -float("inf")):
            x[1::4], y[1::2] = bad, bad
            if reduction == NONE:
                grad[1::2] = bad
            got = self.run(x, y, weight=weight, beta=beta, reduction=reduction, grad=grad)
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                each = i or reduction == NONE
                assert torch.equal(a[kept] if each else a, b) or torch.allclose(a[kept] if each else a, b, 1e-6, 0)
                assert not each or (a[~kept] == 0).all()
        for t in self.run(x, y, weight=torch.zeros(rows), beta=beta, reduction=reduction, grad=grad):
            assert (t == 0).all()

    @pytest.mark.slow
    def test_sentinels_masks_and_beta(self):
        """A sample, in float32: the interpreter computes bfloat16, and NaN in tl.max, not as compiled code does.

        So its rows that hold NaN are masked ones.
        """

        def call(x, y, weight, beta, reduction, grad):
            weight = None if weight is None else weight.float()
            return (
                t.cpu()
                for t in self.run(x, y, weight=weight, beta=beta, reduction=REDUCTION.index(reduction), grad=grad)
            )

        hidden = [c for c in combinations.COMBINATIONS if c[1] != "none" or not any("nan" in kind for kind in c[0])]
        for combination in random.Random(0).sample(hidden, 60):
            try:
                combinations.check(call, *combination)
            except AssertionError as e:
                raise AssertionError(combination) from e

    @pytest.mark.parametrize("classes", [6, 5000])
    def test_sums_of_weights(self, classes):
        x, y = torch.randn(64, classes), torch.randn(64, classes)
        for a, b in zip(self.run(x, y, weight=torch.full((64,), 1e37)), self.run(x, y), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
        signs = torch.tensor([1.0, -1.0]).repeat(32)
        rows = self.run(x, y, reduction=NONE)[0].cpu()
        value = self.run(x, y, weight=signs)[0].cpu()
        assert value.isinf() and value.sign() == (rows * signs).double().sum().sign()

    @pytest.mark.parametrize("classes", [6, 5000])
    def test_rows_are_never_negative(self, classes):
        x = torch.randn(300 if classes == 6 else 8, classes)
        for y in (x + 1e-6 * torch.randn_like(x), x + torch.randn(len(x), 1)):
            for beta in (0.0, 0.3, 0.5, 1.0):
                assert (self.run(x, y, beta=beta, reduction=NONE)[0] >= 0).all()

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

    @pytest.mark.parametrize("classes", [6, 300, 4100])
    def test_layouts(self, classes):
        """Rows of two strides, and classes that are not adjacent; the gradients are laid out as their logits."""
        torch.manual_seed(4)
        plain, wide = torch.randn(3, 4, classes), torch.randn(4, 7, classes)
        turned, columns = torch.randn(4, 3, classes).transpose(0, 1), torch.randn(classes, 12).T
        first = torch.randn(3, classes, 4).mT
        weight = torch.rand(12) + 0.5
        weight[::3] = 0
        for x, y in (
            (wide[:3, :4], plain), (wide[1:, 3:], wide[:3, 2:6]), (turned, plain), (first, plain), (first, first + 1),
            (columns, plain.reshape(12, classes)), (plain[:1, :1].expand(3, 4, classes), turned),
        ):  # fmt: skip
            got = self.run(x, y, weight=weight)
            want = self.run(x.reshape(12, classes), y.reshape(12, classes), weight=weight)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-5, atol=1e-7)
            for grad, z in zip(got[1:], (x, y), strict=True):
                assert grad.shape == z.shape and grad.stride() == gradient_like(z).stride()

    @pytest.mark.parametrize(("classes", "beta"), [(6, 0.5), (6, 1.0), (600, 0.0), (600, 0.3)])
    def test_gradient_over_the_input(self, classes, beta):
        torch.manual_seed(6)
        plain, first, weight = torch.randn(2, 3, classes), torch.randn(2, classes, 3).mT, torch.tensor([1.0, 0, 2] * 2)
        for dtype, x, y in (
            (torch.float32, plain[0], plain[1]), (torch.bfloat16, plain, plain + 1), (torch.float32, first, plain),
            (torch.float32, plain, first),
        ):  # fmt: skip
            for needs, w in (((True, True), weight[: x.shape[:-1].numel()]), ((True, False), None)):
                _, dx, dy = self.run(x.to(dtype), y.to(dtype), weight=w, beta=beta, needs=needs)
                a, b, w, grad = on_device(x.to(dtype, copy=True), y.to(dtype), w, torch.ones(()))
                _, stats = js_div.js_div_fwd(a, b, w, beta, 1.0, MEAN)
                got = js_div.js_div_bwd_inplace(grad, a, b, w, stats, beta, 1.0, MEAN, needs[1])
                assert torch.equal(a, dx) and torch.equal(got, dy)
                assert a.stride() == x.stride() and torch.equal(b.cpu(), y.to(dtype))

    @pytest.mark.parametrize(("classes", "parts"), [(9, 4), (300, 2), (5000, 3)])
    @pytest.mark.parametrize("beta", [0.0, 0.3, 0.5])
    def test_parts_of_the_classes(self, beta, classes, parts):
        """As over processes; see `_JSDiv` in _distributed.py."""
        torch.manual_seed(5)
        x, y = on_device(torch.randn(2, 5, classes).movedim(1, 2)[0].T, 3 * torch.randn(5, classes))
        for z, row in ((y, 1), (x, 2), (y, 2)):  # no class of it in the first part
            z[row, : classes // parts] = -float("inf")
        weight, grad = on_device(torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]), torch.rand(5))
        want = self.run(x, y, weight=weight, beta=beta, temperature=0.7, reduction=NONE, grad=grad)
        split = list(zip(x.tensor_split(parts, 1), y.tensor_split(parts, 1), strict=True))
        sums = torch.stack([js_div.js_div_part_sums(a, b, weight, 0.7) for a, b in split])
        sums = joined_sums(sums, 0.7)
        divergences = sum(js_div.js_div_part_divergences(a, b, weight, sums, beta, 0.7) for a, b in split)
        sums[1::2].reciprocal_()
        stats = torch.cat((sums, divergences[:2]))
        grads = [js_div.js_div_bwd(grad, a, b, weight, stats, beta, 0.7, NONE, True, True) for a, b in split]
        dx, dy = (torch.cat(g, 1) for g in zip(*grads, strict=True))
        for a, b in zip((divergences[2], dx, dy), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

    def test_expanded_gradient(self):
        x, y = torch.randn(5, 9), torch.randn(5, 9)
        a = self.run(x, y, reduction=NONE, grad=torch.tensor(0.7, dtype=torch.float64).expand(5))
        b = self.run(x, y, reduction=NONE, grad=torch.full((5,), 0.7))
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))

    def test_rows_far_apart(self):
        x, y, near = torch.randn(3, 9), torch.randn(3, 9), torch.tensor([1.0, 0.5, 2.0])
        a = self.run(x, y, reduction=NONE, weight=far_apart(near), grad=far_apart(near))
        assert all(map(torch.equal, a, self.run(x, y, reduction=NONE, weight=near, grad=near)))

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

    @pytest.mark.parametrize("beta", [0.0, 1.0])
    @pytest.mark.parametrize("classes", [6, 1000, 5000, 40001])
    @pytest.mark.parametrize("distance", [1e-2, 1.0, 30.0])
    def test_ends_are_kl(self, classes, beta, distance):
        """beta = 0: KL(target || input), 1: KL(input || target)."""
        torch.manual_seed(classes)
        x = torch.randn(48 if classes == 6 else 3, classes)
        self.check(x, x + distance * torch.randn_like(x), beta=beta, temperature=0.7, slack=8)

    @pytest.mark.parametrize("classes", [6, 5000])
    def test_kl_where_logits_are_masked_by_the_lowest_number(self, classes):
        x, y = torch.randn(2, classes), torch.randn(2, classes)
        x[:, 1] = torch.finfo(torch.float32).min
        for beta, a, b in ((0.0, x, y), (1.0, y, x)):
            value, *grads = self.run(a, b, beta=beta, reduction=NONE)
            torch.testing.assert_close(value.cpu(), y.softmax(-1)[:, 1] * -x[:, 1], rtol=1e-5, atol=0)
            torch.testing.assert_close(grads[int(beta)].cpu(), x.softmax(-1) - y.softmax(-1), rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("classes", [6, 5000])
    def test_ends_are_infinite_where_kl_is(self, classes):
        x, y = torch.randn(4, classes), torch.randn(4, classes)
        x[0, 0] = y[1, 0] = x[2, 0] = y[2, 0] = -float("inf")
        for beta, infinite in ((0.0, 0), (1.0, 1)):
            loss, dx, dy = (t.cpu() for t in self.run(x, y, beta=beta, reduction=NONE))
            want = reference.js_div(x.double(), y.double(), beta=beta, reduction="none")
            torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
            assert loss.isinf().tolist() == [i == infinite for i in range(4)]
            finite = [i for i in range(4) if i != infinite]
            assert torch.isfinite(dx[finite]).all() and torch.isfinite(dy[finite]).all()
        for t in self.run(x, x.clone(), beta=0.0, reduction=NONE):
            assert (t == 0).all()
