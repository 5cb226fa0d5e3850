from ..plots import trend
from ..registry import studies
from ..study import RESPLIT, Study, Variant
from ..summary import collect, format_difference, scores_by_seed

LABELS = (50, 100, 200)
SETTINGS = {
    "udi": "--controller dynamic --baselines joint,joint-self-training,self-training",
    "co-training": "--method co-training --rounds 2 --controller static --alpha 1,0 --baselines none",
}
CLAIMS = [
    ("udi", "ensemble"),
    ("udi", "joint"),
    ("co-training", "ensemble"),
    ("co-training", "udi"),
    ("udi", "self-training"),
    ("co-training", "self-training"),
    ("udi", "sklearn-concat"),
    ("co-training", "sklearn-concat"),
]
LINES = ("co-training", "udi", "ensemble", "joint")


@studies.register("fewlabels")
class FewLabels(Study):
    """Few of 1077 pairs of digit halves have labels: how much does a follower gain from the unlabelled pairs?"""

    seeds, seeding = range(10, 20), RESPLIT
    variants = [
        Variant(name, f"--dataset fewdigits --labels {n} {options}", f"{n} labels")
        for n in LABELS
        for name, options in SETTINGS.items()
    ]

    def notes(self, records):
        tables, lines = collect(self, records), []
        for n in LABELS:
            table = tables.get((f"{n} labels", "prediction"), {})
            for ours, theirs in CLAIMS:
                if gain := ours in table and theirs in table and format_difference(table[ours], table[theirs]):
                    lines.append(f"{n} labels: {ours} against {theirs}: {gain} points.")
        return lines

    def draw(self, records, folder):
        tables, scores = collect(self, records), {}
        for n in LABELS:
            for name, by_seed in tables.get((f"{n} labels", "prediction"), {}).items():
                scores.setdefault(name, {})[str(n)] = scores_by_seed(by_seed, "test_acc")
        shown = {name: scores[name] for name in LINES if name in scores}
        title = "Halves of digits, few of 1077 pairs with a label: test accuracy, %"
        path = folder / "labels.png"
        return [trend(shown, CLAIMS[:3], title, "labels", path), *super().draw(records, folder)]
