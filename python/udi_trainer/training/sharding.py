"""Parameters, gradients and optimizer state spread over the processes by FSDP2, for models that fit in none.

Checkpoints hold whole tensors, so that any number of processes goes on with them. A model that is trained to its end is
whole in every process again: others learn from it, predict with it, after the processes have parted too. It needs a
quarter of the memory that its training took, and no message.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import distributed
from ..errors import UserError

CONTAINERS = nn.Sequential, nn.ModuleList, nn.ModuleDict


def shard(model: nn.Module, device: torch.device) -> None:
    """Shards the model in place. Parameters are gathered block by block, as they are needed."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the one that FSDP2 takes
    mesh = init_device_mesh(device.type, (distributed.world(),))
    object.__setattr__(model, "plain", hollow(model))  # unseen by nn.Module
    for p in model.parameters():
        p.data = p.data.contiguous()  # FSDP2 takes no other
    try:
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"--shard: FSDP2 cannot shard this model: {error}") from error
    if hasattr(model, "shares"):
        register_fsdp_forward_method(model, "shares")


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Members of its sequences, inner ones first, whose own parameters fill a message; the rest goes with the model.

    None where modules share a parameter, which FSDP2 would part if it were in two blocks.
    """
    if len([*model.named_parameters(remove_duplicate=False)]) > len([*model.parameters()]):
        return
    for sequence in reversed([m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]):
        for block in sequence:
            own = sum(p.nbytes for p in block.parameters() if not isinstance(p, DTensor))
            if own >= distributed.BUCKET and not isinstance(block, CONTAINERS):
                yield block


def hollow(model: nn.Module) -> nn.Module:
    """A copy whose parameters have no memory yet; its buffers are the model's."""
    memo: dict[int, Any] = {id(b): b for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p), p.requires_grad)
        memo[id(p)].untyped_storage().resize_(0)
    return copy.deepcopy(model, memo)


def unsharded(model: nn.Module) -> nn.Module:
    """The model, whole in every process; its parameters lie in memory as they did before."""
    if not isinstance(model, FSDPModule):
        return model
    plain: nn.Module = model.__dict__["plain"]
    own = plain.state_dict()
    for name, t in model.state_dict().items():
        if isinstance(t, DTensor):
            own[name].untyped_storage().resize_(own[name].nbytes)
            own[name].copy_(t.full_tensor())
    return plain


def whole(state: Any) -> Any:
    """A state with tensors in the place of DTensors: in the first process, which writes them; None in the others."""
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if distributed.first() else None
    return {name: whole(value) for name, value in state.items()} if isinstance(state, dict) else state


def spread(state: dict, part: Any) -> dict:
    """A state of whole tensors as one for this module or optimizer, sharded as its parameters are."""
    if isinstance(part, torch.optim.Optimizer):
        parameters = dict(enumerate(p for group in part.param_groups for p in group["params"]))
        entries = {i: {name: like(t, parameters[i]) for name, t in kept.items()} for i, kept in state["state"].items()}
        return state | {"state": entries}
    own = part.state_dict()
    return {name: like(t, own.get(name)) for name, t in state.items()}


def like(t: Any, sharded: Any) -> Any:
    """The shard that belongs beside this one, if they are of one shape."""
    if not isinstance(sharded, DTensor) or isinstance(t, DTensor) or getattr(t, "shape", None) != sharded.shape:
        return t
    full = t.to(sharded.device).contiguous()
    return distribute_tensor(full, sharded.device_mesh, sharded.placements, src_data_rank=None).clone()
