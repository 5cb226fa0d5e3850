"""Unidirectional Dynamic Interaction (arXiv 2509.02281): training without a joint loss.

Anchor phase: every modality alone; the best is frozen. Follower phase: every other modality learns
    L = L_cls + a_con L_con + a_com L_com
from its labels and from the anchor, which gets nothing back.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import cross_entropy, layer_norm

from udi_kernels import alignment_weights, club_mi, club_nll, gramian, js_div, weighted_sum

from .. import distributed
from ..console import log
from ..evaluation.fusion import fuse
from ..evaluation.scores import scores
from ..evaluation.similarity import cross_prediction, linear_cka
from ..models.classifiers import ConditionalGaussian
from ..registry import methods
from ..run import Run
from ..training.loop import best_epoch, fit, outputs
from ..training.task import apply, update
from .frozen import Frozen
from .outcome import Outcome
from .unimodal import Alone, Unimodal, train_alone

NEAR_TIE = 0.005  # validation accuracies this near each other leave the anchor's choice to predictive entropy
Q_WARMUP = 100  # steps in which q is only fitted: the bound of an unfitted q is noise that can wreck a follower


class Follower(Unimodal):
    key = "follower"

    def __init__(self, run: Run, modality: str, anchor: Frozen, alone: Alone | None = None):
        """Starts from scratch, or from the parameters of ``alone``."""
        super().__init__(run, modality)
        self.anchor = anchor
        if anchor.cache is None:
            self.reads, self.random = (modality, *anchor.reads), True
        if alone:
            self.model.load_state_dict(alone.model.state_dict())
        options = run.options
        self.q = ConditionalGaussian(anchor.width, self.width, options.q_width, options.q_depth).to(run.device)
        self.q_parameters = list(self.q.parameters())
        self.optimizer = run.optimizer(
            [{"params": self.parameters}, {"params": self.q_parameters, "lr_scale": options.q_lr}]
        )
        self.warmup = q_warmup(run)
        self.controller = Controller(run).to(run.device)
        self.parts = {"model": self.model, "q": self.q, "optimizer": self.optimizer, "controller": self.controller}

    def flags(self, number: int) -> dict:
        return {"align": self.controller.due(number), "fitted": number >= self.warmup}

    def step(self, batch, align, fitted):
        """``align``: measure the losses' weights anew; ``fitted``: q is good enough for its bound to be lowered."""
        alpha = self.controller.alpha
        with self.run.autocast():
            anchor_features, anchor_logits = self.anchor.outputs(batch)
            features, logits = self.forward(batch, training=True)
            cls = cross_entropy(logits, batch["labels"])
            some = None
            if self.anchor.has is not None:  # what the anchor lacks, only the labels teach
                rows, some = repeated(self.anchor.has[batch["index"]])
                both = anchor_features, anchor_logits, features, logits
                anchor_features, anchor_logits, features, logits = (t[rows] for t in both)
            con = js_div(logits, anchor_logits)

            # q(y|x) is fitted with the features fixed, the bound is lowered in the features with q fixed: a q that has
            # not just been fitted to this very batch, which would raise the bound. Taken per dimension the bound is of
            # the order of the other losses; below zero it bounds nothing.
            x, y = self.normalise(anchor_features), self.normalise(features)
            mu, logvar = self.q(x)
            q_nll = club_nll(mu, logvar, y.detach())
            bound = club_mi(mu.detach(), logvar.detach(), y, process_group=distributed.group()) / self.width
            com = bound.relu() if fitted else 0 * bound
            if some is not None:
                con, com, q_nll = con * some, com * some, q_nll * some

        if align:
            # The gradients that set the weights make this step's update too.
            grads = [
                distributed.average(torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True))
                for loss in (cls, con, com)
            ]
            alpha.copy_(alignment_weights(gramian(grads)))
            q_grad = distributed.average(torch.autograd.grad(q_nll, self.q_parameters))
            apply(self.optimizer, self.parameters + self.q_parameters, [*weighted_sum(grads, alpha), *q_grad])
        else:
            one = alpha[0]
            parameters = self.parameters + self.q_parameters
            grads = torch.autograd.grad((cls, con, com, q_nll), parameters, (*alpha, one), allow_unused=True)
            update(self.optimizer, parameters, grads)
        for _ in range(self.run.options.q_steps - 1):
            self.fit_q(x, y.detach())
        loss = torch.stack((cls, con, com)).detach() @ alpha
        scalars = {"loss": loss, "cls": cls, "con": con, "com": bound, "q_nll": q_nll}
        return scalars | {"alpha_con": alpha[1], "alpha_com": alpha[2] if fitted else 0 * alpha[2]}

    def fit_q(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Another step of q alone: the optimizer skips weights that have no gradient."""
        with self.run.autocast():
            mu, logvar = self.q(x)
            nll = club_nll(mu, logvar, y)
        grad = [*[None] * len(self.parameters), *torch.autograd.grad(nll, self.q_parameters)]
        update(self.optimizer, self.parameters + self.q_parameters, grad)

    def normalise(self, features: torch.Tensor) -> torch.Tensor:
        """LayerNorm without parameters: the bound has no minimum in features of free scale."""
        return layer_norm(features, features.shape[1:]) if self.run.options.club_norm == "layer" else features


def repeated(has: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers (N,) of the samples of a batch that ``has``, bool (N,), marks, over and over; and whether there are any.

    As many as the batch has, whatever their number: a step's shapes stay the same, and nothing waits for the GPU.
    """
    first = has.int().argsort(descending=True, stable=True)
    count = has.sum()
    return first[torch.arange(len(has), device=has.device) % count.clamp_min(1)], count > 0


class Controller(nn.Module):
    """The weights (1, a_con, a_com) of the three losses, and the steps at which they are measured anew."""

    def __init__(self, run: Run):
        super().__init__()
        options = run.options
        static = options.controller == "static"
        self.register_buffer("alpha", torch.tensor([1.0, *(options.alpha or (0, 0))]))
        self.every = None if static else run.steps if options.align_every == "epoch" else int(options.align_every)

    def due(self, number: int) -> bool:
        return self.every is not None and number % self.every == 0


def q_warmup(run: Run) -> int:
    """Steps of a follower in which q is only fitted; of a short training, a quarter."""
    chosen, steps = run.options.q_warmup, run.options.epochs * run.steps
    return min(Q_WARMUP, steps // 4) if chosen is None else chosen


def anchor_phase(run: Run) -> tuple[dict[str, Alone], str, dict]:
    """Trains modalities alone: their tasks by name, the anchor's name, and how it was chosen."""
    options = run.options
    only_anchor = options.anchor != "auto" and options.follower_init == "scratch"
    heat = math.ceil(options.race * options.epochs) if options.race else options.epochs
    tasks = train_alone(run, [options.anchor] if only_anchor else None, heat, phase="anchor")
    anchor, selection = choose_anchor(options.anchor, {m: run.history[task.name][:heat] for m, task in tasks.items()})
    accuracies = ", ".join(f"{m} {merit['val_acc']:.4f}" for m, merit in selection["modalities"].items())
    log.info("anchor: %s, by %s (validation: %s)", anchor, selection["by"], accuracies)
    if heat < options.epochs:
        fit([tasks[anchor]], run)
    return tasks, anchor, selection


def choose_anchor(option: str, histories: dict[str, list[dict]]) -> tuple[str, dict]:
    """The modality that leads on validation, and by what it was chosen; near ties go to the surer one.

    Each modality counts as in the best epoch of its history.
    """
    best = {m: best_epoch(history) for m, history in histories.items()}
    merits = {m: {name: row[name] for name in ("epoch", "val_acc", "val_entropy")} for m, row in best.items()}
    ranked = sorted(merits, key=lambda m: -merits[m]["val_acc"])
    lead = merits[ranked[0]]["val_acc"]
    near = [m for m in ranked if lead - merits[m]["val_acc"] <= NEAR_TIE]
    if option != "auto":
        by, anchor = "option", option
    elif len(near) > 1:
        by, anchor = "predictive entropy", min(near, key=lambda m: merits[m]["val_entropy"])
    else:
        by, anchor = "validation accuracy", ranked[0]
    rivals = [merits[m]["val_acc"] for m in merits if m != anchor]
    margin = merits[anchor]["val_acc"] - max(rivals) if rivals else None
    return anchor, {"by": by, "margin": margin, "modalities": merits}


def predictions(tasks: Mapping[str, Unimodal], run: Run) -> tuple[dict, dict]:
    """Features and logits of each modality, on validation and test, from one pass."""
    both = {m: outputs(task, run, task.features_and_logits) for m, task in tasks.items()}
    features = {m: {split: z[:, : tasks[m].width] for split, z in seen.items()} for m, seen in both.items()}
    logits = {m: {split: z[:, tasks[m].width :] for split, z in seen.items()} for m, seen in both.items()}
    return features, logits


def similarity(anchor: dict, follower: dict) -> dict[str, float]:
    """How much of a follower's test features the anchor's have, too, of samples that have both."""
    both = {s: ~(anchor[s].isnan().any(1) | follower[s].isnan().any(1)) for s in anchor}
    anchor, follower = ({s: z[s][both[s]] for s in z} for z in (anchor, follower))
    return {"cka": linear_cka(anchor["test"], follower["test"]), "r2": cross_prediction(anchor, follower)}


def collapsed(history: list[dict], alone: float | None, classes: int) -> str | None:
    """Why a follower counts as collapsed, or None: it ended with less than half of the skill it had, or has alone."""
    chance, end = 1 / classes, history[-1]["val_acc"]
    reached = best_epoch(history)["val_acc"]
    where, skill = ("it had reached", reached) if alone is None else ("alone it reaches", alone)
    if end < skill and end - chance < 0.5 * (skill - chance):
        return f"its validation accuracy ended at {end:.3f}, {where} {skill:.3f}"
    if alone is None and end <= chance:
        return f"its validation accuracy ended at {end:.3f}, no better than chance"
    return None


@methods.register("udi")
def udi(run: Run) -> Outcome:
    """Unidirectional Dynamic Interaction: a frozen anchor, and followers that learn from it."""
    tasks, name, selection = anchor_phase(run)
    features, alone = predictions(tasks, run)
    unimodal = {modality: scores(z, run.labels) for modality, z in alone.items()}
    epochs = {m: len(run.history[task.name]) for m, task in tasks.items() if m != name}
    unfinished = {m: n for m, n in epochs.items() if run.options.race and n < run.options.epochs}
    for modality, n in unfinished.items():
        unimodal[modality]["epochs"] = n

    anchor, warm = Frozen(run, name, tasks[name].model, tasks[name].width), run.options.follower_init == "anchor-phase"
    warmup, steps = q_warmup(run), run.options.epochs * run.steps
    if warmup >= steps:
        log.warning("q is fitted in all %d steps of a follower, so L_com never counts: lower --q-warmup", steps)
    modalities = [modality for modality in run.data.modalities if modality != name]
    followers = {m: run.make(Follower, m, anchor, tasks[m] if warm else None) for m in modalities}
    fit(list(followers.values()), run)
    followed, trained = predictions(followers, run)
    logits = {m: alone[m] if m == name else trained[m] for m in run.data.modalities}
    collapses = {}
    for modality, follower in followers.items():
        skill = unimodal[modality]["val_acc"] if modality in tasks else None
        reason = collapsed(run.history[follower.name], skill, run.data.classes)
        if reason:
            collapses[modality] = reason
            log.warning("follower %s collapsed: %s", modality, reason)
    fused, rule = fuse(run.options.fusion, logits, run.labels)
    metrics = {
        "anchor": name,
        "anchor_selection": selection,
        "controller": run.options.controller,
        "q_warmup": warmup,
        "modalities": {modality: scores(z, run.labels) for modality, z in logits.items()},
        "unimodal": unimodal,
        "collapsed": collapses,
        "similarity": {modality: similarity(features[name], y) for modality, y in followed.items()},
        "fused": fused,
    }
    if len(alone) == len(logits) and not unfinished:
        metrics["ensemble"] = fuse(run.options.fusion, alone, run.labels)[0]
    models = {m: (tasks if m == name else followers)[m].model for m in run.data.modalities}
    return Outcome(metrics, models, rule)
