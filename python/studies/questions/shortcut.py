from ..plots import trend
from ..registry import studies
from ..study import RESPLIT, Entry, Study, Variant
from ..summary import collect, format_difference, scores_by_seed

RHOS = (0.9, 0.95, 0.99)
ALONE, PLAIN, GIVEN, RESIDUAL = "digit alone", "CLUB", "CLUB given the label", "residual"
UDI = "--method udi --controller static --baselines none"
SETTINGS = {
    "ensemble": "--method ensemble --baselines joint",
    "consistency": f"{UDI} --alpha 1,0",
    PLAIN: f"{UDI} --alpha 0,30",
    GIVEN: f"{UDI} --alpha 0,30 --club given-label",
    RESIDUAL: f"{UDI} --alpha 0,0 --follower-loss residual",
}
CLAIMS = [(PLAIN, ALONE), (GIVEN, PLAIN), (RESIDUAL, GIVEN), (RESIDUAL, PLAIN), ("consistency", ALONE)]
SHIFTED = "digit, random hue in test"
ORACLE = "random hue in training, too"


@studies.register("shortcut")
class Shortcut(Study):
    """A hue usually reveals the label, and a digit in this hue is the other modality: what makes it ignore the hue?"""

    seeding = RESPLIT
    variants = [
        Variant(name, f"--dataset huedigits --resplit 360 --rho {rho} {options}", f"rho {rho}")
        for rho in RHOS
        for name, options in SETTINGS.items()
    ] + [Variant("ensemble", "--dataset huedigits --resplit 360 --rho 0.1 --method ensemble", ORACLE)]

    def keep(self, metrics, history):
        kept = super().keep(metrics, history)
        shifted = {"digit": metrics["modalities"]["digit"]["shifted_acc"], "fused": metrics["fused"]["shifted_acc"]}
        baselines = {name: scores["shifted_acc"] for name, scores in metrics["baselines"].items()}
        return kept | {"shifted": shifted | baselines}

    def entries(self, record):
        """The fused predictions on test data like the training data, then the digit classifier on random hues."""
        name, metrics, shifted = record["variant"], record["metrics"], record["shifted"]
        alone = name == "ensemble"
        for other, scores in metrics["baselines"].items():
            yield Entry("prediction, test like training", other, scores, baseline=True)
            yield Entry(SHIFTED, other, {"val_acc": scores["val_acc"], "test_acc": shifted[other]})
        yield Entry("prediction, test like training", name, metrics["fused"], baseline=alone)
        digit = metrics["modalities"]["digit"]
        scores = {"val_acc": digit["val_acc"], "test_acc": shifted["digit"]}
        if record["condition"] == ORACLE:
            name, alone = "digit alone, " + ORACLE, False
        yield Entry(SHIFTED, ALONE if alone else name, scores, baseline=alone)

    def notes(self, records):
        tables, lines = collect(self, records), []
        for rho in RHOS:
            table = tables.get((f"rho {rho}", SHIFTED), {})
            for ours, theirs in CLAIMS:
                if gain := ours in table and theirs in table and format_difference(table[ours], table[theirs]):
                    lines.append(f"rho {rho}, random hue in test: {ours} against {theirs}: {gain} points.")
        lines.append("The weights were set by hand: validation has the hues of training and cannot choose them.")
        return lines

    def draw(self, records, folder):
        tables, scores = collect(self, records), {}
        for rho in RHOS:
            for name, by_seed in tables.get((f"rho {rho}", SHIFTED), {}).items():
                scores.setdefault(name, {})[str(rho)] = scores_by_seed(by_seed, "test_acc")
        title = "Digits in a hue that tells the label with probability rho; in test it is random: accuracy, %"
        path = folder / "shift.png"
        shown = {
            name: scores[name] for name in (RESIDUAL, GIVEN, PLAIN, ALONE, "consistency", "joint") if name in scores
        }
        return [trend(shown, CLAIMS[1:3], title, "rho", path), *super().draw(records, folder)]
