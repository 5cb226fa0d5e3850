"""What does not fit is named: by csrc in words, and without csrc by the same type of error."""

import copy
import pickle

import pytest
import torch

from udi_kernels import GradientPlan, alignment_weights, gramian, weighted_sum

a, b = torch.ones(3, 4), torch.ones(3, 4)
leaf = torch.ones(3, 4, requires_grad=True)
nested, jagged = (
    torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    for layout in (torch.strided, torch.jagged)
)
BAD_GRADS = [
    (a, TypeError, "grads must be a sequence, got a tensor"),
    (None, TypeError, "grads must be a sequence of sequences of tensors, got NoneType"),
    ([], ValueError, "grads must hold at least one tensor"),
    ([[], []], ValueError, "grads must hold at least one tensor"),
    ([[None], [None]], ValueError, "grads must hold at least one tensor"),
    ([3], TypeError, r"grads\[0\] must be a sequence of tensors, got int"),
    ([[a], [a, b]], ValueError, r"grads\[1\] must have length 1 as grads\[0\] has, got 2"),
    ([[a], [3]], TypeError, r"grads\[1\]\[0\] must be a tensor or None, got int"),
    ([[a], [torch.ones(4, 3)]], ValueError, r"grads\[1\]\[0\] must have shape \(3, 4\) as grads\[0\]\[0\] has, got"),
    ([[None, a], [None, a.half()]], ValueError, r"grads\[1\]\[1\] must have dtype torch.float32 .* got torch.float16"),
    ([[a.long()]], TypeError, r"grads\[0\]\[0\] must be float16, .* got torch.int64"),
    ([[a.cfloat()]], TypeError, r"grads\[0\]\[0\] must be float16, .* got torch.complex64"),
    ([[nested]], ValueError, r"grads\[0\]\[0\] must be dense, got a nested tensor; call .to_padded_tensor"),
    ([[jagged]], ValueError, r"grads\[0\]\[0\] must be dense, got a nested tensor; call .to_padded_tensor"),
    ([[a.to_sparse_csr()]], ValueError, r"grads\[0\]\[0\] must be dense, got torch.sparse_csr; call .to_dense"),
    ([[a.to_sparse_csc()]], ValueError, r"grads\[0\]\[0\] must be dense, got torch.sparse_csc; call .to_dense"),
    ([[a.to_sparse()]], ValueError, r"grads\[0\]\[0\] must be dense, got torch.sparse_coo; call .to_dense"),
    ([[a], [a.to("meta")]], ValueError, r"grads\[1\]\[0\] must be .*on cpu.*, got .*meta"),
    ([[a, a.to("meta")]], ValueError, r"grads\[0\]\[1\] must be .*on cpu.*, got .*meta"),
    ([[a], [leaf]], ValueError, r"grads\[1\]\[0\] must not require grad .* detach"),
    ([a, b], TypeError, r"grads\[0\] must be a sequence of tensors, got a tensor; pass stacked=True if"),
]
BAD_STACKED = [
    (a, TypeError, "grads must be a sequence, got a tensor"),
    ([None], ValueError, "grads must hold at least one tensor"),
    ([a, 3], TypeError, r"grads\[1\] must be a tensor or None, got int"),
    ([a, b[0, 0]], ValueError, r"grads\[1\] must have shape \(K, \*shape\), got \(\)"),
    ([a, b[:2]], ValueError, r"grads\[1\] must have size K of the first dimension 3 as grads\[0\] has, got 2"),
    ([a[:0]], ValueError, r"grads\[0\] must hold at least one gradient, got shape \(0, 4\)"),
]
w = torch.ones(2)
BAD_SUMS = [
    ([1.0, 1.0], None, TypeError, "weights must be a torch.Tensor, got list"),
    (torch.ones(3), None, ValueError, r"weights must have shape \(2,\), got \(3,\)"),
    (torch.ones(2, device="meta"), None, ValueError, "weights must be .*on cpu.*, got .*meta"),
    (torch.ones(2, requires_grad=True), None, ValueError, "weights must not require grad"),
    (torch.ones(2).cfloat(), None, TypeError, "weights must be float16, .* got torch.complex64"),
    (torch.ones(2).to_sparse(), None, ValueError, "weights must be dense, got torch.sparse_coo"),
    (nested, None, ValueError, "weights must be dense, got a nested tensor"),
    (w, a, TypeError, "out must be a sequence of tensors, got Tensor"),
    (w, [], ValueError, "out must have length 1, one per parameter, got 0"),
    (w, [None], TypeError, r"out\[0\] must be a tensor, got None"),
    (w, [a.t()], ValueError, r"out\[0\] must have shape \(3, 4\) .* got \(4, 3\)"),
    (w, [a.half()], ValueError, r"out\[0\] must have dtype torch.float32 .* got torch.float16"),
    (w, [torch.ones(3, 8)[:, ::2]], ValueError, r"out\[0\] must have strides \(4, 1\) .* got \(8, 2\)"),
    (w, [leaf], ValueError, r"out\[0\] must not require grad"),
]


OPS = {"gramian": gramian, "weighted_sum": lambda g, **o: weighted_sum(g, w, **o), "GradientPlan": GradientPlan}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("grads, error, message", BAD_GRADS)
def test_bad_gradients(op, grads, error, message, refused):
    refused(lambda: OPS[op](grads), f"^{op}: {message}", error)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("grads, error, message", BAD_STACKED)
def test_bad_stacked_gradients(op, grads, error, message, refused):
    refused(lambda: OPS[op](grads, stacked=True), f"^{op}: {message}", error)


