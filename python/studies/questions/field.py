import statistics
from collections.abc import Iterator
from pathlib import Path

from udi_trainer.data.dataset import Dataset
from udi_trainer.data.openml import SOURCES, downloaded
from udi_trainer.options import Options
from udi_trainer.registry import datasets

from ..plots import benchmark
from ..ranks import friedman, mean_ranks
from ..registry import studies
from ..study import RESPLIT, Study, Variant, scores_of
from ..summary import differences, mean_with_interval
from ..tables import format_scores, markdown

METHODS = "ensemble joint joint-sum ogm-ge gramian mmpareto dgl g2d mla reconboost pdmp pmr g-blending dimml".split()
SEMI_SUPERVISED = ["self-training", "joint-self-training"]  # further methods that learn from samples without labels
CO_TRAINING = "--method co-training --controller static --alpha 1,0 --baselines none"
SCIKIT = "--method sklearn-late --baselines sklearn-concat"
REFERENCE = "ensemble"
BUILT_IN = {"breastcancer": "--resplit 85", "splitdigits": "--resplit 360", "cgdigits": ""}
FOLDERS = ("cremad", "kinetics-sounds", "ave", "ucf101", "modelnet40", "avmnist")
SHORTCUT = ("cgdigits",)  # made so that joint training fails: not for few labels
STEPS, EPOCHS = 600, (15, 50)  # how many steps epochs aim at, and the bounds of epochs
FEW = (60, 200)  # bounds of the labels that are kept: ten of each class, at most a quarter
# The stages that a method trains, as the log names them; by default one of its own name, of all modalities.
ALONE, JOINT = "anchor", "joint, all"
STAGES = {
    "udi": (ALONE, "follower"),
    "ensemble": (ALONE,),
    "dimml": ("detached, all", "fusion, all"),
    "co-training": (ALONE, "follower"),
    "self-training": (ALONE, "student"),
    "joint-self-training": (JOINT, "student, all"),
    "g-blending": (ALONE, JOINT, "g-blending, all"),
    **{m: (ALONE, f"{m}, all") for m in ("g2d", "reconboost", "pdmp")},
}
HEAD = """\
Accuracies are on test, in percent: mean ± standard deviation over seeds. All methods have the same encoders, batches,
epochs of each stage, optimizer and learning rate, and their papers' hyper-parameters; nothing is tuned for any of them.
The epoch is chosen on validation. The difference is to the {reference}: the mean over data sets, with the 95% t
interval over data sets. Ranks are of mean accuracies, 1 is the best. {seeding}"""


@studies.register("field")
class Field(Study):
    """How do the field's methods compare on all data sets at hand, with all labels and with few?"""

    seeds, seeding = range(10, 15), RESPLIT

    def prepare(self, extra: list[str]) -> list[str]:
        """Finds the data sets: of scikit-learn, of OpenML where it has downloaded them, and what is in --data-root."""
        root, rest = None, list(extra)
        for i, token in enumerate(extra):
            if token.startswith("--data-root"):
                root = Path(token.partition("=")[2] or extra[i + 1])
                rest = extra[:i] + extra[i + 1 + ("=" not in token) :]
        self.variants = variants(root)
        return rest

    def keep(self, metrics, history):
        kept = {metrics["method"]: metrics["fused"], **metrics["baselines"]}
        seconds: dict[str, float] = {}
        for row in history:
            stage = row["phase"] if row["modality"] else f"{row['phase']}, all"
            seconds[stage] = seconds.get(stage, 0) + row["seconds"]
        cost = {m: [seconds[s] for s in STAGES.get(m, (f"{m}, all",)) if s in seconds] for m in kept}
        alone = {m: scores_of(scores) for m, scores in metrics["unimodal"].items()}
        scores = {m: scores_of(fused) for m, fused in kept.items()}
        return {"metrics": {"scores": scores, "alone": alone, "seconds": {m: sum(s) for m, s in cost.items() if s}}}

    def tables(self, records):
        parts = [f"{HEAD.format(reference=REFERENCE, seeding=self.seeding)}"]
        for half, title in HALVES.items():
            if scores := collect(records, half):
                parts += [f"## {title}", accuracies(scores), f"### Difference to the {REFERENCE}, by data set"]
                parts += ["Points, paired by seed, with the 95% t interval over seeds.", by_set(scores)]
        return "\n\n".join([*parts, "## Cost", COST, cost(records)])

    def draw(self, records, folder):
        names = []
        for half, title in HALVES.items():
            if scores := collect(records, half):
                path = folder / f"{half}.png"
                names.append(benchmark(points(scores), mean_ranks(means(scores)), title, REFERENCE, path))
        return names


HALVES = {"labelled": "All labels", "few": "Few labels"}
COST = """\
Seconds of training in the runs with all labels, in multiples of joint training: the mean over runs. It includes the
stages that methods share, such as each modality alone. scikit-learn's methods log no stages."""


