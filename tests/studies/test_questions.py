"""The questions: their options, records and notes."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.stats

from studies.command import main, studies
from studies.questions import field, gaussian
from studies.questions.features import follower_features
from studies.questions.speakers import by_fold, missing
from studies.study import Study
from udi_trainer import Options

from .helpers import ROOT, SCORES, line, metrics, record, results, table


def test_options_of_all_studies():
    for study in (cls() for name, cls in studies.items() if name != "stub"):
        assert all(study.resolve([*v.options.split(), "--seed", "0"]) for v in study.variants) and study.__doc__
        assert len({str(v) for v in study.variants}) == len(study.variants)


def test_studies_name_their_data_sets():
    """A study keeps its meaning when the default data set changes. Only quickstart asks for the defaults."""
    for name, cls in studies.items():
        if name not in ("quickstart", "stub") and cls.program == Study.program:
            assert all("--dataset " in variant.options for variant in cls().variants), name


@pytest.mark.parametrize("name", [name for name in studies if name != "stub"])
def test_committed_tables_come_from_the_committed_results(name):
    folder, study = ROOT / "python" / "results" / name, studies[name]()
    if not folder.exists():
        pytest.skip(f"no results of {name} are committed yet")
    records, committed = results(folder)["runs"], table(folder)
    for text in (study.tables(records), *study.notes(records)):
        assert f"\n\n{text}\n" in committed
    assert len((folder / "results.json").read_text().splitlines()) < len(records) + 20  # one line per run


def test_anchor_study():
    study = studies["anchor"]()
    records = []
    for seed, (gray, color) in enumerate([(0.9, 0.8), (0.7, 0.8)]):
        for variant, anchor, fused in (("auto", "gray", gray), ("anchor gray", "gray", gray)):
            records.append(record(variant, seed, "cgdigits", metrics=metrics(anchor, fused)))
        records.append(record("anchor color", seed, "cgdigits", metrics=metrics("color", color)))
    (note,) = study.notes(records)
    assert "gray 2" in note and "On 1 of 2 seeds" in note and "5.00 points" in note
    assert "auto" in study.tables(records)


def test_controller_study(tmp_path):
    study = studies["controller"]()
    accuracies = [0.2, 0.5, 0.4, 0.6]
    history = [
        {"phase": "follower", "modality": "color", "epoch": i + 1, "val_acc": acc, "alpha_con": 0.5, "alpha_com": i / 4}
        for i, acc in enumerate(accuracies)
    ]
    kept = study.keep(metrics("gray", 0.9), [{"phase": "anchor"}, *history])
    records = [record(variant, seed, **kept) for variant in ("each epoch", "static 1,0") for seed in (0, 1)]
    cells = line(study.tables(records).split("### follower color")[1], "each epoch")
    assert cells[3:6] == ["0.50 ± 0.00", "0.38 ± 0.00", "10.00 ± 0.00"]
    assert study.draw(records, tmp_path) == ["accuracy.png", "weights.png"] and (tmp_path / "weights.png").exists()


def test_defaults_study():
    """The gain over the paper's controller is measured on validation, averaged over conditions and paired by seed."""
    study, records, gains = studies["defaults"](), [], [0.01, 0.03, 0.02]
    for seed, gain in enumerate(gains):
        for condition in ("clean", "noisy training"):
            for variant, val in (("dynamic", 0.5), ("static 1,1", 0.5 + gain + (0.02 if condition == "clean" else 0))):
                found = metrics("left", 0.9)
                found["fused"]["val_acc"] = val
                records.append(record(variant, seed, condition, metrics=found))
    low, high = scipy.stats.ttest_1samp([100 * gain + 1 for gain in gains], 0).confidence_interval(0.95)
    assert study.notes(records)[0].endswith(f"static 1,1: +3.00 [{low:+.2f}, {high:+.2f}].")
    assert study.notes(records[:1]) == []


