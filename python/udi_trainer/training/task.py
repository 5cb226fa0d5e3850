"""A task: a model, and the step that trains it. A method consists of one or more tasks."""

import math
from collections.abc import Sequence
from functools import reduce
from types import EllipsisType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy, nll_loss

from .. import distributed
from ..data.dataset import Batch
from ..evaluation.scores import accuracy, macro_f1
from ..models.encoders import make_encoder
from ..run import Run
from .loss_scale import LossScale

Model = TypeVar("Model", bound=nn.Module)
Gradients = Sequence[torch.Tensor | None]
Rows = slice | EllipsisType


class Task:
    """One stage of a method; made by :meth:`Run.make`.

    A subclass has its ``key`` and sets ``model``, ``parameters`` and ``parts``: by name, everything with a state_dict
    that training changes, including the model and the optimizers. The run's seed, the task's name and the number of the
    epoch or step determine every random number, so a checkpoint needs no random state.
    """

    key = ""  # first part of its name; the name seeds the task and names its checkpoint
    seed_key = ""  # the key of another task whose random numbers it draws
    capturable = True  # whether a CUDA graph can hold its steps: nothing in them synchronises with the GPU
    semi_supervised = False  # whether a batch holds samples with or without label, then as many labelled ones
    random = True  # whether its steps may draw random numbers; only tasks that do not can run in parallel threads

    model: nn.Module
    parameters: list[nn.Parameter]
    parts: dict
    decay: float | None = None

    def __init__(self, run: Run, modality: str | None = None) -> None:
        self.run, self.modality = run, modality
        self.phase = self.key  # its name in the log
        self.name, self.seed_name = self.name_of(modality), self.seed_name_of(modality)
        # The modalities that it needs as input.
        self.reads = tuple(run.data.modalities) if modality is None else (modality,)
        self.loss_scale = LossScale().to(run.device) if run.options.amp == "fp16" else None
        self.freezing: list[Freezing] = []

    @classmethod
    def name_of(cls, modality: str | None) -> str:
        return "-".join(filter(None, (cls.key, modality)))

    def rename(self) -> None:
        """Names a task that tries another weight decay than the first, and its phase, after it."""
        if self.decay not in (None, self.run.decays[0]):
            self.name += f"-decay-{self.decay:g}"
            self.phase += f", decay {self.decay:g}"

    @classmethod
    def seed_name_of(cls, modality: str | None) -> str:
        return "-".join(filter(None, (cls.seed_key or cls.key, modality)))

    def make_encoder(self, modality: str) -> tuple[nn.Module, int]:
        """A new encoder for this modality, and the width of its features; frozen as the options say."""
        data, freeze = self.run.data, self.run.options.freeze or {}
        encoder, width = make_encoder(modality, data.modalities[modality], data.train)
        if modality in freeze:
            self.freezing.append(Freezing(encoder, freeze[modality]))
        return encoder, width

    def train_mode(self, epoch: int) -> None:
        """Puts the model into training mode, with the encoders frozen that are to be in this epoch."""
        self.model.train()
        for freezing in self.freezing:
            freezing.apply(epoch)

    @property
    def frozen_now(self) -> tuple[bool, ...]:
        """Which of the encoders that --freeze names are frozen now: steps differ by it."""
        return tuple(freezing.frozen for freezing in self.freezing)

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
        """The classification loss of a batch, weighted by class if the options say so; ``reduction``: mean or none.

        The weights are not normalized by batch, so the mean over several processes is that of one.
        """
        weights = self.run.class_weights
        if weights is None:
            return cross_entropy(logits, labels, reduction=reduction)
        rows = weights[labels] * cross_entropy(logits, labels, reduction="none")
        return rows.mean() if reduction == "mean" else rows

    def place(self, model: Model) -> Model:
        """Moves the model to the run's device, and compiles and shards it if the options say so."""
        model.to(self.run.device)
        if self.run.options.compile:
            model.compile()
        return self.shard(model)

    def shard(self, model: Model) -> Model:
        """Shards the model's parameters over the processes if the options say so."""
        if self.run.options.shard:
            from .sharding import shard  # slow to import

            shard(model, self.run.device)
        return model

    @property
    def epochs(self) -> int:
        """Its length; the learning rate schedule spans it."""
        return self.run.options.epochs

    def rows(self, batch: Batch) -> tuple[Rows, Rows]:
        """Rows of a batch for losses without labels, and rows for those with; the same if all samples are labelled."""
        if not self.semi_supervised:
            return ..., ...
        first = len(batch["labels"]) // 2
        return slice(first), slice(first, None)

    def begin_epoch(self, epoch: int) -> None:
        """Runs before the steps of an epoch, outside of any graph; epochs count from 0."""

    def flags(self, number: int) -> dict:
        """The kind of this step: keyword arguments of `step`, with few values and the same names in every step."""
        return {}

    def step(self, batch: Batch, **flags: Any) -> dict[str, torch.Tensor]:
        """Trains on the batch; returns scalars by name, on the device."""
        raise NotImplementedError

    def load(self, part: Any, state: dict) -> None:
        """Restores a model or an optimizer from a state with unsharded tensors."""
        if self.run.options.shard:
            from .sharding import shard_state

            state = shard_state(state, part)
        part.load_state_dict(state)
        if isinstance(part, torch.optim.Optimizer):  # fused ones need states in the layout of the parameters
            for parameter, kept in part.state.items():
                for name, t in kept.items():
                    if isinstance(t, torch.Tensor) and t.shape == parameter.shape and t.stride() != parameter.stride():
                        kept[name] = torch.empty_like(parameter).copy_(t)

    def gradients(
        self,
        losses: torch.Tensor | Sequence[torch.Tensor],
        parameters: Sequence[nn.Parameter],
        retain_graph: bool = False,
    ) -> Gradients:
        """Gradients of a loss, or of the sum of several, averaged over the processes, laid out as the parameters.

        None for parameters that the losses do not depend on, as with a frozen encoder. ``retain_graph``: keep the graph
        for further calls. Losses in float16 are scaled, the gradients are not.
        """
        if self.freezing and not all(parameter.requires_grad for parameter in parameters):
            some = iter(self.gradients(losses, [p for p in parameters if p.requires_grad], retain_graph))
            return [next(some) if parameter.requires_grad else None for parameter in parameters]
        losses = [losses] if isinstance(losses, torch.Tensor) else losses
        losses = [loss for loss in losses if loss.requires_grad]
        if not losses:
            return [None] * len(parameters)
        weights = self.loss_scale.weights(losses) if self.loss_scale else None
        if not self.run.options.shard:
            if weights:  # given as grad_outputs, they would make torch import sympy, and cost more
                losses = [reduce(torch.add, map(torch.mul, weights, losses))]
            grads: Gradients = torch.autograd.grad(losses, parameters, None, retain_graph, allow_unused=True)
            grads = self.loss_scale.unscaled(grads) if self.loss_scale else grads
            return distributed.average(laid_out(grads, parameters))
        for parameter in parameters:
            parameter.grad = None
        # autograd.grad would bypass FSDP2's hooks, which average.
        torch.autograd.backward(losses, weights, retain_graph)
        return [parameter.grad for parameter in parameters]

    def measured(self) -> dict[str, Any]:
        """What else the log says of an epoch, at its end."""
        return {}

    def logits(self, batch: Batch) -> torch.Tensor:
        """The prediction (N, C)."""
        raise NotImplementedError

    def validate(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Scores on validation, the predictive entropy, and the number of classes that are predicted."""
        log_p = logits.log_softmax(-1)
        return {
            "val_acc": accuracy(logits, labels),
            "val_macro_f1": macro_f1(logits, labels),
            "val_loss": nll_loss(log_p, labels).item(),
            "val_entropy": -(log_p.exp() * log_p).sum(-1).mean().item(),
            "val_classes": len(logits.argmax(-1).unique()),
        }


class Freezing:
    """An encoder that is frozen in the first epochs of a stage, or in ``"all"``.

    The statistics of its normalization stand still, too. Parameters that a file of weights lacks are trained.
    """

    def __init__(self, encoder: nn.Module, epochs: str | int) -> None:
        self.encoder, unloaded = encoder, getattr(encoder, "unloaded", ())
        self.epochs = math.inf if epochs == "all" else int(epochs)
        self.names = [name for name, p in encoder.named_parameters() if p.requires_grad and name not in unloaded]
        self.frozen = False
        if self.epochs == math.inf:  # no optimizer gets these parameters
            self.apply(0)

    def apply(self, epoch: int) -> None:
        self.frozen = epoch < self.epochs
        for name in self.names:
            self.encoder.get_parameter(name).requires_grad_(not self.frozen)
        for layer in self.encoder.modules() if self.frozen else ():
            if isinstance(layer, nn.modules.batchnorm._NormBase):
                layer.eval()


def taken(rows: Rows | torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """These rows of the tensors; all rows (...) are the tensors themselves, which saves an op each, and a copy back."""
    return tensors if rows is ... else tuple(t[rows] for t in tensors)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Its parameters that require a gradient; an encoder may keep others frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def laid_out(grads: Gradients, parameters: Sequence[nn.Parameter]) -> Gradients:
    """The gradients in the memory layout of their parameters; copies only those that have another.

    torch's fused optimizers read a gradient's memory in the order of the parameter's, whatever its strides (2.13,
    2.14), and ``autograd.grad`` returns other layouts than ``backward`` accumulates: transposed after an einsum,
    channels last after a convolution, expanded after a sum.
    """

    def copied(grad, parameter):
        if grad is None or grad.stride() == parameter.stride() or type(grad) is not torch.Tensor:
            return grad
        return torch.empty_like(parameter, dtype=grad.dtype).copy_(grad)

    return [copied(grad, parameter) for grad, parameter in zip(grads, parameters, strict=True)]


def update(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], grads: Gradients) -> None:
    """An optimizer step with these gradients."""
    for parameter, grad in zip(parameters, laid_out(grads, parameters), strict=True):
        parameter.grad = grad
    optimizer.step()
