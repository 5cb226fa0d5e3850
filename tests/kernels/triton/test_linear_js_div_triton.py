"""linear_js_div's Triton launcher."""

import pytest
import torch
from interpreted import DEVICE, RUNS_HERE, assert_as_good, on_device, run_again

from udi_kernels import reference

if not RUNS_HERE:

    def test_interpreter():
        run_again(__file__)

else:
    pytest.importorskip("triton", reason="triton is not installed")
    from udi_kernels.triton import linear_js_div

    if DEVICE == "cuda":
        pytestmark = pytest.mark.gpu


class TestRows:
    __test__ = RUNS_HERE

    def check(
        self, R, C, *, beta=0.5, temperature=1.0, dtype=torch.float32, hard=False, stride=None, scale=1.0, near=None
    ):
        x, y = scale * torch.randn(R, C), scale * torch.randn(R, stride or C)
        if near:
            y = x + near * y
        x, y = x.to(dtype), y.to(dtype)[:, :C]
        soft, h, labels = torch.rand(R) + 0.5, None, None
        if hard:
            h, labels = torch.rand(R) + 0.5, torch.randint(C, (R,))
            soft[0] = h[-1] = 0
            y[0] = float("nan")
            labels[-1] = -100
        ours, grad = self.run(x, y, soft, h, labels, beta, temperature)
        results = []
        for wide in (torch.float32, torch.float64):
            leaf = x.to(wide, copy=True).requires_grad_()
            clean = torch.where((soft != 0)[:, None], y, 0).to(wide)
            rows = reference.js_div(leaf, clean, beta=beta, temperature=temperature, reduction="none") * soft
            if hard:
                each = torch.nn.functional.cross_entropy(leaf, labels, reduction="none", ignore_index=-100)
                rows = rows + h * each
            results.append((rows.detach(), torch.autograd.grad(rows.sum(), leaf)[0]))
        for got, plain, truth in zip((ours, grad), *results, strict=True):
            assert_as_good(got, plain, truth, torch.float32 if got.dim() == 1 else dtype)

    @staticmethod
    def run(x, y, soft, hard, labels, beta, temperature, need_grad=True):
        x, y, soft, hard, labels = on_device(x.clone(), y, soft, hard, labels)
        loss = linear_js_div.linear_js_div_rows(x, y, soft, hard, labels, beta, temperature, need_grad)
        return loss, x

    @pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.8, 1.0])
    @pytest.mark.parametrize("classes", [1, 6, 101, 8192, 8193, 13001])
    def test_value_and_gradient(self, classes, beta):
        self.check(3, classes, beta=beta, temperature=1.5)

    @pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("classes", [101, 9000])
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_labels_and_rows_of_one_term(self, classes, beta, temperature):
        self.check(5, classes, beta=beta, temperature=temperature, hard=True)

    @pytest.mark.parametrize("classes", [96, 8224])
    def test_rows_with_a_stride(self, classes):
        self.check(3, classes, stride=classes + 3)
        self.check(3, classes, stride=classes + 32)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("classes", [101, 9000])
    def test_16_bits(self, classes, dtype):
        self.check(3, classes, dtype=dtype)

    @pytest.mark.parametrize("beta, scale", [(0.0, 1e3), (0.5, 1e3), (1.0, 1e2)])  # at 1e3 KL(q || p) has no gradient
    @pytest.mark.parametrize("classes", [33, 9000])
    def test_large_logits(self, classes, beta, scale):
        self.check(3, classes, beta=beta, scale=scale)

    @pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("classes", [33, 9000])
    def test_nearly_equal_rows(self, classes, beta):
        self.check(3, classes, beta=beta, near=1e-3)

    @pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter reads")
    @pytest.mark.parametrize("classes, beta, sweeps", [
        (8192, 0.5, 1), (8193, 0.5, 3), (8193, 0.3, 3), (8193, 0.0, 2), (8193, 1.0, 3),
    ])  # fmt: skip
    @pytest.mark.parametrize("hard", [False, True])
    def test_sweeps(self, classes, beta, sweeps, hard, monkeypatch):
        """Each logit is read this often, besides that of the label, and each gradient is written once."""
        from triton.runtime.interpreter import InterpreterBuilder

        x, y = torch.randn(2, classes), torch.randn(2, classes)
        h, labels = (torch.ones(2), torch.zeros(2, dtype=torch.int64)) if hard else (None, None)
        counts = {"load": [0, 0], "store": [0, 0]}

        def counting(what, original):
            def counted(builder, pointers, *arguments):
                mask = arguments[0 if what == "load" else 1].data
                for side, t in enumerate((x, y)):
                    inside = pointers.data - t.data_ptr()
                    counts[what][side] += int((mask & (inside < t.numel() * 4) & (inside >= 0)).sum())
                return original(builder, pointers, *arguments)

            return counted

        for what in counts:
            name = f"create_masked_{what}"
            monkeypatch.setattr(InterpreterBuilder, name, counting(what, getattr(InterpreterBuilder, name)))
        linear_js_div.linear_js_div_rows(x, y, torch.ones(2), h, labels, beta, 1.0, True)
        n = x.numel()
        assert counts == {"load": [sweeps * n + 2 * hard, sweeps * n], "store": [n, 0]}

    @pytest.mark.parametrize("classes", [33, 9000])
    def test_without_gradient_the_logits_stay(self, classes):
        x, y = torch.randn(2, classes), torch.randn(2, classes)
        for beta in (0.0, 0.5, 1.0):
            loss, left = self.run(x, y, torch.ones(2), None, None, beta, 1.0, need_grad=False)
            assert torch.equal(left.cpu(), x)
            assert torch.equal(loss, self.run(x, y, torch.ones(2), None, None, beta, 1.0)[0])

    @pytest.mark.parametrize("classes", [33, 9000])
    def test_a_label_out_of_range_gives_nan(self, classes):
        x, y = torch.randn(2, classes), torch.randn(2, classes)
        loss, _ = self.run(x, y, torch.ones(2), torch.ones(2), torch.tensor([classes, 0]), 0.5, 1.0)
        assert loss.isnan().tolist() == [True, False]

    def test_no_rows(self):
        loss, _ = self.run(torch.empty(0, 5), torch.empty(0, 5), torch.empty(0), None, None, 0.5, 1.0)
        assert loss.shape == (0,)
