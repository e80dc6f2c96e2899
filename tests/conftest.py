"""What every test gets: one thread, its own seeded generator, and the folder of real clips where there is one."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

collect_ignore = [] if importlib.util.find_spec("zarr") else ["data_sets.py", "killing.py"]
"""Helpers of tests that are skipped without zarr, in which doctest would look for examples."""

_LONGEST = ("test_dataset_ray", "test_stock_models", "test_dataset_kills")
"""Files whose single tests take longest: begun last, they would keep one process busy while the others have nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, everything else in its order."""
    items.sort(key=lambda item: item.path.stem not in _LONGEST)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more threads, and sums keep one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Whatever draws from the global generator draws the same in every run and order of tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def copied(traced: Any) -> Any:
    """The same operations as nodes of their own: who is given a trace rewrites it."""
    graph = copy.deepcopy(traced.graph)
    same = dict(zip(traced.graph.nodes, graph.nodes, strict=True))
    inputs = tuple(node and same[node] for node in traced.inputs)
    tensors, constants = ({same[n]: v for n, v in each.items()} for each in (traced.tensors, traced.constants))
    return replace(traced, graph=graph, inputs=inputs, tensors=tensors, constants=constants)


@pytest.fixture
def one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model is traced once in the test, which explains it by several methods on inputs of one shape.

    Tracing a small net takes far longer than all the rest.
    """
    from captum_dtd import attribution  # not above: children that need no package would wait for it
    from captum_dtd.graph import trace

    traces: dict[nn.Module, Any] = {}

    def traced(model: nn.Module, arguments: Any, batch: int) -> Any:
        if model not in traces:
            traces[model] = trace(model, arguments, batch)
        return copied(traces[model])

    monkeypatch.setattr(attribution, "trace", traced)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real recordings, from CAPTUM_DTD_DATA."""
    folder = os.environ.get("CAPTUM_DTD_DATA")
    if not folder:
        pytest.skip(
            "needs real recordings, which their licences keep out of the repository: "
            "put UCF-101, HMDB-51 and Weizmann clips into a folder and name it in CAPTUM_DTD_DATA"
        )
    return Path(folder)


@pytest.fixture(scope="session")
def cpu_kernels() -> Any:
    """The module of compiled kernels for the CPU."""
    from captum_dtd import native

    if "cpu" not in native.loaded:
        pytest.skip(f"compares compiled CPU kernels, and this installation has none: {native.missing['cpu']}")
    return native.loaded["cpu"]
