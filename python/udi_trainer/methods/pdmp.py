"""Performance-dominant modality prioritization (PDMP; Wei et al. 2026, arXiv 2604.05773).

Joint training in which the encoder of the modality that is best alone learns faster than the others:

    g <- gamma_p g in the encoder of the dominant modality,   g <- gamma_r g in the other encoders

The dominant modality is the most accurate one on validation among modalities trained alone. The factors multiply the
learning rate: with SGD that is the same, while AdamW would divide a factor of the gradient out again.

No code of the authors was found. The text of the paper that was available, its abstract and summaries, names the two
coefficients, which depend on the data set, but not their values: the defaults are this trainer's own.
"""

from dataclasses import dataclass

from ..options import Group, number, option, reads
from ..registry import methods
from ..run import Run
from ..training.loop import best_epoch, merit
from .joint import Joint, train_joint
from .outcome import Outcome
from .unimodal import train_alone


@dataclass(frozen=True, kw_only=True)
class PDMPOptions(Group, title="PDMP"):
    pdmp_dominant: float = option(2.0, number(float, above=0), "gamma_p: factor of the dominant modality's encoder")
    pdmp_rest: float = option(0.5, number(float, 0), "gamma_r: factor of the other encoders")


class PDMP(Joint):
    key = "pdmp"

    def __init__(self, run: Run, dominant: str):
        super().__init__(run)
        options = run.options.of(PDMPOptions)
        encoders = {
            m: [p for p in encoder.parameters() if p.requires_grad] for m, encoder in self.model.encoders.items()
        }
        scale = {m: options.pdmp_dominant if m == dominant else options.pdmp_rest for m in encoders}
        groups = [{"params": parameters, "lr_scale": scale[m]} for m, parameters in encoders.items()]
        inside = {p for parameters in encoders.values() for p in parameters}
        groups.append({"params": [p for p in self.parameters if p not in inside]})
        self.optimizer = self.parts["optimizer"] = run.optimizer(groups)


@methods.register("pdmp")
@reads(PDMPOptions)
def pdmp(run: Run) -> Outcome:
    """Joint training in which the encoder of the modality that is best alone learns faster than the others (PDMP)."""

    def choose() -> str:
        select, histories = run.options.select, {m: run.history[task.name] for m, task in train_alone(run).items()}
        best = {m: merit(best_epoch(history, select), select) for m, history in histories.items()}
        return max(best, key=lambda m: best[m])

    dominant = run.decide("dominant modality", choose)
    outcome = train_joint(run.make(PDMP, dominant=dominant))
    outcome.metrics["dominant"] = dominant
    return outcome
