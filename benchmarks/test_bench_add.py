"""Relevance across the additions that end r3d_18's residual blocks: the fused operation, and elementwise steps of PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import rivals
import workloads
from pytest_benchmark.fixture import BenchmarkFixture
from workloads import Addition

from captum_dtd.kernels import Precision

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("contender", ["captum_dtd", "elementwise"])
@pytest.mark.parametrize("layer", workloads.ADDITIONS, ids=str)
def test_summands(
    benchmark: BenchmarkFixture, layer: Addition, precision: Precision, contender: str, small: bool
) -> None:
    benchmark.group = f"{layer} {precision}"
    layer = workloads.reduced_addition(layer) if small else layer
    dtype = workloads.dtype_of(precision)
    given = workloads.draw_addition(layer, dtype)
    if contender == "captum_dtd":
        kernel = workloads.chosen("z_plus_add", layer, dtype, precision)
        run: Callable[[], rivals.Result] = partial(workloads.summands, *given, kernel)
        benchmark.extra_info["kernel"] = kernel
    else:
        rival = rivals.fastest_rival(rivals.addition_rivals(*given, compiled=False))
        run = rival.run
        benchmark.extra_info["composition"] = rival.name
    assert workloads.joined(benchmark(run)).shape[1] == 2 * layer.channels
