from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def growth(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import growth

    return growth


class Device:
    def __init__(self, free):
        self.free_memory = lambda: free

    def peak_memory(self, call):
        return 4 << 20


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_row_divides_by_the_sizes(growth):
    gains = {"op": 1.9, "bound": 2.0}
    points = [dict(size=n, seconds=n * n * 1e-3, memory=n << 21, gains=gains) for n in (1, 4, 16)]
    cells = growth.row(dict(series="f", bound="exp", points=points))
    assert cells == ["f", "16", "1 ms", "16 ms", "256 ms", "4.00", "1.00", "1.90", "2.00 exp, 0.95"]
    points[2] = dict(size=16, missing="needs 3 GiB")
    cells = growth.row(dict(series="f", bound="exp", points=points))
    assert cells[4:6] == ["needs 3 GiB", "4.00"]


def test_each_series_can_be_called(growth, monkeypatch, threads):
    for name, (bound, each, sizes, make) in growth.SERIES.items():
        assert [b // a for a, b in zip(sizes, sizes[1:], strict=False)] == [4, 4]
        if sizes != growth.LISTS:  # whose P is fixed
            make(64)()
        monkeypatch.setitem(growth.SERIES, name, (bound, each, [sizes[-1]], make))
        (point,) = growth.measured(name, 1, Device(free=0))["points"]
        assert "are free" in point["missing"]
    name = "certainty_fusion, 3 × N × 32"
    monkeypatch.setitem(growth.SERIES, name, ("exp", 384, (8, 32), growth.SERIES[name][3]))
    result = growth.measured(name, 1, Device(free=1 << 40))
    assert all(p["seconds"] > 0 and p["gains"]["bound"] > 0 for p in result["points"])
    assert growth.table([result]).splitlines()[2].startswith(f"| {name} | 32 |")
