from collections import Counter

from . import Study, Variant, studies
from .summary import spread


@studies.register("anchor")
class Anchor(Study):
    """How much does it matter which modality is the anchor, and does validation choose the best?"""

    modalities = ("gray", "color")
    variants = [
        Variant("auto", "--baselines none"),
        *(Variant(f"anchor {m}", f"--baselines none --anchor {m}") for m in modalities),
    ]

    def notes(self, runs):
        """Validation's choice against the one that was best on test, which nobody can make beforehand."""
        by_seed = {}
        for run in runs:
            by_seed.setdefault(run["seed"], {})[run["variant"]] = run["metrics"]
        chosen, losses = Counter(), []
        for metrics in by_seed.values():
            test = {m: metrics[f"anchor {m}"]["fused"]["test_acc"] for m in self.modalities if f"anchor {m}" in metrics}
            if "auto" in metrics and len(test) == len(self.modalities):
                chosen[metrics["auto"]["anchor"]] += 1
                losses.append(max(test.values()) - test[metrics["auto"]["anchor"]])
        if not losses:
            return []
        votes = ", ".join(f"{m} {n}" for m, n in chosen.most_common())
        right = sum(loss == 0 for loss in losses)
        return [
            f"Validation chose: {votes}. On {right} of {len(losses)} seeds no other anchor fused better on test; on the"
            f" mean of seeds the best other one would have been worth {100 * spread(losses)[0]:.2f} points."
        ]