def test_q_study():
    study = studies["q"]()
    history = [{"phase": "follower", "modality": "color", "com": com, "q_nll": 2.0} for com in (0.3, 0.25)]
    found = metrics("gray", 0.9) | {"similarity": {"color": {"r2": 0.5}}}
    kept = study.keep(found, [{"phase": "anchor", "modality": "gray"}, *history])
    text = study.tables([record("default", seed, **kept) for seed in (0, 1)])
    cells = line(text.split("### follower color")[1], "default")
    assert cells[3:6] == ["16.00 ± 0.00", "2.00 ± 0.00", "0.50 ± 0.00"]  # 64 dimensions of 0.25


def test_features_study():
    """After one epoch: the similarity of follower and anchor, and the stored features of the follower."""
    assert main(["features", "--seeds", "3,", "--epochs", "1", "--out", "out"]) == 0
    text = table("out")
    assert "CKA with anchor" in text and "![](features.png)" in text
    assert Path("out/features.png").stat().st_size > 20_000
    run = Path("out/runs/with-L_com-seed3/run")
    modality, features, labels = follower_features(run)
    assert features.shape == (360, 64) and len(labels) == 360
    assert modality != json.loads((run / "metrics.json").read_text())["anchor"]


def test_estimator_study(tmp_path):
    """Small runs of both of its tasks, and the tables of the study."""
    for name, options in (("default", "--dims 2,64 --rho2 0.1"), ("minimise", "--task minimise")):
        assert gaussian.main([*options.split(), "--steps", "20", "--out", name]) == 0
    records = [record(n, 0, metrics=json.loads(Path(n, "metrics.json").read_text())) for n in ("default", "minimise")]
    study = studies["estimator"]()
    text = study.tables(records)
    assert line(text, "64, 0.1")[1] == "7.111" and "R² of y from x" in text
    assert study.draw(records, tmp_path) == ["error.png"] and (tmp_path / "error.png").exists()


@pytest.mark.parametrize("dim", [2, 16])
def test_fitted_club_is_right_on_gaussians(dim):
    options = gaussian.parse(["--steps", "1500", "--out", "unused"])
    cell = gaussian.estimate(dim, 0.3, options)
    assert cell["estimate"] == pytest.approx(cell["club"], rel=0.05)
    assert cell["estimate"] > cell["information"]


# --- the field ---


def multiview_file(folder, name, count, classes):
    random, labels = np.random.default_rng(0), np.arange(count) % classes
    views = {f"x{i}": labels[:, None] + random.normal(size=(count, 4)) for i in (1, 2)}
    scipy.io.savemat(folder / name, views | {"y": labels})


def test_field_study_finds_the_data_sets(tmp_path):
    multiview_file(tmp_path, "many.mat", 600, 3)
    multiview_file(tmp_path, "little.mat", 60, 3)
    study = studies["field"]()
    assert study.prepare(["--epochs", "2", "--data-root", str(tmp_path)]) == ["--epochs", "2"]
    options = {str(variant): variant.options for variant in study.variants}
    conditions = list(dict.fromkeys(variant.condition for variant in study.variants))
    files = ["little", "many", "many, 60 labels"]  # few labels need four times as many samples
    few = ["breastcancer, 60 labels", "splitdigits", "splitdigits, 100 labels", "cgdigits"]
    assert conditions == [*files, "breastcancer", *few]
    assert (
        f"--data-root {tmp_path} --multiview many.mat --resplit 90 --batch-size 32 --epochs 46" in options["many: udi"]
    )
    assert "--batch-size 8 --epochs 50" in options["little: udi"] and "--labels 60" in options["many, 60 labels: udi"]
    assert "self-training" not in options["many: udi"] and "self-training" in options["many, 60 labels: udi"]
    for variant in study.variants:
        assert study.resolve([*variant.options.split(), "--seed", "0"])
    assert studies["field"]().prepare([f"--data-root={tmp_path}", "--jobs"]) == ["--jobs"]