def variants(root: Path | None) -> list[Variant]:
    """The runs of each data set at hand, with all labels and with few; co-training and scikit-learn's methods last."""
    made = []
    for name, options in found(root):
        data = make(options)
        size = len(data.train)
        batch = 32 if size >= 320 else 8
        epochs = min(max(EPOCHS[0], round(STEPS * batch / size)), EPOCHS[1])
        options += f" --batch-size {batch} --epochs {epochs}"
        made.append(runs(name, options, METHODS))
        labels = min(max(FEW[0], 10 * data.classes), FEW[1])
        if name not in SHORTCUT and 2 * data.classes <= labels <= size / 4:
            made.append(runs(f"{name}, {labels} labels", f"{options} --labels {labels}", METHODS + SEMI_SUPERVISED))
    return [variant for column in zip(*made, strict=True) for variant in column]


def runs(name: str, options: str, names: list[str]) -> list[Variant]:
    """One of all methods that share stages, and those of the others."""
    udi = f"--method udi --controller dynamic --baselines {','.join(names)}"
    each = {"udi": udi, "scikit-learn": SCIKIT, "co-training": CO_TRAINING}
    return [Variant(variant, f"{options} {own}", name) for variant, own in each.items()]


def found(root: Path | None) -> Iterator[tuple[str, str]]:
    """The name of each data set at hand, and the options that choose it. Seeds draw the splits where they can."""
    if root:
        for file in sorted([*root.glob("*.mat"), *root.glob("*_TRAIN.ts")]):
            options = f"--dataset multiview --data-root {root} --multiview {file.name}"
            yield file.stem.removesuffix("_TRAIN"), f"{options} --resplit {len(make(options).val)}"
        for name in FOLDERS:
            if (root / name).is_dir():
                yield name, f"--dataset {name} --data-root {root / name}"
    for name, options in BUILT_IN.items():
        yield name, f"--dataset {name} {options}".strip()
    for name in filter(downloaded, SOURCES):
        options = f"--dataset openml --openml {name}"
        yield name, f"{options} --resplit {len(make(options).val)}"


def make(text: str) -> Dataset:
    """The data set of these options."""
    tokens = text.split()
    given = {flag[2:].replace("-", "_"): value for flag, value in zip(tokens[::2], tokens[1::2], strict=True)}
    return datasets.find(given["dataset"])(Options.make(**given))


# --- statistics: {method: {data set: {seed: score}}} ---


def collect(records: list[dict], half: str) -> dict[str, dict[str, dict[int, float]]]:
    """Test accuracies in percent; only methods that have run on all data sets with all seeds."""
    scores: dict = {}
    kept = [r for r in records if ("labels" in r["condition"]) == (half == "few")]
    for record in kept:
        for method, each in record["metrics"]["scores"].items():
            scores.setdefault(method, {}).setdefault(record["condition"], {})[record["seed"]] = 100 * each["test_acc"]
    count = len({(r["condition"], r["seed"]) for r in kept})
    return {m: by_set for m, by_set in scores.items() if sum(map(len, by_set.values())) == count}


def means(scores: dict) -> dict[str, dict[str, float]]:
    return {
        m: {name: statistics.fmean(by_seed.values()) for name, by_seed in each.items()} for m, each in scores.items()
    }


def points(scores: dict) -> dict[str, dict[str, float]]:
    """The mean difference of each method to the reference, by data set."""
    return {
        m: {name: statistics.fmean(differences(each[name], scores[REFERENCE][name])) for name in each}
        for m, each in scores.items()
    }


def accuracies(scores: dict) -> str:
    ranks, gaps, sets = mean_ranks(means(scores)), points(scores), list(scores[REFERENCE])
    rows = [["", *sets, "mean", "difference", "mean rank"]]
    for m in sorted(scores, key=lambda m: ranks[m]):
        shown = [format_scores(scores[m][name].values()) for name in sets]
        gap = "" if m == REFERENCE else mean_with_interval(gaps[m].values())
        rows.append([m, *shown, f"{statistics.fmean(means(scores)[m].values()):.2f}", gap, f"{ranks[m]:.2f}"])
    p = friedman(ranks, len(sets))
    test = f"Friedman's test of equal ranks, {len(sets)} data sets: p = {p:.2g}." if len(sets) > 1 else ""
    return f"{markdown(rows)}\n\n{test}".strip()


def by_set(scores: dict) -> str:
    sets = list(scores[REFERENCE])
    rows = [["", *sets]]
    for m, each in scores.items():
        if m != REFERENCE:
            gaps = [differences(each[name], scores[REFERENCE][name]) for name in sets]
            rows.append([m, *map(mean_with_interval, gaps)])
    return markdown(rows)


def cost(records: list[dict]) -> str:
    ratios: dict[str, list[float]] = {}
    for record in records:
        seconds = record["metrics"]["seconds"]
        if "labels" not in record["condition"] and "joint" in seconds:
            for m, s in seconds.items():
                ratios.setdefault(m, []).append(s / seconds["joint"])
    rows = sorted((statistics.fmean(r), m) for m, r in ratios.items())
    return markdown([["", "times joint training"], *([m, f"{ratio:.1f}"] for ratio, m in rows)])
