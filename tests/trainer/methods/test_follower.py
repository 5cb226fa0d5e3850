"""A follower's step against plain torch."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from udi_trainer import Options
from udi_trainer.command import main
from udi_trainer.data.labels import hide
from udi_trainer.methods.follower import Follower
from udi_trainer.methods.frozen import Frozen
from udi_trainer.methods.unimodal import Alone
from udi_trainer.registry import datasets

from ..helpers import freeze, make_run, read_log, training_batch


def make_follower(data="cgdigits", val_anchor_logits=None, scale=1.0, **options):
    run = make_run(data, batch_size=32, **options)
    return Follower(run, "color", frozen(Alone(run, "gray"), scale), val_anchor_logits=val_anchor_logits)


def frozen(task, scale=1.0):
    return Frozen(task.run, task.modality, task.model, task.width, scale)


@pytest.fixture
def follower():
    """A follower after a few steps."""
    follower = make_follower()
    for number in range(1, 6):
        follower.step(training_batch(follower), **follower.flags(number))
    return follower


def plain_losses(follower, batch, scale=1.0):
    """The three losses in plain torch, q as it is."""
    anchor = follower.teacher
    with torch.no_grad():
        x, z = anchor.model(anchor.view.input(batch))
        mu, logvar = follower.q(torch.nn.functional.layer_norm(x, x.shape[1:]))
    y, logits = follower.model(follower.view.input(batch))
    p, q = (scale * z).softmax(-1), logits.softmax(-1)
    m = (p + q) / 2
    con = (p * (p / m).log() + q * (q / m).log()).sum(-1).mean() / 2
    y = torch.nn.functional.layer_norm(y, y.shape[1:])
    negative = (y[None] - mu[:, None]).square().mean(1)
    com = ((negative - (y - mu).square()) / logvar.exp()).mean() / 2
    return [cross_entropy(logits, batch["labels"]), con, com]


@pytest.mark.parametrize("align", [True, False])
def test_step_is_the_plain_formula(follower, align):
    """Losses, alphas and update against flattened gradients in plain torch, on a controller step and on another."""
    batch = training_batch(follower, seed=1)
    follower.controller.alpha.copy_(torch.tensor([1.0, 0.3, 0.7]))
    freeze(follower)
    scalars = follower.step(batch, align=align, fitted=True)

    losses = plain_losses(follower, batch)
    for name, loss in zip(("cls", "con", "com"), losses, strict=True):
        torch.testing.assert_close(scalars[name], loss.detach())
    parameters = follower.parameters
    grads = [torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in losses]
    pairs = [zip(gs, parameters, strict=True) for gs in grads]
    flat = [torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in pair]) for pair in pairs]
    alpha = torch.tensor([1.0, 0.3, 0.7])
    if align:
        con, com = (flat[0] @ g for g in flat[1:])
        gain = torch.stack((con, com)).relu()
        alpha = torch.cat((torch.ones(1), gain / gain.sum() if gain.sum() > 0 else gain))
    torch.testing.assert_close(follower.controller.alpha, alpha, rtol=1e-3, atol=1e-4)
    update = torch.cat([w.grad.flatten() for w in parameters])
    torch.testing.assert_close(update, sum(a * g for a, g in zip(alpha, flat, strict=True)), rtol=1e-3, atol=1e-5)


def test_step_leaves_the_anchor_alone_and_fits_q(follower):
    batch = training_batch(follower, seed=1)
    anchor = [p.clone() for p in follower.teacher.model.parameters()]
    before = follower.step(batch, align=False, fitted=False)["q_nll"]
    for _ in range(20):
        after = follower.step(batch, align=False, fitted=False)["q_nll"]
    assert after < before
    assert all(torch.equal(a, b) for a, b in zip(anchor, follower.teacher.model.parameters(), strict=True))
    assert all(p.grad is None and not p.requires_grad for p in follower.teacher.model.parameters())


def test_q_has_the_depth_and_width_of_the_options():
    q = make_follower(q_depth=2, q_width=7).q
    assert [layer.weight.shape[::-1] for layer in q.layers[::2]] == [(64, 7), (7, 7), (7, 128)]


@pytest.mark.parametrize("align", [True, False])
def test_more_steps_of_q(align):
    """Each fits q further to the same batch; the follower takes its one step as ever."""
    followers, nll = [], []
    for steps in (1, 4):
        run = make_run(q_steps=steps)
        torch.manual_seed(0)
        follower = Follower(run, "color", frozen(Alone(run, "gray")))
        batch = training_batch(follower)
        follower.step(batch, align=align, fitted=True)
        followers.append([p.clone() for p in follower.parameters])
        nll.append(follower.step(batch, align=False, fitted=True)["q_nll"])
    assert all(torch.equal(a, b) for a, b in zip(*followers, strict=True))
    assert nll[1] < nll[0]


def test_few_labels():
    """L_cls of the second half of a batch, L_con, L_com and q of the first, by a calibrated teacher."""
    follower = make_follower(hide(datasets["cgdigits"](Options()), 60, 0), scale=0.3)
    assert follower.semi_supervised
    freeze(follower)
    train = follower.run.data.train
    known = (train.labels >= 0).nonzero().flatten()
    first, second = torch.arange(32), known[:32]
    follower.controller.alpha.copy_(torch.tensor([1.0, 0.5, 2.0]))
    batch = train.batch(torch.cat((first, second)), list(train.stored))
    scalars = follower.step(batch, align=False, fitted=True)

    unlabelled, labelled = (train.batch(index, list(train.stored)) for index in (first, second))
    cls = plain_losses(follower, labelled)[0]
    _, con, com = plain_losses(follower, unlabelled | {"labels": torch.zeros(32, dtype=torch.long)}, scale=0.3)
    for name, loss in zip(("cls", "con"), (cls, con), strict=True):
        torch.testing.assert_close(scalars[name], loss.detach())
    torch.testing.assert_close(scalars["com"], com.detach(), rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(cls + 0.5 * con + 2 * com.relu(), follower.parameters)
    for w, grad in zip(follower.parameters, grads, strict=True):
        torch.testing.assert_close(w.grad, grad, rtol=1e-3, atol=1e-5)


def test_residual():
    """Cross-entropy of the sum with the anchor's calibrated logits, by which it is judged on validation too."""
    val_anchor_logits = torch.randn(360, 10)
    follower = make_follower(val_anchor_logits=val_anchor_logits, scale=0.3)
    freeze(follower)
    batch = training_batch(follower)
    scalars = follower.step(batch, align=False, fitted=True)
    logits = follower.model(follower.view.input(batch))[1]
    anchor = follower.teacher.model(follower.teacher.view.input(batch))[1]
    torch.testing.assert_close(scalars["cls"], cross_entropy(logits + 0.3 * anchor, batch["labels"]).detach())
    z, labels = torch.randn(360, 10), follower.run.labels["val"]
    assert follower.validate(z, labels) == Alone.validate(follower, z + val_anchor_logits, labels)


