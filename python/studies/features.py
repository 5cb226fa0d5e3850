import json

import torch
from sklearn.manifold import TSNE

from data import datasets
from models import Classifier, encoders

from . import Study, Variant, studies
from .summary import new_figure

WEIGHTS = {"without": "1,0", "with": "1,1"}


@studies.register("features")
class Features(Study):
    """Does the complementary loss make a follower's features say what the anchor's do not?"""

    variants = [
        Variant(f"{name} L_com", f"--dataset splitdigits --baselines none --controller static --alpha {alpha}")
        for name, alpha in WEIGHTS.items()
    ]
    columns = Study.columns | {"CKA with anchor": ("cka", 1), "R² from anchor": ("r2", 1)}

    def rows(self, variant, run):
        for row in super().rows(variant, run):
            modality = row.section.removeprefix("follower ")
            if not row.baseline and modality in run["metrics"]["similarity"]:
                row.figures = row.figures | run["metrics"]["similarity"][modality]
            yield row

    def draw(self, runs, folder):
        """Beside the accuracies, t-SNE of a follower's test features in the first seed's runs, while these exist."""
        names, path = super().draw(runs, folder), folder / "features.png"
        seed = min(run["seed"] for run in runs)
        found = {v.name: folder / "runs" / f"{v.name.replace(' ', '-')}-seed{seed}" / "run" for v in self.variants}
        if all((run / "metrics.json").exists() for run in found.values()):
            figure = new_figure(12, 5.6)
            panels = figure.subplots(1, len(found), squeeze=False)[0]
            for axes, (name, run) in zip(panels, found.items(), strict=True):
                modality, features, labels = follower_features(run)
                points = TSNE(random_state=0).fit_transform(features)
                dots = axes.scatter(*points.T, c=labels, cmap="tab10", s=14, linewidth=0)
                axes.set_title(f"t-SNE of follower {modality}, {name}, seed {seed}", loc="left", fontsize=11)
                axes.set_xticks([])
                axes.set_yticks([])
            figure.legend(*dots.legend_elements(), title="class", frameon=False, loc="outside right center")
            figure.savefig(path, dpi=130)
        return [*names, *([path.name] if path.exists() else [])]


def follower_features(run):
    """The first follower of an ended run: its modality, its features of the test samples, and their labels."""
    config, metrics = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "metrics"))
    data = datasets.find(config["dataset"])(config["data_root"])
    modality = next(m for m in data.modalities if m != metrics["anchor"])
    view = data.modalities[modality]
    model = Classifier(encoders.find(view.encoder)(view.shape(data.train)), data.classes)
    checkpoint = torch.load(run / "checkpoints" / f"follower-{modality}.pt", weights_only=True)
    model.load_state_dict(checkpoint["best"])
    with torch.no_grad():
        features, _ = model.eval()(view.input(data.test.rows(torch.arange(len(data.test)), view.reads)))
    return modality, features.numpy(), data.test.labels.numpy()
