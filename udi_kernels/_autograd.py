"""What the autograd functions of the losses share."""

import torch


def differentiable_backward(f, inputs, needs, grad):
    """Gradients of f in the inputs that need one, by autograd through f: they can be differentiated again.

    The kernels' backward passes can not, so this replaces them where a graph of the gradients is wanted.
    """
    needed = [x for x, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(f(*inputs), needed, grad, create_graph=True))
    return [next(grads) if need else None for need in needs]


def kernel_backward(op, args, needs):
    """Gradients from a backward kernel, which leaves out (returns empty) those that are not needed."""
    return [grad if need else None for grad, need in zip(op(*args, *needs), needs, strict=True)]
