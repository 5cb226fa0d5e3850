from functools import partial

import pytest
import torch
from losses import assert_as_good_as_torch, resident, run

from udi_kernels import duc_loss, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 5), (2, 1), (64, 512), (300, 7), (33, 41), (1000, 130), (5, 1271), (513, 30)]


def loop(student, teacher, dims, *, temperature=1.0):
    """Sample by sample with raw exponentials, as the paper and its code have it."""
    loss = 0
    for i, row in enumerate(student[:, dims]):
        similarity = torch.exp(teacher[:, dims] @ row / temperature)
        loss = loss - torch.log(similarity[i] / similarity.sum())
    return loss / len(student)


def draw(n, d, dtype=torch.float32, device="cpu", scale=1.0):
    student, noise = (torch.randn(n, d, device=device) for _ in range(2))
    return [(scale * t).to(dtype) for t in (student, 0.5 * student + noise)]


def draw_dims(d, device="cpu"):
    dims = torch.rand(d, device=device) < 0.5
    dims[d // 2] = True
    return dims


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,d", SHAPES)
def test_accuracy(n, d, dtype, reduction, device):
    options = dict(dims=draw_dims(d, device), temperature=2.5, reduction=reduction)
    ops = [partial(op, **options) for op in (duc_loss, reference.duc_loss)]
    assert_as_good_as_torch(*ops, lambda: draw(n, d, dtype, device))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 50.0])
