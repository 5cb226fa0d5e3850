import pytest


@pytest.fixture
def folder(tmp_path):
    """Writes files, see files.py."""
    from .files import Folder

    (tmp_path / "files").mkdir()
    return Folder(tmp_path / "files")


@pytest.fixture
def options(tmp_path):
    """The options of all runs in these tests."""
    return {"cache_dir": tmp_path / "cache", "device": "cpu", "progress": False}
