from statistics import fmean

from report import MODALITY_COLORS, WEIGHTS, column, finish

from . import Study, Variant, studies
from .summary import new_figure

WINDOW = 5  # epochs
STATIC = ("0.5,0.5", "1,0", "0,1", "1,1")


@studies.register("controller")
class Controller(Study):
    """Do weights that follow the gradients beat fixed ones, and is measuring them once an epoch enough?"""

    variants = [
        Variant(name, f"--baselines none {options} {noise}", condition)
        for condition, noise in {"": "", "noisy training": "--noise 0.2,0.2"}.items()
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
        """A panel for each dynamic variant with its weights, and one with all followers' validation accuracy."""
        clean = [run for run in runs if not run["condition"]]
        logs = {
            name: followers(r for r in clean if r["variant"] == name)
            for name in dict.fromkeys(r["variant"] for r in clean)
        }
        dynamic = [name for name in logs if not name.startswith("static")]
        figure = new_figure(10, 3.2 * (len(dynamic) + 1))
        *panels, last = figure.subplots(len(dynamic) + 1, 1, squeeze=False)[:, 0]
        for axes, name in zip(panels, dynamic, strict=True):
            for key, (color, label) in WEIGHTS.items():
                for log in logs[name]:
                    axes.plot(column(log, "epoch"), column(log, key), color=color, alpha=0.3, linewidth=0.8)
                epochs, means = mean_by_epoch(logs[name], key)
                axes.plot(epochs, smooth(means), color=color, linewidth=2.2, label=label)
            axes.set_ylim(-0.03, 1.03)
            finish(axes, f"Weights measured {name}: every run, and their mean smoothed over {WINDOW} epochs", "weight")
        for (name, group), color in zip(logs.items(), (*MODALITY_COLORS, "#222222") * len(logs), strict=False):
            epochs, means = mean_by_epoch(group, "val_acc")
            style = "-" if name in dynamic else "--"
            last.plot(epochs, [100 * x for x in means], style, color=color, label=name)
        finish(last, "Validation accuracy of the followers, mean of seeds", "%")
        figure.savefig(path, dpi=130)
        return path.name


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
