from ..registry import studies
from ..study import NOISE, Study, Variant
from ..summary import differences, interval, mean_and_std

PAPER = "dynamic"
ALPHAS = {
    PAPER: "--controller dynamic",
    "static 1,1": "--controller static --alpha 1,1",
    "static 3,3": "--controller static --alpha 3,3",
}


@studies.register("defaults")
class Defaults(Study):
    """Does validation favor another default than the paper's controller? Many seeds, where fusion uses a follower."""

    seeds = 20
    variants = [
        Variant(name, f"--dataset splitdigits --baselines none {options} {noise}", condition or "clean")
        for condition, noise in NOISE.items()
        for name, options in ALPHAS.items()
    ]

    def notes(self, records):
        """The paired gain in fused validation accuracy over the paper's controller, averaged over conditions."""
        fused = {}
        for record in records:
            by_seed = fused.setdefault(record["variant"], {}).setdefault(record["seed"], {})
            by_seed[record["condition"]] = record["metrics"]["fused"]["val_acc"]
        means = {
            name: {seed: mean_and_std(by.values())[0] for seed, by in by_seed.items() if len(by) == len(NOISE)}
            for name, by_seed in fused.items()
        }
        texts = []
        for name, ours in means.items():
            gains = [100 * x for x in differences(ours, means.get(PAPER, {}))]
            if name != PAPER and len(gains) > 1:
                mean, half = mean_and_std(gains)[0], interval(gains)
                texts.append(f"{name}: {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]")
        text = f"Fused validation accuracy against {PAPER}, mean of clean and noisy: {'; '.join(texts)}."
        return [text] if texts else []
