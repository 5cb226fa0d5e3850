import pytest


@pytest.fixture
def folder(tmp_path):
    """Makes files, see files.py."""
    from .files import Folder

    (tmp_path / "files").mkdir()
    return Folder(tmp_path / "files")


@pytest.fixture
def options(tmp_path):
    """What every run of these tests has in common."""
    return {"cache_dir": tmp_path / "cache", "device": "cpu", "progress": False}
