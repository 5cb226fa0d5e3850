from collections import Counter

from ..registry import studies
from ..study import Study, Variant
from ..summary import mean_and_std

UDI = "--controller static --baselines none"
MODALITIES = {"cgdigits": ("gray", "color"), "splitdigits": ("left", "right")}


@studies.register("anchor")
class Anchor(Study):
    """How much does it matter which modality is the anchor, and does validation choose the best?"""

    variants = [
        Variant(name, f"--dataset {dataset} {UDI} --anchor {name.removeprefix('anchor ')}", dataset)
        for dataset, modalities in MODALITIES.items()
        for name in ("auto", *(f"anchor {m}" for m in modalities))
    ]

    def notes(self, records):
        return [note for dataset in MODALITIES for note in choice(dataset, records)]


def choice(dataset, records):
    """Compares the anchor chosen on validation with the one that is best on test."""
    by_seed, modalities = {}, MODALITIES[dataset]
    for record in records:
        if record["condition"] == dataset:
            by_seed.setdefault(record["seed"], {})[record["variant"]] = record["metrics"]
    chosen, losses = Counter(), []
    for metrics in by_seed.values():
        test = {m: metrics[f"anchor {m}"]["fused"]["test_acc"] for m in modalities if f"anchor {m}" in metrics}
        if "auto" in metrics and len(test) == len(modalities):
            chosen[metrics["auto"]["anchor"]] += 1
            losses.append(max(test.values()) - test[metrics["auto"]["anchor"]])
    if losses:
        votes = ", ".join(f"{m} {n}" for m, n in chosen.most_common())
        best = sum(loss == 0 for loss in losses)
        yield (
            f"{dataset}: validation chose {votes}. On {best} of {len(losses)} seeds no other anchor fused better on"
            f" test; on average the best anchor would have gained {100 * mean_and_std(losses)[0]:.2f} points."
        )
