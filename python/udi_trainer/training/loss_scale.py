"""Dynamic loss scaling for float16 (Micikevicius et al., arXiv 1710.03740), without waiting for the GPU.

Losses are multiplied by the scale, and gradients divided by it. Where a gradient is not finite, the optimizer skips the
step, and the scale is halved; after 2000 steps without that it doubles. ``torch.amp.GradScaler`` does the same. Here
gradients are unscaled before anything else uses them, because methods compute with them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

INITIAL, INTERVAL = 2.0**16, 2000  # GradScaler's


class LossScale(nn.Module):
    scale: torch.Tensor
    steps: torch.Tensor  # since the scale changed

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(INITIAL))
        self.register_buffer("steps", torch.tensor(0, dtype=torch.int32))

    def weights(self, losses: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The scale as a weight of each loss."""
        return [self.scale.to(loss.dtype) for loss in losses]

    def unscaled(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        inverse = self.scale.double().reciprocal().float()
        return [None if grad is None else grad * inverse for grad in grads]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the optimizer skip steps whose gradients are not finite, and the scale follow."""
        optimizer.register_step_pre_hook(self._find)
        optimizer.register_step_post_hook(self._adapt)

    def _find(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found = torch.zeros_like(self.scale)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, torch.ones_like(found))
        optimizer.found_inf = found  # type: ignore[attr-defined]  # torch's fused optimizers read it

    def _adapt(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        torch._amp_update_scale_(self.scale, self.steps, optimizer.found_inf, 2.0, 0.5, INTERVAL)  # type: ignore
