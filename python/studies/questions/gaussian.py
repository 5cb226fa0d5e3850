"""CLUB for Gaussians with known mutual information: the program of the study ``estimator``.

x and y are jointly Gaussian with D dimensions; each pair of components has correlation rho. Their mutual information is
-D/2 ln(1 - rho²) nats. CLUB with the true conditional N(rho x, 1 - rho²) is D rho² / (1 - rho²), an upper bound.

y has unit variance, because q's Tanh keeps the log-variance in [-1, 1]. For rho² = 0.6 the log-variance is
ln 0.4 = -0.92, just inside. Scaling y (--scale) preserves the information, but moves the variance out of q's range.
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import mse_loss

from udi_kernels import CLUB, club_mi
from udi_trainer.command import Parser, argument
from udi_trainer.errors import UserError
from udi_trainer.options import number
from udi_trainer.run_folder import write_json
from udi_trainer.seeds import derive_seed

HELD_OUT = 100_000  # new samples for all measurements


def main(argv=None):
    try:
        options = parse(argv)
        torch.manual_seed(derive_seed(options.seed, options.task))
        if options.task == "minimise":
            metrics = minimise(options)
        else:
            metrics = {"cells": [estimate(dim, rho2, options) for dim in options.dims for rho2 in options.rho2]}
        Path(options.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(options.out) / "metrics.json", metrics)
        return 0
    except UserError as error:
        print(f"gaussian.py: {error}", file=sys.stderr)
        return 2


def parse(argv=None):
    parser = Parser(prog="gaussian.py", description="Fits CLUB's q to Gaussians with known mutual information.")

    def add(flag, kind, default, help):
        help += f" (default: {default})"
        parser.add_argument(flag, type=argument(kind), default=default, metavar="N", help=help)

    parser.add_argument("--task", choices=("estimate", "minimise"), default="estimate")
    add("--dims", numbers(int, 1), [2, 16, 64], "dimensions of x and of y")
    add("--rho2", numbers(float, above=0), [0.1, 0.3, 0.6], "squared correlations, below 1")
    add("--depth", number(int, 0), 1, "hidden layers of q's two networks; CLUB has one")
    add("--width", number(int, 1), 128, "units of a hidden layer; half of CLUB's hidden_size")
    add("--lr", number(float, above=0), 1e-2, "initial learning rate of Adam, with cosine decay to 0")
    add("--steps", number(int, 1), 3000, "training steps of q; an encoder takes half as many")
    add("--batch-size", number(int, 1), 256, "batch size")
    add("--repeats", number(int, 1), 1, "steps on each batch")
    add("--samples", number(int, 0), 0, "size of a fixed training set for q; 0: new samples in every batch")
    add("--scale", number(float, above=0), 1.0, "standard deviation of y")
    add("--seed", number(int, 0), 0, "seed of samples and weights")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for metrics.json")
    options = parser.parse_args(argv)
    if max(options.rho2) >= 1:
        raise UserError(f"--rho2 {max(options.rho2)}: must be below 1")
    return options


def numbers(kind, *bounds, **named):
    parse = number(kind, *bounds, **named)
    return lambda text: [parse(part) for part in text.split(",")]


def correlated(n, dim, rho2):
    x = torch.randn(n, dim)
    return x, rho2**0.5 * x + (1 - rho2) ** 0.5 * torch.randn(n, dim)


def layers(inputs, outputs, depth, width):
    sizes = [inputs, *[width] * depth]
    hidden = [part for pair in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


def make_q(dim, depth, width):
    q = CLUB(dim, dim, 2 * width)
    if depth != 1:
        q.p_mu, q.p_logvar = layers(dim, dim, depth, width), layers(dim, dim, depth, width).append(nn.Tanh())
    return q


def batches(draw, size, pool=None, repeats=1):
    """Endless batches of new samples, or of samples from the pool; yields each batch ``repeats`` times."""
    while True:
        index = torch.randint(len(pool[0]), (size,)) if pool else None
        batch = [t[index] for t in pool] if pool else draw(size)
        for _ in range(repeats):
            yield batch


def fit(parameters, loss, data, steps, lr):
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _, batch in zip(range(steps), data, strict=False):
        optimizer.zero_grad()
        loss(*batch).backward()
        optimizer.step()
        schedule.step()


def estimate(dim, rho2, options):
    """CLUB with a fitted q on held-out samples, and the true values."""

    def draw(n):
        x, y = correlated(n, dim, rho2)
        return x, options.scale * y

    pool = draw(options.samples) if options.samples else None
    q = make_q(dim, options.depth, options.width)
    data = batches(draw, options.batch_size, pool, options.repeats)
    fit(q.parameters(), q.learning_loss, data, options.steps, options.lr)
    truth = {"information": -dim / 2 * math.log(1 - rho2), "club": dim * rho2 / (1 - rho2)}
    with torch.no_grad():
        fitted = {"estimate": q(*draw(HELD_OUT)).item(), "on_pool": q(*pool).item() if pool else None}
    return {"dim": dim, "rho2": rho2} | truth | fitted


def minimise(options, dim=16, rho2=0.6, warmup=100):
    """Trains an encoder y of z to be independent of x; returns the dependence before and after.

    Half of z depends on x with squared correlation rho², the other half is independent of it. The encoder's output has
    mean 0 and variance 1, so it cannot vanish.
    """

    def draw(n):
        x, dependent = correlated(n, dim, rho2)
        return x, torch.cat((dependent, torch.randn(n, dim)), dim=1)

    encoder = layers(2 * dim, dim, 1, 128).append(nn.BatchNorm1d(dim, affine=False))
    before = dependence(encoder, draw, dim, options)
    q = make_q(dim, 1, 128)
    q_optimizer = torch.optim.Adam(q.parameters(), lr=3e-3)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    encoder.train()
    for step in range(options.steps // 2):
        x, z = draw(options.batch_size)
        y = encoder(z)
        for _ in range(3):
            q_optimizer.zero_grad()
            q.learning_loss(x, y.detach()).backward()
            q_optimizer.step()
        with torch.no_grad():
            mu, logvar = q.get_mu_logvar(x)
        if step >= warmup:
            optimizer.zero_grad()
            club_mi(mu, logvar, y).relu().backward()
            optimizer.step()
    return {"before": before, "after": dependence(encoder, draw, dim, options)}


def dependence(encoder, draw, dim, options):
    """Measures of dependence between x and y = encoder(z). Training minimised only the first one, with another q."""

    @torch.no_grad()
    def encode(n):
        x, z = draw(n)
        return x, encoder(z), z[:, dim:]

    encoder.train()
    for _ in range(50):
        encode(1000)  # updates BatchNorm's running statistics
    encoder.eval()
    x, y, free = encode(HELD_OUT)
    q = make_q(dim, options.depth, options.width)
    data = ((x, y) for x, y, _ in batches(encode, options.batch_size))
    fit(q.parameters(), q.learning_loss, data, options.steps // 2, options.lr)

    def r2(source, target):
        """Held-out R², averaged over dimensions, of a new network that predicts one of (x, y, free) from another."""
        network = layers(dim, dim, 1, 256)
        data = ((batch[source], batch[target]) for batch in batches(encode, options.batch_size))
        fit(network.parameters(), lambda a, b: mse_loss(network(a), b), data, options.steps // 3, 3e-3)
        a, b = (x, y, free)[source], (x, y, free)[target]
        with torch.no_grad():
            return 1 - ((network(a) - b).square().mean(0) / b.var(0)).mean().item()

    spectrum = torch.linalg.eigvalsh(torch.cov(y.T)).clamp_min(1e-12)
    spectrum = spectrum / spectrum.sum()
    qx, qy = (torch.linalg.qr(t - t.mean(0))[0] for t in (x, y))
    with torch.no_grad():
        bound = q(x, y).item()
    return {
        "CLUB, nats": bound,
        "R² of y from x": r2(0, 1),
        "R² of x from y": r2(1, 0),
        "mean squared canonical correlation": torch.linalg.svdvals(qx.T @ qy).square().mean().item(),
        "R² of z's free half from y": r2(1, 2),
        "effective rank of y": math.exp(-(spectrum * spectrum.log()).sum().item()),
    }


if __name__ == "__main__":
    sys.exit(main())
