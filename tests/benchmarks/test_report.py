"""From pytest-benchmark's JSON to tables and plots."""

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_pytest_benchmark_shows_the_samples(tmp_path):
    select = "js_div and 64x6 and not compile and not liger"
    command = ["-m", "pytest", BENCHMARKS, "--benchmark-only", "--device=cpu", "-q", "-k", select]
    run(*command, f"--benchmark-json={tmp_path / 'results.json'}")
    results = json.loads((tmp_path / "results.json").read_text())
    assert "node" not in results["machine_info"]
    assert [b["params"]["provider"] for b in results["benchmarks"]] == ["udi_kernels", "eager", "mse_loss"]
    for benchmark in results["benchmarks"]:
        stats, info = benchmark["stats"], benchmark["extra_info"]
        assert stats["rounds"] == len(stats["data"]) >= 5
        median = statistics.median(stats["data"])
        assert math.isclose(info["bandwidth"] * median, info["necessary_bytes"], rel_tol=1e-6)
        assert math.isclose(info["copy_fraction"] * info["copy_bandwidth"], info["bandwidth"], rel_tol=1e-6)
        assert info["necessary_bytes"] == 5 * 64 * 6 * 4 and 0 < median < 0.1
        assert 0 < info["hot_us"] < 1e5

    report = run(BENCHMARKS / "report.py", tmp_path / "results.json")
    assert "| `js_div` 64x6 float32 + backward |" in report and "`js_div` 64x6: udi_kernels " in report
    assert ", mse_loss " in report
    if importlib.util.find_spec("matplotlib"):
        run(BENCHMARKS / "report.py", tmp_path / "results.json", "--out", tmp_path / "out")
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.json", "table.md", "js_div.png"}
        again = run(BENCHMARKS / "report.py", tmp_path / "out" / "results.json")  # the compact file is sufficient
        assert again == (tmp_path / "out" / "table.md").read_text()


def test_every_case_can_be_shown(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cases
    import report

    ops = {case.op for case in cases.CASES.values()}
    assert ops == set(report.USUAL) == {op for figure in report.FIGURES.values() for op in figure}
    assert {name for case in cases.CASES.values() for name in case.providers} == set(report.COLORS)


def run(*command):
    env = {
        name: x for name, x in os.environ.items() if name != "PYTEST_XDIST_WORKER"
    }  # pytest-benchmark is disabled under xdist
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_committed_table_comes_from_the_committed_results():
    committed = [*(BENCHMARKS / "results").glob("*/results.json")]
    assert committed
    for results in committed:
        assert run(BENCHMARKS / "report.py", results) == results.with_name("table.md").read_text()
