"""The GPU check: its stages fit the time limit, and it always writes a one-page summary."""

import re
import sys

import gpu_check


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
