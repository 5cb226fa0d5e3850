"""The benchmark suite: what it measures is what it shows, and what differs in result is not compared."""

import importlib.util
import json
import math
import re
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_check  # noqa: E402
import measure  # noqa: E402
from cases import CASES, Case, Provider  # noqa: E402
from shapes import MODELS  # noqa: E402


@pytest.mark.parametrize(
    "model, parameters, tensors",
    [
        ("ResNet-18", 11_689_512, 62),
        ("ResNet-50", 25_557_032, 161),
        ("ViT-B/16", 86_567_656, 152),
        ("ViT-L/16", 304_326_632, 296),
    ],
)
def test_parameter_lists(model, parameters, tensors):
    assert (sum(map(math.prod, MODELS[model])), len(MODELS[model])) == (parameters, tensors)


def test_an_input_set_has_the_size_that_its_case_states():
    for case in CASES.values():
        if case.elements < 1e6:
            inputs = case.draw(partial(torch.zeros, dtype=case.dtype))
            assert sum(t.numel() for t in inputs if t.is_floating_point()) == case.elements


class Still(measure.CPU):
    """Its ceilings do not matter here."""

    seconds = 0.05

    def _measure_ceilings(self, elements):
        self.copy_bandwidth = self.read_bandwidth = 1e9


def test_only_equal_results_are_compared():
    def absent(x):
        raise measure.Unavailable("not installed")

    providers = {
        "ours": Provider({"": partial(partial, torch.sum)}, 0),
        "variants": Provider({"a": lambda x: lambda: (x + x).sum() / 2, "b": partial(partial, torch.sum)}, 1),
        "wrong": Provider({"": lambda x: lambda: x.sum() * 1.01}, 0),
        "absent": Provider({"": absent}, 0),
        "huge": Provider({"": partial(partial, torch.sum)}, 1e9),
    }
    case = Case("sum", "1000000", torch.float32, "", 0, 10**6, 4 * 10**6, lambda randn: [1 + randn(10**6)], providers)
    results = measure.measure(case, list(providers), Still())
    assert isinstance(results["wrong"], AssertionError)
    assert isinstance(results["absent"], measure.Unavailable)
    assert "GiB" in str(results["huge"])
    ours, variants = results["ours"], results["variants"]
    assert min(len(ours[0]), len(variants[0])) >= 3
    assert ours[1]["cold"] and ours[1]["input_sets"] * 4e6 > measure.CPU.rotation
    assert ours[1]["peak_memory"] < 100 and variants[1]["variant"] in "ab"


def test_pytest_benchmark_shows_the_samples(tmp_path):
    select = "js_div and 64x6 and not compile and not liger"
    command = ["-m", "pytest", BENCHMARKS, "--benchmark-only", "--device=cpu", "-q", "-k", select]
    run(*command, f"--benchmark-json={tmp_path / 'results.json'}")
    results = json.loads((tmp_path / "results.json").read_text())
    assert "node" not in results["machine_info"]
    assert [b["params"]["provider"] for b in results["benchmarks"]] == ["udi_kernels", "eager"]
    for benchmark in results["benchmarks"]:
        stats, info = benchmark["stats"], benchmark["extra_info"]
        assert stats["rounds"] == len(stats["data"]) >= 5
        median = statistics.median(stats["data"])
        assert math.isclose(info["bandwidth"] * median, info["necessary_bytes"], rel_tol=1e-6)
        assert math.isclose(info["copy_fraction"] * info["copy_bandwidth"], info["bandwidth"], rel_tol=1e-6)
        assert info["necessary_bytes"] == 5 * 64 * 6 * 4 and 0 < median < 0.1

    assert "| `js_div` 64x6 float32 + backward |" in run(BENCHMARKS / "report.py", tmp_path / "results.json")
    if importlib.util.find_spec("matplotlib"):
        run(BENCHMARKS / "report.py", tmp_path / "results.json", "--out", tmp_path / "out")
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.json", "table.md", "js_div.png"}


def run(*command):
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_gpu_check_fits_its_calls(tmp_path):
    seconds = {}
    for stage in gpu_check.stages(tmp_path):
        seconds[stage.part] = seconds.get(stage.part, 0) + stage.seconds
    assert list(seconds) == ["kernels", "speed", "trainer"] and max(seconds.values()) <= 570


def test_gpu_check_goes_on_and_sums_up_on_a_page(tmp_path, monkeypatch, capsys):
    python = [sys.executable, "-c"]
    (tmp_path / "test_it.py").write_text("def test_a():\n    assert 1 == 2\ndef test_b(): pass\n")
    tests = [sys.executable, "-m", "pytest", "-q", tmp_path / "test_it.py", f"--junitxml={tmp_path / 'tests.xml'}"]
    stages = [
        gpu_check.Stage("kernels", "build", 30, [*python, "print('fine')"]),
        gpu_check.Stage("kernels", "exercise", 30, [*python, "raise SystemExit('\\n'.join(map(str, range(99))))"]),
        gpu_check.Stage("kernels", "memcheck", 1, [*python, "import time; time.sleep(60)"]),
        gpu_check.Stage("kernels", "tests", 60, tests),
        gpu_check.Stage("kernels", "racecheck", 1, [], "no GPU"),
        gpu_check.Stage("speed", "report", 30, [*python, "raise SystemExit(1)"]),
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda out: stages)
    for arguments, code in (["--only", "speed"], 1), (["--only", "build"], 0), (["--only", "kernels"], 1):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path), *arguments])
        assert gpu_check.main() == code
    page = (tmp_path / "summary.md").read_text()
    assert page in capsys.readouterr().out + "\n" and len(page.splitlines()) < 60
    assert re.search(r"build +\d+ s  ok", page)
    for expected in ("FAILED (1)", "stopped after 1 s", "not run: no GPU", "    98"):
        assert expected in page
    assert "tests: 2, 0 skipped, 1 failed" in page and "test_a: assert 1 == 2" in page
