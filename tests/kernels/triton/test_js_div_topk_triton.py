"""js_div_topk's Triton launchers. NaN and bfloat16 are not as compiled in the interpreter: tests there use neither."""

import pytest
import torch
from interpreted import (
    DEVICE,
    INTERPRETED,
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
from udi_kernels._js_div_topk import TAILS

if not RUNS_HERE:

    def test_interpreter():
        run_again(__file__)

else:
    pytest.importorskip("triton", reason="triton is not installed")
    from udi_kernels.triton import js_div_topk

    if DEVICE == "cuda":
        pytestmark = pytest.mark.gpu


def draw(rows, classes, k, dtype=torch.float32):
    x = 2 * torch.randn(rows, classes)
    logprobs, indices = (x + torch.randn(rows, classes)).log_softmax(-1).topk(k, -1)
    order = torch.randperm(k)
    return x.to(dtype), indices[:, order].contiguous(), logprobs[:, order].contiguous()


class TestJSDivTopK:
    __test__ = RUNS_HERE

    @staticmethod
    def run(
        x, indices, logprobs, *, tail="renormalize", beta=0.5, temperature=1.0, weight=None, reduction=MEAN, grad=None
    ):
        if grad is None:
            grad = torch.ones((x.shape[:-1].numel(),) if reduction == NONE else ())
        x, indices, logprobs, weight, grad = on_device(x, indices, logprobs, weight, grad)
        options = TAILS.index(tail), beta, temperature, reduction
        loss, stats = js_div_topk.js_div_topk_fwd(x, indices, logprobs, weight, *options)
        return loss, js_div_topk.js_div_topk_bwd(grad, x, indices, logprobs, weight, stats, *options, True)

    def check(self, x, indices, logprobs, slack=8, **options):
        ours = self.run(x, indices, logprobs, **options)
        reduction, grad = options.pop("reduction", MEAN), options.pop("grad", None)
        grad = torch.ones(()) if grad is None else grad

        def function(x, **kind):
            return reference.js_div_topk(x, indices, logprobs, **kind)

        plain, truth = (
            autograd(function, (x,), grad, d, reduction=REDUCTION[reduction], **options)
            for d in (torch.float32, torch.float64)
        )
        for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
            assert_as_good(
                a, b, c, x.dtype if i else torch.float32, slack, None if i else max(1.0, c.abs().max().item())
            )

    @pytest.mark.parametrize("tail", TAILS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize(
        ("rows", "classes", "k"), [(64, 6, 2), (7, 1, 1), (3, 41, 40), (5, 1000, 16), (3, 4100, 100), (2, 40001, 8)]
    )
    def test_random(self, rows, classes, k, dtype, tail):
        self.check(*draw(rows, classes, k, dtype), tail=tail)

    @pytest.mark.parametrize("tail", TAILS)
    @pytest.mark.parametrize("temperature", [0.5, 3.0])
    @pytest.mark.parametrize("beta", [0.0, 1e-3, 0.3, 0.9, 1.0])
    def test_parameters(self, beta, temperature, tail):
        if beta < 1 or tail == "bucket":
            self.check(*draw(24, 101, 7), tail=tail, beta=beta, temperature=temperature, reduction=NONE)

    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    @pytest.mark.parametrize("weighted", [False, True])
    def test_reductions_weights_and_padding(self, reduction, weighted):
        x, indices, logprobs = draw(9, 300, 5)
        indices[2, 1], indices[3, 4], logprobs[4, 0] = -1, -1, -float("inf")
        weight = torch.rand(18)[::2] if weighted else None
        grad = torch.rand(9) if reduction == NONE else torch.rand(())
        for tail in TAILS:
            self.check(x, indices, logprobs, tail=tail, weight=weight, grad=grad, reduction=reduction)

    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    def test_masked_rows_are_skipped(self, reduction):
        x, indices, logprobs = draw(12, 300, 5)
        weight = torch.rand(12) + 0.5
        weight[1::2] = 0
        kept = weight != 0
        want = self.run(x[kept], indices[kept], logprobs[kept], weight=weight[kept], reduction=reduction)
        x[1::4], logprobs[1::2], indices[3] = float("nan"), -float("inf"), 10**6
        got = self.run(x, indices, logprobs, weight=weight, reduction=reduction)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            each = i or reduction == NONE
            torch.testing.assert_close(a[kept] if each else a, b, rtol=1e-6, atol=0)
            assert not each or (a[~kept] == 0).all()
        for t in self.run(x, indices, logprobs, weight=torch.zeros(12), reduction=reduction):
            assert (t == 0).all()

    def test_infinite_logits_and_rows_that_are_undefined(self):
        inf = float("inf")
        x, indices, logprobs = draw(6, 40, 4)
        x[0, indices[0, 1]], x[1, 20:] = -inf, -inf
        indices[2, 0], x[3, 7], x[4] = 1000, inf, -inf
        for tail in TAILS:
            value, dx = (t.cpu() for t in self.run(x, indices, logprobs, tail=tail, reduction=NONE))
            undefined = [False, False, True, True, True, False]
            assert value.isnan().tolist() == undefined and dx.isnan().any(1).tolist() == undefined
            assert (dx[:2][x[:2] == -inf] == 0).all()
            rows = [0, 1, 5]
            want = reference.js_div_topk(x[rows].double(), indices[rows], logprobs[rows], tail=tail, reduction="none")
            torch.testing.assert_close(value[rows].double(), want, rtol=1e-5, atol=1e-6)
        value, dx = self.run(x[:1], indices[:1], logprobs[:1], beta=0.0, reduction=NONE)
        assert value.isinf().all() and dx.isfinite().all()

    @pytest.mark.parametrize("tail", TAILS)
    def test_never_negative(self, tail):
        x, indices, _ = draw(100, 40, 40)
        logprobs = (x + 1e-6 * torch.randn_like(x)).log_softmax(-1).gather(-1, indices)
        for beta in (0.0, 0.3, 0.5):
            assert (self.run(x, indices, logprobs, tail=tail, beta=beta, reduction=NONE)[0] >= 0).all()

    def test_layouts(self):
        wide = torch.randn(4, 7, 300)
        for x in (wide[:3, :4], wide[1:, 3:], torch.randn(4, 3, 300).transpose(0, 1), wide[:1, :1].expand(3, 4, 300)):
            _, indices, logprobs = draw(12, 300, 5)
            got = self.run(x, indices, logprobs)
            want = self.run(x.reshape(12, 300), indices, logprobs)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-5, atol=1e-7)
            assert got[1].shape == x.shape and got[1].is_contiguous()

    @pytest.mark.parametrize("reduction", [NONE, SUM, MEAN], ids=REDUCTION)
    def test_empty_batch(self, reduction):
        loss, dx = self.run(
            torch.empty(0, 5), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2), reduction=reduction
        )
        assert dx.shape == (0, 5) and loss.shape == ((0,) if reduction == NONE else ())
        assert loss.isnan() if reduction == MEAN else (loss == 0).all()

    @pytest.mark.skipif(INTERPRETED, reason="NaN is not as compiled there")
    def test_nan(self):
        x, indices, logprobs = draw(4, 300, 5)
        x[1, 7], logprobs[2, 1] = float("nan"), float("nan")
        for tail in TAILS:
            for beta in (0.0, 0.3, 0.5):
                value, dx = self.run(x, indices, logprobs, tail=tail, beta=beta, reduction=NONE)
                assert value.isnan().tolist() == dx.isnan().any(1).tolist() == [False, True, True, False]
