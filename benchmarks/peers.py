"""What the kernels are measured against: plain torch as users write it, and the best plain form for torch.compile."""

import math

import torch
import torch.nn.functional as F


def js_div_eager(input, target):
    q, p = input.softmax(-1), target.softmax(-1)
    log_m = ((q + p) / 2).log()
    return 0.5 * (F.kl_div(log_m, p, reduction="batchmean") + F.kl_div(log_m, q, reduction="batchmean"))


def js_div_plain(input, target):
    log_q, log_p = input.float().log_softmax(-1), target.float().log_softmax(-1)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1).mean()


def club_mi_pairs(mu, logvar, y):
    """All N x N x D pairs, as in the CLUB authors' repository."""
    positive = -((mu - y) ** 2) / 2 / logvar.exp()
    negative = -((y.unsqueeze(0) - mu.unsqueeze(1)) ** 2).mean(1) / 2 / logvar.exp()
    return (positive.sum(-1) - negative.sum(-1)).mean()


def club_mi_plain(mu, logvar, y):
    mu, logvar, y = mu.float(), logvar.float(), y.float()
    mean = y.mean(0)
    negative = (y - mean).square().mean(0) + (mean - mu).square()
    return 0.5 * ((negative - (y - mu).square()) * (-logvar).exp()).sum(-1).mean()


def gramian_cat(grads):
    rows = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in grads])
    return rows @ rows.T


def gramian_dots(grads):
    """A dot product per parameter and pair: the best loop over torch calls, no copy of the gradients."""
    k = len(grads)
    gram = torch.empty(k, k, device=grads[0][0].device)
    for i in range(k):
        for j in range(i, k):
            pairs = zip(grads[i], grads[j], strict=True)
            gram[i, j] = gram[j, i] = torch.stack([torch.dot(a.view(-1), b.view(-1)) for a, b in pairs]).sum()
    return gram


def weighted_sum_foreach(grads, weights):
    total = torch._foreach_mul(grads[0], weights[0])
    for row, w in zip(grads[1:], weights[1:], strict=True):
        torch._foreach_add_(total, torch._foreach_mul(row, w))
    return total


def weighted_sum_loop(grads, weights):
    return [sum(w * g for w, g in zip(weights, column, strict=True)) for column in zip(*grads, strict=True)]
