#!/usr/bin/env bash
# Fused SGD starts its momentum from memory that nobody wrote, if its first step is skipped for an overflow.
#
# Version:   torch 2.13.0, CPU.
# Input:     SGD(momentum=0.9, fused=True), a parameter of ones, and optimizer.found_inf = 1 at the first step, as
#            gradient scalers set it where scaled gradients overflow. In fp16 the first steps do so by design, until the
#            scale has come down. found_inf is 0 at the second step, whose gradient is 1.
# Behaviour: the first step leaves the parameter alone, but makes momentum_buffer by torch.empty_like and never fills
#            it. The second step takes it for a momentum and adds 0.9 times it. Here torch fills such memory with NaN, to
#            show what is never written; otherwise the step depends on what was in memory before. AdamW is right.
# Expected:  the second step is the first that counts: momentum_buffer is the gradient, as after a first step.
# Here:      the trainer fills the momentum with zeros before a first step under loss scaling.
#
# Output seen:
#
#     torch 2.13.0+cpu
#     SGD   after the skipped step: [1.0, 1.0], after the next: [nan, nan]
#     AdamW after the skipped step: [1.0, 1.0], after the next: [0.9, 0.9]
#     as described
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cat > "$folder/show.py" <<'PYTHON'
import torch

torch.use_deterministic_algorithms(True)  # with the next line: NaN in memory that torch.empty returns
torch.utils.deterministic.fill_uninitialized_memory = True


def steps(name, **options):
    """The parameter after a skipped step, and after the next one."""
    p, seen = torch.nn.Parameter(torch.ones(2)), []
    optimizer = getattr(torch.optim, name)([p], lr=0.1, fused=True, weight_decay=0.0, **options)
    optimizer.grad_scale = torch.ones(())
    for found_inf, grad in ((1.0, torch.inf), (0.0, 1.0)):
        optimizer.found_inf, p.grad = torch.tensor(found_inf), torch.full((2,), grad)
        optimizer.step()
        seen.append([round(x, 4) for x in p.tolist()])
    return seen


print("torch", torch.__version__)
found = {"SGD": steps("SGD", momentum=0.9), "AdamW": steps("AdamW")}
for name, (skipped, following) in found.items():
    print(f"{name:5} after the skipped step: {skipped}, after the next: {following}")
as_described = str(found["SGD"]) == "[[1.0, 1.0], [nan, nan]]" and found["AdamW"] == [[1.0, 1.0], [0.9, 0.9]]
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
