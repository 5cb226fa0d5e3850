"""Compiling the CUDA kernels, which takes no GPU, and their cache."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from udi_kernels import _cache, _nvrtc

KERNEL = "udi::weighted_sum<float, 500>"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(_cache, "_warned", set())
    monkeypatch.setenv("UDI_KERNELS_CACHE", str(tmp_path))
    return tmp_path / "udi_kernels"


@pytest.fixture
def nvrtc():
    pytest.importorskip("cuda.bindings.nvrtc")
    try:
        return _nvrtc.version()
    except _cache.BuildError as e:
        pytest.skip(str(e))


def test_machine_code_is_compiled_once(nvrtc, cache, monkeypatch):
    code, entry = _nvrtc.image(KERNEL, "sm_75")
    assert code.startswith(b"\x7fELF") and b"weighted_sum" in entry
    monkeypatch.setattr(_nvrtc, "compile", None)
    assert _nvrtc.image(KERNEL, "sm_75") == (code, entry)
    assert [path.name for path in cache.rglob("*.cubin")] == ["weighted_sum-float-500-sm_75.cubin"]


def test_an_architecture_that_nvrtc_does_not_know_yet_gets_ptx(nvrtc, cache):
    code, entry = _nvrtc.image(KERNEL, "sm_999")
    assert b".version" in code and b".entry " + entry in code


def test_an_architecture_that_nvrtc_no_longer_knows_is_an_error(nvrtc, cache):
    with pytest.raises(_cache.BuildError, match="no code for sm_20"):
        _nvrtc.image(KERNEL, "sm_20")
    with pytest.raises(_cache.BuildError, match="like sm_90, got 9.0"):
        _nvrtc.image(KERNEL, "9.0")


def test_command_fills_the_cache(nvrtc, cache, monkeypatch, capsys):
    monkeypatch.setattr(_nvrtc, "KERNELS", [KERNEL])
    _nvrtc.fill_cache(["sm_75", "sm_90"])
    assert "2 kernels by NVRTC" in capsys.readouterr().out
    assert len(list(cache.rglob("*.cubin"))) == 2


def test_command_says_what_is_missing(tmp_path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "__init__.py").write_text("")  # hides the real one
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "udi_kernels", "--compile", "sm_90"]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 1 and "pip install udi-kernels[cuda]" in run.stderr


def test_a_cache_that_cannot_be_written_costs_time_alone(cache):
    cache.parent.joinpath("udi_kernels").write_text("")
    with pytest.warns(UserWarning, match="set UDI_KERNELS_CACHE to a writable folder"):
        assert _cache.once("file", lambda: b"made") == b"made"


def test_processes_that_start_together_make_a_file_once(cache):
    code = """
import time
from udi_kernels import _cache
def make():
    with open(_cache.folder() / "log", "a") as log:
        log.write("made")
    time.sleep(0.5)
    return b"content"
print(_cache.once("file", make))
"""
    with ThreadPoolExecutor() as pool:
        command = [sys.executable, "-c", code]
        runs = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True), range(3)))
    assert [run.stdout for run in runs] == ["b'content'\n"] * 3, runs[0].stderr
    assert (cache / "log").read_text() == "made"


def test_an_interrupted_write_leaves_nothing_behind(cache):
    def die():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _cache.once("file", die)
    assert _cache.once("file", lambda: b"made") == b"made"


def test_plain_torch_serves_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(9, 0), (6, 1)][device])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ["H100", "P100"][device])
    with pytest.raises(_cache.BuildError, match="P100 is too old"):
        _nvrtc.serve(None)


def test_table_sizes_agree():
    header = (_cache.SOURCES / "cuda" / "arguments.h").read_text()
    (words,) = re.findall(r"kTableWords\[\] = {(.+)};", header)
    assert tuple(map(int, words.split(", "))) == _nvrtc.TABLE_WORDS
