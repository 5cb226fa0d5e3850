from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def page_faults(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import page_faults

    return page_faults


def test_each_call_starts_from_the_logits(page_faults, monkeypatch):
    import peers

    memory = []
    layer = peers.Layer.apply
    monkeypatch.setattr(peers.Layer, "apply", lambda root, given: memory.append(given[0].clone()) or layer(root, given))
    before, call = page_faults.calls(4, 10, "float32")["js_div(inplace_backward=True)"]
    for _ in range(2):
        before()
        call()
    assert torch.equal(*memory)


def test_table(page_faults):
    common = dict(shape="4x10", dtype="float32", system_seconds=0.01, page_faults=1200.0)
    results = [
        dict(common, call="torch.compile", allocator="as usual", seconds=0.4, cpu_seconds=0.6),
        dict(common, call="torch.compile", allocator="huge pages", seconds=0.1, cpu_seconds=0.1),
        dict(common, call="js_div", allocator="as usual", seconds=0.2, cpu_seconds=0.4),
    ]
    last = page_faults.table(results).splitlines()[-1]
    assert last == "| js_div | as usual | 200 ms | 2.00× | 400 ms | 1.50× | 10 ms | 1,200 |"
