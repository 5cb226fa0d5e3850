"""The implementations that the kernels are compared with. Each function computes exactly the op in its name."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from measure import Unavailable
from udi_kernels import js_div, reference

# Static shapes, the whole function in one graph. The inputs require gradients, so the backward pass is compiled, too.
compiled = partial(torch.compile, dynamic=False, fullgraph=True)


class Layer(torch.autograd.Function):
    """What a layer makes, in given memory: logits that are neither a leaf nor a view."""

    @staticmethod
    def forward(ctx, root, memory):
        return memory[0].detach()

    @staticmethod
    def backward(ctx, grad):
        return None, None


# --- js_div(input, target) --------------------------------------------------------------------------------------


def js_div_eager(input, target):
    """The usual code; in float32, as under autocast."""
    q, p = input.softmax(-1, dtype=torch.float32), target.softmax(-1, dtype=torch.float32)
    log_m = ((q + p) / 2).log()
    return 0.5 * (F.kl_div(log_m, p, reduction="batchmean") + F.kl_div(log_m, q, reduction="batchmean"))


def js_div_probabilities(input, target):
    """Minimizes exponentials and logarithms: computes log m from the probabilities."""
    log_q, log_p = input.float().log_softmax(-1), target.float().log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    log_m = ((q + p) / 2).clamp_min(torch.finfo(torch.float32).tiny).log()
    return 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1).mean()


def js_div_topk_scattered(divergence, input, indices, logprobs):
    """The usual way: a dense teacher, whose softmax renormalizes."""
    return divergence(input, torch.full_like(input, -torch.inf).scatter(-1, indices, logprobs))


def js_div_topk_gathered(input, indices, logprobs):
    """The same by logarithms of the student's K probabilities: outside, log(q/m) is log 2."""
    log_q, log_p = input.float().log_softmax(-1).gather(-1, indices), logprobs.float().log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    log_m = ((q + p) / 2).clamp_min(torch.finfo(torch.float32).tiny).log()
    chosen = (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1)
    return 0.5 * (chosen + math.log(2) * (1 - q.sum(-1))).mean()


def skew_kl_eager(input, target):
    """The code of DistiLLM's authors, alpha = 0.1."""
    p, q = target.softmax(-1, dtype=torch.float32), input.softmax(-1, dtype=torch.float32)
    log_p = target.log_softmax(-1, dtype=torch.float32)
    log_m = (0.1 * p + 0.9 * q).log()
    return (p * (log_p - log_m)).sum(-1).mean()


def js_div_liger(input, target):
    try:
        from liger_kernel.transformers import LigerJSD
    except ImportError:
        raise Unavailable("liger-kernel is not installed") from None
    if not input.is_cuda:
        raise Unavailable("liger-kernel's JSD needs a GPU")
    if target.requires_grad:
        raise Unavailable("liger-kernel's JSD has no gradient for the target")
    # It takes log-probabilities and always accumulates in float32.
    return LigerJSD(beta=0.5)(input.log_softmax(-1), target.log_softmax(-1))


# --- linear_js_div(input, weight, target, target_weight) ------------------------------------------------------------


def linear_js_div_logits(input, weight, target, target_weight):
    """This library's js_div on whole logits."""
    with torch.no_grad():
        target = F.linear(target, target_weight)
    return js_div(F.linear(input, weight), target)


def linear_js_div_reference(input, weight, target, target_weight):
    with torch.no_grad():
        target = F.linear(target, target_weight)
    return reference.js_div(F.linear(input, weight), target)


def linear_js_div_trl(input, weight, target, target_weight):
    """The generalized JSD loss of TRL's GKD trainer, on whole logits; also sums over the classes."""
    with torch.no_grad():
        target = F.linear(target, target_weight)
    return _trl_sum(F.linear(input, weight), target) / len(input)


def linear_js_div_trl_chunked(input, weight, target, target_weight, rows=256):
    """The same by chunks of rows, each checkpointed."""

    def of_chunk(x, t):
        return _trl_sum(F.linear(x, weight), F.linear(t, target_weight))

    chunks = zip(input.split(rows), target.split(rows), strict=True)
    return sum(checkpoint(of_chunk, x, t, use_reentrant=False) for x, t in chunks) / len(input)


def _trl_sum(student, teacher):
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    m = torch.logsumexp(torch.stack([q, p]) - math.log(2), 0)
    kl = partial(F.kl_div, reduction="none", log_target=True)
    return (0.5 * kl(m, p) + 0.5 * kl(m, q)).sum()


