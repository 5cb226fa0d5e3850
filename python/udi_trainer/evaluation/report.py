"""The report of a run: the table on the terminal, and report.png."""

from pathlib import Path
from typing import IO, Any

from ..console import log
from ..errors import short
from .plotting import INK, METHOD_COLORS, MODALITY_COLORS, MUTED, curves, fonts_for, new_figure, style_axes

ALONE = ("anchor", "unimodal")  # phases in which a modality is trained alone
LOSSES = {"cls": "$L_{cls}$", "con": "$L_{con}$", "com": "$L_{com}$"}
ALPHAS = {"alpha_con": r"$\alpha_{con}$", "alpha_com": r"$\alpha_{com}$"}
PRODUCTS = {(0, 1): r"$\langle g_{cls}, g_{con}\rangle$", (0, 2): r"$\langle g_{cls}, g_{com}\rangle$"}
History = dict[str, list[dict]]  # the rows of metrics.jsonl by stage


def comparison(metrics: dict) -> list[tuple[str, str | None, dict]]:
    """(name, modality or None, scores) of everything that the run trained; the method itself comes last."""
    method, unimodal, modalities = metrics["method"], metrics["unimodal"], metrics["modalities"]
    entries = []
    for m, scores in unimodal.items():
        epochs = f", {scores['epochs']} epochs" if "epochs" in scores else ""  # stopped early by --race
        entries.append((f"{m} alone{epochs}", m, scores))
    if "ensemble" in metrics and "ensemble" not in metrics["baselines"]:
        entries.append(("ensemble", None, metrics["ensemble"]))
    entries += [(name, None, scores) for name, scores in metrics["baselines"].items()]
    if modalities != unimodal:
        part = "follower" if metrics["anchor"] else metrics.get("part", "share")
        for m, scores in modalities.items():
            entries.append((f"{method}: {m} ({'anchor' if m == metrics['anchor'] else part})", m, scores))
    if "fusion_head" in metrics:
        entries.append((f"{method}: fusion head", None, metrics["fusion_head"]))
    return [*entries, (method, None, metrics["fused"])]


def table(metrics: dict) -> str:
    """A text table of everything that the run trained."""
    lines = [f"{'':<28}{'val acc':>8}{'test acc':>10}{'macro F1':>10}   fusion"]
    lines += [table_line(name, scores) for name, _, scores in comparison(metrics)]
    lines += [f"collapsed: {m}: {reason}" for m, reason in metrics.get("collapsed", {}).items()]
    fused = metrics["fused"]
    judged = fused.get("judged") or {"by": "log-likelihood", "candidates": fused.get("log_likelihood")}
    if judged["candidates"]:
        found = ", ".join(f"{rule} {x:.4f}" for rule, x in sorted(judged["candidates"].items(), key=lambda x: -x[1]))
        lines.append(f"fusion {fused['rule']}, by cross-validated {judged['by']} on validation: {found}")
    for m, dims in metrics.get("effective_dims", {}).items():
        lacking = ", ".join(f"{n} not in {other}" for other, n in dims["lacking_in"].items())
        lines.append(f"effective dimensions: {m} {len(dims['dims'])} of {dims['of']}; of these {lacking}")
    if "refit" in metrics:
        lines += ["", "final fit on training and validation together:"]
        lines += [table_line(name, scores) for name, _, scores in comparison(metrics | metrics["refit"])]
    return "\n".join(lines)


def table_line(name: str, scores: dict) -> str:
    val = f"{scores['val_acc']:>8.4f}" if "val_acc" in scores else " " * 8
    return (
        f"{name:<28}{val}{scores['test_acc']:>10.4f}{scores['test_macro_f1']:>10.4f}   {fusion_text(scores)}".rstrip()
    )


