import math
from itertools import zip_longest
from statistics import fmean

from udi_trainer.evaluation.plotting import INK, MODALITY_COLORS, MUTED, curves, new_figure, style_axes

from ..registry import studies
from ..study import NOISE, Study, Variant
from ..summary import heading

WINDOW = 5  # epochs
COLORS = (*MODALITY_COLORS, INK, MUTED)
ALPHAS = {"alpha_con": (r"$\alpha_{con}$", "#12908e"), "alpha_com": (r"$\alpha_{com}$", "#c0392b")}
KEPT = ("val_acc", *ALPHAS)
STATIC = ("0.5,0.5", "1,0", "0,1", "1,1", "3,3")


@studies.register("controller")
class Controller(Study):
    """Do weights that follow the gradients beat fixed ones, and is measuring them once an epoch enough?"""

    variants = [
        Variant(name, f"--dataset cgdigits --baselines none {options} {noise}", condition)
        for condition, noise in NOISE.items()
        for name, options in (
            ("each epoch", "--controller dynamic"),
            ("each step", "--controller dynamic --align-every 1"),
            *((f"static {alpha}", f"--controller static --alpha {alpha}") for alpha in STATIC),
        )
    ]
    columns = Study.columns | {
        "α con": ("alpha_con", 1),
        "α com": ("alpha_com", 1),
        "worst drop of val acc": ("drop", 100),
    }

    def keep(self, metrics, history):
        """Adds each follower's validation accuracy and weights by epoch."""
        followers = {}
        for row in history:
            if row["phase"] == "follower":
                follower = followers.setdefault(row["modality"], {name: [] for name in KEPT})
                for name, values in follower.items():
                    values.append(row[name])
        return super().keep(metrics, history) | {"followers": followers}

    def entries(self, record):
        for entry in super().entries(record):
            follower = record["followers"].get(entry.section.removeprefix("follower "))
            if follower and not entry.baseline:
                alphas = {name: fmean(with_nan(follower[name])) for name in ALPHAS}
                entry.scores = entry.scores | alphas | {"drop": worst_drop(follower["val_acc"])}
            yield entry

    def draw(self, records, folder):
        return [*super().draw(records, folder), draw_alphas(records, folder / "weights.png")]


def draw_alphas(records, path):
    """A column per condition, with the weights of each dynamic variant and the validation accuracy of all followers."""
    followers = {}
    for record in records:
        by_name = followers.setdefault(record["condition"], {})
        by_name.setdefault(record["variant"], []).extend(record["followers"].values())
    dynamic = list(dict.fromkeys(r["variant"] for r in records if not r["variant"].startswith("static")))
    figure = new_figure(13, 3.1 * (len(dynamic) + 1))
    columns = figure.subplots(len(dynamic) + 1, len(followers), squeeze=False).T
    top = 108 * max(x for r in records for follower in r["followers"].values() for x in follower["val_acc"])
    for (*panels, last), (condition, by_name) in zip(columns, followers.items(), strict=True):
        for axes, name in zip(panels, dynamic, strict=True):
            axes.set_ylim(-0.03, 1.03)
            draw_weights(axes, by_name.get(name, []))
            style_axes(axes, heading(condition, f"weights measured {name}"))
        lines = []
        last.set_ylim(0, top)
        for (name, group), color in zip(by_name.items(), COLORS * len(by_name), strict=False):
            means = [100 * x for x in mean_by_epoch(group, "val_acc")]
            lines.append((name, epochs(means), means, {"color": color, "linestyle": "-" if name in dynamic else "--"}))
        curves(last, lines)
        style_axes(last, heading(condition, "validation accuracy of followers, %"))
    text = f"Thin: a run. Thick: the mean of runs, of weights over {WINDOW} epochs too. Dashed: static weights."
    figure.suptitle(text, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=110)
    return path.name


def draw_weights(axes, group):
    """All runs, and their smoothed mean."""
    lines = []
    for key, (label, color) in ALPHAS.items():
        for follower in group:
            axes.plot(epochs(follower[key]), with_nan(follower[key]), color=color, alpha=0.3, linewidth=0.8)
        means = smooth(mean_by_epoch(group, key))
        lines.append((label, epochs(means), means, {"color": color, "linewidth": 2.2}))
    curves(axes, lines)


def epochs(values):
    return range(1, len(values) + 1)


def with_nan(values):
    """Replaces None with NaN, which JSON lacks."""
    return [math.nan if x is None else x for x in values]


def worst_drop(series):
    """The largest drop below an earlier value; 0 if the series only increases."""
    return max(max(series[: i + 1]) - x for i, x in enumerate(series))


def mean_by_epoch(group, key):
    """The mean of the followers that reached each epoch."""
    values = zip_longest(*(with_nan(follower[key]) for follower in group))
    return [fmean(x for x in xs if x is not None) for xs in values]


def smooth(series):
    """Centered moving average, over fewer values at the ends."""
    half = WINDOW // 2
    return [fmean(series[max(0, i - half) : i + half + 1]) for i in range(len(series))]
