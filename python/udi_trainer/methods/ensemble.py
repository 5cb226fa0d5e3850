"""The plain ensemble: each modality trained alone, outputs fused."""

from ..evaluation.fusion import FusionOptions
from ..evaluation.scores import scores
from ..options import reads
from ..registry import methods
from ..run import Run
from ..training.inference import outputs
from .outcome import Outcome
from .unimodal import train_alone


@methods.register("ensemble")
@reads(FusionOptions)
def ensemble(run: Run) -> Outcome:
    """Independently trained modalities, outputs fused."""
    tasks = train_alone(run)
    logits = {modality: outputs(task, run) for modality, task in tasks.items()}
    alone = {modality: scores(z, run.labels) for modality, z in logits.items()}
    fused, rule = run.fuse(logits)
    metrics = {"modalities": alone, "unimodal": alone, "fused": fused}
    return Outcome(metrics, {modality: task.model for modality, task in tasks.items()}, rule)
