from ..registry import studies
from ..study import SCORES, Entry, Study, Variant
from ..summary import differences, interval, mean_and_std

DATASETS = {"cgdigits": "--dataset cgdigits", "halves": "--dataset splitdigits"}
FULL = "full contrast, both ways"
NEITHER = "neither shared classifier nor contrast"
SETTINGS = {
    "dimml": "--baselines udi,ensemble,joint --controller static",
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
    """How does DI-MML compare with UDI, and what do shared classifier, contrast and certainty contribute?"""

    variants = [
        Variant(name, f"--method dimml {dataset} {options}", condition)
        for condition, dataset in DATASETS.items()
        for name, options in SETTINGS.items()
    ]

    def keep(self, metrics, history):
        kept = super().keep(metrics, history)
        by_rule = metrics["fused"]["by_rule"]
        kept["metrics"]["mean"] = {name: by_rule["mean"][name] for name in SCORES}
        effective = metrics.get("effective_dims", {})
        kept["effective_dims"] = {m: [len(dims["dims"]), dims["lacking_in"]] for m, dims in effective.items()}
        return kept

    def entries(self, record):
        yield from super().entries(record)
        if record["variant"] == "dimml":
            yield Entry("prediction", f"dimml, {MEAN}", record["metrics"]["mean"])
        for m, scores in record["metrics"]["modalities"].items():
            yield Entry(f"own head {m}", record["variant"], scores)

    def notes(self, records):
        """DI-MML's paired gains in test accuracy, and the effective dimensions."""
        lines = []
        for condition in DATASETS:
            ours = [record for record in records if record["condition"] == condition]
            accuracies = {}
            for record in ours:
                metrics, name = record["metrics"], record["variant"]
                own = [scores["test_acc"] for scores in metrics["modalities"].values()]
                figures = {(name, "fused"): metrics["fused"]["test_acc"], (name, "own heads"): sum(own) / len(own)}
                if name == "dimml":
                    figures |= {(other, "fused"): s["test_acc"] for other, s in metrics["baselines"].items()}
                    figures[MEAN, "fused"] = metrics["mean"]["test_acc"]
                for key, value in figures.items():
                    accuracies.setdefault(key, {})[record["seed"]] = value
            for other, what in CLAIMS:
                pair = accuracies.get(("dimml", what), {}), accuracies.get((other, what), {})
                gains = [100 * x for x in differences(*pair)]
                if len(gains) > 1:
                    mean, half = mean_and_std(gains)[0], interval(gains)
                    bounds = f"[{mean - half:+.2f}, {mean + half:+.2f}]"
                    lines.append(f"{condition}: dimml's {what} against {other}: {mean:+.2f} {bounds} points.")
            effective = [record["effective_dims"] for record in ours if record["variant"] == "dimml"]
            for m in effective[0] if effective else ():
                counts = [dims[m][0] for dims in effective]
                lacking = [n for dims in effective for n in dims[m][1].values()]
                lines.append(
                    f"{condition}: {m} has {min(counts)} to {max(counts)} effective dimensions of 64;"
                    f" another modality lacks {min(lacking)} to {max(lacking)} of these."
                )
        return lines
