"""What a run shows of itself: the table on the terminal, and report.png."""

from itertools import cycle


def comparison(metrics):
    """(name, modality or None, figures) of everything that the run trained, the method itself last."""
    method, unimodal, modalities = metrics["method"], metrics["unimodal"], metrics["modalities"]
    rows = []
    for m, figures in unimodal.items():
        epochs = f", {figures['epochs']} epochs" if "epochs" in figures else ""  # that lost the race for the anchor
        rows.append((f"{m} alone{epochs}", m, figures))
    if "ensemble" in metrics and "ensemble" not in metrics["baselines"]:
        rows.append(("ensemble", None, metrics["ensemble"]))
    rows += [(name, None, figures) for name, figures in metrics["baselines"].items()]
    if modalities != unimodal:
        part = "follower" if metrics["anchor"] else metrics.get("part", "share")
        for m, figures in modalities.items():
            rows.append((f"{method}: {m} ({'anchor' if m == metrics['anchor'] else part})", m, figures))
    if "fusion_head" in metrics:
        rows.append((f"{method}: fusion head", None, metrics["fusion_head"]))
    return [*rows, (method, None, metrics["fused"])]


def table(metrics):
    lines = [f"{'':<28}{'val acc':>8}{'test acc':>10}{'macro F1':>10}   fusion"]
    for name, _, figures in comparison(metrics):
        numbers = f"{figures['val_acc']:>8.4f}{figures['test_acc']:>10.4f}{figures['test_macro_f1']:>10.4f}"
        lines.append(f"{name:<28}{numbers}   {rule(figures)}".rstrip())
    lines += [f"collapsed: {m}: {reason}" for m, reason in metrics.get("collapsed", {}).items()]
    for m, found in metrics.get("effective_dims", {}).items():
        lacking = ", ".join(f"{n} not in {other}" for other, n in found["lacking_in"].items())
        lines.append(f"effective dimensions: {m} {len(found['dims'])} of {found['of']}; of these {lacking}")
    return "\n".join(lines)


def rule(figures):
    weights = figures.get("weights") or {}
    return figures.get("rule", "") + (": " if weights else "") + ", ".join(f"{m} {w:.2f}" for m, w in weights.items())


MODALITY_COLORS = ("#3b6fb6", "#d9822b", "#3a9a5c", "#a3529f", "#8c6d46")
INK, MUTED = "#222222", "#8f8f8f"
LOSSES = {"cls": (INK, "$L_{cls}$"), "con": ("#12908e", "$L_{con}$"), "com": ("#c0392b", "$L_{com}$")}
WEIGHTS = {"alpha_con": ("#12908e", r"$\alpha_{con}$"), "alpha_com": ("#c0392b", r"$\alpha_{com}$")}
ALONE = ("anchor", "unimodal")  # phases in which a modality is trained alone
STYLES = ("-", "--", ":", "-.")


def draw(metrics, stages, path):
    """Curves, weights over time, and the comparison. ``stages``: the rows of metrics.jsonl by stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    hue = {m: MODALITY_COLORS[i % len(MODALITY_COLORS)] for i, m in enumerate(metrics["modalities"])}
    followers = [rows for rows in stages.values() if rows[0]["phase"] == "follower" and "controller" in metrics]
    bars = comparison(metrics)
    height = 1 + 0.45 * len(bars)
    detached = [rows for rows in stages.values() if rows[0]["phase"] == "detached"]
    tall = followers or "effective_dims" in metrics
    figure = Figure(figsize=(12, max(4.5, height) + (4.5 if tall else 0)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if tall else 1, 2, squeeze=False)
    if "effective_dims" in metrics:
        losses = {f"cls_{m}": (color, f"{m}, own head") for m, color in hue.items()}
        losses |= {"contrast": (INK, "between modalities")}
        lines(axes[0, 1], detached[:1], losses, "Detached: losses before weighting", "nats")
        dimensions(axes[1, 0], metrics["effective_dims"], hue)
    if followers:
        lines(axes[0, 1], followers, LOSSES, "Follower: losses before weighting", "nats")
        axes[0, 1].set_ylim(bottom=0)
        lines(axes[1, 0], followers, WEIGHTS, f"Follower: weights ({metrics['controller']} controller)", "weight")
        axes[1, 0].set_ylim(-0.03, max(1, axes[1, 0].get_ylim()[1]) + 0.03)
    accuracies(axes[0, 0], stages, hue)
    compare(axes[-1, 1], bars, hue)
    anchor = f", anchor {metrics['anchor']}" if metrics["anchor"] else ""
    figure.suptitle(f"{metrics['method']} on {metrics['dataset']}, seed {metrics['seed']}{anchor}", fontsize=13)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.savefig(path, dpi=130)


def accuracies(axes, stages, hue):
    """Validation accuracy by epoch: a modality keeps its color, and is dashed where it is trained alone."""
    whole = cycle(STYLES)  # methods that train one model of all modalities are told apart by their dashes
    for rows in stages.values():
        phase, modality = rows[0]["phase"], rows[0]["modality"]
        label = f"{modality}, {'alone' if phase in ALONE else phase}" if modality else phase
        dashes = next(whole) if modality is None else "--" if phase in ALONE else "-"
        style = {"color": hue.get(modality, MUTED), "linestyle": dashes}
        axes.plot([r["epoch"] for r in rows], column(rows, "val_acc"), label=label, **style)
    axes.set_ylim(0, 1.02)
    finish(axes, "Validation accuracy", "accuracy")


def lines(axes, followers, columns, title, unit):
    """The same figures of each follower, one color a figure and one line style a follower."""
    for rows, style in zip(followers, STYLES * len(followers), strict=False):
        suffix = f" {rows[0]['modality']}" if len(followers) > 1 else ""
        for name, (color, label) in columns.items():
            axes.plot([r["epoch"] for r in rows], column(rows, name), style, color=color, label=label + suffix)
    finish(axes, title, unit)


def dimensions(axes, found, hue):
    """A row a modality, filled where its dimension is effective."""
    for y, (m, facts) in enumerate(reversed(found.items())):
        axes.bar(facts["dims"], 0.8, width=0.9, bottom=y - 0.4, color=hue[m])
    names = [f"{m}\n{len(facts['dims'])} of {facts['of']}" for m, facts in reversed(found.items())]
    axes.set_yticks(range(len(found)), names, fontsize=9)
    axes.set_xlim(-0.5, max(facts["of"] for facts in found.values()) - 0.5)
    axes.set_xlabel("dimension")
    axes.set_title("Effective dimensions", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def column(rows, name):
    return [float("nan") if row[name] is None else row[name] for row in rows]


def finish(axes, title, unit):
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))


def compare(axes, bars, hue):
    """Test accuracy of everything; a dot marks what the plain mean of probabilities reaches in a fusion's place."""
    title = "Test accuracy"
    bars = bars[::-1]
    for y, (name, modality, figures) in enumerate(bars):
        last = y == 0
        axes.barh(y, figures["test_acc"], color=hue.get(modality, INK if last else MUTED), height=0.68,
                  alpha=0.5 if " alone" in name else 1)  # fmt: skip
        end = figures["test_acc"]
        if figures.get("rule") != "mean" and "by_rule" in figures:
            plain = figures["by_rule"]["mean"]["test_acc"]
            axes.plot(plain, y, "o", color="white", markeredgecolor=INK, markersize=7)
            end, title = max(end, plain + 0.015), "Test accuracy (dot: plain mean of probabilities)"
        axes.text(end + 0.012, y, f"{figures['test_acc']:.3f}", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=9)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