def field_record(condition, seed, **accuracies):
    history = [
        {"phase": "anchor", "modality": "a", "seconds": 2.0},
        {"phase": "anchor", "modality": "b", "seconds": 1.0},
        {"phase": "follower", "modality": "b", "seconds": 3.0},
        {"phase": "joint", "modality": None, "seconds": 4.0},
    ]
    baselines = {name: scored(x) for name, x in accuracies.items() if name != "udi"}
    found = metrics("a", accuracies["udi"]) | {"baselines": baselines}
    return record("udi", seed, condition, **studies["field"]().keep(found, history))


def test_field_study(tmp_path):
    """Ranks of mean accuracies, differences paired by seed and averaged over sets, and the cost of shared stages."""
    study = studies["field"]()
    records = [
        field_record(name, seed, udi=0.8 + shift + 0.01 * seed, ensemble=0.8, joint=0.7)
        for name, shift in (("one", 0.02), ("two", 0.04), ("two, 60 labels", -0.2))
        for seed in (0, 1)
    ]
    co_training = metrics(None, 0.9) | {"method": "co-training"}
    records += [record("co-training", seed, "two, 60 labels", **study.keep(co_training, [])) for seed in (0, 1)]
    records.append(field_record("two", 0, udi=0.84, ensemble=0.8, joint=0.7, pmr=0.9))  # not all have run pmr
    labelled, few = study.tables(records).split("## Few labels")
    low, high = scipy.stats.ttest_1samp([2.5, 4.5], 0).confidence_interval(0.95)
    wanted = ["82.50 ± 0.71", "84.50 ± 0.71", "83.50", f"+3.50 [{low:+.2f}, {high:+.2f}]", "1.00"]
    assert line(labelled, "udi") == wanted and line(labelled, "joint")[-1] == "3.00"
    low, high = scipy.stats.ttest_1samp([2, 3], 0).confidence_interval(0.95)
    assert line(labelled.split("by data set")[1], "udi")[0] == f"+2.50 [{low:+.2f}, {high:+.2f}]"
    assert "pmr" not in labelled and line(few, "co-training")[0] == "90.00 ± 0.00" and line(few, "udi")[-1] == "4.00"
    costs = few.split("## Cost")[1]
    assert [line(costs, m)[0] for m in ("ensemble", "joint", "udi")] == ["0.8", "1.0", "1.5"]
    assert study.draw(records, tmp_path) == ["labelled.png", "few.png"] and (tmp_path / "few.png").stat().st_size > 9999


def test_field_study_with_enough_data_sets_for_a_critical_difference(tmp_path):
    records = [field_record(f"set {i}", 0, udi=0.8, ensemble=0.7 + 0.001 * i, joint=0.6) for i in range(6)]
    assert field.means({"a": {"one": {0: 0.1, 1: 0.2}}, "b": {"one": {0: 0.3, 1: 1e-17}}})["b"] == {"one": 0.15}
    assert "Friedman's test of equal ranks, 6 data sets: p = 0." in studies["field"]().tables(records)
    assert studies["field"]().draw(records, tmp_path) == ["labelled.png"]


# --- where UDI wins ---


def scored(test_acc, val_acc=0.5):
    return SCORES | {"val_acc": val_acc, "test_acc": test_acc}


def test_fewlabels_study(tmp_path):
    """Differences are paired by seed, at each number of labels."""
    study, records, gains = studies["fewlabels"](), [], [0.01, 0.03, 0.02]
    for n in (50, 100, 200):
        for seed, gain in enumerate(gains, 10):
            found = metrics("left", 0.8 + gain) | {"ensemble": scored(0.8), "baselines": {"joint": scored(0.7 + gain)}}
            records.append(record("udi", seed, f"{n} labels", metrics=found))
            records.append(record("co-training", seed, f"{n} labels", metrics=metrics(None, 0.9)))
    low, high = scipy.stats.ttest_1samp([100 * gain for gain in gains], 0).confidence_interval(0.95)
    notes = study.notes(records)
    assert f"100 labels: udi against ensemble: +2.00 [{low:+.2f}, {high:+.2f}] points." in notes
    assert "50 labels: udi against joint: +10.00 [+10.00, +10.00] points." in notes
    assert study.draw(records, tmp_path) == ["labels.png", "accuracy.png"] and (tmp_path / "labels.png").exists()
    assert list(study.seeds) == list(range(10, 20))


