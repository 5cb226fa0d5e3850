"""ReconBoost (Hua et al., ICML 2024, arXiv 2405.09321): modalities take turns, each boosted on what the others miss.

In a stage one modality m learns alone, then all are rectified together. With z_m the logits of its head, z = sum z_m,
and q = softmax of the sum of the others' logits, without gradient:

    boosting:       L = mean over samples of (w1 - w2 q_y) CE(z_m, y) / C
    rectification:  L = CE(z, y)

As in the authors' code (github.com/huacong/ReconBoost), both parts of a stage are as long, modalities take turns in a
fixed order, training starts from modalities trained alone, and w1 is 5, w2 is 1 (CREMA-D). Its term of memory
consolidation has no gradient, since both sides are detached, and is left out; so is a factor of z that it learns. There
a stage has 4 and 4 epochs, in up to 1,000 stages; here each modality has ``--reconboost-rounds`` stages of equal
length. Heads are linear, each modality's own, where theirs is a shared network. SGD at 0.01 there, and the stage that
is best on test; here validation decides.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..models.classifiers import SumClassifier
from ..options import Group, number, option, reads
from ..registry import methods
from ..run import Run
from ..training.task import update
from .joint import Joint, as_float, train_joint
from .outcome import Outcome
from .unimodal import Alone, train_alone

RECTIFY = -1


@dataclass(frozen=True, kw_only=True)
class ReconBoostOptions(Group, title="ReconBoost"):
    reconboost_label: float = option(5.0, number(float, 0), "w1: weight of the label")
    reconboost_others: float = option(1.0, number(float, 0), "w2: how much less it counts what the others know")
    reconboost_rounds: int = option(4, number(int, 1), "stages of each modality")


class ReconBoost(Joint):
    key = "reconboost"
    classifier = SumClassifier
    model: SumClassifier

    def __init__(self, run: Run, initial: Mapping[str, Alone]):
        super().__init__(run)
        self.options, self.names = run.options.of(ReconBoostOptions), list(initial)
        states = {m: task.model.state_dict().items() for m, task in initial.items()}
        place = {"encoder": "encoders", "head": "heads"}
        initials = {m: [(*name.split(".", 1), t) for name, t in state] for m, state in states.items()}
        self.load(self.model, {f"{place[p]}.{m}.{name}": t for m, kept in initials.items() for p, name, t in kept})
        self.stage = run.options.epochs * run.steps / (self.options.reconboost_rounds * len(self.names))
        self.own = {m: {*self.model.encoders[m].parameters(), *self.model.heads[m].parameters()} for m in self.names}

    def flags(self, number: int) -> dict:
        stage, done = divmod(number, self.stage)
        return {"boosted": int(stage) % len(self.names) if done < self.stage / 2 else RECTIFY}

    def step(self, batch, boosted):
        """``boosted``: the place of the modality that learns alone, or RECTIFY."""
        with self.run.autocast():
            features, logits = self.forward(batch, training=True)
            if boosted == RECTIFY:
                loss = self.cross_entropy(logits, batch["labels"])
                parameters = set(self.parameters)
            else:
                m = self.names[boosted]
                parameters, shares = self.own[m], self.model.shares(features)
                others = torch.stack([z.detach() for name, z in shares.items() if name != m]).sum(0)
                known = as_float(others).softmax(-1).gather(1, batch["labels"][:, None])[:, 0]
                weight = (self.options.reconboost_label - self.options.reconboost_others * known) / logits.shape[1]
                loss = self.mean(weight * self.cross_entropy(shares[m], batch["labels"], reduction="none"), m, batch)
        learning = [p for p in self.parameters if p in parameters]
        grads = dict(zip(learning, self.gradients(loss, learning), strict=True))
        update(self.optimizer, self.parameters, [grads.get(p) for p in self.parameters])
        return {"loss": loss}


@methods.register("reconboost")
@reads(ReconBoostOptions)
def reconboost(run: Run) -> Outcome:
    """Modalities take turns to learn what the others miss, and are rectified together in between (ReconBoost)."""
    return train_joint(run.make(ReconBoost, initial=train_alone(run)))
