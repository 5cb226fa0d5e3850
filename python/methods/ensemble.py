"""The plain ensemble: modalities trained alone, outputs fused."""

from fit import outputs
from fusion import fuse, scores

from . import methods
from .unimodal import train_alone


@methods.register("ensemble")
def ensemble(run):
    """Independently trained modalities, outputs fused."""
    logits = {modality: outputs(task, run) for modality, task in train_alone(run).items()}
    alone = {modality: scores(z, run.labels) for modality, z in logits.items()}
    return {"modalities": alone, "unimodal": alone, "fused": fuse(run.options.fusion, logits, run.labels)}