def linear_js_div_liger(input, weight, target, target_weight, compiled=False):
    """liger-kernel's chunked loss, in chunks of 1024 rows, its default."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        raise Unavailable("liger-kernel is not installed") from None
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=compiled)
    labels = torch.zeros(len(input), dtype=torch.int64, device=input.device)
    return loss(input, weight, target, target_weight, labels)


def linear_js_div_liger_triton(input, weight, target, target_weight):
    if not input.is_cuda:
        raise Unavailable("liger-kernel's Triton loss needs a GPU")
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError:
        raise Unavailable("liger-kernel is not installed") from None
    return LigerFusedLinearJSD(jsd_beta=0.5)(input, weight, target, target_weight)


# --- club_mi(mu, logvar, y) -------------------------------------------------------------------------------------


def club_mi_pairs(mu, logvar, y):
    """All N x N x D pairs, as in the CLUB authors' repository."""
    mu, logvar, y = mu.float(), logvar.float(), y.float()
    positive = -((mu - y) ** 2) / 2 / logvar.exp()
    negative = -((y.unsqueeze(0) - mu.unsqueeze(1)) ** 2).mean(1) / 2 / logvar.exp()
    return (positive.sum(-1) - negative.sum(-1)).mean()


def club_mi_closed_form(mu, logvar, y):
    mu, logvar, y = mu.float(), logvar.float(), y.float()
    mean = y.mean(0)
    negative = (y - mean).square().mean(0) + (mean - mu).square()
    return 0.5 * ((negative - (y - mu).square()) * (-logvar).exp()).sum(-1).mean()


def club_mi_one_hot(mu, logvar, y, given, num_classes):
    """The class-conditional form with a one-hot matrix; classes must be 0 to num_classes - 1."""
    mu, logvar, y = mu.float(), logvar.float(), y.float()
    one_hot = F.one_hot(given, num_classes).float()
    rows = one_hot.sum(0)
    mean = (one_hot.T @ y / rows.clamp_min(1)[:, None])[given]
    var = (one_hot.T @ (y - mean).square() / rows.clamp_min(1)[:, None])[given]
    negative = var + (mean - mu).square()
    values = 0.5 * ((negative - (y - mu).square()) * (-logvar).exp()).sum(-1)
    return (values * (rows / (rows - 1).clamp_min(1))[given]).mean()


# --- duc_loss(student, teacher, dims, temperature) ------------------------------------------------------------------


def duc_loss_loop(student, teacher, dims, temperature):
    """Sample by sample with plain exponentials, as in the authors' code."""
    student, teacher, total = student.float()[:, dims], teacher.float()[:, dims], 0
    for i in range(len(student)):
        positive = (teacher[i] @ student[i] / temperature).exp()
        total = total - (positive / (teacher @ student[i] / temperature).exp().sum()).log()
    return total / len(student)


def duc_loss_indexed(student, teacher, dims, temperature):
    """Gathers the selected dimensions; their number depends on the data."""
    return duc_loss_gathered(student, teacher, dims.nonzero().flatten(), temperature)


def duc_loss_gathered(student, teacher, index, temperature):
    z = student.float()[:, index] @ (teacher.float()[:, index] / temperature).T
    return F.cross_entropy(z, torch.arange(len(z), device=z.device))


def duc_loss_lse(student, teacher, index, temperature):
    z = student.float().index_select(1, index) @ (teacher.float().index_select(1, index) / temperature).T
    return (z.logsumexp(1) - z.diagonal()).mean()


def duc_loss_masked(student, teacher, dims, temperature):
    z = torch.where(dims, student.float(), 0) @ (torch.where(dims, teacher.float(), 0) / temperature).T
    return (z.logsumexp(1) - z.diagonal()).mean()


# --- effective_dims(features, labels, num_classes) ------------------------------------------------------------------


def class_means(features, labels, num_classes):
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=num_classes)[:, None]


def effective_dims_pairs(features, labels, num_classes):
    """All N x C x D distances, as in the authors' code."""
    distances = (features.unsqueeze(1) - class_means(features, labels, num_classes)).abs()
    hits = (distances.argmin(1) == labels.unsqueeze(1)).float()
    return hits.mean(0) > hits.mean()


def effective_dims_classes(features, labels, num_classes):
    """Class by class, without the N x C x D tensor."""
    means = class_means(features, labels, num_classes)
    own = (features - means[labels]).abs()
    hits = torch.ones_like(features, dtype=torch.bool)
    for k in range(num_classes):
        distance = (features - means[k]).abs()
        first = (k < labels)[:, None]
        hits &= ~((distance < own) | (first & (distance == own)))
    hits = hits.sum(0)
    return hits * len(hits) > hits.sum()


