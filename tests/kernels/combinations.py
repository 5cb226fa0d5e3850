"""js_div of 2,448 combinations of sentinels, masks, beta, reductions and sizes, against formulas in float64."""

import itertools
import math

import torch

INF = math.inf
LOWEST = torch.finfo(torch.float32).min
# What a hostile row holds: in every class, or in class 1.
ROWS = {"nan": math.nan, "inf": INF, "-inf": -INF, "lowest": LOWEST}
CLASS = {"one nan": math.nan, "one -inf": -INF, "one lowest": LOWEST}
KINDS = [*ROWS, *CLASS]
PAIRS = [("plain", "plain"), *((kind, "plain") for kind in KINDS), *(("plain", kind) for kind in KINDS)]
PAIRS += [("-inf", "-inf"), ("one -inf", "one -inf")]
MASKS = "none", "bool", "weights", "all masked"
COMBINATIONS = list(itertools.product(PAIRS, MASKS, (0.0, 0.3, 0.5, 1.0), ("none", "sum", "mean"), (6, 101, 200)))
HOSTILE = 3, 5  # rows


def draw(pair, mask, classes):
    """Input, target and weight of 7 rows."""
    logits = [2 * torch.randn(7, classes), 2 * torch.randn(7, classes)]
    logits[0][6, 2] = logits[1][6, 2] = -INF  # a class that neither side has
    for z, kind in zip(logits, pair, strict=True):
        for row in HOSTILE:
            if kind in ROWS:
                z[row] = ROWS[kind]
            elif kind in CLASS:
                z[row, 1] = CLASS[kind]
    weight = torch.rand(7) + 0.5
    weight[list(HOSTILE)] = 0
    return *logits, {"none": None, "bool": weight != 0, "weights": weight, "all masked": torch.zeros(7)}[mask]


def truth(x, y, beta):
    """Rows and their gradients in both, by the formulas, in float64."""
    if beta == 1:
        rows, gy, gx = truth(y, x, 0.0)
        return rows, gx, gy
    log_q, log_p = (z.double().log_softmax(-1) for z in (x, y))
    q, p = log_q.exp(), log_p.exp()
    if beta == 0:
        d = torch.where(p == 0, 0, log_p) - torch.where(p == 0, 0, log_q)
        rows = (p * d).sum(-1, keepdim=True)
        return rows[:, 0], q - p, torch.where(p == 0, 0, p * (d - rows))
    m = beta * p + (1 - beta) * q
    over_q, over_p = (torch.where(r == 0, 0, torch.where(r == 0, 1, r / m).log()) for r in (q, p))
    kl_q, kl_p = (q * over_q).sum(-1, keepdim=True), (p * over_p).sum(-1, keepdim=True)
    rows = (beta * kl_p + (1 - beta) * kl_q)[:, 0]
    return rows, (1 - beta) * q * (over_q - kl_q), beta * p * (over_p - kl_p)


def check(run, pair, mask, beta, reduction, classes):
    """run(x, y, weight, beta, reduction, grad) gives value and gradients as `truth` has them, masked rows left out."""
    x, y, weight = draw(pair, mask, classes)
    grad = torch.rand(7) if reduction == "none" else torch.rand(())
    value, *grads = (t.double() for t in run(x, y, weight, beta, reduction, grad))
    rows, *row_grads = truth(x, y, beta)
    w = torch.ones(7).double() if weight is None else weight.double()
    share = w / (w.sum() if w.any() else 1) if reduction == "mean" else w
    losses = torch.where(w == 0, 0, rows * share)
    want = losses if reduction == "none" else losses.sum()
    want = torch.where(want > -LOWEST, INF, want)
    torch.testing.assert_close(value, want, rtol=2e-5, atol=2e-6, equal_nan=True)
    finite = rows.isfinite() | (w == 0)
    for got, each in zip(grads, row_grads, strict=True):
        expected = torch.where(w[:, None] == 0, 0, each * (grad.double() * share).expand(7)[:, None])
        torch.testing.assert_close(got[finite], expected[finite], rtol=2e-4, atol=2e-6)
        assert (got[w == 0] == 0).all()
