"""What every test gets: one thread, its own seeded generator, and the folder of real clips where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


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


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real recordings, from CAPTUM_DTD_DATA."""
    folder = os.environ.get("CAPTUM_DTD_DATA")
    if not folder:
        pytest.skip("CAPTUM_DTD_DATA is not set: it names the folder of real clips")
    return Path(folder)
