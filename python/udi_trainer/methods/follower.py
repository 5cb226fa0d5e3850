"""UDI's follower: a modality that learns from its labels and from a frozen teacher.

    L = L_cls + a_con L_con + a_com L_com

L_con is the JS divergence between the teacher's prediction and its own, L_com the CLUB bound of the mutual information
between the teacher's features and its own. The controller sets the weights a. Neither term needs labels: where few
samples have one, a step takes a batch of any samples for these two, and a labelled batch for L_cls.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import layer_norm

from udi_kernels import alignment_weights, club_mi, club_nll, gramian, js_div, weighted_sum

from .. import distributed
from ..data.dataset import Batch
from ..models.classifiers import ConditionalGaussian
from ..options import Group, number, one_of, option, pair, steps_or_epoch
from ..run import Run
from ..training.task import Rows, taken, update
from .frozen import Frozen, Fused
from .unimodal import Alone, Unimodal

Q_WARMUP = 100  # steps that only fit q: the bound of an unfitted q is noise that can wreck a follower


@dataclass(frozen=True, kw_only=True)
class FollowerOptions(Group, title="UDI: the followers' losses"):
    controller: str = option(
        "dynamic",
        one_of("dynamic", "static"),
        "weights of L_con and L_com: dynamic, from the losses' gradients as in the paper, or static",
    )
    alpha: tuple[float, float] | None = option(
        None,
        pair("weights CON,COM", number(float, 0), number(float, 0)),
        "static weights of L_con and L_com; implies --controller static",
        "CON,COM",
        "1,1",
        needs={"controller": "static"},
        implied=True,
    )
    align_every: str | int = option(
        "epoch",
        steps_or_epoch,
        "how often the dynamic controller measures the gradients: every epoch, or every N steps",
        "epoch|N",
        needs={"controller": "dynamic"},
    )
    club: str = option(
        "marginal",
        one_of("marginal", "given-label"),
        "information that L_com bounds: what anchor and follower share (marginal), or share beyond the label"
        " (given-label)",
    )
    club_norm: str = option(
        "layer",
        one_of("layer", "none"),
        "normalisation of CLUB's inputs: layer (LayerNorm without parameters) or none",
    )
    q_depth: int = option(1, number(int, 0), "hidden layers of q, the network that CLUB fits")
    q_width: int = option(128, number(int, 1), "units of each hidden layer of q")
    q_lr: float = option(1.0, number(float, above=0), "q's learning rate, as a multiple of --lr")
    q_steps: int = option(1, number(int, 1), "steps of q on each batch")
    q_warmup: int | None = option(
        None,
        number(int, 0),
        "steps that only fit q, before L_com counts",
        shown="100, or a quarter of a shorter follower phase",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.controller == "static" and self.alpha is None:
            self._set("alpha", (1.0, 1.0))


class Follower(Unimodal):
    key, rounds = "follower", 1

    def __init__(
        self,
        run: Run,
        modality: str,
        teacher: Frozen | Fused,
        initial: Alone | None = None,
        val_anchor_logits: torch.Tensor | None = None,
        round: int = 1,
    ):
        """
        Args:
            teacher: frozen modalities to learn from.
            initial: a task whose parameters it starts from; by default it starts from scratch.
            val_anchor_logits: the anchor's logits on validation (N, C). They make it a residual follower, which is
                trained and validated on the sum of both logits.
            round: of co-training, from 1.
        """
        super().__init__(run, modality)
        if round > 1:
            self.name, self.seed_name = (f"{name}-{round}" for name in (self.name, self.seed_name))
        self.options = options = run.options.of(FollowerOptions)
        self.teacher, present = teacher, run.data.val.present(modality)
        self.val_anchor_logits = val_anchor_logits
        if val_anchor_logits is not None and present is not None:
            self.val_anchor_logits = val_anchor_logits[present]
        self.semi_supervised = bool((run.data.train.labels < 0).any())
        if teacher.random:
            self.reads, self.random = tuple({modality, *teacher.reads}), True
        if initial:
            self.load(self.model, initial.model.state_dict())
        self.classes = torch.arange(run.data.classes if options.club == "given-label" else 0, device=run.device)
        width = teacher.width + len(self.classes)
        self.q = ConditionalGaussian(width, self.width, options.q_width, options.q_depth).to(run.device)
        self.shard(self.q.layers)  # not q itself: its output is a view, which FSDP2 warns of
        self.q_parameters = list(self.q.parameters())
        self.optimizer = run.optimizer(
            [{"params": self.parameters}, {"params": self.q_parameters, "lr_scale": options.q_lr}],
            run.decay.get(modality),
        )
        self.warmup = q_warmup(run)
        self.controller = Controller(run).to(run.device)
        self.parts = {"model": self.model, "q": self.q, "optimizer": self.optimizer, "controller": self.controller}

    def flags(self, number: int) -> dict:
        return {"align": self.controller.due(number), "fitted": number >= self.warmup}

    def step(self, batch, align, fitted):
        """``align``: measure the losses' weights anew; ``fitted``: q is good enough for its bound to be minimised."""
        with self.run.autocast():
            cls, con, com, q_nll, bound, x, y = self.losses(batch, fitted)
        alpha = self.controller.alpha
        _, a_con, a_com = alpha.unbind()
        parameters = self.parameters + self.q_parameters
        if align:
            # The gradients that set the weights make this step's update too.
            grads = [self.gradients(loss, self.parameters, retain_graph=True) for loss in (cls, con, com)]
            self.controller.gram.copy_(gramian(grads))
            found = alignment_weights(self.controller.gram)
            alpha.copy_(found.where(found.isfinite(), alpha) if self.loss_scale else found)
            grad = [*weighted_sum(grads, alpha), *self.gradients(q_nll, self.q_parameters)]
            loss = cls + a_con * con + a_com * com
        else:
            loss = cls + a_con * con + a_com * com
            grad = self.gradients(loss + q_nll, parameters)
        update(self.optimizer, parameters, grad)
        for _ in range(self.options.q_steps - 1):
            self.fit_q(x, y)
        scalars = {"loss": loss, "cls": cls, "con": con, "com": bound, "q_nll": q_nll}
        return scalars | {"alpha_con": a_con, "alpha_com": a_com if fitted else 0 * a_com}

    def measured(self):
        """The Gramian of L_cls, L_con and L_com that the dynamic controller measured last."""
        return {} if self.controller.every is None else {"gramian": self.controller.gram.tolist()}

    def losses(self, batch: Batch, fitted: bool) -> tuple[torch.Tensor, ...]:
        """L_cls, L_con, L_com, q's loss, the bound behind L_com, and q's input and target, detached."""
        labels = batch["labels"]
        any_rows, labelled = self.rows(batch)
        teacher_features, teacher_logits = self.teacher.outputs(batch)
        features, logits = self.forward(batch, training=True)
        classified = logits if self.val_anchor_logits is None else logits + self.anchor_logits(teacher_logits, batch)
        cls = self.cross_entropy(*taken(labelled, classified, labels))

        rows: Rows | torch.Tensor = any_rows
        any_present = None
        if self.teacher.present is not None:  # samples without the teacher's modality learn from their labels alone
            rows, any_present = repeated(self.teacher.present[batch["index"][any_rows]])
        paired = teacher_features, teacher_logits, features, logits, labels
        teacher_features, teacher_logits, features, logits, labels = taken(rows, *paired)
        con = js_div(logits, teacher_logits)

        # q(y|x) is fitted with the features fixed; the bound is minimised in the features with q fixed. A q that was
        # just fitted to this very batch would raise the bound, so both use q as it was before the step. Per dimension
        # the bound is of the order of the other losses; below zero it bounds nothing.
        x, y = self.normalise(teacher_features), self.normalise(features)
        given = None
        if len(self.classes):  # for an unlabelled sample q sees the features alone, and the sample bounds nothing
            given, x = labels, torch.cat((x, (labels[:, None] == self.classes).to(x.dtype)), dim=1)
        mu, logvar = self.q(x)
        target = y.detach()
        q_nll = club_nll(mu, logvar, target)
        bound = club_mi(mu.detach(), logvar.detach(), y, given=given, process_group=distributed.group())
        bound = bound / self.width
        com = bound.relu() if fitted else 0 * bound
        if any_present is not None:
            con, com, q_nll = con * any_present, com * any_present, q_nll * any_present
        return cls, con, com, q_nll, bound, x, target

    def fit_q(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Another step of q alone: the optimizer skips parameters without a gradient."""
        with self.run.autocast():
            mu, logvar = self.q(x)
            nll = club_nll(mu, logvar, y)
        grad = [*[None] * len(self.parameters), *self.gradients(nll, self.q_parameters)]
        update(self.optimizer, self.parameters + self.q_parameters, grad)

    def anchor_logits(self, anchor_logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What a residual follower adds to its logits: the anchor's, and 0 where a sample lacks the anchor."""
        present = self.teacher.present
        return anchor_logits if present is None else anchor_logits * present[batch["index"], None]

    def validate(self, logits, labels):
        """As in training, a residual follower is validated together with the anchor."""
        return super().validate(logits if self.val_anchor_logits is None else logits + self.val_anchor_logits, labels)

    def normalise(self, features: torch.Tensor) -> torch.Tensor:
        """LayerNorm without parameters: without it the bound is unbounded below in the scale of the features."""
        return layer_norm(features, features.shape[1:]) if self.options.club_norm == "layer" else features


def repeated(present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (N,) of the rows marked in ``present``, bool (N,), repeated in turn; and whether any row is marked.

    There are always N of them, so a step's shapes do not change and nothing waits for the GPU.
    """
    first = present.int().argsort(descending=True, stable=True)
    count = present.sum()
    return first[torch.arange(len(present), device=present.device) % count.clamp_min(1)], count > 0


class Controller(nn.Module):
    """The weights (1, a_con, a_com) of the three losses, their gradients' Gramian, and the steps that measure both."""

    def __init__(self, run: Run):
        super().__init__()
        options = run.options.of(FollowerOptions)
        static = options.controller == "static"
        self.register_buffer("alpha", torch.tensor([1.0, *(options.alpha or (0, 0))]))
        self.register_buffer("gram", torch.zeros(3, 3))
        self.every = None if static else run.steps if options.align_every == "epoch" else int(options.align_every)

    def load_state_dict(self, state_dict, *args, **kwargs):
        return super().load_state_dict({"gram": self.gram} | state_dict, *args, **kwargs)  # older states lack it

    def due(self, number: int) -> bool:
        return self.every is not None and number % self.every == 0


def q_warmup(run: Run) -> int:
    """Steps that only fit q; of a short training, a quarter."""
    chosen, steps = run.options.of(FollowerOptions).q_warmup, run.options.epochs * run.steps
    return min(Q_WARMUP, steps // 4) if chosen is None else chosen
