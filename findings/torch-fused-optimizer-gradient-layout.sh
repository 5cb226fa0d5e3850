#!/usr/bin/env bash
# A fused optimizer reads a gradient's memory in the order of the parameter's, whatever the gradient's strides.
#
# Version:   torch 2.13.0, CPU.
# Input:     a parameter W (2, 3), contiguous, and W.grad = torch.autograd.grad(...) of einsum("oi,bi->bo", W, x), which
#            has strides (1, 2). Shape, dtype and number of elements are W's, and torch accepts the assignment.
# Behaviour: SGD(fused=True) and AdamW(fused=True) update W with the gradient's elements in the wrong places, without an
#            error or a warning. With fused=False they update W as the formula says.
# Expected:  the same step for fused=True and fused=False, or an error.
# Here:      weighted_sum(..., like=parameters) returns gradients in the layout of the parameters.
#
# Output seen (a step of SGD with lr=1 is W.grad; the first step of AdamW with lr=1 is the sign of W.grad):
#
#     torch 2.13.0+cpu
#     W.grad, strides (1, 2): [[22, 26, 30], [-220, -260, -300]]
#     SGD   fused=False step: [[22, 26, 30], [-220, -260, -300]]
#     SGD   fused=True  step: [[22, -220, 26], [-260, 30, -300]]
#     AdamW fused=False step: [[1, 1, 1], [-1, -1, -1]]
#     AdamW fused=True  step: [[1, -1, 1], [-1, 1, -1]]
#     as described
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cat > "$folder/show.py" <<'PYTHON'
import torch


def step(name, fused):
    """What an optimizer subtracts from W, and W.grad."""
    W = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    x = torch.arange(1.0, 13.0).reshape(4, 3)
    loss = (torch.einsum("oi,bi->bo", W, x) * torch.tensor([1.0, -10.0])).sum()
    (W.grad,) = torch.autograd.grad(loss, [W])
    before = W.detach().clone()
    options = {"weight_decay": 0.0} if name == "AdamW" else {}
    getattr(torch.optim, name)([W], lr=1.0, fused=fused, **options).step()
    return (before - W.detach()).round().int().tolist(), W.grad


print("torch", torch.__version__)
_, grad = step("SGD", False)
right = grad.int().tolist()
in_memory = grad.t().contiguous().flatten().view(2, 3).int()  # the elements in the order of the gradient's memory
print(f"W.grad, strides {grad.stride()}: {right}")
as_described = grad.stride() == (1, 2)
for name, of in (("SGD", lambda g: g), ("AdamW", torch.sign)):
    for fused in (False, True):
        got, _ = step(name, fused)
        print(f"{name:5} fused={fused!s:5} step: {got}")
        as_described &= got == of(in_memory if fused else torch.tensor(right)).tolist()
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
