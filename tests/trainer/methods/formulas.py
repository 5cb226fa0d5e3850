"""Plain forms of what the tests of methods compare with."""

import torch
from torch.nn.functional import cross_entropy


def loss_of(logits, batch, modality=None):
    """The mean cross-entropy, over the samples that have the modality."""
    kept = batch.get(f"{modality} present", torch.ones_like(batch["labels"])).bool()
    return cross_entropy(logits[kept], batch["labels"][kept])


def gradient(loss, parameters):
    """The gradients, with zeros for what the loss does not depend on."""
    return list(torch.autograd.grad(loss, list(parameters), retain_graph=True, materialize_grads=True))


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def check_gradients(parameters, wanted):
    for parameter, grad in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-12)


def label_probability(logits, batch, modality):
    """The sum over the samples that have the modality, and their number."""
    kept = batch.get(f"{modality} present", torch.ones_like(batch["labels"])).bool()
    p = [z.softmax(0)[y] for z, y in zip(logits[kept], batch["labels"][kept], strict=True)]
    return torch.stack(p).mean()
