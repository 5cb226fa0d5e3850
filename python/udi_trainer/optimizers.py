"""torch's optimizers without the decorators that keep torch.compile out of them.

These import ``torch._dynamo`` at their first use, which takes about a second. The trainer compiles encoders only.
"""

import inspect
from typing import Any

import torch

DECORATED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")


def plain(optimizer: type[torch.optim.Optimizer]) -> Any:
    members = {name: inspect.unwrap(getattr(optimizer, name)) for name in DECORATED}
    members["step"] = torch.no_grad()(inspect.unwrap(optimizer.step))
    return type(optimizer.__name__, (optimizer,), members)


AdamW, SGD, LBFGS = map(plain, (torch.optim.AdamW, torch.optim.SGD, torch.optim.LBFGS))
