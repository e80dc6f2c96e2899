"""One explanation of C3D: ours in every precision, the walk in plain PyTorch, zennit, and Captum's LRP."""

from __future__ import annotations

from functools import partial
from typing import get_args

import pytest
import rivals
import torch
import workloads
from pytest_benchmark.fixture import BenchmarkFixture

from captum_dtd import DeepTaylor
from captum_dtd.kernels import Precision

TARGET = 7


@pytest.mark.parametrize("precision", get_args(Precision))
def test_captum_dtd(benchmark: BenchmarkFixture, precision: Precision, small: bool) -> None:
    benchmark.group = "C3D explained"
    method = DeepTaylor(workloads.c3d(16 if small else 1), workloads.LOW, workloads.HIGH, precision=precision)
    clip = workloads.pixels()
    benchmark(partial(method.attribute, clip, TARGET))


@pytest.mark.parametrize("library", ["plain torch", "zennit", "captum"])
def test_others(benchmark: BenchmarkFixture, library: str, small: bool) -> None:
    benchmark.group = "C3D explained"
    model, clip = workloads.c3d(16 if small else 1), workloads.pixels()
    if library == "plain torch":
        method = DeepTaylor(model, workloads.LOW, workloads.HIGH, backend="reference")
        run = partial(method.attribute, clip, TARGET)
    elif library == "zennit":
        pytest.importorskip("zennit", reason="zennit is not installed (pip install zennit)")
        low, high = (torch.tensor(bound).view(1, 3, 1, 1, 1) for bound in (workloads.LOW, workloads.HIGH))
        run = partial(rivals.zennit_walk(rivals.one_by_one(model), clip, TARGET, low, high))
    else:
        run = partial(rivals.captum_walk(rivals.one_by_one(model), clip, TARGET))
    benchmark(run)
