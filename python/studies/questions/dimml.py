from ..registry import studies
from ..study import SCORES, Entry, Study, Variant
from ..summary import differences, interval, spread

DATASETS = {"cgdigits": "--dataset cgdigits", "halves": "--dataset splitdigits"}
FULL = "full contrast, both ways"
NEITHER = "neither shared classifier nor contrast"
SETTINGS = {
    "dimml": "--baselines udi,ensemble,joint",
    "no shared classifier": "--baselines none --shared-weight 0",
    "no contrast": "--baselines none --contrast-weight 0",
    FULL: "--baselines none --contrast full",
    NEITHER: "--baselines none --shared-weight 0 --contrast-weight 0",
}
MEAN = "mean of the heads' probabilities"
CLAIMS = [
    (NEITHER, "own heads"),
    *((other, "fused") for other in (NEITHER, "no shared classifier", "no contrast", FULL, MEAN, "ensemble", "udi")),
]


@studies.register("dimml")
class DIMML(Study):
    """Beside UDI, and without its parts: what does DI-MML owe to shared classifier, contrast and certainty?"""

    variants = [
        Variant(name, f"--method dimml {dataset} {options}", condition)
        for condition, dataset in DATASETS.items()
        for name, options in SETTINGS.items()
    ]

    def keep(self, metrics, history):
        kept = super().keep(metrics, history)
        by_rule = metrics["fused"]["by_rule"]
        kept["metrics"]["mean"] = {name: by_rule["mean"][name] for name in SCORES}
        found = metrics.get("effective_dims", {})
        kept["effective_dims"] = {m: [len(facts["dims"]), facts["lacking_in"]] for m, facts in found.items()}
        return kept

    def entries(self, record):
        yield from super().entries(record)
        if record["variant"] == "dimml":
            yield Entry("prediction", f"dimml, {MEAN}", record["metrics"]["mean"])
        for m, scores in record["metrics"]["modalities"].items():
            yield Entry(f"own head {m}", record["variant"], scores)

    def notes(self, records):
        """DI-MML's gains in test accuracy, seed by seed, and the effective dimensions."""
        lines = []
        for condition in DATASETS:
            ours = [record for record in records if record["condition"] == condition]
            reached = {}
            for record in ours:
                metrics, name = record["metrics"], record["variant"]
                own = [scores["test_acc"] for scores in metrics["modalities"].values()]
                figures = {(name, "fused"): metrics["fused"]["test_acc"], (name, "own heads"): sum(own) / len(own)}
                if name == "dimml":
                    figures |= {(other, "fused"): s["test_acc"] for other, s in metrics["baselines"].items()}
                    figures[MEAN, "fused"] = metrics["mean"]["test_acc"]
                for key, value in figures.items():
                    reached.setdefault(key, {})[record["seed"]] = value
            for other, what in CLAIMS:
                pair = reached.get(("dimml", what), {}), reached.get((other, what), {})
                gains = [100 * x for x in differences(*pair)]
                if len(gains) > 1:
                    mean, half = spread(gains)[0], interval(gains)
                    bounds = f"[{mean - half:+.2f}, {mean + half:+.2f}]"
                    lines.append(f"{condition}: dimml's {what} against {other}: {mean:+.2f} {bounds} points.")
            whole = [record["effective_dims"] for record in ours if record["variant"] == "dimml"]
            for m in whole[0] if whole else ():
                counts = [found[m][0] for found in whole]
                lacking = [n for found in whole for n in found[m][1].values()]
                lines.append(
                    f"{condition}: {m} is effective in {min(counts)} to {max(counts)} of 64 dimensions;"
                    f" another modality lacks {min(lacking)} to {max(lacking)} of these."
                )
        return lines
