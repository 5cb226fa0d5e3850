"""Lists of gradients, and what their Gram matrix and weighted sum must be."""

import torch

from udi_kernels import GradientPlan, gramian, weighted_sum

SHAPES = [(7,), (64, 33, 3, 3), (), (0, 3), (1271,), (16384,), (41, 1, 5)]


def draw(k, shapes=SHAPES, dtype=torch.float32, device="cpu"):
    return [[torch.randn(s, device=device).to(dtype) for s in shapes] for _ in range(k)]


def stack(grads):
    return [torch.stack(column) for column in zip(*grads, strict=True)]


def flat(grads):
    """(K, N), None as zeros."""
    like = [next((g for g in column if g is not None), torch.empty(0)) for column in zip(*grads, strict=True)]
    rows = [[torch.zeros_like(t) if g is None else g for g, t in zip(row, like, strict=True)] for row in grads]
    return torch.stack([torch.cat([g.flatten().to(like[0].device) for g in row]) for row in rows])


def assert_gramian(gram, grads):
    """Symmetric, and no further from float64 than a matrix product in the gradients' own dtype."""
    rows = flat(grads)
    truth = rows.double() @ rows.double().T
    wide = rows.dtype == torch.float64
    assert gram.shape == truth.shape and gram.dtype == (torch.float64 if wide else torch.float32)
    assert torch.equal(gram, gram.T)
    error, bound = ((g.double() - truth).norm().item() for g in (gram, rows @ rows.T))
    rounding = rows.shape[1] ** 0.5 * 2.3e-16 if wide else 6e-8  # of a double sum; of the float32 result
    assert error <= bound + rounding * truth.norm().item()


def assert_weighted_sum(out, grads, weights):
    """Each element no further from float64 than rounding of K float32 terms and of the result."""
    for result, column in zip(out, zip(*grads, strict=True), strict=True):
        terms = [(w, g) for w, g in zip(weights.double(), column, strict=True) if g is not None]
        if not terms:
            assert result is None
            continue
        dtype, shape = terms[0][1].dtype, terms[0][1].shape
        truth = sum(w * g.double() for w, g in terms)
        scale = sum((w * g.double()).abs() for w, g in terms)
        unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert result.dtype == dtype and result.shape == shape
        bound = 0.5 * torch.finfo(dtype).eps * truth.abs() + len(terms) * unit * scale + torch.finfo(dtype).tiny
        assert ((result.double() - truth).abs() <= bound).all()


def check(grads, weights=None, plan_of=None):
    """Both ops and the plan against float64, the plan bit by bit against the ops."""
    lists = plan_of or grads
    some = next(g for row in lists for g in row if g is not None)
    weights = torch.randn(len(grads), device=some.device) if weights is None else weights
    gram, out = gramian(lists), weighted_sum(lists, weights)
    assert_gramian(gram, grads)
    assert_weighted_sum(out, grads, weights)
    plan = GradientPlan(lists)
    assert torch.equal(plan.gramian(), gram)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plan.weighted_sum(weights), out, strict=True))
