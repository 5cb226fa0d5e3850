"""Unidirectional Dynamic Interaction (arXiv 2509.02281): training without a joint loss.

Anchor phase: every modality alone; the best is frozen. Follower phase: every other modality learns
    L = L_cls + a_con L_con + a_com L_com
from its labels and from the anchor, which gets nothing back. L_con and L_com need no labels: where few samples have
one, a step has a batch of any samples for these, and a labelled one for L_cls.

With --teacher fused all modalities follow the fused prediction of all, which is co-training, and no longer one way.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import cross_entropy, layer_norm

from udi_kernels import alignment_weights, club_mi, club_nll, gramian, js_div, weighted_sum

from .. import distributed
from ..console import log
from ..data.dataset import Batch
from ..errors import UserError
from ..evaluation.fusion import LogLinear, fuse, temperature
from ..evaluation.scores import accuracy, scores
from ..evaluation.similarity import cross_prediction, linear_cka
from ..models.classifiers import ConditionalGaussian
from ..registry import methods
from ..run import Run
from ..training.loop import best_epoch, fit, outputs, predict, usable
from ..training.task import update
from .frozen import Frozen, Fused
from .outcome import Outcome
from .unimodal import Alone, Unimodal, train_alone

NEAR_TIE = 0.005  # validation accuracies this near each other leave the anchor's choice to predictive entropy
Q_WARMUP = 100  # steps in which q is only fitted: the bound of an unfitted q is noise that can wreck a follower


class Follower(Unimodal):
    key = "follower"

    def __init__(
        self,
        run: Run,
        modality: str,
        teacher: Frozen | Fused,
        alone: Alone | None = None,
        beside: torch.Tensor | None = None,
        number: int = 1,
    ):
        """Starts from scratch, or from the parameters of ``alone``.

        ``beside``: the anchor's logits of validation, with which a residual follower is judged. ``number``: of the
        round.
        """
        super().__init__(run, modality)
        if number > 1:
            self.name += f"-{number}"
        self.teacher, kept = teacher, usable(run.data.val, modality)
        self.beside = beside if beside is None or kept is None else beside[kept]
        self.semi_supervised = bool((run.data.train.labels < 0).any())
        if teacher.random:
            self.reads, self.random = tuple({modality, *teacher.reads}), True
        if alone:
            self.load(self.model, alone.model.state_dict())
        options = run.options
        self.classes = torch.arange(run.data.classes if options.club == "given-label" else 0, device=run.device)
        width = teacher.width + len(self.classes)
        self.q = ConditionalGaussian(width, self.width, options.q_width, options.q_depth).to(run.device)
        self.shard(self.q.layers)  # whose output, other than q's, is no view, which FSDP2 warns of
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
        alpha, labels = self.controller.alpha, batch["labels"]
        anyone, labelled = self.rows(batch)
        with self.run.autocast():
            teacher_features, teacher_logits = self.teacher.outputs(batch)
            features, logits = self.forward(batch, training=True)
            judged = logits if self.beside is None else logits + self.known(teacher_logits, batch)
            cls = cross_entropy(judged[labelled], labels[labelled])

            both = teacher_features, teacher_logits, features, logits, labels
            some = None
            if self.teacher.has is not None:  # what the teacher lacks, only the labels teach
                anyone, some = repeated(self.teacher.has[batch["index"][anyone]])
            teacher_features, teacher_logits, features, logits, labels = (t[anyone] for t in both)
            con = js_div(logits, teacher_logits)

            # q(y|x) is fitted with the features fixed, the bound is lowered in the features with q fixed: a q that has
            # not just been fitted to this very batch, which would raise the bound. Taken per dimension the bound is of
            # the order of the other losses; below zero it bounds nothing.
            x, y = self.normalise(teacher_features), self.normalise(features)
            given = None
            if len(self.classes):  # of samples without a label q knows the features alone, and they bound nothing
                given, x = labels, torch.cat((x, (labels[:, None] == self.classes).to(x.dtype)), dim=1)
            mu, logvar = self.q(x)
            q_nll = club_nll(mu, logvar, y.detach())
            bound = club_mi(mu.detach(), logvar.detach(), y, given=given, process_group=distributed.group())
            bound = bound / self.width
            com = bound.relu() if fitted else 0 * bound
            if some is not None:
                con, com, q_nll = con * some, com * some, q_nll * some

        if align:
            # The gradients that set the weights make this step's update too.
            grads = [self.gradients(loss, self.parameters, retain_graph=True) for loss in (cls, con, com)]
            alpha.copy_(alignment_weights(gramian(grads)))
            q_grad = self.gradients(q_nll, self.q_parameters)
            update(self.optimizer, self.parameters + self.q_parameters, [*weighted_sum(grads, alpha), *q_grad])
        else:
            one = alpha[0]
            parameters = self.parameters + self.q_parameters
            update(self.optimizer, parameters, self.gradients((cls, con, com, q_nll), parameters, (*alpha, one)))
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
        grad = [*[None] * len(self.parameters), *self.gradients(nll, self.q_parameters)]
        update(self.optimizer, self.parameters + self.q_parameters, grad)

    def known(self, anchor_logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What a residual follower adds its logits to: the anchor's, 0 of samples that the anchor lacks."""
        has = self.teacher.has
        return anchor_logits if has is None else anchor_logits * has[batch["index"], None]

    def validate(self, logits, labels):
        """As it is trained: a residual follower together with the anchor."""
        return super().validate(logits if self.beside is None else logits + self.beside, labels)

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


