"""The CUDA kernel of additions, run by the emulator: against the oracle, over layouts, types and orders of threads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from emulator.agreement import assert_agrees, assert_same_bits
from emulator.build import as_array, load, run_sanitized
from op_cases import ADDS, LAYOUTS, VARIANTS, Add, disagreement, lay_out, problem
from torch import Tensor

OP = "z_plus_add"
KERNELS = ("cuda/ieee",)

CASES = tuple(case for case in ADDS if case.x[0])
NAMES = {case.name: case for case in CASES}
SAMPLE = [
    NAMES[name] for name in ("summands", "summands in vectors", "summands of 17 channels", "summands, one frozen")
]

Relevance = Callable[..., Tensor]


@pytest.fixture(scope="module")
def front() -> ModuleType:
    return load("add_front")


@pytest.fixture
def relevance(front: ModuleType) -> Relevance:
    """The operation by the emulated kernel; both results side by side along the channels."""

    def run(x: Tensor, other: Tensor, relevance: Tensor, out: str = "contiguous", **options: float) -> Tensor:
        both = [lay_out(torch.full(x.shape, torch.nan, dtype=relevance.dtype), out) for _ in range(2)]
        name = str(x.dtype).removeprefix("torch.")
        front.relevance(name, *map(as_array, (x, other, relevance, *both)), **options)
        return torch.cat(both, 1)

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_oracle(case: Add, relevance: Relevance) -> None:
    assert_agrees(OP, case, relevance)


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_strides_are_free(case: Add, relevance: Relevance) -> None:
    posed = problem(OP, case, VARIANTS[OP][2], torch.float32, True)
    for of_x, of_other, of_out in itertools.product(LAYOUTS, LAYOUTS, LAYOUTS[:4]):
        arguments = posed.on("cpu", torch.float32, of_x)
        arguments["other"] = lay_out(arguments["other"].contiguous(), of_other)
        actual = relevance(**arguments, out=of_out)
        assert not disagreement(actual, posed, 1e-6), (of_x, of_other, of_out)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_bits_depend_on_neither_the_order_of_threads_nor_the_size_of_launches(
    case: Add, layout: str, relevance: Relevance, front: ModuleType
) -> None:
    assert_same_bits(OP, case, VARIANTS[OP][:1], layout, 37, relevance, front)


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_vanishing_sums_pass_nothing_and_nan_is_told(case: Add, relevance: Relevance) -> None:
    ones = torch.ones(case.x)
    for dead in (0.0, -1.0, 1e-40):
        assert not relevance(dead * ones, -ones, ones).any()
        assert not relevance(dead * ones, -ones, 0 * ones).any()
    x = ones.clone()
    x[0, 1, 0, 1, 1] = torch.nan
    shared = relevance(x, ones, ones)
    assert shared.isnan().sum() == 2, "both summands of the sum that is NaN, and nothing else"
    assert shared.view(case.x[0], 2, *case.x[1:])[0, :, 1, 0, 1, 1].isnan().all()


SANITIZED = """
import json, sys
import numpy as np
import add_front as front
random = np.random.default_rng(0)
for dtype, bits, sums in (("float32", "f4", "f4"), ("bfloat16", "u2", "f4")):
    for shape in json.loads(sys.argv[1]):
        for last in (False, True):
            def array(kind):
                values = random.integers(0, 16000, shape).astype(kind)
                return np.moveaxis(np.moveaxis(values, 1, -1).copy(), -1, 1) if last else values
            front.relevance(dtype, array(bits), array(bits), array(sums), array(sums), array(sums))
print("clean")
"""


def test_nothing_runs_over_an_edge() -> None:
    ran = run_sanitized("add_front", SANITIZED, json.dumps([case.x for case in CASES]))
    assert ran.returncode == 0 and ran.stdout.strip() == "clean", ran.stderr[-4000:]


def test_every_kernel_is_emulated(front: ModuleType) -> None:
    assert tuple(front.kernels()) == KERNELS