@pytest.mark.parametrize("few", [False, True])
def test_club_given_the_label(few):
    """q knows the label, and negatives are of the same class; samples without a label bound nothing."""
    data = datasets["cgdigits"](Options())
    follower = make_follower(hide(data, 600, 0) if few else data, club="given-label")
    freeze(follower)
    train = follower.run.data.train
    index = torch.arange(32)
    if few:
        index = torch.cat((index, (train.labels >= 0).nonzero().flatten()[:32]))
    scalars = follower.step(train.batch(index, list(train.stored)), align=False, fitted=True)

    batch = train.batch(index[:32], list(train.stored))
    x, _ = follower.teacher.model(follower.teacher.view.input(batch))
    y, _ = follower.model(follower.view.input(batch))
    x, y = (torch.nn.functional.layer_norm(t, t.shape[1:]).double() for t in (x, y))
    labels = batch["labels"]
    hot = torch.stack([labels == c for c in range(10)], dim=1)
    mu, logvar = (t.double() for t in follower.q(torch.cat((x, hot), dim=1).float()))
    known, rows = labels >= 0, []
    assert few == (not known.all())
    for i in known.nonzero().flatten().tolist():
        own = ((y[i] - mu[i]).square() * (-logvar[i]).exp()).sum()
        others = [j for j in range(32) if labels[j] == labels[i] and j != i]
        each = [((y[j] - mu[i]).square() * (-logvar[i]).exp()).sum() for j in others]
        rows.append(sum((e - own) / 2 for e in each) / len(each) if each else 0 * own)
    bound = torch.stack(rows).mean() / follower.width
    torch.testing.assert_close(scalars["com"].double(), bound, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("align", ["epoch", "3"])
def test_plain_pytorch_trains_the_same(align):
    """Both phases against UDI in plain torch: all pairs, concatenated gradients, the anchor run in every step."""
    from eager_udi import EagerUDI

    options = {"epochs": 3, "controller": "dynamic", "align_every": align, "baselines": [], "q_warmup": 5}
    argv = [
        "--dataset",
        "cgdigits",
        "--controller",
        "dynamic",
        "--align-every",
        align,
        "--baselines",
        "none",
        "--q-warmup",
        "5",
        "--epochs",
        "3",
    ]
    assert main([*argv, "--out", "run"]) == 0
    plain = EagerUDI(make_run(**options))
    plain.fit()
    ours = [row["loss"] for row in read_log("run")]
    assert len(ours) == 9
    assert ours == pytest.approx([row["loss"] for rows in plain.history.values() for row in rows], rel=1e-3)
    assert any(row.get("alpha_con", 0) > 0 for row in read_log("run"))
    assert align == "epoch" or any(row.get("alpha_com", 0) > 0 for row in read_log("run"))
