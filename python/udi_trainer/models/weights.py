"""Initial weights of the trainer's own encoders, from a file. They are matched by name and shape."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..errors import UserError
from ..run_folder import load_tensors

WRAPPERS = ("state_dict", "model")  # names under which training scripts save a state_dict beside other things

# torchvision's names of ResNet-18, which most repositories keep, and those of the trainer's own.
RESNET18 = {"conv1": "0.0", "bn1": "0.1"} | {
    f"layer{layer}.{block}.{theirs}": f"{2 * layer + block + 1}.{ours}"
    for layer in range(1, 5)
    for block in range(2)
    for theirs, ours in {
        "conv1": "body.0.0", "bn1": "body.0.1", "conv2": "body.2.0", "bn2": "body.2.1",
        "downsample.0": "shortcut.0", "downsample.1": "shortcut.1",
    }.items()
}  # fmt: skip


def load_weights(encoder: nn.Module, file: str) -> str:
    """Loads initial weights into the encoder; returns what was loaded and what was not, in words.

    The file must have all weights of the encoder, under its own names or torchvision's. Only the final linear layer may
    be missing or of another shape: it then keeps its initialization, and ``encoder.unloaded`` names its parameters. If
    the first convolution has another number of channels, it gets the mean over the file's channels, scaled to preserve
    the magnitude of its outputs (as in temporal segment networks, arXiv 1608.00859).

    Raises:
        UserError: the file holds code, lacks weights, or has weights of another shape.
    """
    given, own = read_weights(Path(file)), encoder.state_dict()
    named = {own_name(name, own): name for name in given}
    final, stem = final_layer(encoder), next((name for name, t in own.items() if t.dim() == 4), None)
    loaded, lacking, notes = {}, [], []
    for name, t in own.items():
        if name not in named:
            if name not in final and not name.endswith("num_batches_tracked"):  # a counter, which old files lack
                lacking.append(name)
            continue
        value = given[named[name]]
        if name == stem and value.dim() == 4 and value.shape[1] != t.shape[1]:
            notes.append(f"{named[name]} as the mean over its {value.shape[1]} channels")
            value = value.float().mean(1, keepdim=True).expand(-1, t.shape[1], -1, -1) * (value.shape[1] / t.shape[1])
        if value.shape != t.shape and name not in final:
            shapes = f"shape {tuple(value.shape)}, the encoder needs {tuple(t.shape)}"
            raise UserError(f"{file}: {named[name]} has {shapes}")
        loaded[name] = value
    unloaded = [] if all(name in loaded and loaded[name].shape == own[name].shape for name in final) else final
    loaded = {name: t for name, t in loaded.items() if name not in unloaded}
    if lacking or not loaded:
        what = f"lacks {len(lacking) or len(own)} of the encoder's {len(own)} tensors ({listed(lacking or own)})"
        raise UserError(f"{file} {what}; it has {listed(given)}")
    encoder.load_state_dict(own | loaded)
    cast(Any, encoder).unloaded = unloaded
    said = [f"{len(loaded)} of {len(own)} tensors loaded from {file}", *notes]
    said += [f"{listed(unloaded)} (the final layer) as initialized"] if unloaded else []
    unused = [name for name in given if own_name(name, own) not in loaded]
    return ", ".join(said + ([f"not used: {listed(unused)}"] if unused else []))


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of the state_dict in the file, without the prefix of DataParallel; runs no code from the file."""
    given = load_tensors(file, "give a file that holds a state_dict alone", legacy=True)
    while inner := next((given[name] for name in WRAPPERS if isinstance(given.get(name), dict)), None):
        given = inner
    tensors = {str(n).removeprefix("module."): t for n, t in given.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        raise UserError(f"{file} holds no weights: it has {listed(map(str, given)) or 'nothing'}")
    return tensors


def own_name(name: str, own: dict[str, torch.Tensor]) -> str:
    """The encoder's name for a tensor of the file; another name is returned as it is."""
    module, _, leaf = name.rpartition(".")
    return name if name in own else f"{RESNET18.get(module, module)}.{leaf}"


def final_layer(encoder: nn.Module) -> list[str]:
    """The names of the last linear layer's parameters."""
    linear = [name for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)]
    return [f"{linear[-1]}.{leaf}" for leaf in ("weight", "bias")] if linear else []


def listed(names: Iterable[str], shown: int = 3) -> str:
    """The first of these names, and how many more there are."""
    first, more = list(names)[:shown], len(list(names)) - shown
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")
