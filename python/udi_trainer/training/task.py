"""What a stage of a method is made of: a model, and how a step trains it."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.functional import nll_loss

from .. import distributed
from ..data.dataset import Batch
from ..evaluation.scores import accuracy
from ..run import Run

Model = TypeVar("Model", bound=nn.Module)
Gradients = Sequence[torch.Tensor | None]


class Task:
    """One stage of a method.

    A subclass has its ``key``, and sets ``model``, ``parameters`` and ``parts``: everything with a state_dict that
    training changes, by name, the model and the optimizers among them. Its seed, its name and the number of an epoch or
    step determine all that is random in it, so a checkpoint needs no random state. Made by :meth:`Run.make`.
    """

    key = ""  # first part of its name, which seeds it and names its checkpoint
    capturable = True  # whether a CUDA graph can hold its steps: nothing in them waits for the GPU
    semi_supervised = False  # whether its batches are of any samples, followed by as many that have a label
    random = True  # whether its steps may draw random numbers; those that do not can run beside others in threads

    model: nn.Module
    parameters: list[nn.Parameter]
    parts: dict

    def __init__(self, run: Run, modality: str | None = None) -> None:
        self.run, self.modality = run, modality
        self.phase = self.key  # as the log calls it
        self.name = self.name_of(modality)
        self.reads = tuple(run.data.modalities) if modality is None else (modality,)  # modalities whose input it needs

    @classmethod
    def name_of(cls, modality: str | None) -> str:
        return "-".join(filter(None, (cls.key, modality)))

    def place(self, model: Model) -> Model:
        """The model on the run's device, compiled and sharded if the run wants that."""
        model.to(self.run.device)
        if self.run.options.compile:
            model.compile()
        return self.shard(model)

    def shard(self, model: Model) -> Model:
        """The model on the run's device, its parameters spread over the processes if the run wants that."""
        if self.run.options.shard:
            from .sharding import shard  # takes its time to import

            shard(model, self.run.device)
        return model

    @property
    def epochs(self) -> int:
        """Its length, which the learning rate's schedule follows."""
        return self.run.options.epochs

    def rows(self, batch: Batch) -> tuple[slice, slice]:
        """Of a batch the rows of any samples, and those of labelled ones; the same rows where all have a label."""
        first = len(batch["labels"]) // 2 if self.semi_supervised else 0
        return slice(first or None), slice(first, None)

    def begin_epoch(self, epoch: int) -> None:
        """What comes before an epoch's steps, outside of any graph; epochs count from 0."""

    def flags(self, number: int) -> dict:
        """What kind of step this is: keyword arguments of `step`, of few values, the same names in every step."""
        return {}

    def step(self, batch: Batch, **flags: Any) -> dict[str, torch.Tensor]:
        """Trains on the batch; returns named scalars, left on the device."""
        raise NotImplementedError

    def load(self, part: Any, state: dict) -> None:
        """Takes up what a model or an optimizer was, from a state with whole tensors."""
        if self.run.options.shard:
            from .sharding import spread

            state = spread(state, part)
        part.load_state_dict(state)
        if isinstance(part, torch.optim.Optimizer):  # fused ones walk through memory: states lie there as parameters do
            for parameter, kept in part.state.items():
                for name, t in kept.items():
                    if isinstance(t, torch.Tensor) and t.shape == parameter.shape and t.stride() != parameter.stride():
                        kept[name] = torch.empty_like(parameter).copy_(t)

    def gradients(
        self,
        losses: torch.Tensor | Sequence[torch.Tensor],
        parameters: Sequence[nn.Parameter],
        weights: Sequence[torch.Tensor] | None = None,
        retain_graph: bool = False,
    ) -> Gradients:
        """Of a loss, or of a weighted sum of losses, averaged over the processes that train together.

        None for parameters that have no part in it. ``retain_graph``: others of the same graph follow.
        """
        if not self.run.options.shard:
            grads = torch.autograd.grad(losses, parameters, weights, retain_graph, allow_unused=True)
            return distributed.average(grads)
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(losses, weights, retain_graph)  # FSDP2's hooks, which average, see no autograd.grad
        return [parameter.grad for parameter in parameters]

    def logits(self, batch: Batch) -> torch.Tensor:
        """The prediction (N, C)."""
        raise NotImplementedError

    def validate(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Accuracy, loss and predictive entropy on validation."""
        log_p = logits.log_softmax(-1)
        return {
            "val_acc": accuracy(logits, labels),
            "val_loss": nll_loss(log_p, labels).item(),
            "val_entropy": -(log_p.exp() * log_p).sum(-1).mean().item(),
        }


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Its parameters without those that an encoder of one's own keeps frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def update(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], grads: Gradients) -> None:
    """A step with these gradients."""
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer.step()