# --- certainty_fusion(logits) ---------------------------------------------------------------------------------------


def certainty_fusion_heads(logits):
    """Head by head, as in the authors' code."""
    weights = torch.stack([z.softmax(1).max(1).values for z in logits]).softmax(0)
    return sum(w[:, None].repeat(1, z.shape[1]) * z for w, z in zip(weights, logits, strict=True))


def certainty_fusion_stacked(logits):
    return (logits.softmax(-1).amax(-1, keepdim=True).softmax(0) * logits).sum(0)


# --- gramian(grads): K lists of P tensors, or P tensors of K stacked gradients ------------------------------------


def gramian_cat(grads):
    rows = torch.cat([g.reshape(-1) for row in grads for g in row]).view(len(grads), -1)
    return rows @ rows.T


def _symmetric(k, product):
    upper = {(i, j): product(i, j) for i in range(k) for j in range(i, k)}
    return torch.stack([torch.stack([upper[min(i, j), max(i, j)] for j in range(k)]) for i in range(k)])


def gramian_dots(grads):
    """One dot product per parameter and pair."""

    def product(i, j):
        pairs = zip(grads[i], grads[j], strict=True)
        return torch.stack([torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in pairs]).sum()

    return _symmetric(len(grads), product)


def gramian_foreach_mul(grads):
    def product(i, j):
        return torch.stack([t.sum() for t in torch._foreach_mul(grads[i], grads[j])]).sum()

    return _symmetric(len(grads), product)


def gramian_foreach_norm(grads):
    """<a, b> = (|a + b|^2 - |a|^2 - |b|^2) / 2."""

    def square(row):
        return torch.stack(torch._foreach_norm(row, 2, torch.float32)).square().sum()

    squares = [square(row) for row in grads]

    def product(i, j):
        if i == j:
            return squares[i]
        return (square(torch._foreach_add(grads[i], grads[j])) - squares[i] - squares[j]) / 2

    return _symmetric(len(grads), product)


def gramian_matmuls_of_lists(grads):
    return gramian_matmuls([torch.stack(column) for column in zip(*grads, strict=True)])


def gramian_matmuls(stacked):
    """One matrix product per parameter, as in TorchJD."""
    rows = [g.flatten(1) for g in stacked]
    return sum(r @ r.T for r in rows)


# --- weighted_sum(grads, weights) ---------------------------------------------------------------------------------


def weighted_sum_loop(grads, weights):
    return [sum(w * g for w, g in zip(weights, column, strict=True)) for column in zip(*grads, strict=True)]


def weighted_sum_foreach(grads, weights):
    total = torch._foreach_mul(grads[0], weights[0])
    for row, w in zip(grads[1:], weights[1:], strict=True):
        torch._foreach_add_(total, torch._foreach_mul(row, w))
    return total


def weighted_sum_foreach_alpha(grads, weights):
    """Saves a pass, but copies the weights to the host."""
    first, *others = weights.tolist()
    total = torch._foreach_mul(grads[0], first)
    for row, w in zip(grads[1:], others, strict=True):
        torch._foreach_add_(total, row, alpha=w)
    return total


def weighted_sum_tensordot(stacked, weights):
    """As in TorchJD."""
    return [torch.tensordot(weights.to(g.dtype), g, 1) for g in stacked]


# --- UDI's controller: Gram matrix, weights, weighted sum ---------------------------------------------------------


def alignment_weights(gram):
    gain = gram[0, 1:].relu()
    return torch.cat([gain.new_ones(1), gain / gain.sum().clamp_min(torch.finfo(gain.dtype).tiny)])


def controller_torchjd(stacked, **options):
    """The controller as a weighting in TorchJD's public interface; returns the call."""
    try:
        from torchjd.aggregation import GramianWeightedAggregator, Weighting
        from torchjd.autojac import jac_to_grad
    except ImportError:
        raise Unavailable("torchjd is not installed, or too old") from None

    class Alignment(Weighting):
        def forward(self, gram, /):
            return alignment_weights(gram)

    aggregator = GramianWeightedAggregator(Alignment())
    parameters = [torch.empty_like(g[0], requires_grad=True) for g in stacked]

    def call():
        for parameter, g in zip(parameters, stacked, strict=True):
            parameter.jac, parameter.grad = g, None
        jac_to_grad(parameters, aggregator, **options)
        return [parameter.grad for parameter in parameters]

    return call
