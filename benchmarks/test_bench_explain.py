"""One explanation of every named network: ours in every precision, and everybody else's."""

from __future__ import annotations

from functools import partial

import pytest
from explanations import explainer, ours
from networks import WORKLOADS, Workload
from peers import PEERS
from pytest_benchmark.fixture import BenchmarkFixture

CASES = [
    pytest.param(workload, name, id=f"{workload}-{name}")
    for workload in WORKLOADS
    for name in (*map(ours, workload.precisions), *workload.peers)
]


@pytest.mark.parametrize(("workload", "name"), CASES)
def test_explanation(benchmark: BenchmarkFixture, workload: Workload, name: str, small: bool) -> None:
    benchmark.group = f"{workload} explained"
    if name in PEERS and not PEERS[name].installed:
        pytest.skip(f"times {name}, which is not installed here: pip install {PEERS[name].needs}")
    question = workload.posed(small)
    run = partial(explainer(name, question), question.clips)
    assert benchmark(run).shape == question.clips.shape
