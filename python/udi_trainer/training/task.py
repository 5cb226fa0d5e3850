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
        """The model on the run's device, compiled if the run wants that."""
        model.to(self.run.device)
        if self.run.options.compile:
            model.compile()
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


Gradients = Sequence[torch.Tensor | None]


def update(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], grads: Gradients) -> None:
    """A step with these gradients, averaged over the processes that train together."""
    apply(optimizer, parameters, distributed.average(grads))


def apply(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], grads: Gradients) -> None:
    """A step with these gradients as they are."""
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer.step()
