"""What every benchmark gets: one thread, no gradients, and ``--small`` for layers that take no time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--small", action="store_true", help="tiny layers: shows that the benchmarks run, measures nothing"
    )


@pytest.fixture
def small(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--small"))


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """One thread and no gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
