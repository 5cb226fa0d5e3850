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

    def check(self, R, C, *, beta=0.5, temperature=1.0, dtype=torch.float32, hard=False, stride=None, scale=1.0):
        x, y = scale * torch.randn(R, C), scale * torch.randn(R, stride or C)
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
    @pytest.mark.parametrize("classes", [1, 6, 101, 4096, 4097, 9001])
    def test_value_and_gradient(self, classes, beta):
        self.check(3, classes, beta=beta, temperature=1.5)

    @pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("classes", [101, 9000])
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_labels_and_rows_of_one_term(self, classes, beta, temperature):
        self.check(5, classes, beta=beta, temperature=temperature, hard=True)

    @pytest.mark.parametrize("classes", [96, 8192])
    def test_rows_with_a_stride(self, classes):
        self.check(3, classes, stride=classes + 3)
        self.check(3, classes, stride=classes + 32)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("classes", [101, 5000])
    def test_16_bits(self, classes, dtype):
        self.check(3, classes, dtype=dtype)

    @pytest.mark.parametrize("classes", [33, 5000])
    def test_large_logits(self, classes):
        self.check(3, classes, scale=1e3)

    @pytest.mark.parametrize("classes", [33, 5000])
    def test_without_gradient_the_logits_stay(self, classes):
        x, y = torch.randn(2, classes), torch.randn(2, classes)
        _, left = self.run(x, y, torch.ones(2), None, None, 0.5, 1.0, need_grad=False)
        assert torch.equal(left.cpu(), x)

    @pytest.mark.parametrize("classes", [33, 5000])
    def test_a_label_out_of_range_gives_nan(self, classes):
        x, y = torch.randn(2, classes), torch.randn(2, classes)
        loss, _ = self.run(x, y, torch.ones(2), torch.ones(2), torch.tensor([classes, 0]), 0.5, 1.0)
        assert loss.isnan().tolist() == [True, False]

    def test_no_rows(self):
        loss, _ = self.run(torch.empty(0, 5), torch.empty(0, 5), torch.empty(0), None, None, 0.5, 1.0)
        assert loss.shape == (0,)
