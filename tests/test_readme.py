"""The README's snippets run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
COMMANDS = [
    command.strip()
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.splitlines()
    for command in line.split("#")[0].split("&&")
    if command.strip()
]
# What would install, or run these tests in themselves.
ELSEWHERE = ("pip install", "python -m pytest", "pytest benchmarks/")


def run(*command):
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    end = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert end.returncode == 0, end.stderr
    return end.stdout


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_python(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "udi_trainer" in code:
        pytest.importorskip("sklearn", reason='needs the trainer\'s extra: pip install -e ".[train]"')
        assert "udi" in run(sys.executable, "-c", code)
    else:
        run(sys.executable, "-c", code)


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(ELSEWHERE)])
def test_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, script, *options = command.split()
    assert program == "python"
    path = ROOT / script
    run(sys.executable, path if path.exists() else script, *options)


def test_all_commands_are_known():
    assert len(COMMANDS) >= 3 and any(c.startswith("python python/train.py") for c in COMMANDS)
