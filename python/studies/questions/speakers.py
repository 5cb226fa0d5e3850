import statistics

from ..plots import trend
from ..registry import studies
from ..study import Study, Variant
from ..summary import collect, format_difference, scores_by_seed
from ..tables import format_scores, markdown

FOLDS = range(6)
DATA = "--dataset spokendigits --audio-length 0.6 --epochs 12"
FEW = "one speaker with labels"
SETTINGS = {
    "": {
        "udi": "--controller static --baselines joint,ogm-ge,dimml",
        "udi, warm": "--controller static --baselines none --follower-init anchor-phase",
        "udi, warm, static 1,0": "--controller static --baselines none --follower-init anchor-phase --alpha 1,0",
    },
    FEW: {
        "udi, static 1,0": "--labelled-speakers 1 --fusion loglinear --controller static --alpha 1,0 --baselines joint"
    },
}
OTHERS = ("ensemble", "joint", "ogm-ge", "dimml", "image alone")
LABELLED = {FEW: "one", "": "all three"}
BEST = {FEW: "udi, static 1,0", "": "udi, warm"}  # best on validation


@studies.register("speakers")
class Speakers(Study):
    """Spoken and written digits with new speakers in test: does UDI beat the ensemble, and under which conditions?"""

    seeds, unit = 2, "fold"
    seeding = """\
A fold counts with the mean of its seeds, which change the initial weights and the
order of samples. Each speaker is tested in two folds, so folds are not independent."""
    variants = [
        Variant(name, f"{DATA} --fold {fold} {options}", f"{condition}, fold {fold}".removeprefix(", "))
        for condition, settings in SETTINGS.items()
        for fold in FOLDS
        for name, options in settings.items()
    ]

    def keep(self, metrics, history):
        kept = super().keep(metrics, history)
        judged = {"": metrics["fused"], "ensemble": metrics["ensemble"], **metrics["baselines"]}
        kept["metrics"]["without"] = {name: scores["without"] for name, scores in judged.items()}
        return kept

    def tables(self, records):
        return f"{super().tables(by_fold(records))}\n\n### One modality missing in test\n\n{missing(by_fold(records))}"

    def notes(self, records):
        tables, lines = collect(self, by_fold(records)), []
        for condition, settings in SETTINGS.items():
            table = tables.get((condition, "prediction"), {})
            for ours in settings:
                for theirs in OTHERS:
                    if gain := ours in table and theirs in table and format_difference(table[ours], table[theirs]):
                        lines.append(f"{condition or 'All labelled'}: {ours} against {theirs}: {gain} points.")
        return lines

    def draw(self, records, folder):
        merged = by_fold(records)
        tables, scores = collect(self, merged), {}
        for condition, ticks in LABELLED.items():
            table = tables.get((condition, "prediction"), {})
            for name in (BEST[condition], *OTHERS):
                if name in table:
                    shown = "udi" if name == BEST[condition] else name
                    scores.setdefault(shown, {})[ticks] = scores_by_seed(table[name], "test_acc")
        title = "New speakers: test accuracy, %"
        path, claims = folder / "speakers.png", [("udi", theirs) for theirs in OTHERS]
        return [
            trend(scores, claims, title, "training speakers with labels, of three", path),
            *super().draw(merged, folder),
        ]


def missing(records: list[dict]) -> str:
    """Test accuracy of each fused prediction without each modality, in runs where all speakers have labels."""
    accuracies: dict = {}
    for record in records:
        for name, without in record["metrics"]["without"].items() if not record["condition"] else ():
            for m, accuracy in without.items():
                accuracies.setdefault(name or record["variant"], {}).setdefault(m, {})[record["seed"]] = accuracy
    modalities = list(next(iter(accuracies.values()), ()))
    rows = [[name, *(format_scores(by[m].values(), 100) for m in modalities)] for name, by in accuracies.items()]
    return markdown([["", *(f"without {m}" for m in modalities)], *rows])


def by_fold(records: list[dict]) -> list[dict]:
    """One record per variant and fold, with the mean scores of its seeds. The fold takes the place of the seed."""
    groups: dict = {}
    for record in records:
        groups.setdefault((record["variant"], record["condition"]), []).append(record)
    merged = []
    for (_, condition), group in groups.items():
        condition, _, fold = condition.rpartition("fold ")
        scores = mean([record["metrics"] for record in group])
        merged.append(group[0] | {"condition": condition.removesuffix(", "), "seed": int(fold), "metrics": scores})
    return merged


def mean(values: list):
    """Averages the floats in nested dicts with the same keys; other values are those of the first dict."""
    if isinstance(values[0], dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: mean([value[key] for value in values if key in value]) for key in keys}
    return statistics.fmean(values) if isinstance(values[0], float) else values[0]
