import statistics

from ..registry import studies
from ..study import Study, Variant
from ..summary import gather, paired

FOLDS = range(6)
DATA = "--dataset spokendigits --encoder image=mlp,speech=mlp --sample-rate 4000 --stft 64,32 --epochs 8"
SETTINGS = {
    "udi": "--baselines joint,ogm-ge,dimml",
    "udi, warm": "--baselines none --follower-init anchor-phase",
    "udi, warm, static 1,0": "--baselines none --follower-init anchor-phase --alpha 1,0",
}
OTHERS = ("ensemble", "joint", "ogm-ge", "dimml")


@studies.register("speakers")
class Speakers(Study):
    """Spoken and written digits of speakers never heard in training: does UDI pass the ensemble, and what lets it?"""

    seeds = 2
    variants = [
        Variant(name, f"{DATA} --fold {fold} {options}", f"fold {fold}")
        for fold in FOLDS
        for name, options in SETTINGS.items()
    ]

    def tables(self, records):
        return super().tables(by_fold(records))

    def notes(self, records):
        found = gather(self, by_fold(records)).get(("", "prediction"), {})
        pairs = [(ours, theirs) for ours in SETTINGS for theirs in OTHERS if ours in found and theirs in found]
        gains = [(ours, theirs, paired(found[ours], found[theirs])) for ours, theirs in pairs]
        lines = [f"{ours} against {theirs}: {gain} points." for ours, theirs, gain in gains if gain]
        unit = "Folds stand in the place of seeds: each counts by the mean of its seeds."
        return [*lines, f"{unit} Test speakers are in two folds each, so folds are not independent."]

    def draw(self, records, folder):
        return super().draw(by_fold(records), folder)


def by_fold(records: list[dict]) -> list[dict]:
    """A record a variant and fold, with the mean scores of its seeds, and the fold as its seed."""
    groups: dict = {}
    for record in records:
        groups.setdefault((record["variant"], record["condition"]), []).append(record)
    return [
        group[0] | {"condition": "", "seed": int(fold.split()[-1]), "metrics": mean([r["metrics"] for r in group])}
        for (_, fold), group in groups.items()
    ]


def mean(values: list):
    """Of numbers in dicts of the same keys; what is no number is the first one's."""
    if isinstance(values[0], dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: mean([value[key] for value in values if key in value]) for key in keys}
    return statistics.fmean(values) if isinstance(values[0], float) else values[0]