def test_parity_with_the_loop(temperature, device):
    inputs, dims = draw(40, 23, torch.float64, device), draw_dims(23, device)
    ours, theirs = (run(partial(f, dims=dims, temperature=temperature), inputs) for f in (duc_loss, loop))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_1e4(dtype, device):
    """Raw exponentials overflow; the truth is that of the positive or the largest negative."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], device=device)
    teacher = torch.stack([100 * signs, torch.randn(4, device=device)], 1)
    student = torch.stack([100 * signs.flip(0), torch.randn(4, device=device)], 1)
    inputs = [student.to(dtype), teacher.to(dtype)]
    dims = torch.tensor([True, False], device=device)
    assert not loop(*inputs, dims).isfinite()
    rows, *grads = run(partial(duc_loss, dims=dims, reduction="none"), inputs)
    # The positive is -1e4, two negatives are 1e4 and the third is -1e4.
    torch.testing.assert_close(rows, torch.full_like(rows, 2e4 + torch.log(torch.tensor(2.0)).item()))
    assert all(g.isfinite().all() for g in grads)
    assert_as_good_as_torch(
        partial(duc_loss, dims=dims, reduction="none"),
        partial(reference.duc_loss, dims=dims, reduction="none"),
        lambda: [100 * torch.randn(50, 2, device=device, dtype=dtype) for _ in range(2)],
    )


def test_nearly_certain_rows_keep_their_digits(device):
    """Positives far above the negatives: losses and gradients down to 1e-30 have the relative accuracy of others."""
    teacher = 8 * torch.eye(6, device=device)
    student = teacher * torch.arange(1.0, 7.0, device=device)[:, None] / 6
    dims = torch.ones(6, dtype=torch.bool, device=device)
    f, g = (partial(op, dims=dims, reduction="none") for op in (duc_loss, reference.duc_loss))
    ours, truth = run(f, [student, teacher]), run(g, [student.double(), teacher.double()])
    assert truth[0].max() / truth[0].min() > 1e20
    torch.testing.assert_close(ours[0], truth[0].float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[1], truth[1].float(), rtol=1e-5, atol=0)


def test_the_other_dimensions_play_no_part(device):
    (student, teacher), dims = draw(20, 9, device=device), draw_dims(9, device)
    want = run(partial(duc_loss, dims=dims), [student, teacher])
    for t in (student, teacher):
        t[:, ~dims] = float("nan")
    got = run(partial(duc_loss, dims=dims), [student, teacher])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (got[1][:, ~dims] == 0).all() and (got[2][:, ~dims] == 0).all()


def test_without_dimensions(device):
    loss, *grads = run(
        partial(duc_loss, dims=torch.zeros(7, dtype=torch.bool, device=device)), draw(8, 7, device=device)
    )
    assert loss.item() == pytest.approx(torch.log(torch.tensor(8.0)).item())
    assert all((g == 0).all() for g in grads)


def test_nan_stays_in_its_rows(device):
    (student, teacher), dims = draw(600, 9, device=device), draw_dims(9, device)
    student[3] = float("nan")
    rows = duc_loss(student, teacher, dims, reduction="none")
    assert rows.isnan().nonzero().flatten().tolist() == [3]
    teacher[5] = float("nan")
    assert duc_loss(student, teacher, dims, reduction="none").isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,m,d", [(1, 2, 5), (3, 700, 33), (64, 65, 20), (300, 1300, 7), (0, 4, 3)])
def test_more_teachers_than_students(n, m, d, dtype, reduction, device):
    """The first N teachers are positives; the others, a queue, are negatives only."""
    options = dict(dims=draw_dims(d, device), temperature=2.5, reduction=reduction)
    ops = [partial(op, **options) for op in (duc_loss, reference.duc_loss)]
    if n:
        assert_as_good_as_torch(*ops, lambda: [x[:k] for x, k in zip(draw(m, d, dtype, device), (n, m), strict=True)])
    student, teacher = (x[:k].double() for x, k in zip(draw(m, d, device=device), (n, m), strict=True))
    z = student[:, options["dims"]] @ teacher[:, options["dims"]].T / 2.5
    rows = torch.nn.functional.cross_entropy(z, torch.arange(n, device=device), reduction=reduction)
    value, *grads = run(ops[0], [student, teacher])
    torch.testing.assert_close(value, rows, equal_nan=True)
    assert [g.shape for g in grads] == [(n, d), (m, d)] and (n or not grads[1].any())


def test_queue_gradcheck_and_compile(device):
    dims = draw_dims(4, device)
    inputs = [x[:k].double().requires_grad_() for x, k in zip(draw(7, 4, device=device), (3, 7), strict=True)]
    f = partial(duc_loss, dims=dims, temperature=0.7)
    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for n, m in ((3, 7), (4, 9), (5, 5)):
        inputs = [x[:k] for x, k in zip(draw(m, 4, device=device), (n, m), strict=True)]
        for a, b in zip(run(compiled, inputs), run(f, inputs), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temperatures_at_the_ends(dtype, device, backend):
    student, teacher = (8 * torch.eye(6, 5, device=device, dtype=dtype) for _ in range(2))
    dims = torch.ones(5, dtype=torch.bool, device=device)
    for temperature, want in ((1e-37, [0.0] * 5 + [6.0]), (1e37, [6.0] * 6)):  # the last row's products are all 0
        value, *grads = run(partial(duc_loss, dims=dims, temperature=temperature, reduction="none"), [student, teacher])
        torch.testing.assert_close(value.exp(), torch.tensor(want, dtype=dtype, device=device).clamp_min(1))
        assert not any(g[:5].isnan().any() for g in grads)


def test_reductions_agree(device):
    inputs, dims = draw(50, 20, torch.float64, device), draw_dims(20, device)
    rows = duc_loss(*inputs, dims, reduction="none")
    assert rows.shape == (50,)
    torch.testing.assert_close(rows.mean(), duc_loss(*inputs, dims))
    torch.testing.assert_close(rows.sum(), duc_loss(*inputs, dims, reduction="sum"))


def test_strides(device):
    a, b = torch.randn(30, 120, device=device), torch.randn(40, 30, device=device)
    dims = draw_dims(80, device)[::2]
    for inputs in ([a[:, :40], b.T], [a[:1, :40].expand(30, 40), a[:, 1::3]]):
        for reduction in ("mean", "none"):
            f = partial(duc_loss, dims=dims, reduction=reduction)
            want = run(f, [t.contiguous() for t in inputs])
            leaves = [t.detach().requires_grad_() for t in inputs]
            value = f(*leaves)
            got = value, *torch.autograd.grad(value.sum(), leaves)  # sum's gradient has stride 0
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_partial_requires_grad_and_retain_graph(device):
    inputs, f = draw(30, 50, device=device), partial(duc_loss, dims=draw_dims(50, device))
    want = run(f, inputs)
    for i in range(2):
        got = run(f, inputs, needs=[j == i for j in range(2)])
        assert torch.equal(got[1 + i], want[1 + i]) and got[2 - i] is None
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = f(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))
    assert not f(*inputs).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_gradcheck_and_double_backward(reduction, device):
    f = partial(duc_loss, dims=draw_dims(4, device), temperature=0.7, reduction=reduction)
    inputs = [t.requires_grad_() for t in draw(5, 4, torch.float64, device)]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape, device):
    leaves = [torch.empty(shape, device=device, requires_grad=True) for _ in range(2)]
    dims = torch.ones(shape[1], dtype=torch.bool, device=device)
    for op in (duc_loss, reference.duc_loss):
        for reduction in ("none", "sum", "mean"):
            loss = op(*leaves, dims, reduction=reduction)
            want = reference.duc_loss(
                torch.zeros(shape[0], 1), torch.zeros(shape[0], 1), torch.ones(1, dtype=torch.bool), reduction=reduction
            )
            torch.testing.assert_close(loss.detach().cpu(), want, equal_nan=True)
            assert all(g.shape == shape for g in torch.autograd.grad(loss.sum(), leaves))


def test_mixed_dtypes_and_autocast(device):
    (student, teacher), dims = draw(8, 5, device=device), draw_dims(5, device)
    half = student.bfloat16().requires_grad_()
    loss = duc_loss(half, teacher, dims)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    layer = torch.nn.Linear(5, 5, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        duc_loss(layer(student), teacher, dims).backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("n", [2, 7, 16, 33, 100, 1500])
def test_bit_identical_repeats_and_threads(n, device):
    inputs, f = draw(n, 70, device=device), partial(duc_loss, dims=draw_dims(70, device))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(run(f, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_matrix_of_all_pairs(device):
    """At N = 8192 forward and backward need less beyond inputs and gradients than an N x N matrix of float32."""
    (student, teacher), dims = draw(8192, 64, device=device), draw_dims(64, device)
    student.requires_grad_()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        duc_loss(student, teacher, dims, temperature=10.0).backward()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = resident()
        duc_loss(student[:64], teacher[:64], dims).backward()  # what is loaded and allocated once
        duc_loss(student, teacher, dims, temperature=10.0).backward()
        peak = resident("VmHWM") - before
    assert peak < 8192 * 8192 * 4 / 2


def test_opcheck(device):
    ops = torch.ops.udi_kernels
    inputs, dims = [t[::2] for t in draw(18, 21, device=device)], draw_dims(42, device)[::2]
    leaves = [t.detach().requires_grad_() for t in inputs]
    duc_loss(*inputs, dims)  # loads the kernels
    for reduction in range(3):
        torch.library.opcheck(ops.duc_loss.default, (*leaves, dims, 2.0, reduction))
        for need in (False, True):
            torch.library.opcheck(ops.duc_loss_fwd.default, (*inputs, dims, 2.0, reduction, need))
        loss, *saved = ops.duc_loss_fwd(*inputs, dims, 2.0, reduction, True)
        for needs in ((True, True), (True, False), (False, True)):
            args = torch.ones_like(loss), *inputs, dims, *saved, 2.0, reduction, *needs
            torch.library.opcheck(ops.duc_loss_bwd.default, args)


def test_compile_fullgraph(device):
    def f(student, teacher):
        return duc_loss(student.tanh(), teacher, dims, temperature=3.0) + duc_loss(teacher, student.detach(), dims)

    dims = draw_dims(8, device)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for n in (4, 7, 9):
        inputs = draw(n, 8, device=device)
        for a, b in zip(run(compiled, inputs), run(f, inputs), strict=True):
            torch.testing.assert_close(a, b)


DIMS = torch.ones(4, dtype=torch.bool)
BAD = {
    "student must be a torch.Tensor, got float": lambda x: duc_loss(1.0, x, DIMS),
    "dims must be a torch.Tensor, got list": lambda x: duc_loss(x, x, [True] * 4),
    "teacher must be float.*, got torch.int32": lambda x: duc_loss(x, x.int(), DIMS),
    r"student must have shape \(N, D\), got \(4,\)": lambda x: duc_loss(x[0], x[0], DIMS),
    r"teacher must have .* rows of student's \(3, 4\), got \(3, 3\)": lambda x: duc_loss(x, x[:, :3], DIMS),
    r"teacher must have .* M >= N rows of student's \(3, 4\), got \(2, 4\)": lambda x: duc_loss(x, x[:2], DIMS),
    "teacher must be on cpu as student is, got meta": lambda x: duc_loss(x, x.to("meta"), DIMS),
    "dims must be torch.bool, got torch.int64": lambda x: duc_loss(x, x, DIMS.long()),
    "dims must be dense, got torch.sparse_coo; call .to_dense": lambda x: duc_loss(x, x, DIMS.to_sparse()),
    r"dims must have shape \(4,\), one per dimension, got \(3,\)": lambda x: duc_loss(x, x, DIMS[:3]),
    "dims must be on cpu as student is, got meta": lambda x: duc_loss(x, x, DIMS.to("meta")),
    r"temperature must lie in \[1e-37, 1e37\], got 0": lambda x: duc_loss(x, x, DIMS, temperature=0),
    r"temperature must lie in \[1e-37, 1e37\], got nan": lambda x: duc_loss(x, x, DIMS, temperature=float("nan")),
    r"temperature must lie in \[1e-37, 1e37\], got 9e-38": lambda x: duc_loss(x, x, DIMS, temperature=9e-38),
    r"temperature must lie in \[1e-37, 1e37\], got 1.1e\+37": lambda x: duc_loss(x, x, DIMS, temperature=1.1e37),
    "temperature must be a number": lambda x: duc_loss(x, x, DIMS, temperature=torch.ones(())),
    "reduction .* got 'avg'": lambda x: duc_loss(x, x, DIMS, reduction="avg"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, refused):
    refused(lambda: BAD[message](torch.zeros(3, 4)), f"^duc_loss: {message}")
