from pathlib import Path

import numpy
import torch
from sklearn.manifold import TSNE

from udi_trainer import load
from udi_trainer.evaluation.plotting import new_figure
from udi_trainer.predictor import FILE, saved_dataset
from udi_trainer.run_folder import read_json

from ..registry import studies
from ..study import Study, Variant

ALPHAS = {"without": "1,0", "with": "1,1"}


@studies.register("features")
class Features(Study):
    """Does the complementary loss make a follower's features complement those of the anchor?"""

    variants = [
        Variant(f"{name} L_com", f"--dataset splitdigits --baselines none --controller static --alpha {alpha}")
        for name, alpha in ALPHAS.items()
    ]
    columns = Study.columns | {"CKA with anchor": ("cka", 1), "R² from anchor": ("r2", 1)}

    def entries(self, record):
        for entry in super().entries(record):
            modality = entry.section.removeprefix("follower ")
            if not entry.baseline and modality in record["metrics"]["similarity"]:
                entry.scores = entry.scores | record["metrics"]["similarity"][modality]
            yield entry

    def draw(self, records, folder):
        """Adds t-SNE of a follower's test features, if the runs of the first seed still exist."""
        names, path = super().draw(records, folder), folder / "features.png"
        seed = min(record["seed"] for record in records)
        runs = {v.name: folder / "runs" / f"{v.name.replace(' ', '-')}-seed{seed}" / "run" for v in self.variants}
        if all((run / FILE).exists() for run in runs.values()):
            figure = new_figure(12, 5.6)
            panels = figure.subplots(1, len(runs), squeeze=False)[0]
            for axes, (name, run) in zip(panels, runs.items(), strict=True):
                modality, features, labels = follower_features(run)
                points = TSNE(random_state=0).fit_transform(features)
                dots = axes.scatter(*points.T, c=labels, cmap="tab10", s=14, linewidth=0)
                axes.set_title(f"t-SNE of follower {modality}, {name}, seed {seed}", loc="left", fontsize=11)
                axes.set_xticks([])
                axes.set_yticks([])
            figure.legend(*dots.legend_elements(), title="class", frameon=False, loc="outside right center")
            figure.savefig(path, dpi=130)
        return [*names, *([path.name] if path.exists() else [])]


@torch.no_grad()
def follower_features(run: Path) -> tuple[str, numpy.ndarray, numpy.ndarray]:
    """The first follower of a finished run: its modality, its features of the test samples, and their labels."""
    config, predictor = read_json(run / "config.json"), load(run, device="cpu")
    anchor = read_json(run / "metrics.json")["anchor"]
    test = saved_dataset(config).test
    modality = next(m for m in predictor.modalities if m != anchor)
    features, _ = predictor.models[modality].eval()(predictor.modalities[modality].sample(test, len(test)))
    return modality, features.numpy(), test.labels.numpy()
