"""Sharding of parameters, gradients and optimizer state by FSDP2, for models that do not fit in one process.

Checkpoints hold full tensors, so any number of processes can resume them. After its training, a model is full in every
process again: others learn from it and predict with it, even after the process group has ended. It then needs a quarter
of the memory that training took, and no communication.
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
    object.__setattr__(model, "plain", empty_copy(model))  # hidden from nn.Module
    for p in model.parameters():
        p.data = p.data.contiguous()  # FSDP2 needs that
    try:
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"--shard: FSDP2 cannot shard this model: {error}") from error
    for method in ("fuse", "shares"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Members of its sequences with enough parameters for a message, inner ones first; the model takes the rest.

    There are none where modules share a parameter: FSDP2 would split it if it were in two blocks.
    """
    if len([*model.named_parameters(remove_duplicate=False)]) > len([*model.parameters()]):
        return
    for sequence in reversed([m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]):
        for block in sequence:
            own = sum(p.nbytes for p in block.parameters() if not isinstance(p, DTensor))
            if own >= distributed.BUCKET and not isinstance(block, CONTAINERS):
                yield block


def empty_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters have no memory yet; it shares the model's buffers."""
    memo: dict[int, Any] = {id(b): b for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p), p.requires_grad)
        memo[id(p)].untyped_storage().resize_(0)
    return copy.deepcopy(model, memo)


def unsharded(model: nn.Module) -> nn.Module:
    """The model with full parameters in every process, in their original memory layout."""
    if not isinstance(model, FSDPModule):
        return model
    plain: nn.Module = model.__dict__["plain"]
    own = plain.state_dict()
    for name, t in model.state_dict().items():
        if isinstance(t, DTensor):
            own[name].untyped_storage().resize_(own[name].nbytes)
            own[name].copy_(t.full_tensor())
    return plain


def full_state(state: Any) -> Any:
    """The state with full tensors instead of DTensors in the first process, which writes it; None in the others."""
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if distributed.first() else None
    return {name: full_state(value) for name, value in state.items()} if isinstance(state, dict) else state


def shard_state(state: dict, part: Any) -> dict:
    """A state with full tensors, sharded as the parameters of this module or optimizer are."""
    if isinstance(part, torch.optim.Optimizer):
        parameters = dict(enumerate(p for group in part.param_groups for p in group["params"]))
        entries = {
            i: {name: shard_like(t, parameters[i]) for name, t in kept.items()} for i, kept in state["state"].items()
        }
        return state | {"state": entries}
    own = part.state_dict()
    return {name: shard_like(t, own.get(name)) for name, t in state.items()}


def shard_like(t: Any, sharded: Any) -> Any:
    """The tensor sharded as ``sharded`` is, if both have one shape."""
    if not isinstance(sharded, DTensor) or isinstance(t, DTensor) or getattr(t, "shape", None) != sharded.shape:
        return t
    full = t.to(sharded.device).contiguous()
    return distribute_tensor(full, sharded.device_mesh, sharded.placements, src_data_rank=None).clone()
