"""Relevance across each max pooling of C3D: the fused operation, and compositions of PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import rivals
import workloads
from pytest_benchmark.fixture import BenchmarkFixture
from workloads import Pooling

from captum_dtd.kernels import Precision

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


CONTENDERS = [
    (layer, contender)
    for layer in workloads.POOLINGS
    for contender in ("captum_dtd", "average pooling", "blocks")
    if contender != "blocks" or layer.tiles  # without tiles there are no blocks
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("layer", "contender"), CONTENDERS, ids=str)
def test_proportional(
    benchmark: BenchmarkFixture, layer: Pooling, precision: Precision, contender: str, small: bool
) -> None:
    benchmark.group = f"{layer} {precision}"
    layer = workloads.reduced_pooling(layer) if small else layer
    dtype = workloads.dtype_of(precision)
    x, relevance = workloads.draw_pooling(layer, dtype)
    if contender == "captum_dtd":
        kernel = workloads.chosen("max_pool3d_relevance", layer, dtype, precision)
        run: Callable[[], rivals.Result] = partial(workloads.max_pool, layer, x, relevance, kernel)
        benchmark.extra_info["kernel"] = kernel
    else:
        found = (
            rivals.block_max_pool_rivals(layer, x, relevance, compiled=False)
            if contender == "blocks"
            else rivals.max_pool_rivals(layer, x, relevance)
        )
        rival = rivals.fastest_rival(found)
        run = rival.run
        benchmark.extra_info["composition"] = rival.name
    assert benchmark(run).shape == x.shape