def fused_teachers(run: Run, tasks: Mapping[str, Unimodal], logits: dict[str, dict]) -> dict[str, Fused]:
    """For each modality: all of them fused by the log-linear rule, so that weights are fitted on validation."""
    weights = LogLinear.fit(torch.stack([z["val"] for z in logits.values()]), run.labels["val"]).weights
    scales = dict(zip(logits, weights or (), strict=True))
    frozen = {m: Frozen(run, m, task.model, task.width, scales[m]) for m, task in tasks.items()}
    return {m: Fused(frozen, m) for m in tasks}


def overfitted(anchor: Alone, val_acc: float) -> str | None:
    """Why an anchor's logits leave a residual follower too little in training, or None.

    Its accuracy there is more than two standard errors above that on validation.
    """
    train, kept = anchor.run.data.train, anchor.run.data.train.labels.cpu() >= 0
    if (has := usable(train, anchor.modality)) is not None:
        kept &= has
    train_acc = accuracy(predict(anchor, anchor.run, train)[kept], train.labels.cpu()[kept])
    if train_acc - val_acc > 2 * math.sqrt(val_acc * (1 - val_acc) / len(anchor.run.data.val)):
        return f"its accuracy is {train_acc:.3f} in training, {val_acc:.3f} on validation"
    return None


def follow(run: Run, tasks: Mapping[str, Alone], name: str, alone: dict[str, dict]) -> dict[str, Follower]:
    """Trains the anchor's followers. ``alone``: the logits of each task."""
    residual = run.options.follower_loss == "residual"
    val, labels = alone[name]["val"], run.labels["val"]
    if residual and (reason := overfitted(tasks[name], accuracy(val, labels))):
        log.warning("anchor %s is overfitted, which ruins residual followers: %s", name, reason)
    # Logits are calibrated where they teach samples without labels, or are added to a follower's.
    calibrated = residual or bool((run.data.train.labels < 0).any())
    scale = 1 / temperature(val, labels) if calibrated else 1.0
    anchor = Frozen(run, name, tasks[name].model, tasks[name].width, scale)
    beside = scale * val.nan_to_num(0) if residual else None
    modalities = [m for m in run.data.modalities if m != name]
    followers = {m: run.make(Follower, m, anchor, start(run, tasks, m), beside) for m in modalities}
    fit(list(followers.values()), run)
    return followers


def co_train(run: Run, tasks: Mapping[str, Alone], logits: dict[str, dict]) -> dict[str, Follower]:
    """Trains all modalities to follow the fused prediction, round by round that of the last ones."""
    teachers = fused_teachers(run, tasks, logits)
    for number in range(1, run.options.rounds + 1):
        followers = {m: run.make(Follower, m, teachers[m], start(run, tasks, m), None, number) for m in tasks}
        fit(list(followers.values()), run)
        if number < run.options.rounds:
            teachers = fused_teachers(run, followers, predictions(followers, run)[1])
    return followers


def start(run: Run, tasks: Mapping[str, Alone], modality: str) -> Alone | None:
    """What a follower's parameters start from, if not from scratch."""
    return tasks[modality] if run.options.follower_init == "anchor-phase" else None


@methods.register("udi")
def udi(run: Run) -> Outcome:
    """Unidirectional Dynamic Interaction: a frozen anchor, and followers that learn from it."""
    options, co_training = run.options, run.options.teacher == "fused"
    if co_training and (lacking := [m for m in run.data.modalities if usable(run.data.train, m) is not None]):
        raise UserError(f"--teacher fused fuses all modalities, and samples lack {', '.join(lacking)}")
    tasks, name, selection = anchor_phase(run)
    features, alone = predictions(tasks, run)
    unimodal = {modality: scores(z, run.labels) for modality, z in alone.items()}
    epochs = {m: len(run.history[task.name]) for m, task in tasks.items() if m != name}
    unfinished = {m: n for m, n in epochs.items() if options.race and n < options.epochs}
    for modality, n in unfinished.items():
        unimodal[modality]["epochs"] = n

    warmup, steps = q_warmup(run), options.epochs * run.steps
    if warmup >= steps:
        log.warning("q is fitted in all %d steps of a follower, so L_com never counts: lower --q-warmup", steps)
    followers = co_train(run, tasks, alone) if co_training else follow(run, tasks, name, alone)
    followed, trained = predictions(followers, run)
    logits = {m: (trained if m in followers else alone)[m] for m in run.data.modalities}
    collapses = {}
    for modality, follower in followers.items():
        skill = unimodal[modality]["val_acc"] if modality in tasks else None
        reason = collapsed(run.history[follower.name], skill, run.data.classes)
        if reason:
            collapses[modality] = reason
            log.warning("follower %s collapsed: %s", modality, reason)
    own = "loglinear" if options.follower_loss == "residual" else "auto"
    fused, rule = fuse(run.fusion(own), logits, run.labels)
    metrics = {
        "anchor": None if co_training else name,
        "part": "follower",
        "anchor_selection": selection,
        "controller": options.controller,
        "q_warmup": warmup,
        "modalities": {modality: scores(z, run.labels) for modality, z in logits.items()},
        "unimodal": unimodal,
        "collapsed": collapses,
        "similarity": {modality: similarity(features[name], y) for modality, y in followed.items() if modality != name},
        "fused": fused,
    }
    if len(alone) == len(logits) and not unfinished:
        metrics["ensemble"] = fuse(run.fusion(), alone, run.labels)[0]
    models: dict[str, nn.Module] = {m: {**tasks, **followers}[m].model for m in run.data.modalities}
    return Outcome(metrics, models, rule)
