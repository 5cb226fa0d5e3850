import re

import pytest

from udi_kernels import _build


@pytest.fixture
def no_csrc(monkeypatch):
    """As where csrc could not be built."""
    monkeypatch.setattr(_build, "load", lambda kind: None)


@pytest.fixture
def refused(monkeypatch):
    """Checks that csrc refuses a call in these words; without csrc the error has the same type and names the same."""

    def check(call, words, error=(TypeError, ValueError)):
        with pytest.raises(error, match=words) as native:
            call()
        op_and_argument = " ".join(str(native.value).split()[:2])
        with monkeypatch.context() as without_csrc, pytest.raises(native.type, match=f"^{re.escape(op_and_argument)} "):
            without_csrc.setattr(_build, "load", lambda kind: None)
            call()

    return check


@pytest.fixture(params=["csrc", "reference"])
def backend(request):
    """Both give the same."""
    if request.param == "reference":
        request.getfixturevalue("no_csrc")
    return request.param
