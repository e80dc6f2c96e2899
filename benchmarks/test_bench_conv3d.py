"""Relevance across convolutions, each by the fused operation and by the fastest composition of PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import rivals
import workloads
from pytest_benchmark.fixture import BenchmarkFixture
from workloads import Convolution

from captum_dtd import native
from captum_dtd.kernels import Precision

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


@pytest.mark.parametrize("contender", ["captum_dtd", "composition"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layer", workloads.CONVOLUTIONS + workloads.LINEAR_LAYERS + workloads.GROUPED_LAYERS, ids=str)
def test_z_plus(
    benchmark: BenchmarkFixture, layer: Convolution, precision: Precision, contender: str, small: bool
) -> None:
    benchmark.group = f"z+ {layer} {precision}"
    layer = workloads.reduced(layer) if small else layer
    dtype = workloads.dtype_of(precision)
    given = workloads.draw(layer, dtype)
    if contender == "captum_dtd":
        kernel = workloads.chosen("z_plus_conv3d", layer, dtype, precision)
        run: Callable[[], rivals.Result] = partial(workloads.z_plus, layer, given, kernel)
        benchmark.extra_info["kernel"] = kernel
    else:
        rival = rivals.fastest_rival(rivals.z_plus_rivals(layer, given, compiled=False))
        run = rival.run
        benchmark.extra_info["composition"] = rival.name
    with native.unchanging([given.weight]):  # of compositions, too, all that depends on weights alone was made before
        assert benchmark(run).shape == given.x.shape


@pytest.mark.parametrize("contender", ["captum_dtd", "three convolutions", "lifted"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layer", workloads.PIXEL_LAYERS, ids=str)
def test_z_beta(
    benchmark: BenchmarkFixture, layer: Convolution, precision: Precision, contender: str, small: bool
) -> None:
    benchmark.group = f"z-beta {layer} {precision}"
    layer = workloads.reduced(layer) if small else layer
    dtype = workloads.dtype_of(precision)
    given = workloads.draw(layer, dtype, pixels=True)
    if contender == "captum_dtd":
        kernel = workloads.chosen("z_beta_conv3d", layer, dtype, precision)
        run: Callable[[], rivals.Result] = partial(workloads.z_beta, layer, given, kernel)
        benchmark.extra_info["kernel"] = kernel
    else:
        found = (
            rivals.lifted_z_beta_rivals(layer, given, compiled=False)
            if contender == "lifted"
            else rivals.z_beta_rivals(layer, given)
        )
        rival = rivals.fastest_rival(found)
        run = rival.run
        benchmark.extra_info["composition"] = rival.name
    with native.unchanging([given.weight]):  # of compositions, too, all that depends on weights alone was made before
        assert benchmark(run).shape == given.x.shape