@pytest.mark.parametrize("weights, out, error, message", BAD_SUMS)
def test_bad_weights_and_out(weights, out, error, message, refused):
    refused(lambda: weighted_sum([[a], [b]], weights, out=out), f"^weighted_sum: {message}", error)
    refused(lambda: GradientPlan([[a], [b]], out=out).weighted_sum(weights), f"^GradientPlan: {message}", error)


@pytest.mark.parametrize(
    "like, error, message",
    [
        (a, TypeError, "like must be a sequence of tensors, got Tensor"),
        ([None], TypeError, r"like\[0\] must be a tensor, got None"),
        ([], ValueError, "like must have length 1, one per parameter, got 0"),
        ([a.t()], ValueError, r"like\[0\] must have shape \(3, 4\) as parameter 0's gradient has, got \(4, 3\)"),
        ([a.to_sparse()], ValueError, r"like\[0\] must be dense, got torch.sparse_coo"),
        ([nested], ValueError, r"like\[0\] must be dense, got a nested tensor"),
    ],
)
def test_bad_like(like, error, message, refused):
    refused(lambda: weighted_sum([[a], [b]], w, like=like), f"^weighted_sum: {message}", error)


def test_like_beside_out(refused):
    refused(
        lambda: weighted_sum([[a], [b]], w, like=[a], out=[torch.ones(3, 4)]), "like must be None if out", ValueError
    )


def test_plan_cannot_be_copied():
    plan = GradientPlan([[a], [b]])
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(
            TypeError, match="^GradientPlan: .* cannot be copied or pickled; make a new plan of the copied"
        ):
            call(plan)


def test_plan_refuses_what_it_would_have_to_copy(refused):
    words = r"^GradientPlan: grads\[1\]\[0\] must have strides \(4, 1\) .* got \(1, 3\).*contig"
    refused(lambda: GradientPlan([[a], [torch.ones(4, 3).t()]]), words, ValueError)
    expanded, strided = torch.ones(3, 1).expand(3, 4), torch.ones(2, 3, 8)[..., ::2]
    words = r"^GradientPlan: grads\[1\]\[0\] must be dense, got shape \(3, 4\) with"
    refused(lambda: GradientPlan([[a], [expanded]]), words, ValueError)
    refused(lambda: GradientPlan([strided], stacked=True), r"^GradientPlan: grads\[0\] must be dense", ValueError)


@pytest.mark.parametrize(
    "gram, anchor, error, message",
    [
        ([[1.0]], 0, TypeError, "gram must be a torch.Tensor, got list"),
        (torch.ones(2, 3), 0, ValueError, r"gram must have shape \(K, K\), got \(2, 3\)"),
        (torch.ones(2, 2), 2, ValueError, r"anchor must lie in \[0, 2\), got 2"),
        (torch.ones(2, 2), -1, ValueError, r"anchor must lie in \[0, 2\), got -1"),
        (torch.ones(2, 2), 10**400, ValueError, r"anchor must lie in \[0, 2\), got 1000"),
        (torch.ones(2, 2), True, TypeError, "anchor must be an int, got bool"),
        (torch.ones(2, 2), 1.0, TypeError, "anchor must be an int, got float"),
        (torch.ones(2, 2), 1j, TypeError, "anchor must be an int, got complex"),
        (torch.ones(2, 2), torch.tensor(1), TypeError, "anchor must be an int, got Tensor"),
        (torch.ones(2, 2).cfloat(), 0, TypeError, "gram must be of a floating-point dtype, got torch.complex64"),
        (torch.ones(2, 2).to_sparse(), 0, ValueError, "gram must be dense"),
        (nested, 0, ValueError, "gram must be dense, got a nested tensor"),
    ],
)
def test_alignment_weights_bad_input(gram, anchor, error, message):
    with pytest.raises(error, match=f"^alignment_weights: {message}"):
        alignment_weights(gram, anchor=anchor)


def overlaps():
    """For each overlap: gradients, out, and what is named."""
    memory = torch.zeros(40)
    g = [[memory[4 * i :][:4], memory[20 + 4 * i :][:4]] for i in range(2)]
    free = [torch.zeros(4), torch.zeros(4)]
    stack = memory[:8].view(2, 4)
    return {
        "shifted": (g, [memory[1:5], free[1]], {}, r"out\[0\] must not overlap grads\[0\]\[0\]"),
        "the end of one and the next": (g, [memory[2:6], free[1]], {}, r"out\[0\] must not overlap grads\[[01]\]\[0\]"),
        "another parameter's gradient": (g, [g[0][1], free[1]], {}, r"out\[0\] must not overlap grads\[0\]\[1\]"),
        "another list's and parameter's": (g, [free[0], g[1][0]], {}, r"out\[1\] must not overlap grads\[1\]\[0\]"),
        "the same output twice": (g, [free[0], free[0]], {}, r"out\[[01]\] must not overlap out\[[01]\]"),
        "shifted outputs": (g, [memory[30:34], memory[31:35]], {}, r"out\[1\] must not overlap out\[0\]"),
        "stacked": ([stack], [memory[2:6]], {"stacked": True}, r"out\[0\] must not overlap grads\[0\]"),
    }


@pytest.mark.parametrize("how", overlaps())
def test_overlap(how, refused):
    grads, out, options, words = overlaps()[how]
    refused(lambda: weighted_sum(grads, w, out=out, **options), f"^weighted_sum: {words}", ValueError)
    refused(lambda: GradientPlan(grads, out=out, **options), f"^GradientPlan: {words}", ValueError)
