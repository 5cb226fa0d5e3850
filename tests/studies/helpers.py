"""Helpers for the tests of studies."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCORES = {"val_acc": 0.5, "test_acc": 0.5, "test_macro_f1": 0.5}


def results(folder="results/stub"):
    return json.loads((Path(folder) / "results.json").read_text())


def table(folder="results/stub"):
    return (Path(folder) / "table.md").read_text()


def line(text, name):
    """The cells of a line in a table."""
    return next([c.strip() for c in x.split("|")[2:-1]] for x in text.splitlines() if x.startswith(f"| {name} "))


def metrics(anchor, fused):
    """The part of a UDI run's metrics.json that studies read."""
    both = {"gray": SCORES, "color": SCORES}
    top = {"method": "udi", "anchor": anchor, "unimodal": both, "modalities": both, "baselines": {}, "collapsed": {}}
    return top | {"fused": SCORES | {"test_acc": fused, "rule": "mean", "by_rule": {}}}


def record(variant, seed, condition="", **kept):
    return {"variant": variant, "condition": condition, "options": "", "seed": seed, "commits": []} | kept