def controller_table(history: History) -> str:
    """What followers measured under the dynamic controller, epoch by epoch; empty without them."""
    lines = []
    for rows in history.values():
        if "gramian" not in rows[0]:
            continue
        heads = (
            "epoch",
            "JS",
            "CLUB",
            "a_con",
            "a_com",
            "cls.cls",
            "con.con",
            "com.com",
            "cls.con",
            "cls.com",
            "con.com",
        )
        lines.append(
            f"{rows[0]['phase']} {rows[0]['modality']}: losses in nats (CLUB's per dimension), weights, Gramian"
        )
        lines += ["".join(f"{head:>{6 if head == 'epoch' else 10}}" for head in heads)]
        for row in rows:
            gram = [row["gramian"][i][j] for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))]
            values = [row["con"], row["com"], row["alpha_con"], row["alpha_com"]]
            lines.append(
                f"{row['epoch']:>6}" + "".join(f"{x:>10.4f}" for x in values) + "".join(f"{x:>10.2e}" for x in gram)
            )
    return "\n".join(lines)


def fusion_text(scores: dict) -> str:
    """The fusion rule and its weights."""
    weights = scores.get("weights") or {}
    return scores.get("rule", "") + (": " if weights else "") + ", ".join(f"{m} {w:.2f}" for m, w in weights.items())


def draw(metrics: dict, history: History, path: Path | IO[bytes]) -> None:
    """Draws report.png: accuracies above; below, the followers' losses, effective dimensions and results by class.

    Each modality has its own color. Where no installed font has the characters of a class name, its number is drawn.
    """
    from matplotlib import rc_context

    families, missing = fonts_for(str([metrics, history]))
    if missing:
        log.warning("no installed font has %s: report.png shows the numbers of such classes", short(missing, 20))
        classes = [str(c) if set(name) & set(missing) else name for c, name in enumerate(metrics.get("classes", []))]
        metrics = metrics | {"classes": classes}
    with rc_context({"font.family": families}):
        draw_panels(literal(metrics, missing), literal(history, missing), path)


def draw_panels(metrics: dict, history: History, path: Path | IO[bytes]) -> None:
    colors = {m: MODALITY_COLORS[i % len(MODALITY_COLORS)] for i, m in enumerate(metrics["modalities"])}
    phase = "co-trained" if metrics["method"] == "co-training" else "follower"
    followers = {rows[0]["modality"]: rows for rows in history.values() if rows[0]["phase"] == phase}
    if "controller" not in metrics:  # they belong to a baseline
        followers = {}
    effective_dims = metrics.get("effective_dims")
    joint_phases = [rows[0]["phase"] for rows in history.values() if rows[0]["modality"] is None]
    colors |= {phase: METHOD_COLORS[i % len(METHOD_COLORS)] for i, phase in enumerate(joint_phases)}
    colors[metrics["method"]] = INK
    bars = bar_entries(metrics)
    dynamic = bool(followers) and metrics["controller"] == "dynamic"
    top, middle = max(4.0, 1 + 0.42 * len(bars)), 2.9 * bool(followers or effective_dims)
    bottom = 4.2 * ("test_confusion" in metrics["fused"])
    heights = [height for height in (top, middle, 2.9 * dynamic, bottom) if height]
    figure = new_figure(12, sum(heights) + 0.4)
    rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
    left, right = rows[0, 0].subplots(1, 2, width_ratios=[1.15, 1])
    draw_accuracies(left, history, metrics["anchor"], colors)
    final = {name: scores for name, _, scores in bar_entries(metrics | metrics.get("refit", {}))}
    draw_comparison(right, bars, final if "refit" in metrics else {}, metrics["method"], colors)
    if followers:
        draw_losses(rows[1, 0], followers, dynamic, colors)
    if dynamic:
        draw_controller(rows[2, 0], followers, colors)
    if effective_dims:
        draw_dimensions(rows[1, 0], effective_dims, history, colors)
    if bottom:
        draw_classes(rows[-1, 0], metrics)
    anchor = f", anchor {metrics['anchor']}" if metrics["anchor"] else ""
    figure.suptitle(f"{metrics['method']} on {metrics['dataset']}, seed {metrics['seed']}{anchor}", fontsize=13)
    figure.savefig(path, dpi=130)


