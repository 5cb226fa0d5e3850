from statistics import fmean

from report import INK, MODALITY_COLORS, MUTED, WEIGHTS, column, finish

from . import NOISE, Study, Variant, studies
from .summary import new_figure, title

WINDOW = 5  # epochs
COLORS = (*MODALITY_COLORS, INK, MUTED)
STATIC = ("0.5,0.5", "1,0", "0,1", "1,1", "3,3")


@studies.register("controller")
class Controller(Study):
    """Do weights that follow the gradients beat fixed ones, and is measuring them once an epoch enough?"""

    variants = [
        Variant(name, f"--baselines none {options} {noise}", condition)
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
    logged = ("modality", "epoch", "val_acc", "alpha_con", "alpha_com")

    def figures(self, metrics, log):
        rows = [row for row in log if row["phase"] == "follower"]
        return {"metrics": metrics, "log": [{name: row[name] for name in self.logged} for row in rows]}

    def rows(self, variant, run):
        for row in super().rows(variant, run):
            for log in followers([run]):
                if row.section == f"follower {log[0]['modality']}" and not row.baseline:
                    weights = {name: fmean(column(log, name)) for name in WEIGHTS}
                    row.figures = row.figures | weights | {"drop": worst_drop(column(log, "val_acc"))}
            yield row

    def draw(self, runs, folder):
        return [*super().draw(runs, folder), self.draw_weights(runs, folder / "weights.png")]

    def draw_weights(self, runs, path):
        """A column a condition: a panel for each dynamic variant's weights, and all followers' validation accuracy."""
        logs = {}
        for run in runs:
            logs.setdefault(run["condition"], {}).setdefault(run["variant"], []).extend(followers([run]))
        dynamic = list(dict.fromkeys(r["variant"] for r in runs if not r["variant"].startswith("static")))
        figure = new_figure(8 * len(logs), 3.2 * (len(dynamic) + 1))
        columns = figure.subplots(len(dynamic) + 1, len(logs), squeeze=False, sharey="row").T
        for (*panels, last), (condition, by_name) in zip(columns, logs.items(), strict=True):
            for axes, name in zip(panels, dynamic, strict=True):
                draw_alphas(axes, by_name.get(name, []))
                axes.set_ylim(-0.03, 1.03)
                finish(axes, title(condition, f"weights measured {name}, mean over {WINDOW} epochs"), "weight")
            for (name, group), color in zip(by_name.items(), COLORS * len(by_name), strict=False):
                epochs, means = mean_by_epoch(group, "val_acc")
                style = "-" if name in dynamic else "--"
                last.plot(epochs, [100 * x for x in means], style, color=color, label=name)
            finish(last, title(condition, "followers' validation accuracy, mean of seeds"), "%")
        figure.savefig(path, dpi=110)
        return path.name


def draw_alphas(axes, logs):
    """Every run, and the smoothed mean."""
    for key, (color, label) in WEIGHTS.items():
        for log in logs:
            axes.plot(column(log, "epoch"), column(log, key), color=color, alpha=0.3, linewidth=0.8)
        epochs, means = mean_by_epoch(logs, key)
        axes.plot(epochs, smooth(means), color=color, linewidth=2.2, label=label)


def followers(runs):
    """The log of each follower of each run."""
    logs = {}
    for number, run in enumerate(runs):
        for row in run["log"]:
            logs.setdefault((number, row["modality"]), []).append(row)
    return list(logs.values())


def worst_drop(series):
    """How far it ever fell below what it had reached: 0 of a training that only improves."""
    return max(max(series[: i + 1]) - x for i, x in enumerate(series))


def mean_by_epoch(logs, key):
    by_epoch = {}
    for log in logs:
        for epoch, x in zip(column(log, "epoch"), column(log, key), strict=True):
            by_epoch.setdefault(epoch, []).append(x)
    return list(by_epoch), [fmean(xs) for xs in by_epoch.values()]


def smooth(series):
    """Centered moving average; at the ends, of what there is."""
    reach = WINDOW // 2
    return [fmean(series[max(0, i - reach) : i + reach + 1]) for i in range(len(series))]
