from pathlib import Path

from udi_trainer.evaluation.plotting import MODALITY_COLORS, MUTED, new_figure

from ..registry import studies
from ..study import Study, Variant
from ..summary import mean_and_std
from ..tables import format_scores, markdown
from . import gaussian

NEAR = 0.05  # relative to CLUB with the true conditional
DIMS, RHO2 = (2, 16, 64), (0.1, 0.3, 0.6)
HARD = "--dims 64 --rho2 0.1,0.6"  # where settings differ most
SETTINGS = {
    "linear": "--depth 0",
    "2 hidden layers": "--depth 2",
    "width 64": "--width 64",
    "width 256": "--width 256",
    "lr 0.002": "--lr 0.002",
    "lr 0.05": "--lr 0.05",
    "750 steps": "--steps 750",
    "4 steps a batch": "--repeats 4",
    "batch 64": "--batch-size 64",
    "10,000 samples": "--samples 10000",
    "1,000 samples": "--samples 1000",
    "y of std 0.1": "--scale 0.1",
    "y of std 3": "--scale 3",
    "as in cgdigits": "--width 64 --lr 0.003 --batch-size 64 --steps 480 --samples 1077",
}


@studies.register("estimator")
class Estimator(Study):
    """How must q be fitted for an accurate CLUB, given known mutual information, and does minimising it help?"""

    seeds = 3
    program = Path(gaussian.__file__)
    variants = [
        Variant("default", ""),
        *(Variant(name, f"{HARD} {options}") for name, options in SETTINGS.items()),
        Variant("minimise", "--task minimise"),
    ]

    def resolve(self, argv):
        return vars(gaussian.parse([*argv, "--out", "unused"]))

    def extra(self, argv, extra):
        return extra

    def keep(self, metrics, history):
        return {"metrics": metrics}

    def tables(self, records):
        cells = group_cells(records)
        encoders = [record["metrics"] for record in records if "before" in record["metrics"]]
        parts = {
            "Fitted with the defaults: nats, on held-out samples": cells and accuracy(cells.get("default", {})),
            "Error when one setting changes, on held-out samples": cells and sensitivity(cells),
            "An encoder that lowers the bound: before and after, on held-out samples": encoders and lowered(encoders),
        }
        return "\n\n".join(f"### {title}\n\n{markdown(lines)}" for title, lines in parts.items() if lines)

    def draw(self, records, folder):
        """Errors of the default settings by D and rho², and of each other setting in the hardest cases."""
        cells = group_cells(records)
        figure = new_figure(12, 5.2)
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
        for offset, (rho2, color) in enumerate(zip(RHO2, MODALITY_COLORS, strict=False)):
            for (dim, r), group in cells.get("default", {}).items():
                if r == rho2:
                    x = list(DIMS).index(dim) + 0.2 * (offset - 1)
                    first = dim == DIMS[0]
                    left.plot([x] * len(group), [100 * error(c) for c in group], "o", color=color, alpha=0.8,
                              label=f"ρ² = {rho2}" if first else None)  # fmt: skip
        left.axhspan(-100 * NEAR, 100 * NEAR, color=MUTED, alpha=0.15, linewidth=0)
        left.set_ylim(-8, 8)
        left.set_xticks(range(len(DIMS)), [f"D = {dim}" for dim in DIMS])
        left.set_ylabel("error of the fitted CLUB, %")
        left.set_title(f"Defaults, fresh samples: a dot a seed, the band {100 * NEAR:.0f}%", loc="left", fontsize=11)
        left.legend(frameon=False, fontsize=9, loc="upper right")
        names = list(cells)
        for rho2, color in ((RHO2[0], MODALITY_COLORS[0]), (RHO2[-1], MODALITY_COLORS[2])):
            for y, name in enumerate(names):
                errors = [100 * error(c) for c in cells[name].get((DIMS[-1], rho2), [])]
                label = f"ρ² = {rho2}" if y == 0 else None
                right.plot(errors, [y] * len(errors), "o", color=color, alpha=0.8, label=label)
        right.axvspan(-100 * NEAR, 100 * NEAR, color=MUTED, alpha=0.15, linewidth=0)
        right.set_xscale("symlog", linthresh=10)
        right.set_xticks([-100, -10, 0, 10, 100], ["-100", "-10", "0", "10", "100"])
        right.set_yticks(range(len(names)), names, fontsize=9)
        right.invert_yaxis()
        right.set_xlabel("error of the fitted CLUB, % (logarithmic beyond 10)")
        right.set_title(f"One setting changed, D = {DIMS[-1]}", loc="left", fontsize=11)
        right.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
        for axes in (left, right):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / "error.png", dpi=130)
        return ["error.png"]


def group_cells(records):
    """{variant: {(D, rho²): the seeds' cells}}"""
    cells = {}
    for record in records:
        for cell in record["metrics"].get("cells", []):
            cells.setdefault(record["variant"], {}).setdefault((cell["dim"], cell["rho2"]), []).append(cell)
    return cells


def error(cell, of="estimate"):
    return cell[of] / cell["club"] - 1


def percent(errors):
    """Mean and standard deviation, in percent."""
    if not errors:
        return ""
    mean, std = mean_and_std(errors)
    return f"{100 * mean:+.1f}%" + ("" if std is None else f" ± {100 * std:.1f}")


def accuracy(default):
    lines = [["D, ρ²", "information", "CLUB, true q", "CLUB, fitted q", "error", "largest error", "below information"]]
    for (dim, rho2), cells in default.items():
        errors, (mean, _) = [error(c) for c in cells], mean_and_std([c["estimate"] for c in cells])
        truth = [f"{cells[0][name]:.3f}" for name in ("information", "club")]
        below = f"{sum(c['estimate'] < c['information'] for c in cells)} of {len(cells)}"
        largest = f"{100 * max(errors, key=abs):+.1f}%"
        lines.append([f"{dim}, {rho2}", *truth, f"{mean:.3f}", percent(errors), largest, below])
    return lines


def sensitivity(cells):
    hard = [(DIMS[-1], RHO2[0]), (DIMS[-1], RHO2[-1])]
    head = [f"D = {dim}, ρ² = {rho2}" for dim, rho2 in hard]
    lines = [["", *head, "within 5%", *(f"{column}, on its own samples" for column in head)]]
    for name, by_cell in cells.items():
        groups = [by_cell.get(key, []) for key in hard]
        errors = [error(c) for group in groups for c in group]
        near = f"{sum(abs(e) <= NEAR for e in errors)} of {len(errors)}"
        own = [percent([error(c, "on_pool") for c in group if c["on_pool"]]) for group in groups]
        lines.append([name, *(percent([error(c) for c in group]) for group in groups), near, *own])
    return lines


def lowered(encoders):
    lines = [["", "before", "after"]]
    for name in encoders[0]["before"]:
        values = ([metrics[when][name] for metrics in encoders] for when in ("before", "after"))
        lines.append([name, *(format_scores(v, digits=3) for v in values)])
    return lines
