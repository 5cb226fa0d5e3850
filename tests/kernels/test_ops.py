"""The way of a call, the same for all ops."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from udi_kernels import _build, _ops, club_mi, gramian, js_div, weighted_sum

X = torch.zeros(3, 4)


def test_numbers_of_reductions_agree():
    assert _build.load("cpu").REDUCTIONS == {name: i for i, name in enumerate(_ops.REDUCTIONS)}


class OutOfMemory(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "udi_kernels":
            self.calls += 1
            raise torch.OutOfMemoryError("tried to allocate")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "call",
    [lambda: js_div(X, X), lambda: club_mi(X, X, X), lambda: gramian([[X]]), lambda: weighted_sum([[X]], X[0, :1])],
)
def test_an_error_is_seen_once_and_as_it_is(call):
    with OutOfMemory() as mode, pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
        call()
    assert mode.calls == 1


BAD = {
    "js_div: target must have input's shape \\(3, 4\\), got \\(3, 5\\)": lambda: js_div(X, torch.zeros(3, 5)),
    "js_div: reduction must be one of .* got 'avg'": lambda: js_div(X, X, reduction="avg"),
    "js_div: input must be a torch.Tensor, got list": lambda: js_div([1.0], X),
    "club_mi: y must have mu's shape": lambda: club_mi(X, X, X[:2]),
    "gramian: grads\\[1\\]\\[0\\] must have shape \\(3, 4\\)": lambda: gramian([[X], [X[:2]]]),
    "gramian: grads\\[0\\] must be a sequence of tensors": lambda: gramian([X, X]),
    "weighted_sum: weights must have shape \\(2,\\)": lambda: weighted_sum([[X], [X]], torch.ones(3)),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_while_compiling(message):
    with pytest.raises(Exception, match=message):
        torch.compile(BAD[message], fullgraph=True, backend="aot_eager")()
