"""The speed of every op compared with its peers.

    pytest benchmarks/ --benchmark-only                # a quick selection
    pytest benchmarks/ --benchmark-only --full         # everything

The first test of a case measures all of its providers, interleaved. Each test then reports one of them.
"""

import pytest

from cases import CASES
from measure import Unavailable, clock, replay


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("case", "provider"), [(c.name, p) for c in CASES.values() for p in c.providers])
def test_speed(case, provider, benchmark, measured):
    result = measured(case)[provider]
    if isinstance(result, Unavailable):
        pytest.skip(str(result))
    if isinstance(result, Exception):
        raise result
    samples, info = result
    benchmark.group = case
    benchmark.extra_info.update(info)
    replay(benchmark, samples)
