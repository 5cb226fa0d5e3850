"""A plan reads memory: what it must notice, and what it must refuse."""

import pytest
import torch
from lists import draw, stack
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from udi_kernels import GradientPlan, gramian, weighted_sum


def two(t):
    return TwoTensor(t, 2 * t)


def test_subclasses_take_part_through_dispatch():
    grads = draw(3, shapes=[(4, 3), (5,)])
    wrapped = [[two(t) for t in row] for row in grads]
    gram = gramian(wrapped)
    assert torch.equal(gram.a, gramian(grads)) and torch.equal(gram.b, 4 * gramian(grads))
    weights = torch.randn(3)
    out = weighted_sum(wrapped, two(weights))
    for s, want in zip(out, weighted_sum(grads, weights), strict=True):
        assert torch.equal(s.a, want) and torch.equal(s.b, 4 * want)
    with FakeTensorMode() as mode:
        fake = [[mode.from_tensor(t) for t in row] for row in grads]
        assert gramian(fake).shape == (3, 3)
        assert weighted_sum(fake, torch.ones(3))[0].shape == (4, 3)


class Plain(torch.Tensor):
    """A subclass whose memory is its own."""


def test_plan_refuses_subclasses_by_name(backend):
    grads = draw(2, shapes=[(4,), (5,)])
    grads[1][1] = two(grads[1][1])
    with pytest.raises(
        TypeError, match=r"GradientPlan: grads\[1\]\[1\] must be a plain tensor, .* got a TwoTensor; call"
    ):
        GradientPlan(grads)
    with FakeTensorMode() as mode, pytest.raises(TypeError, match=r"grads\[0\]\[0\] .* got a FakeTensor"):
        GradientPlan([[mode.from_tensor(torch.ones(3))]])
    with pytest.raises(TypeError, match=r"out\[0\] .* got a TwoTensor"):
        GradientPlan([[torch.ones(3)]], out=[two(torch.ones(3))])
    grads[1][1] = torch.randn(5).as_subclass(Plain)
    assert GradientPlan(grads).gramian().shape == (2, 2)


def moves(t):
    """Ways in which a buffer stops being what a plan has seen."""
    return {
        "other memory": lambda: setattr(t, "data", torch.zeros_like(t)),
        "other dtype": lambda: setattr(t, "data", t.data.double()),
        "freed": lambda: t.untyped_storage().resize_(0),
        "other shape": lambda: t.resize_(2, 2),
        "transposed": lambda: t.t_(),
        "offset": lambda: t.set_(t.untyped_storage(), 1, (4, 3)) if t.untyped_storage().resize_(100) else None,
    }


@pytest.mark.parametrize("how", moves(torch.zeros(4, 3)))
@pytest.mark.parametrize("which", ["grads[1][0]", "out[0]"])
def test_plan_notices_that_a_buffer_moved(how, which):
    grads, out = [[torch.randn(4, 3), torch.randn(5)] for _ in range(2)], [torch.zeros(4, 3), torch.zeros(5)]
    plan = GradientPlan(grads, out=out)
    plan.weighted_sum(torch.ones(2))
    before = plan.gramian()
    moves(grads[1][0] if which == "grads[1][0]" else out[0])[how]()
    message = rf"GradientPlan: {which} must stay the torch.float32 buffer of shape \(4, 3\) .* make a new plan"
    for call in (plan.gramian, lambda: plan.weighted_sum(torch.ones(2))):
        with pytest.raises(RuntimeError, match=message.replace("[", r"\[").replace("]", r"\]")):
            call()
    assert torch.isfinite(before).all()


def test_plan_of_a_model_that_changes_its_dtype():
    model = torch.nn.Linear(4, 3)
    model(torch.randn(2, 4)).sum().backward()
    plan = GradientPlan([[p.grad for p in model.parameters()]])
    plan.gramian()
    model.double()
    try:
        plan.gramian()  # the old buffers, if the plan alone holds them; never freed memory
    except RuntimeError as e:
        assert "make a new plan" in str(e)


@pytest.mark.parametrize("view", [torch._neg_view, lambda t: (1j * -t).conj().imag], ids=["neg_view", "conj().imag"])
def test_negative_views(view):
    t = torch.randn(6, 5)
    grads = [[torch.randn(6, 5)], [view(t)]]
    assert grads[1][0].is_neg()
    plain = [[grads[0][0]], [grads[1][0].clone()]]
    assert not plain[1][0].is_neg()
    weights = torch.tensor([0.5, 2.0])
    assert torch.equal(gramian(grads), gramian(plain))
    assert torch.equal(gramian([grads[1]]), gramian([plain[1]]))
    assert torch.equal(weighted_sum(grads, weights)[0], weighted_sum(plain, weights)[0])
    negative = torch._neg_view(-weights)
    assert torch.equal(GradientPlan(plain).weighted_sum(negative)[0], weighted_sum(plain, weights)[0])
    stacked = [view(torch.stack([t, 2 * t]))]
    assert torch.equal(gramian(stacked, stacked=True), gramian([[s] for s in stacked[0].clone()]))
    with pytest.raises(
        ValueError, match=r"GradientPlan: grads\[1\]\[0\] must be dense, .* a pending negation; call .clone"
    ):
        GradientPlan(grads)
    for call in (lambda out: weighted_sum(grads, weights, out=out), lambda out: GradientPlan(plain, out=out)):
        with pytest.raises(ValueError, match=r"out\[0\] must not be a negative view; call .resolve_neg"):
            call([torch._neg_view(torch.zeros(6, 5))])


def test_flat_gradients_are_not_taken_for_stacked_ones():
    g0, g1 = torch.randn(6), torch.randn(6)
    with pytest.raises(TypeError, match=r"gramian: grads\[0\] must be a sequence .* stacked=True"):
        gramian([g0, g1])
    assert gramian([[g0], [g1]]).shape == (2, 2) and gramian(stack([[g0], [g1]]), stacked=True).shape == (2, 2)