def literal(value: Any, missing: str = "") -> Any:
    """The same with all strings escaped, so that a $ in a name starts no formula, and without missing characters."""
    if isinstance(value, dict):
        return {literal(name, missing): literal(part, missing) for name, part in value.items()}
    if isinstance(value, list):
        return [literal(part, missing) for part in value]
    if not isinstance(value, str):
        return value
    value = "".join(c.encode("ascii", "backslashreplace").decode() if c in missing else c for c in value)
    return value.replace("$", r"\$")


def draw_accuracies(axes, history: History, anchor: str | None, colors: dict):
    """Validation accuracy by epoch. If a modality has a follower, its training alone is dashed."""
    following = {rows[0]["modality"] for rows in history.values() if rows[0]["phase"] == "follower"}
    lines = []
    for rows in history.values():
        phase, m = rows[0]["phase"], rows[0]["modality"]
        if m is None:
            name = phase
        elif phase in ALONE:
            name = f"{m}, anchor" if m == anchor else f"{m} alone"
        else:
            name = f"{m}, {phase}"
        dashed = phase in ALONE and m in following
        style = {"color": colors.get(phase if m is None else m, MUTED), "linestyle": "--" if dashed else "-"}
        style["linewidth"] = 1.3 if dashed or m is None else 2
        epochs, values = series(rows, "val_acc")
        lines.append((name, epochs, [100 * x for x in values], style))
    axes.set_ylim(0, 102)
    curves(axes, lines)
    style_axes(axes, "Validation accuracy, %")


def draw_losses(figure, followers: History, dynamic: bool, colors: dict):
    """The followers' losses."""
    last = next(iter(followers.values()))[-1]
    fixed = ", ".join(f"{label} = {last[name]:g}" for name, label in ALPHAS.items())
    weights = "" if dynamic else f"; weights in the last epoch {fixed}"
    title = f"Follower{'s' * (len(followers) > 1)}: losses before weighting, nats{weights}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for axes, (name, label) in zip(figure.subplots(1, len(LOSSES)), LOSSES.items(), strict=True):
        lines = [(m, *series(rows, name), {"color": colors[m]}) for m, rows in followers.items()]
        finite = [x for _, _, values, _ in lines for x in values if x == x]
        axes.set_ylim(min(0, *finite), 1.05 * max(finite))
        curves(axes, lines)
        style_axes(axes, label)


def draw_controller(figure, followers: History, colors: dict):
    """What the dynamic controller measures, inner products of the losses' gradients, and the weights that follow."""
    figure.suptitle("Dynamic controller: inner products of gradients, and weights", x=0.01, ha="left", fontsize=11)
    panels = figure.subplots(1, len(PRODUCTS) + len(ALPHAS))
    for axes, ((i, j), label) in zip(panels, PRODUCTS.items(), strict=False):
        rows = {m: [row for row in rows if "gramian" in row] for m, rows in followers.items()}
        lines = [
            (m, [row["epoch"] for row in kept], [row["gramian"][i][j] for row in kept], {"color": colors[m]})
            for m, kept in rows.items()
        ]
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        curves(axes, lines)
        style_axes(axes, label)
    for axes, (name, label) in zip(panels[len(PRODUCTS) :], ALPHAS.items(), strict=True):
        axes.set_ylim(-0.03, 1.03)
        curves(axes, [(m, *series(rows, name), {"color": colors[m]}) for m, rows in followers.items()])
        style_axes(axes, label)


def draw_dimensions(figure, effective_dims: dict, history: History, colors: dict):
    """The loss between modalities, and the effective dimensions of each."""
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    rows = next(rows for rows in history.values() if rows[0]["phase"] == "detached")
    curves(left, [("", *series(rows, "contrast"), {"color": INK})])
    style_axes(left, "Loss between modalities, nats")
    for y, (m, dims) in enumerate(effective_dims.items()):
        right.bar(dims["dims"], 0.8, width=0.9, bottom=y - 0.4, color=colors[m])
    names = [f"{m}\n{len(dims['dims'])} of {dims['of']}" for m, dims in effective_dims.items()]
    right.set_yticks(range(len(effective_dims)), names, fontsize=9)
    right.invert_yaxis()
    right.set_xlim(-0.5, max(dims["of"] for dims in effective_dims.values()) - 0.5)
    right.set_xlabel("dimension")
    right.set_title("Effective dimensions", loc="left", fontsize=11)
    right.spines[["top", "right"]].set_visible(False)


