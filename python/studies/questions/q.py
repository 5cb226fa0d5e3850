from udi_trainer.models.encoders import FEATURES

from ..registry import studies
from ..study import Study, Variant

DATASETS = ("splitdigits", "cgdigits")
SETTINGS = {
    "default": "",
    "linear": "--q-depth 0",
    "2 hidden layers": "--q-depth 2",
    "width 32": "--q-width 32",
    "width 512": "--q-width 512",
    "lr × 0.1": "--q-lr 0.1",
    "lr × 10": "--q-lr 10",
    "4 steps a batch": "--q-steps 4",
    "16 steps a batch": "--q-steps 16",
    "features as they are": "--club-norm none",
}


@studies.register("q")
class Q(Study):
    """Does it matter to accuracy how CLUB's q is made and fitted? Static weights 1,1: the bound always counts."""

    variants = [
        Variant(name, f"--dataset {dataset} --baselines none --controller static --alpha 1,1 {options}", dataset)
        for dataset in DATASETS
        for name, options in SETTINGS.items()
    ]
    columns = Study.columns | {"bound, nats": ("bound", 1), "q's loss": ("q_nll", 1), "R² from anchor": ("r2", 1)}

    def keep(self, metrics, history):
        """Adds the bound and q's loss, averaged over each follower's last epoch."""
        last = {row["modality"]: row for row in history if row["phase"] == "follower"}
        ends = {m: {"bound": FEATURES * row["com"], "q_nll": row["q_nll"]} for m, row in last.items()}
        return super().keep(metrics, history) | {"ends": ends}

    def entries(self, record):
        for entry in super().entries(record):
            modality = entry.section.removeprefix("follower ")
            if not entry.baseline and modality in record["ends"]:
                entry.scores = entry.scores | record["ends"][modality]
                entry.scores["r2"] = record["metrics"]["similarity"][modality]["r2"]
            yield entry

    def notes(self, records):
        return ["Bound and q's loss are means over the training batches of the last epoch; R² is of test features."]
