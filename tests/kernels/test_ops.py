"""The way of a call, the same for all ops."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from udi_kernels import (
    _build,
    _club,
    _duc,
    _js_div,
    _js_div_topk,
    _ops,
    _skew_kl,
    club_mi,
    gramian,
    js_div,
    weighted_sum,
)

X = torch.zeros(3, 4)


@pytest.mark.parametrize("constants", ["REDUCTION", "JS_DIV", "JS_DIV_TOPK", "TAIL", "CLUB", "DUC"])
def test_constants_of_cpp_and_triton_agree(constants):
    """All of an enum, and by the same names."""
    pytest.importorskip("triton", reason="triton is not installed")
    from udi_kernels import triton
    from udi_kernels.triton import club, duc, js_div, js_div_topk

    module = {
        "REDUCTION": triton,
        "JS_DIV": js_div,
        "JS_DIV_TOPK": js_div_topk,
        "TAIL": js_div_topk,
        "CLUB": club,
        "DUC": duc,
    }[constants]
    native = getattr(_build.load("cpu"), constants)
    assert native == {name: int(getattr(module, name)) for name in native}
    assert sorted(native.values()) == list(range(len(native)))


def test_constants_of_cpp_and_python_agree():
    native = _build.load("cpu")
    assert native.REDUCTION == {name.upper(): code for code, name in enumerate(_ops.REDUCTIONS)}
    assert native.REDUCTION == {name: getattr(_ops, name) for name in ("NONE", "SUM", "MEAN")}
    assert native.TAIL == {name.upper(): code for code, name in enumerate(_js_div_topk.TAILS)}
    assert native.SMALL_CLASS == _club.SMALL_CLASS
    x = torch.empty(10, 4)
    for op, arguments, rows in (
        (_js_div.JS_DIV, dict(input=x, weight=x[:, 0], reduction=_ops.MEAN), native.JS_DIV),
        (_js_div_topk.JS_DIV_TOPK, dict(input=x, weight=x[:, 0], reduction=_ops.MEAN), native.JS_DIV_TOPK),
        (_skew_kl.SKEW_KL, dict(input=x, weight=x[:, 0], reduction=_ops.MEAN), native.JS_DIV),
        (_club.CLUB_MI, dict(mu=x, given=None), native.CLUB),
        (_duc.DUC_LOSS, dict(student=x), native.DUC),
    ):
        assert op.saved["stats"](**arguments)[0] == len(rows)


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
