import pytest

from udi_kernels import _build


@pytest.fixture
def no_csrc(monkeypatch):
    """As where csrc could not be built."""
    monkeypatch.setattr(_build, "load", lambda kind: None)


@pytest.fixture(params=["csrc", "reference"])
def backend(request):
    """Both say the same."""
    if request.param == "reference":
        request.getfixturevalue("no_csrc")
    return request.param
