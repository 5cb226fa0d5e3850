"""Unidirectional Dynamic Interaction (arXiv 2509.02281): training without a joint loss.

Anchor phase: every modality alone; the best is frozen. Follower phase: every other modality learns
    L = L_cls + a_con L_con + a_com L_com
from its labels and from the anchor, which gets nothing back.
"""

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy, layer_norm

from fit import fit, outputs
from fusion import accuracy, fuse, scores
from models import FEATURES, Classifier, encoder_for
from udi_kernels import CLUB, alignment_weights, club_mi, gramian, js_div, weighted_sum

from . import methods
from .unimodal import train_alone

NEAR_TIE = 0.005  # validation accuracies this near each other leave the anchor's choice to predictive entropy
Q_WARMUP = 100  # steps in which q is only fitted: the bound of an unfitted q is noise that can wreck a follower


class Follower:
    phase = "follower"

    def __init__(self, run, modality, alone, anchor):
        self.run, self.modality, self.name = run, modality, f"{self.phase}-{modality}"
        self.view, self.anchor_view = run.data.modalities[modality], anchor.view
        self.anchor = anchor.model.requires_grad_(False).eval()
        torch.manual_seed(run.seed(self.name))
        self.model = Classifier(encoder_for(self.view, run.data.train), run.data.classes).to(run.device)
        if run.options.follower_init == "anchor-phase":
            self.model.load_state_dict(alone.model.state_dict())
        self.weights = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, fused=True)
        self.q = CLUB(FEATURES, FEATURES, hidden_size=128).to(run.device)
        self.q_optimizer = torch.optim.AdamW(self.q.parameters(), fused=True)
        self.controller = Controller(run).to(run.device)
        self.optimizers = [self.optimizer, self.q_optimizer]
        self.parts = {
            "model": self.model, "optimizer": self.optimizer,
            "q": self.q, "q_optimizer": self.q_optimizer, "controller": self.controller,
        }  # fmt: skip

    def step(self, index, number):
        train, alpha = self.run.data.train, self.controller.alpha
        with self.run.autocast():
            with torch.no_grad():
                anchor_features, anchor_logits = self.anchor(self.anchor_view.batch(train, index))
            features, logits = self.model(self.view.batch(train, index))
            x, y = self.normalise(anchor_features), self.normalise(features)

            # q(y|x) is fitted to this batch, the features fixed; ...
            q_loss = self.q.learning_loss(x, y.detach())
        self.q_optimizer.zero_grad()
        q_loss.backward()
        self.q_optimizer.step()

        # ... then the bound is lowered in the follower's features, q fixed. Taken per dimension it is of the order of
        # the other losses; below zero it bounds nothing, and must not be lowered further.
        with self.run.autocast():
            with torch.no_grad():
                mu, logvar = self.q.get_mu_logvar(x)
            bound = club_mi(mu, logvar, y) / FEATURES
            cls = cross_entropy(logits, train.labels[index])
            con = js_div(logits, anchor_logits)
        com = bound.relu() * (number >= Q_WARMUP)

        if self.controller.due(number):
            # The gradients that set the weights make this step's update too.
            grads = [
                torch.autograd.grad(loss, self.weights, retain_graph=True, allow_unused=True)
                for loss in (cls, con, com)
            ]
            alpha.copy_(alignment_weights(gramian(grads)))
            update = weighted_sum(grads, alpha)
        else:
            update = torch.autograd.grad(torch.stack((cls, con, com)) @ alpha, self.weights)
        for weight, grad in zip(self.weights, update, strict=True):
            weight.grad = grad
        self.optimizer.step()
        figures = {"loss": torch.stack((cls, con, com)) @ alpha, "cls": cls, "con": con, "com": bound, "q_nll": q_loss}
        return figures | {"alpha_con": alpha[1], "alpha_com": alpha[2] * (number >= Q_WARMUP)}

    def normalise(self, features):
        """LayerNorm without parameters: the bound has no minimum in features of free scale."""
        return layer_norm(features, features.shape[1:]) if self.run.options.club_norm == "layer" else features

    def logits(self, split, index):
        with self.run.autocast():
            return self.model(self.view.batch(split, index))[1]


class Controller(nn.Module):
    """The weights (1, a_con, a_com) of the three losses, and the steps at which they are measured anew."""

    def __init__(self, run):
        super().__init__()
        options, train = run.options, run.data.train
        static = options.controller == "static"
        self.register_buffer("alpha", torch.tensor([1.0, *(options.alpha if static else (0, 0))]))
        steps = len(train) // min(options.batch_size, len(train))
        self.every = None if static else steps if options.align_every == "epoch" else options.align_every

    def due(self, number):
        return self.every is not None and number % self.every == 0


def choose_anchor(run, logits):
    """The modality that leads on validation, and by what it was chosen; near ties go to the surer one."""
    merits = {}
    for modality, z in logits.items():
        log_p = z["val"].log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
        merits[modality] = {"val_acc": accuracy(log_p, run.labels["val"]), "val_entropy": entropy}
    ranked = sorted(merits, key=lambda m: -merits[m]["val_acc"])
    margin = merits[ranked[0]]["val_acc"] - merits[ranked[1]]["val_acc"]
    by, anchor = "validation accuracy", ranked[0]
    if run.options.anchor != "auto":
        by, anchor = "option", run.options.anchor
    elif margin <= NEAR_TIE:
        near = [m for m in ranked if merits[ranked[0]]["val_acc"] - merits[m]["val_acc"] <= NEAR_TIE]
        by, anchor = "predictive entropy", min(near, key=lambda m: merits[m]["val_entropy"])
    return anchor, {"by": by, "margin": margin, "modalities": merits}


def collapsed(rows, alone_val_acc, classes):
    """Why a follower counts as collapsed, or None: it ended with less than half of the skill it has alone."""
    if rows[-1]["diverged"]:
        return f"its loss was not finite in epoch {rows[-1]['epoch']}"
    chance = 1 / classes
    if rows[-1]["val_acc"] - chance < 0.5 * (alone_val_acc - chance):
        return f"its validation accuracy ended at {rows[-1]['val_acc']:.3f}, alone it reaches {alone_val_acc:.3f}"
    return None


@methods.register("udi")
def udi(run):
    """Unidirectional Dynamic Interaction: a frozen anchor, and followers that learn from it."""
    tasks = train_alone(run)
    alone = {modality: outputs(task, run) for modality, task in tasks.items()}
    unimodal = {modality: scores(z, run.labels) for modality, z in alone.items()}
    anchor, selection = choose_anchor(run, alone)
    print(f"anchor: {anchor}, by {selection['by']}")

    logits, collapses = dict(alone), {}
    for modality in tasks:
        if modality != anchor:
            follower = fit(Follower(run, modality, tasks[modality], tasks[anchor]), run)
            logits[modality] = outputs(follower, run)
            reason = collapsed(run.rows[follower.name], unimodal[modality]["val_acc"], run.data.classes)
            if reason:
                collapses[modality] = reason
                print(f"warning: follower {modality} collapsed: {reason}", file=sys.stderr)
    return {
        "anchor": anchor,
        "anchor_selection": selection,
        "controller": run.options.controller,
        "modalities": {modality: scores(z, run.labels) for modality, z in logits.items()},
        "unimodal": unimodal,
        "collapsed": collapses,
        "fused": fuse(run.options.fusion, logits, run.labels),
        "ensemble": fuse(run.options.fusion, alone, run.labels),
    }
