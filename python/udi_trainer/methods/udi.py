"""Unidirectional Dynamic Interaction (arXiv 2509.02281): training without a joint loss.

Anchor phase: every modality alone; the best is frozen as the anchor. Follower phase: every other modality learns from
its labels and from the anchor, see `follower`; no gradient reaches the anchor.

In co-training (method co-training, or --teacher fused), all modalities follow the fused prediction of all. That is no
longer one way.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..console import log
from ..data.dataset import Dataset
from ..errors import UserError, choose
from ..evaluation.fusion import FusionOptions, LogLinear, Rule, temperature
from ..evaluation.scores import accuracy, scores
from ..evaluation.similarity import cross_prediction, linear_cka
from ..options import Group, number, one_of, option, reads, text
from ..registry import methods
from ..run import Run
from ..training.inference import outputs, predict
from ..training.loop import best_epoch, fit, merit
from .follower import Follower, FollowerOptions, q_warmup
from .frozen import Frozen, Fused
from .outcome import Outcome
from .unimodal import Alone, Unimodal, train_alone

NEAR_TIE = 0.005  # merits on validation this close leave the anchor's choice to predictive entropy
CRITERIA = {None: "accuracy", "acc": "accuracy", "macro-f1": "macro-F1", "nll": "likelihood"}


@dataclass(frozen=True, kw_only=True)
class UDIOptions(Group, title="UDI"):
    anchor: str = option(
        "auto",
        text,
        "modality to freeze as the anchor; only this one is then trained alone. auto: the best on validation",
        needs={"teacher": "anchor"},
    )
    race: float | None = option(
        None,
        number(float, above=0, below=1),
        "choose the anchor after this fraction of the anchor phase, and stop training the other modalities alone",
        "F",
        needs={"anchor": "auto", "teacher": "anchor"},
    )
    follower_loss: str = option(
        "label",
        one_of("label", "residual"),
        "L_cls of a follower: of its own logits (label), or of their sum with the anchor's (residual), so that it"
        " learns what the anchor does not know",
        needs={"teacher": "anchor"},
    )
    teacher: str = option(
        "anchor",
        one_of("anchor", "fused"),
        "what followers learn from: anchor; or fused: the fused prediction of all modalities, and all of them follow"
        " (the method co-training, no longer one way)",
    )

    def check(self, data: Dataset) -> None:
        if self.anchor != "auto":
            choose("anchor", self.anchor, data.modalities)
        if self.teacher == "fused":
            check_complete(data)


def check_complete(data: Dataset) -> None:
    """Raises UserError where samples lack a modality, as co-training fuses all."""
    if lacking := [m for m in data.modalities if data.train.present(m) is not None]:
        raise UserError(f"co-training fuses all modalities, and samples lack {', '.join(lacking)}")


@dataclass(frozen=True, kw_only=True)
class CoTrainingOptions(Group, title="UDI and co-training"):
    follower_init: str = option(
        "scratch",
        one_of("scratch", "anchor-phase"),
        "weights that followers start from: scratch, or anchor-phase (trained alone)",
    )
    rounds: int | None = option(
        None,
        number(int, 1),
        "of co-training: how often followers are trained, each time from the previous ones",
        shown="1; of the method co-training 2",
        needs={"teacher": "fused"},
    )


def anchor_phase(run: Run, options: UDIOptions) -> tuple[dict[str, Alone], str, dict]:
    """Trains modalities alone: their tasks by modality, the anchor, and how it was chosen."""
    epochs = run.options.epochs
    only_anchor = options.anchor != "auto" and run.options.of(CoTrainingOptions).follower_init == "scratch"
    selected_at = math.ceil(options.race * epochs) if options.race else epochs  # epoch
    tasks = train_alone(run, [options.anchor] if only_anchor else None, selected_at, phase="anchor")

    def choose() -> tuple[str, dict]:
        histories = {m: run.history[task.name][:selected_at] for m, task in tasks.items()}
        anchor, selection = choose_anchor(options.anchor, histories, run.options.select)
        accuracies = ", ".join(f"{m} {merit['val_acc']:.4f}" for m, merit in selection["modalities"].items())
        log.info("anchor: %s, by %s (validation: %s)", anchor, selection["by"], accuracies)
        return anchor, selection

    anchor, selection = run.decide("anchor", choose)
    if selected_at < epochs:
        fit([tasks[anchor]], run)
    return tasks, anchor, selection


def choose_anchor(option: str, histories: dict[str, list[dict]], select: str | None = None) -> tuple[str, dict]:
    """The modality that is best on validation, and the criterion; near ties go to the lower predictive entropy.

    Each modality is judged by the best epoch of its history.
    """
    best = {m: best_epoch(history, select) for m, history in histories.items()}
    judged = {m: merit(row, select) for m, row in best.items()}
    shown = ["epoch", "val_acc", "val_entropy"]
    shown += {"macro-f1": ["val_macro_f1"], "nll": ["val_loss"]}.get(select or "acc", [])
    merits = {m: {name: row[name] for name in shown} for m, row in best.items()}
    ranked = sorted(judged, key=lambda m: -judged[m])
    lead = judged[ranked[0]]
    near = [m for m in ranked if lead - judged[m] <= NEAR_TIE]
    if option != "auto":
        by, anchor = "option", option
    elif len(near) > 1:
        by, anchor = "predictive entropy", min(near, key=lambda m: merits[m]["val_entropy"])
    else:
        by, anchor = f"validation {CRITERIA[select]}", ranked[0]
    rivals = [judged[m] for m in judged if m != anchor]
    margin = judged[anchor] - max(rivals) if rivals else None
    return anchor, {"by": by, "margin": margin, "modalities": merits}


def predictions(tasks: Mapping[str, Unimodal], run: Run) -> tuple[dict, dict]:
    """Features and logits of each modality, on the splits of :func:`outputs`, from one pass."""
    made = {m: outputs(task, run, task.features_and_logits) for m, task in tasks.items()}
    features = {m: {split: z[:, : tasks[m].width] for split, z in by_split.items()} for m, by_split in made.items()}
    logits = {m: {split: z[:, tasks[m].width :] for split, z in by_split.items()} for m, by_split in made.items()}
    return features, logits


def similarity(anchor: dict, follower: dict) -> dict[str, float]:
    """How similar a follower's test features are to the anchor's, over samples that have both modalities."""
    complete = {s: ~(anchor[s].isnan().any(1) | follower[s].isnan().any(1)) for s in anchor}
    anchor, follower = ({s: z[s][complete[s]] for s in z} for z in (anchor, follower))
    cka = {"cka": linear_cka(anchor["test"], follower["test"])}
    return cka | {"r2": cross_prediction(anchor, follower)} if "val" in anchor else cka


def collapsed(history: list[dict], alone: float | None, classes: int) -> str | None:
    """Why a follower counts as collapsed, or None. It does if it lost half of the skill that it had, or has alone."""
    chance, end = 1 / classes, history[-1]["val_acc"]
    reached = best_epoch(history)["val_acc"]
    where, skill = ("it had reached", reached) if alone is None else ("alone it reaches", alone)
    if end < skill and end - chance < 0.5 * (skill - chance):
        return f"its validation accuracy ended at {end:.3f}, {where} {skill:.3f}"
    if alone is None and end <= chance:
        return f"its validation accuracy ended at {end:.3f}, no better than chance"
    return None


def find_collapsed(run: Run, followers: Mapping[str, Follower], alone: Mapping[str, dict]) -> dict[str, str]:
    """Why followers count as collapsed, by modality. ``alone``: the scores of modalities trained alone."""
    found = {}
    for modality, follower in followers.items():
        skill = alone[modality]["val_acc"] if modality in alone else None
        if reason := collapsed(run.history[follower.name], skill, run.data.classes):
            found[modality] = reason
            log.warning("follower %s collapsed: %s", modality, reason)
    return found


def fused_teachers(run: Run, tasks: Mapping[str, Unimodal], logits: dict[str, dict]) -> dict[str, Fused]:
    """A teacher for each modality: all of them, fused by the log-linear rule with weights fitted on validation."""

    def choose() -> Rule:
        return LogLinear.fit(torch.stack([z["val"] for z in logits.values()]), run.labels["val"])

    scales = dict(zip(logits, run.decide("weights of the teachers", choose).weights or (), strict=True))
    frozen = {m: Frozen(run, m, task.model, task.width, scales[m]) for m, task in tasks.items()}
    return {m: Fused(frozen, m) for m in tasks}


def overfitted(anchor: Alone, val_acc: float) -> str | None:
    """Why the anchor is too good in training to teach residual followers, or None.

    Its training accuracy must be at most two standard errors above its validation accuracy.
    """
    train, kept = anchor.run.data.train, anchor.run.data.train.labels.cpu() >= 0
    if (present := train.present(anchor.modality)) is not None:
        kept &= present
    train_acc = accuracy(predict(anchor, anchor.run, train)[kept], train.labels.cpu()[kept])
    if train_acc - val_acc > 2 * math.sqrt(val_acc * (1 - val_acc) / len(anchor.run.data.val)):
        return f"its accuracy is {train_acc:.3f} in training, {val_acc:.3f} on validation"
    return None


def follow(run: Run, tasks: Mapping[str, Alone], name: str, alone: dict[str, dict]) -> dict[str, Follower]:
    """Trains the followers of the anchor ``name``. ``alone``: the logits of each task."""
    residual = run.options.of(UDIOptions).follower_loss == "residual"

    def choose() -> float:
        val, labels = alone[name]["val"], run.labels["val"]
        if residual and (reason := overfitted(tasks[name], accuracy(val, labels))):
            log.warning("anchor %s is overfitted, which ruins residual followers: %s", name, reason)
        # Logits are calibrated if they teach samples without labels, or are added to a follower's.
        calibrated = residual or bool((run.data.train.labels < 0).any())
        return 1 / temperature(val, labels) if calibrated else 1.0

    scale = run.decide("scale of the anchor's logits", choose)
    anchor = Frozen(run, name, tasks[name].model, tasks[name].width, scale)
    val_anchor_logits = None
    if residual:  # a final fit, which does not validate, reads no values
        val = alone[name].get("val", torch.zeros(len(run.data.val), run.data.classes))
        val_anchor_logits = scale * val.nan_to_num(0)
    followers = {
        m: run.make(
            Follower, modality=m, teacher=anchor, initial=initial(run, tasks, m), val_anchor_logits=val_anchor_logits
        )
        for m in run.data.modalities
        if m != name
    }
    fit(list(followers.values()), run)
    return followers


class CoTrained(Follower):
    """A follower of the method co-training; its seeds, and so its figures, are those of --teacher fused."""

    key, seed_key, rounds = "co-trained", "follower", 2


def co_train(
    run: Run, tasks: Mapping[str, Alone], logits: dict[str, dict], kind: type[Follower]
) -> dict[str, Follower]:
    """Trains all modalities to follow the fused prediction; each round follows the models of the last one."""
    teachers, rounds = fused_teachers(run, tasks, logits), run.options.of(CoTrainingOptions).rounds or kind.rounds
    for round in range(1, rounds + 1):
        followers = {
            m: run.make(kind, modality=m, teacher=teachers[m], initial=initial(run, tasks, m), round=round)
            for m in tasks
        }
        fit(list(followers.values()), run)
        if round < rounds:
            teachers = fused_teachers(run, followers, predictions(followers, run)[1])
    return followers


def initial(run: Run, tasks: Mapping[str, Alone], modality: str) -> Alone | None:
    """The task whose parameters a follower starts from; None: from scratch."""
    return tasks[modality] if run.options.of(CoTrainingOptions).follower_init == "anchor-phase" else None


@methods.register("udi", baselines=("joint",))
@reads(UDIOptions, CoTrainingOptions, FollowerOptions, FusionOptions)
def udi(run: Run) -> Outcome:
    """Unidirectional Dynamic Interaction: a frozen anchor, and followers that learn from it."""
    return two_phases(run, run.options.of(UDIOptions), Follower)


@methods.register("co-training", baselines=("joint",))
@reads(CoTrainingOptions, FollowerOptions, FusionOptions)
def co_training(run: Run) -> Outcome:
    """Each modality learns from its labels and from the fused prediction of all, in rounds."""
    check_complete(run.data)
    return two_phases(run, UDIOptions(teacher="fused"), CoTrained)


def two_phases(run: Run, options: UDIOptions, kind: type[Follower]) -> Outcome:
    """Trains each modality alone, then ``kind`` of followers of the anchor, or in co-training of all."""
    losses, co_training = run.options.of(FollowerOptions), options.teacher == "fused"
    tasks, name, selection = anchor_phase(run, options)
    features, alone = predictions(tasks, run)
    unimodal = {modality: scores(z, run.labels) for modality, z in alone.items()}

    def choose() -> dict[str, int]:
        epochs = {m: len(run.history[task.name]) for m, task in tasks.items() if m != name}
        return {m: n for m, n in epochs.items() if options.race and n < run.options.epochs}

    unfinished = run.decide("unfinished modalities", choose)
    for modality, n in unfinished.items():
        unimodal[modality]["epochs"] = n

    warmup, steps = q_warmup(run), run.options.epochs * run.steps
    if warmup >= steps:
        log.warning("q is fitted in all %d steps of a follower, so L_com never counts: lower --q-warmup", steps)
    followers = co_train(run, tasks, alone, kind) if co_training else follow(run, tasks, name, alone)
    followed, trained = predictions(followers, run)
    logits = {m: (trained if m in followers else alone)[m] for m in run.data.modalities}
    collapses = run.decide("collapsed followers", lambda: find_collapsed(run, followers, unimodal))
    fused, rule = run.fuse(logits, "loglinear" if options.follower_loss == "residual" else "auto")
    metrics = {
        "anchor": None if co_training else name,
        "part": "follower",
        "anchor_selection": selection,
        "controller": losses.controller,
        "q_warmup": warmup,
        "modalities": {modality: scores(z, run.labels) for modality, z in logits.items()},
        "unimodal": unimodal,
        "collapsed": collapses,
        "similarity": {modality: similarity(features[name], y) for modality, y in followed.items() if modality != name},
        "fused": fused,
    }
    if len(alone) == len(logits) and not unfinished:
        metrics["ensemble"] = run.fuse(alone)[0]
    models: dict[str, nn.Module] = {m: {**tasks, **followers}[m].model for m in run.data.modalities}
    return Outcome(metrics, models, rule)