def test_shortcut_study(tmp_path):
    """The digit's classifier is judged on random hues, next to the fused predictions."""
    study, records = studies["shortcut"](), []
    shifts = {"ensemble": 0.5, "consistency": 0.4, "CLUB": 0.6, "CLUB given the label": 0.7, "residual": 0.8}
    for v in study.variants:
        for seed in (0, 1):
            found = metrics(None if v.name == "ensemble" else "hue", 0.9)
            found["modalities"] = {
                m: scored(0.9) | {"shifted_acc": shifts[v.name] + seed / 100} for m in ("hue", "digit")
            }
            found["fused"]["shifted_acc"] = 0.3
            found["baselines"] = {"joint": scored(0.95) | {"shifted_acc": 0.2}} if v.name == "ensemble" else {}
            records.append(record(v.name, seed, v.condition, **study.keep(found, [])))
    text = study.tables(records)
    shifted = text.split("### rho 0.9: digit, random hue in test")[1]
    assert (
        line(shifted, "digit alone")[1] == "50.50 ± 0.71" and line(shifted, "residual")[2] == "+30.00 [+30.00, +30.00]"
    )
    assert line(text.split("### rho 0.9: prediction")[1], "CLUB")[1] == "90.00 ± 0.00"
    assert "rho 0.95, random hue in test: residual against CLUB given the label: +10.00 [+10.00, +10.00] points." in (
        study.notes(records)
    )
    assert study.draw(records, tmp_path) == ["shift.png", "accuracy.png"]


def test_speakers_study(tmp_path):
    """A fold counts once, with the mean over its seeds."""
    study, records = studies["speakers"](), []
    for fold in range(6):
        for seed, gain in ((0, 0.0), (1, 0.02)):
            found = metrics("image", 0.8 + gain + fold / 1000) | {"ensemble": scored(0.8)}
            found["without"] = {"": {"image": 0.3 + gain, "speech": 0.7}, "ensemble": {"image": 0.25, "speech": 0.7}}
            records.append(record("udi", seed, f"fold {fold}", metrics=found))
    low, high = scipy.stats.ttest_1samp([1 + fold / 10 for fold in range(6)], 0).confidence_interval(0.95)
    assert study.notes(records)[0] == f"All labelled: udi against ensemble: +1.25 [{low:+.2f}, {high:+.2f}] points."
    assert line(study.tables(records), "udi")[-2] == "6" and "paired by fold" in study.tables(records)
    records += [r | {"variant": "udi, warm"} for r in records]
    records += [r | {"variant": "udi, static 1,0", "condition": f"one speaker with labels, {r['condition']}"}
                for r in records[:12]]  # fmt: skip
    assert study.draw(records, tmp_path) == ["speakers.png", "accuracy.png"]
    assert [line(missing(by_fold(records)), name) for name in ("udi", "ensemble")] == [
        ["31.00 ± 0.00", "70.00 ± 0.00"],
        ["25.00 ± 0.00", "70.00 ± 0.00"],
    ]


def test_quickstart_study():
    study = studies["quickstart"]()
    assert Options.make() == Options.of_flat(study.resolve([]), map(type, Options.make().groups))
    found = metrics("left", 0.9) | {"ensemble": scored(0.8)}
    assert study.notes([record("udi", seed, metrics=found) for seed in (0, 1)]) == [
        "udi against ensemble: +10.00 [+10.00, +10.00] points."
    ]