def draw_classes(figure, metrics: dict):
    """The confusion matrix and the accuracy per class of the fused prediction."""
    fused, names = metrics["fused"], metrics["classes"]
    f1, precision = 100 * fused["test_macro_f1"], 100 * fused["test_map"]
    when = ", before the final fit" if "refit" in metrics else ""
    figure.suptitle(f"Fused, on test{when}: macro-F1 {f1:.1f} %, mAP {precision:.1f} %", x=0.01, ha="left", fontsize=11)
    left, right = figure.subplots(1, 2)
    shares = [[n / max(1, sum(row)) for n in row] for row in fused["test_confusion"]]
    left.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    few = len(names) <= 12
    for y, row in enumerate(fused["test_confusion"] if few else []):
        for x, n in enumerate(row):
            if n:
                left.text(x, y, n, ha="center", va="center", fontsize=8, color="white" if shares[y][x] > 0.5 else INK)
    ticks, labels = range(len(names)), [name[:12] for name in names]
    if few:
        left.set_xticks(ticks, labels, rotation=0 if max(map(len, labels)) < 4 else 40, fontsize=8)
        left.set_yticks(ticks, labels, fontsize=8)
        right.set_xticks(ticks, labels, rotation=0 if max(map(len, labels)) < 4 else 40, fontsize=8)
    left.set_title("Labels (rows), predictions (columns)", loc="left", fontsize=11)
    right.bar(ticks, [100 * (acc or 0) for acc in fused["test_acc_by_class"]], color=INK, alpha=0.7)
    right.set_ylim(0, 102)
    style_axes(right, "Accuracy by class, %", "class")


def series(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    """The epochs, and this value after each; NaN where it was not finite."""
    return [row["epoch"] for row in rows], [float("nan") if row[name] is None else row[name] for row in rows]


def bar_entries(metrics: dict) -> list[tuple[str, str | None, dict]]:
    """The comparison without the anchor's second entry, which repeats the first: the anchor is frozen."""
    anchor, repeated = metrics["anchor"], f"{metrics['method']}: {metrics['anchor']} (anchor)"
    entries = [entry for entry in comparison(metrics) if entry[0] != repeated]
    return [(f"{anchor} alone (anchor)" if name == f"{anchor} alone" else name, m, s) for name, m, s in entries]


def draw_comparison(axes, bars: list, final: dict[str, dict], method: str, colors: dict):
    """Test accuracies. A dot marks the accuracy of fusion by the mean of probabilities.

    ``final``: by name, the scores of the final fit, if there was one: diamonds, and a second column of numbers.
    """
    marks, place = set(), axes.get_yaxis_transform()
    for y, (name, modality, scores) in enumerate(bars):
        color, bold = colors.get(modality or name, MUTED), "bold" if name == method else "normal"
        value = 100 * scores["test_acc"]
        axes.barh(y, value, color=color, height=0.68, alpha=0.5 if " alone" in name else 1)
        if scores.get("rule") != "mean" and "by_rule" in scores:
            mean = 100 * scores["by_rule"]["mean"]["test_acc"]
            axes.plot(mean, y, "o", color="white", markeredgecolor=INK, markersize=6)
            marks.add("dot: plain mean")
        axes.text(1.03, y, f"{value:.1f}", va="center", fontsize=9, weight=bold, transform=place)
        if name in final:
            refit = 100 * final[name]["test_acc"]
            axes.plot(refit, y, "D", color=INK, markeredgecolor="white", markersize=6)
            axes.text(1.16, y, f"{refit:.1f}", va="center", fontsize=9, weight=bold, transform=place)
            marks.add("diamond: final fit")
    for x, head in ((1.03, "run"), (1.16, "final")) if final else ():
        axes.text(x, 1, head, va="top", fontsize=9, color=MUTED, transform=axes.transAxes)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=9)
    axes.get_yticklabels()[-1].set_weight("bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    said = f" ({'; '.join(sorted(marks, reverse=True))})" if marks else ""
    axes.set_title(f"Test accuracy, %{said}", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
