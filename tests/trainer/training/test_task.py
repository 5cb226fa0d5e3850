"""Gradients reach the optimizer in the layout of their parameters, however a layer was written."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from udi_trainer import train
from udi_trainer.methods.frozen import Frozen
from udi_trainer.methods.unimodal import Alone
from udi_trainer.training.inference import predict
from udi_trainer.training.task import laid_out, update

from ..helpers import METHODS, make_run, training_batch


class Einsum(nn.Module):
    """x W^T as an einsum, whose gradient autograd.grad returns transposed."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x):
        return torch.einsum("oi,bi->bo", self.weight, x)


class Linear(Einsum):
    """The same function."""

    def forward(self, x):
        return linear(x, self.weight)


class Expanded(Einsum):
    """With a parameter whose gradient has strides of 0."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.shift = nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        return linear(x, self.weight) + self.shift.sum()


class Tied(Einsum):
    """One parameter, read in two layouts."""

    def forward(self, x):
        return linear(x, self.weight) + torch.einsum("oi,bi->bo", self.weight, x.sin())


class ChannelsLast(Einsum):
    """A contiguous convolution of a channels-last input."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.conv = nn.Conv2d(inputs, 4, 3)

    def forward(self, x):
        image = x[:, :, None, None].expand(-1, -1, 6, 7) * torch.arange(42.0).view(6, 7).sin()
        return linear(x, self.weight) + self.conv(image.to(memory_format=torch.channels_last)).mean()


def encoder(layer):
    return lambda shape: nn.Sequential(nn.Flatten(), layer(shape.numel(), 7), nn.Tanh())


@pytest.mark.parametrize("layer", [Einsum, Expanded, Tied, ChannelsLast])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_are_those_of_plain_backward(mixed, layer, optimizer):
    mixed.modalities["sensor"].encoder = encoder(layer)
    tasks = [make_run(mixed, optimizer=optimizer).make(Alone, modality="sensor") for _ in range(2)]
    losses, plain = [], tasks[1]
    for seed in range(4):
        batch = training_batch(plain, seed=seed)
        losses.append(tasks[0].step(batch)["loss"])
        plain.optimizer.zero_grad()
        loss = cross_entropy(plain.forward(batch, training=True)[1], batch["labels"])
        loss.backward()
        plain.optimizer.step()
        assert torch.equal(losses[-1], loss.detach())
    pairs = list(zip(tasks[0].parameters, plain.parameters, strict=True))
    assert all(torch.equal(*pair) for pair in pairs)
    assert all(a.grad.stride() == a.stride() for a, _ in pairs)


@pytest.mark.parametrize("method", [*METHODS, "dimml", "self-training"])
def test_every_method_trains_the_same_function_the_same(mixed, method):
    options = {"controller": "dynamic", "align_every": 2, "q_warmup": 1} if method == "udi" else {}
    options |= {"labels": 60} if method == "self-training" else {}
    results = []
    for layer in (Linear, Einsum):
        encoders = dict.fromkeys(mixed.modalities, encoder(layer))
        results.append(train(mixed, method, encoders, epochs=3, baselines=[], progress=False, **options))
    ours, theirs = ([[row["val_loss"] for row in rows] for rows in r.history.values()] for r in results)
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


PLAIN = {"udi": {"alpha": (0, 0)}, "dimml": {"contrast_weight": 0},
         "self-training": {"self_training_weight": 0}}  # fmt: skip


@pytest.mark.parametrize("method", [*(m for m in METHODS if m != "ogm-ge"), "dimml", "self-training",
                                    "dgl", "g-blending", "mmpareto", "pdmp"])  # fmt: skip
def test_balanced_classes_are_as_repeated_samples(mixed, method):
    """A third as many samples of one class train as that class three times, in full batches; without weights not."""
    train_split, losses = mixed.train, []
    few = torch.cat([(train_split.labels == 0).nonzero()[:48], (train_split.labels == 1).nonzero()[:16]]).flatten()
    repeated = torch.cat((few, few[48:], few[48:]))
    for index, weights in (few, "balanced"), (repeated, "none"), (few, "none"):
        mixed.train = train_split.take(index)
        result = train(mixed, method, epochs=4, batch_size=96, class_weights=weights, baselines=[], progress=False,
                       **PLAIN.get(method, {}))  # fmt: skip
        losses.append([row["val_loss"] for rows in result.history.values() for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0] != pytest.approx(losses[2], rel=2e-2)


def test_class_weights_are_those_of_torch(mixed):
    mixed.train.labels = (torch.arange(101) % 4 == 0).long()
    task = make_run(mixed, class_weights="balanced").make(Alone, modality="sensor")
    z, labels = torch.randn(9, 2), torch.arange(9) % 2
    ours = task.cross_entropy(z, labels)
    torch.testing.assert_close(ours, cross_entropy(z, labels, task.run.class_weights, reduction="sum") / 9)
    plain = make_run(mixed).make(Alone, modality="sensor")
    assert torch.equal(plain.cross_entropy(z, labels), cross_entropy(z, labels))


def test_only_other_layouts_are_copied():
    weight, grad = nn.Parameter(torch.randn(3, 4)), torch.randn(3, 4)
    same, none = laid_out([grad, None], [weight, weight])
    assert same is grad and none is None
    (copied,) = laid_out([torch.randn(4, 3).T], [weight])
    assert copied.is_contiguous()
    update(torch.optim.SGD([weight], lr=0.0, fused=True), [weight], [grad.T.contiguous().T])
    assert weight.grad.is_contiguous() and torch.equal(weight.grad, grad)


def test_all_rows_are_taken_without_a_copy(mixed):
    """Whole batches are read through views, whose gradients are not copied either."""
    task, t = make_run(mixed).make(Alone, modality="sensor"), torch.randn(8, 2, requires_grad=True)
    for rows in task.rows(training_batch(task)):
        assert torch.equal(t[rows], t) and t[rows].grad_fn.name() == "AliasBackward0"
    task.semi_supervised = True
    first, second = (t[rows] for rows in task.rows({"labels": torch.zeros(8)}))
    assert torch.equal(first, t[:4]) and torch.equal(second, t[4:])


def test_passes_without_training_are_in_small_pieces_on_a_cpu(mixed):
    """The predictions are those of one piece."""
    mixed.modalities["sensor"].encoder = encoder(Linear)
    mixed.train = mixed.train.take(torch.arange(600) % len(mixed.train))
    task, sizes = make_run(mixed).make(Alone, modality="sensor"), []
    task.model.register_forward_pre_hook(lambda model, inputs: sizes.append(len(inputs[0])))
    logits = predict(task, task.run, mixed.train)
    assert sizes == [125, 125, 125, 125, 100]
    with torch.no_grad():
        whole = task.logits(mixed.train.batch(torch.arange(600), task.view.reads))
    torch.testing.assert_close(logits, whole)
    frozen = Frozen(task.run, "sensor", task.model, task.width)
    assert sizes[5:] == [600, *sizes[:5]] and torch.equal(frozen.cache[1], logits)
