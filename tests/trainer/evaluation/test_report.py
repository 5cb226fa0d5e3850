"""The content of report.png, for all kinds of runs."""

import warnings

import pytest
from matplotlib.font_manager import fontManager

pytest.importorskip("matplotlib", reason='needs the trainer\'s extra: pip install -e ".[train]"')

from matplotlib.figure import Figure

from udi_trainer.evaluation import plotting, report

SCORES = {"val_acc": 0.8, "test_acc": 0.7, "test_macro_f1": 0.6}


def run(modalities, controller="static", baselines=(), epochs=3):
    """Metrics and history of UDI with the first modality as anchor."""
    anchor, *followers = modalities
    history = {}
    for phase, names in (("anchor", modalities), ("follower", followers), *((name, [None]) for name in baselines)):
        for m in names:
            rows = [{"phase": phase, "modality": m, "epoch": i + 1, "val_acc": i / epochs} for i in range(epochs)]
            for i, row in enumerate(rows if phase == "follower" else []):
                row |= {"cls": 1 / (1 + i), "con": 0.1, "com": None if i == 1 else 0.2, "alpha_con": 1, "alpha_com": 1}
                row |= {"gramian": [[2.0, -0.1, 0.3], [-0.1, 1.0, 0.0], [0.3, 0.0, 1.0]]} if i else {}
            history[f"{phase}-{m}"] = rows
    metrics = {"method": "udi", "dataset": "digits", "seed": 0, "anchor": anchor, "controller": controller}
    metrics |= {
        "unimodal": dict.fromkeys(modalities, SCORES),
        "modalities": dict.fromkeys(modalities, SCORES | {"x": 0}),
    }
    metrics |= {"baselines": dict.fromkeys(baselines, SCORES), "ensemble": SCORES}
    return metrics | {"fused": SCORES | {"rule": "sum", "by_rule": {"mean": SCORES}}}, history


