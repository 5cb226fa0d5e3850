"""The Triton launchers of DI-MML's ops against their references in float64.

Without a GPU they run in Triton's interpreter, which must be chosen before Triton is first imported: `test_interpreter`
runs this file again in a process of its own.  With a GPU they run there, in this process.
"""

import pytest
import torch
from interpreted import DEVICE, INTERPRETED, MEAN, NONE, REDUCTION, RUNS_HERE, SUM, assert_replays, run_again

from udi_kernels import reference

# Beside float32's rounding, of sums of a few hundred terms: that of 16-bit coefficients and results.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

if not RUNS_HERE:

    def test_interpreter():
        run_again(__file__)

else:
    pytest.importorskip("triton", reason="triton is not installed")
    from udi_kernels.triton import certainty, duc
    from udi_kernels.triton.effective_dims import effective_dims_fwd

    if DEVICE == "cuda":
        pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A seed, no launches made for other ELEMENTS, and a product that CPUs have not: of 16-bit matrices in float32."""
    torch.manual_seed(0)
    if RUNS_HERE:
        duc._forward.cache_clear()
        duc._backward.cache_clear()
    if INTERPRETED:
        monkeypatch.setattr(duc, "_product", lambda a, b, out: torch.mm(a.float(), b.float(), out=out))


def close(ours, truth, dtype):
    """The error is small beside the largest value."""
    assert ours.shape == truth.shape and ours.isfinite().all()
    scale = max(truth.abs().max().item(), 1e-30)
    error = (ours.cpu().double() - truth.cpu()).abs().max().item() / scale
    assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"


class TestDUC:
    __test__ = RUNS_HERE

    @staticmethod
    def run(student, teacher, dims, grad, temperature=1.0, reduction=NONE, needs=(True, True)):
        student, teacher, dims, grad = (t.to(DEVICE) for t in (student, teacher, dims, grad))
        loss, stats, direction = duc.duc_loss_fwd(student, teacher, dims, temperature, reduction, needs[0])
        return loss, *duc.duc_loss_bwd(grad, student, teacher, dims, stats, direction, temperature, reduction, *needs)

    def check(self, student, teacher, dims, temperature=1.0, reduction=NONE):
        grad = torch.rand(len(student)) if reduction == NONE else torch.rand(())
        leaves = [t.double().requires_grad_() for t in (student, teacher)]
        value = reference.duc_loss(*leaves, dims, temperature=temperature, reduction=REDUCTION[reduction])
        truth = value.detach(), *torch.autograd.grad(value, leaves, grad.double())
        ours = self.run(student, teacher, dims, grad, temperature, reduction)
        for i, (a, b) in enumerate(zip(ours, truth, strict=True)):
            close(a, b, student.dtype if i else torch.float32)

    @pytest.mark.parametrize("elements", [1 << 22, 200], ids=["one block", "blocks"])
    @pytest.mark.parametrize(
        ("dtype", "reduction"),
        [*((torch.float32, r) for r in (NONE, SUM, MEAN)), (torch.float16, MEAN), (torch.bfloat16, NONE)],
        ids=str,
    )
    @pytest.mark.parametrize("shape", [(5, 7), (33, 20), (5, 20, 40)])
    def test_random(self, shape, dtype, reduction, elements, monkeypatch):
        monkeypatch.setattr(duc, "ELEMENTS", elements)
        student, noise = torch.randn(shape[-2:]), torch.randn(shape[-2:])
        shape = shape[0], shape[-1]  # of the student: with three numbers, the teacher has more rows
        dims = torch.rand(shape[1]) < 0.5
        dims[0] = True
        self.check(student[: shape[0]].to(dtype), (student + noise).to(dtype), dims, 2.0, reduction)

    def test_more_rows_than_a_block_of_a_program(self, monkeypatch):
        monkeypatch.setattr(duc, "next_power_of_2", lambda n: 32)
        self.check(torch.randn(40, 32), torch.randn(40, 32), torch.ones(32, dtype=torch.bool))

    def test_logits_of_1e4_and_nearly_certain_rows(self):
        dims = torch.ones(3, dtype=torch.bool)
        self.check(60 * torch.randn(20, 3), 60 * torch.randn(20, 3), dims)
        teacher = 8 * torch.eye(6)
        student = teacher * torch.arange(1.0, 7.0)[:, None] / 6
        loss, grad, _ = self.run(student, teacher, torch.ones(6, dtype=torch.bool), torch.ones(6))
        leaf = student.double().requires_grad_()
        truth = reference.duc_loss(leaf, teacher.double(), torch.ones(6, dtype=torch.bool), reduction="none")
        torch.testing.assert_close(loss.cpu(), truth.detach().float(), rtol=1e-4, atol=0)
        want = torch.autograd.grad(truth.sum(), leaf)[0].float()
        torch.testing.assert_close(grad.cpu(), want, rtol=1e-4, atol=0)

    def test_others_play_no_part_and_no_dims(self):
        dims = torch.tensor([True, False, True])
        student, teacher = torch.randn(2, 9, 3)
        want = self.run(student, teacher, dims, torch.ones(9))
        student[:, 1] = teacher[:, 1] = float("nan")
        assert all(
            torch.equal(a, b) for a, b in zip(self.run(student, teacher, dims, torch.ones(9)), want, strict=True)
        )
        loss, *grads = self.run(student, teacher, torch.zeros(3, dtype=torch.bool), torch.ones(9))
        torch.testing.assert_close(loss.cpu(), torch.full((9,), 9.0).log())
        assert all((g == 0).all() for g in grads)

    def test_autocast(self):
        """Products stay in float32, in the backward pass too."""
        inputs = torch.randn(20, 9), torch.randn(20, 9), torch.rand(9) < 0.5, torch.rand(20)
        with torch.autocast(DEVICE, torch.bfloat16):
            ours = self.run(*inputs)
        assert all(map(torch.equal, ours, self.run(*inputs)))

    def test_one_row_empty_batch_and_partial_needs(self):
        dims = torch.ones(4, dtype=torch.bool)
        for t in self.run(*torch.randn(2, 1, 4), dims, torch.ones(1)):
            assert (t == 0).all()
        for reduction, value in enumerate(([], 0.0, None)):
            loss, *grads = self.run(torch.empty(0, 4), torch.empty(0, 4), dims, torch.ones(()), reduction=reduction)
            assert loss.isnan() if value is None else loss.tolist() == value
            assert all(g.shape == (0, 4) for g in grads)
        inputs = *torch.randn(2, 7, 4), dims, torch.rand(7)
        full = self.run(*inputs)[1:]
        for needs in ((True, False), (False, True)):
            for need, got, want in zip(needs, self.run(*inputs, needs=needs)[1:], full, strict=True):
                assert torch.equal(got, want) if need else got.shape == (0,)


class TestEffectiveDims:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
    @pytest.mark.parametrize("n,c,d", [(1, 1, 3), (300, 10, 33), (40, 3, 130)])
    def test_equals_the_reference(self, n, c, d, dtype):
        labels = torch.randint(c, (n,))
        features = (torch.randn(n, d) + torch.randn(c, d)[labels] * torch.rand(d) * 3).to(dtype)
        got = effective_dims_fwd(features.to(DEVICE), labels.to(DEVICE), c)
        assert torch.equal(got.cpu(), reference.effective_dims(features, labels, c))

    def test_ties_absent_classes_unlabelled_rows_and_infinities(self):
        for trial in range(10):
            labels = torch.arange(4).repeat(4)
            labels[labels == 2] = 3
            labels[5] = -1
            features = torch.randint(-2, 3, (16, 40)).float()
            if trial > 5:
                features[3, 7] = features[4, 8] = torch.tensor([torch.inf, torch.nan])[trial % 2]
            got = effective_dims_fwd(features.to(DEVICE), labels.to(DEVICE), 6)
            assert torch.equal(got.cpu(), reference.effective_dims(features, labels, 6))

    @pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
    def test_empty(self, shape):
        got = effective_dims_fwd(
            torch.empty(shape, device=DEVICE), torch.zeros(shape[0], dtype=torch.int64, device=DEVICE), 3
        )
        assert got.shape == shape[1:] and not got.any()


class TestCertainty:
    __test__ = RUNS_HERE

    def check(self, logits, temperature=0.5):
        grad, leaf = torch.randn(logits.shape[1:]), logits.double().requires_grad_()
        value = reference.certainty_fusion(leaf, temperature=temperature)
        z = logits.to(DEVICE)
        close(certainty.certainty_fusion_fwd(z, temperature), value.detach(), logits.dtype)
        ours = certainty.certainty_fusion_bwd(grad.to(z.dtype).to(DEVICE), z, temperature, True)
        close(ours, torch.autograd.grad(value, leaf, grad.to(z.dtype).double())[0], logits.dtype)

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("shape", [(3, 20, 11), (1, 5, 1), (2, 3, 5000), (5, 4, 100)])
    def test_random(self, shape, dtype):
        self.check((3 * torch.randn(shape)).to(dtype))

    def test_large_logits_ties_and_strides(self):
        logits = torch.randn(3, 9, 5)
        logits[0, 0, :3], logits[1, 1], logits[2, 2, 0] = 7.0, 1e4, -1e4
        self.check(logits)
        self.check(torch.randn(9, 3, 11).transpose(0, 1)[:, :, :7])

    @pytest.mark.parametrize("temperature", [1e-37, 1e-3, 1.0, 1e37])
    def test_impossible_classes(self, temperature):
        logits = 3 * torch.randn(3, 6, 20)
        logits[..., 3] = logits[1, 2, 17] = logits[0, 4, 0] = -torch.inf
        leaf, grad = logits.double().requires_grad_(), torch.randn(6, 20)
        value = reference.certainty_fusion(leaf, temperature=temperature)
        z = logits.to(DEVICE)
        possible = value.isfinite()
        ours = certainty.certainty_fusion_fwd(z, temperature).cpu()
        assert (ours[~possible] == -torch.inf).all()
        close(ours[possible], value[possible].detach(), torch.float32)
        ours = certainty.certainty_fusion_bwd(grad.to(DEVICE), z, temperature, True)
        close(
            ours,
            torch.autograd.grad(value, leaf, grad.double())[0],
            torch.float32 if temperature > 1e-3 else torch.float16,
        )

    def test_empty(self):
        z = torch.empty(3, 0, 5, device=DEVICE)
        assert certainty.certainty_fusion_fwd(z, 1.0).shape == (0, 5)
        assert certainty.certainty_fusion_bwd(torch.empty(0, 5, device=DEVICE), z, 1.0, True).shape == (3, 0, 5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
def test_graph_capture_without_synchronisation():
    """Replayed over poisoned outputs, a captured forward and backward gives the bits of an eager one."""

    def step():
        loss, stats, direction = duc.duc_loss_fwd(x, y, dims, 10.0, MEAN, True)
        grads = duc.duc_loss_bwd(loss, x, y, dims, stats, direction, 10.0, MEAN, True, True)
        found = effective_dims_fwd(x, labels, 10)
        fused = certainty.certainty_fusion_fwd(z, 1.0)
        return loss, *grads, found, fused, certainty.certainty_fusion_bwd(fused, z, 1.0, True)

    x, y, z = (
        torch.randn(300, 64, device=DEVICE),
        torch.randn(300, 64, device=DEVICE),
        torch.randn(3, 64, 10, device=DEVICE),
    )
    dims, labels = torch.rand(64, device=DEVICE) < 0.5, torch.randint(10, (300,), device=DEVICE)
    assert_replays(step)
