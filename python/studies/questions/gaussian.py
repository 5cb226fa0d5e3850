"""CLUB where the truth is known: the program behind the study ``estimator``.

x and y are jointly Gaussian with D dimensions, each pair with correlation rho. Their information is
-D/2 ln(1 - rho²) nats. CLUB with the true conditional N(rho x, 1 - rho²) is D rho² / (1 - rho²), which bounds it.

y has unit variance because q's Tanh keeps the log-variance in [-1, 1]: for rho² = 0.6 it is ln 0.4 = -0.92, just
inside. The same y in another unit (--scale) has the same information, but its variance is out of q's reach.
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

HELD_OUT = 100_000  # fresh samples on which everything is measured


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
    parser = Parser(prog="gaussian.py", description="Fits CLUB's q to Gaussians of known mutual information.")

    def add(flag, kind, default, help):
        help += f" (default: {default})"
        parser.add_argument(flag, type=argument(kind), default=default, metavar="N", help=help)

    parser.add_argument("--task", choices=("estimate", "minimise"), default="estimate")
    add("--dims", numbers(int, 1), [2, 16, 64], "dimensions of x and of y")
    add("--rho2", numbers(float, above=0), [0.1, 0.3, 0.6], "squared correlations, below 1")
    add("--depth", number(int, 0), 1, "hidden layers of q's two networks; CLUB has one")
    add("--width", number(int, 1), 128, "units of a hidden layer; half of CLUB's hidden_size")
    add("--lr", number(float, above=0), 1e-2, "first learning rate of Adam; it falls to 0 along a cosine")
    add("--steps", number(int, 1), 3000, "of q; an encoder takes half as many")
    add("--batch-size", number(int, 1), 256, "samples of a step")
    add("--repeats", number(int, 1), 1, "steps on each batch")
    add("--samples", number(int, 0), 0, "samples to fit q to, again and again; 0: fresh ones in every batch")
    add("--scale", number(float, above=0), 1.0, "standard deviation of y")
    add("--seed", number(int, 0), 0, "of samples and weights")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for metrics.json")
    options = parser.parse_args(argv)
    if max(options.rho2) >= 1:
        raise UserError(f"--rho2 {max(options.rho2)}: a squared correlation is below 1")
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
    """Without end: of fresh samples, or of those in the pool; each ``repeats`` times."""
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
    """CLUB by a fitted q on held-out samples, and what it should be."""

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
    """An encoder y of z is taught to tell nothing about x, of which half of z tells rho²: dependence before and after.

    The other half of z is free to be told. The encoder's output has mean 0 and variance 1, so it cannot vanish.
    """

    def draw(n):
        x, told = correlated(n, dim, rho2)
        return x, torch.cat((told, torch.randn(n, dim)), dim=1)

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
    """Of x and y = encoder(z), by measures of which only the first was minimised, and by another q than that one."""

    @torch.no_grad()
    def encode(n):
        x, z = draw(n)
        return x, encoder(z), z[:, dim:]

    encoder.train()
    for _ in range(50):
        encode(1000)  # settles BatchNorm's statistics, which are then kept
    encoder.eval()
    x, y, free = encode(HELD_OUT)
    q = make_q(dim, options.depth, options.width)
    data = ((x, y) for x, y, _ in batches(encode, options.batch_size))
    fit(q.parameters(), q.learning_loss, data, options.steps // 2, options.lr)

    def r2(source, target):
        """Held-out variance of one of (x, y, free) that a fresh network explains by another; mean over dimensions."""
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