def panels(metrics, history, path, monkeypatch):
    """The report's axes after drawing."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: drawn.append(self))
    report.draw(metrics, history, path)
    return drawn[0].axes


SIX = ("joint", "joint-sum", "ogm-ge", "gramian", "one's own", "another")


def test_dollars_in_class_names(tmp_path):
    metrics, history = run(("gray", "color"))
    figures = {"test_map": 0.5, "test_acc_by_class": [1.0, 0.0], "test_confusion": [[1, 0], [1, 0]]}
    metrics |= {"fused": metrics["fused"] | figures, "classes": ["$5_$", "$"]}
    report.draw(metrics, history, tmp_path / "report.png")


@pytest.mark.parametrize("fonts", [["STIXGeneral"], []])
def test_class_names_beyond_the_usual_font(tmp_path, monkeypatch, caplog, fonts):
    """Drawn with another font that has them, else as numbers, and never as boxes."""
    chosen = [font for font in fontManager.ttflist if font.name in fonts]
    monkeypatch.setattr(fontManager, "ttflist", chosen)
    assert plotting.fonts_for("happy $ é") == (["DejaVu Sans"], "")
    assert plotting.fonts_for("高兴 \u1d81") == (
        ["DejaVu Sans", *fonts],
        "".join(sorted("高兴" + "\u1d81" * (not fonts))),
    )
    metrics, history = run(("gray", "color"))
    figures = {"test_map": 0.5, "test_acc_by_class": [1.0, 0.0], "test_confusion": [[1, 0], [1, 0]]}
    metrics |= {"fused": metrics["fused"] | figures, "classes": ["sad", "高兴"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of glyphs that are missing
        report.draw(metrics, history, tmp_path / "report.png")
    classes = panels(metrics, history, tmp_path / "report.png", monkeypatch)[-2]
    assert [label.get_text() for label in classes.get_yticklabels()] == ["sad", "1"]
    assert "no installed font has 兴高: report.png shows the numbers of such classes" in caplog.text


@pytest.mark.parametrize("modalities", [("gray", "color"), ("a", "b", "c", "d", "e", "f")])
@pytest.mark.parametrize("baselines", [(), SIX])
@pytest.mark.parametrize("controller", ["static", "dynamic"])
def test_every_line_is_named_and_has_a_color_of_its_own(modalities, baselines, controller, tmp_path, monkeypatch):
    metrics, history = run(modalities, controller, baselines)
    curves, bars, *drives = panels(metrics, history, tmp_path / "report.png", monkeypatch)
    measured = [*report.PRODUCTS.values(), *report.ALPHAS.values()] if controller == "dynamic" else []
    assert [axes.get_title(loc="left") for axes in drives] == [*report.LOSSES.values(), *measured]
    # All accuracies are equal here, so one line has all names.
    (name,) = (text.get_text() for text in curves.texts)
    wanted = [f"{modalities[0]}, anchor", *(f"{m} alone" for m in modalities[1:])]
    assert name.split(" = ") == [*wanted, *(f"{m}, follower" for m in modalities[1:]), *baselines]
    assert all(axes.get_legend() is None for axes in (curves, bars, *drives))
    labels = [label.get_text() for label in bars.get_yticklabels()]
    assert labels[0] == f"{modalities[0]} alone (anchor)" and labels[-1] == "udi"
    assert len(labels) == len(set(labels)) == 2 * len(modalities) + 1 + len(baselines)
    colors = {bar.get_facecolor() for bar, label in zip(bars.patches, labels, strict=True) if label in baselines}
    assert len(colors) == len(baselines)


def test_table_says_which_fusion_rule_and_why():
    metrics, _ = run(("gray", "color"))
    metrics["fused"] |= {"rule": "loglinear", "log_likelihood": {"sum": -0.5, "loglinear": -0.25}}
    wanted = "fusion loglinear, by cross-validated log-likelihood on validation: loglinear -0.2500, sum -0.5000"
    assert wanted in report.table(metrics).splitlines()
    metrics["fused"]["judged"] = {"by": "macro-F1", "candidates": {"sum": 0.5, "loglinear": 0.25}}
    wanted = "fusion loglinear, by cross-validated macro-F1 on validation: sum 0.5000, loglinear 0.2500"
    assert wanted in report.table(metrics).splitlines()
    del metrics["fused"]["judged"]
    metrics["fused"]["log_likelihood"] = {}
    assert "cross-validated" not in report.table(metrics)


def test_final_fit(tmp_path, monkeypatch):
    """Its scores have lines and numbers of their own, and a diamond each."""
    metrics, history = run(("gray", "color"), baselines=("joint",))
    scores = {"test_acc": 0.9, "test_macro_f1": 0.85}
    both = dict.fromkeys(("gray", "color"), scores)
    figures = {"test_map": 0.5, "test_acc_by_class": [1.0, 0.0], "test_confusion": [[1, 0], [1, 0]]}
    metrics |= {"fused": metrics["fused"] | figures, "classes": ["a", "b"]}
    plain = report.table(metrics)
    metrics["refit"] = {"unimodal": both, "modalities": {m: s | {"x": 0} for m, s in both.items()}}
    metrics["refit"] |= {"baselines": {"joint": scores}, "ensemble": scores, "fused": scores | {"rule": "sum"}}
    before, _, final = report.table(metrics).partition("\n\nfinal fit on training and validation together:\n")
    lines = [line.rstrip() for line in before.splitlines()[1:8]]
    assert before == plain and len(final.splitlines()) == len(lines) == 7
    for ours, line in zip(final.splitlines(), lines, strict=True):
        assert ours == line.replace("0.8000", " " * 6).replace("0.7000", "0.9000").replace("0.6000", "0.8500")
    bars = panels(metrics, history, tmp_path / "report.png", monkeypatch)[1]
    assert bars.get_title(loc="left") == "Test accuracy, % (dot: plain mean; diamond: final fit)"
    assert [text.get_text() for text in bars.texts] == [*["70.0", "90.0"] * 6, "run", "final"]
    diamonds = [float(line.get_xdata()[0]) for line in bars.lines if line.get_marker() == "D"]
    assert diamonds == [90.0] * 6
    assert "before the final fit" in bars.figure.get_figure().subfigs[-1].get_suptitle()


def test_without_followers(tmp_path):
    metrics, history = run(("gray", "color"))
    metrics |= {"method": "ensemble", "anchor": None, "modalities": metrics["unimodal"]}
    alone = {name: rows for name, rows in history.items() if rows[0]["phase"] == "anchor"}
    report.draw(metrics, alone, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
