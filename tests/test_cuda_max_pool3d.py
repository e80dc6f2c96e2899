"""The CUDA kernels of max pooling, run by the emulator: against the oracle, over layouts, types and orders of threads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulator.agreement import assert_agrees, assert_same_bits
from emulator.build import as_array, load, run_sanitized
from op_cases import (
    EACH,
    FROZEN_POOLS,
    LAYOUTS,
    POOLS,
    THREE,
    VARIANTS,
    FrozenPool,
    Pool,
    disagreement,
    lay_out,
    problem,
)
from oracle import tuples
from torch import Tensor

OP, FORWARD = "max_pool3d_relevance", "max_pool3d"
KERNELS = ("cuda/ieee",)

CASES = (
    *POOLS,
    # Rows of windows that are pairs and fill vectors; vectors of channels.
    Pool("pairs", (1, 2, 4, 4, 8), 2),
    Pool("pairs, T kept", (2, 4, 3, 4, 4), (1, 2, 2)),
    Pool("pairs, odd T and H", (1, 4, 5, 5, 4), 2),
    Pool("pairs, gaps", (1, 2, 5, 7, 8), 2, (3, 3, 2)),
    Pool("pairs, padded T and H", (1, 2, 4, 5, 4), 2, 2, (1, 1, 0)),
    Pool("pairs, more rows than a batch", (1, 2, 6, 6, 4), (3, 3, 2)),
    Pool("vectors, padded", (1, 8, 2, 7, 7), 2, 2, (0, 1, 1)),
    Pool("vectors, ceil", (1, 4, 3, 5, 6), 2, 2, 0, 1, True),
    Pool("vectors, gaps", (1, 4, 5, 7, 8), (2, 1, 2), (3, 2, 3)),
    Pool("vectors, dilated, apart", (1, 4, 6, 7, 8), 2, (3, 3, 4), 0, (2, 2, 3)),
    Pool("vectors, more taps than a batch", (1, 4, 6, 6, 7), 3),
    Pool("vectors, one window, wider than its stride", (1, 4, 4, 4, 4), 3, 2),
    Pool("vectors, overlapping", (1, 4, 4, 5, 6), 3, 2, 1),
    Pool("vectors, overlapping in T alone", (1, 4, 5, 4, 4), (3, 2, 2), (1, 2, 2), (1, 0, 0)),
    Pool("vectors, overlapping, ceil", (1, 4, 4, 6, 5), (3, 3, 2), (2, 2, 1), (1, 0, 1), 1, True),
    Pool("vectors, overlapping, dilated", (1, 4, 6, 7, 8), (2, 3, 2), (1, 1, 2), (1, 1, 0), (2, 2, 3)),
    Pool("dilation and stride share a factor", (1, 2, 9, 1, 12), (3, 1, 3), (2, 1, 4), (1, 0, 1), (4, 1, 6)),
    Pool("one channel, half in the padding", (1, 1, 2, 3, 4), 2, 2, 1),
)
NAMES = {case.name: case for case in CASES}
FROZEN = (
    *FROZEN_POOLS,
    FrozenPool("vectors, frozen", (2, 8, 3, 5, 6), 3, 2, 1, reads=THREE, gives=THREE, times=3),
    FrozenPool("vectors, each frozen", (3, 4, 2, 3, 4), (2, 3, 3), 1, (0, 1, 1), reads=EACH, gives=EACH, times=2),
    FrozenPool(
        "vectors, the last of three times", (1, 4, 3, 4, 4), (1, 2, 2), reads=(((2,), (2,)),), gives=(((0,), (0,)),)
    ),
)
APART_AND_OVERLAPPING = [NAMES[name] for name in ("pairs", "vectors, padded", "overlapping", "vectors, overlapping")]

Relevance = Callable[..., Tensor]


@pytest.fixture(scope="module")
def front() -> ModuleType:
    return load("max_pool3d_front")


def windows_of(options: dict[str, Any], times: int | None) -> dict[str, tuple[int, ...]]:
    """Kernel size, stride, padding and dilation, taken from the options; those along T where no table tells of it."""
    if options["stride"] is None:
        options["stride"] = options["kernel_size"]
    if times is not None:  # along T there are tables, and nothing else
        flat = {name: tuples(options[name], 2)[-2:] for name in ("stride", "padding", "dilation")}
        options |= {name: (int(name != "padding"), *numbers) for name, numbers in flat.items()}
        options |= {name: np.array(options[name]) for name in ("reads", "gives") if name in options}
    return {name: tuples(options.pop(name), 3) for name in ("kernel_size", "stride", "padding", "dilation")}


@pytest.fixture
def forward(front: ModuleType) -> Relevance:
    """The pooling itself, by the emulated kernel."""

    def run(x: Tensor, out: str = "contiguous", ceil_mode: bool = False, **options: Any) -> Tensor:
        times = len(options["reads"][0]) if "reads" in options else None
        windows = windows_of(options, times)
        in_space = [(along, *numbers[1:]) for along, numbers in zip((1, 1, 0, 1), windows.values(), strict=True)]
        n, c, t, *size = F.max_pool3d(x.float(), *(windows.values() if times is None else in_space), ceil_mode).shape
        result = lay_out(torch.full((n, c, times or t, *size), torch.nan, dtype=x.dtype), out)
        name = str(x.dtype).removeprefix("torch.")
        bytes_asked = front.forward(name, as_array(x), as_array(result), *windows.values(), **options)
        assert bytes_asked == (0 if times is None else 2 * options["reads"].size)
        return result

    return run


@pytest.fixture
def relevance(front: ModuleType) -> Relevance:
    """The operation by the emulated kernel."""

    def run(
        x: Tensor,
        relevance: Tensor,
        out: str = "contiguous",
        winner_takes_all: bool = False,
        ceil_mode: bool = False,
        stabilizer: float = 0.0,
        times: int | None = None,
        **options: Any,
    ) -> Tensor:
        size = x.shape if times is None else (*x.shape[:2], times, *x.shape[3:])
        result = lay_out(torch.full(size, torch.nan, dtype=relevance.dtype), out)
        windows = windows_of(options, times)
        name = str(x.dtype).removeprefix("torch.")
        arrays = [as_array(t) for t in (x, relevance, result)]
        bytes_asked = front.relevance(name, *arrays, *windows.values(), winner_takes_all, stabilizer, **options)
        number = 4 if winner_takes_all else relevance.element_size()
        assert times is not None or bytes_asked in (0, relevance.numel() * number)
        return result

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_oracle(case: Pool, relevance: Relevance, forward: Relevance) -> None:
    assert_agrees(OP, case, relevance)
    assert_agrees(FORWARD, case, forward)


@pytest.mark.parametrize("case", FROZEN, ids=lambda case: case.name)
def test_layers_of_frozen_clips(case: FrozenPool, relevance: Relevance, forward: Relevance) -> None:
    assert_agrees(f"frozen_{OP}", case, relevance)
    assert_agrees(f"frozen_{FORWARD}", case, forward)


@pytest.mark.parametrize("case", APART_AND_OVERLAPPING, ids=lambda case: case.name)
def test_strides_are_free(case: Pool, relevance: Relevance, forward: Relevance) -> None:
    variant = VARIANTS[OP][0]
    posed = problem(OP, case, variant, torch.float32, True)
    for of_x, of_relevance, of_out in itertools.product(LAYOUTS, LAYOUTS[:4], LAYOUTS[:4]):
        arguments = posed.on("cpu", torch.float32, of_x)
        arguments["relevance"] = lay_out(arguments["relevance"].contiguous(), of_relevance)
        actual = relevance(**arguments, out=of_out)
        assert not disagreement(actual, posed, 1e-6), (of_x, of_relevance, of_out)
    pooled = problem(FORWARD, case, VARIANTS[FORWARD][0], torch.float32, True)
    for of_x, of_out in itertools.product(LAYOUTS, LAYOUTS[:4]):
        actual = forward(**pooled.on("cpu", torch.float32, of_x), out=of_out)
        assert not disagreement(actual, pooled, 0.0), (of_x, of_out)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", APART_AND_OVERLAPPING, ids=lambda case: case.name)
def test_bits_depend_on_neither_the_order_of_threads_nor_the_size_of_launches(
    case: Pool, layout: str, relevance: Relevance, forward: Relevance, front: ModuleType
) -> None:
    assert_same_bits(OP, case, VARIANTS[OP], layout, 100, relevance, front)
    assert_same_bits(FORWARD, case, VARIANTS[FORWARD], layout, 100, forward, front)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", APART_AND_OVERLAPPING, ids=lambda case: case.name)
def test_vanishing_sums_pass_nothing_and_nan_is_told(case: Pool, layout: str, relevance: Relevance) -> None:
    windows = lay_out(torch.ones(case(torch.zeros(case.x)).shape), layout)
    for dead in (0.0, -1.0, 1e-40):
        x = lay_out(torch.full(case.x, dead), layout)
        assert not relevance(x, windows, layout, **case.options).any()
        assert not relevance(x, torch.zeros_like(windows), layout, **case.options).any()

    ones = torch.ones(case.x)
    ones[0, 1, 0, 1, 1] = torch.nan
    shared = relevance(lay_out(ones, layout), windows, layout, **case.options)
    assert shared[0, 1, 0, 1, 1].isnan() and shared[0, 0].isfinite().all()
    assert shared.isnan().sum() > 1, "a NaN of x makes NaN of all that shares a window with it"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", APART_AND_OVERLAPPING, ids=lambda case: case.name)
def test_winners_are_those_of_torch(case: Pool, layout: str, relevance: Relevance, forward: Relevance) -> None:
    """The first of equals, the last NaN, and the first place of a window in which all is minus infinity."""
    x = torch.randint(-3, 4, case.x).float()
    x[0, 0, 1, 1, 0:3] = torch.nan
    x[0, 1] = -torch.inf
    windows = [tuples(n, 3) for n in (case.kernel, case.stride or case.kernel, case.padding, case.dilation)]
    pooled, indices = F.max_pool3d(x, *windows, case.ceil_mode, return_indices=True)
    given = torch.randint(-8, 9, pooled.shape).float()
    expected = torch.zeros(case.x).flatten(2).scatter_add_(2, indices.flatten(2), given.flatten(2)).view(case.x)
    shared = relevance(lay_out(x, layout), lay_out(given, layout), layout, winner_takes_all=True, **case.options)
    assert torch.equal(shared, expected)
    largest = forward(lay_out(x, layout), layout, **case.options)
    assert torch.equal(largest.nan_to_num(99.0), pooled.nan_to_num(99.0))


SANITIZED = """
import json, sys
import numpy as np
import max_pool3d_front as front
random = np.random.default_rng(0)
for dtype, bits, sums in (("float32", "f4", "f4"), ("bfloat16", "u2", "f4")):
    for shape, outputs, *windows in json.loads(sys.argv[1]):
        for last in (False, True):
            def array(shape, kind):
                values = random.integers(0, 16000, shape).astype(kind)
                return np.moveaxis(np.moveaxis(values, 1, -1).copy(), -1, 1) if last else values
            for winner in (False, True):
                arrays = array(shape, bits), array(outputs, sums), array(shape, sums)
                front.relevance(dtype, *arrays, *windows, winner)
            front.forward(dtype, array(shape, bits), array(outputs, bits), *windows)
print("clean")
"""


def test_nothing_runs_over_an_edge() -> None:
    cases = []
    for case in CASES:
        windows = (case.kernel, case.kernel if case.stride is None else case.stride, case.padding, case.dilation)
        cases.append((case.x, tuple(case(torch.zeros(case.x)).shape), *(tuples(numbers, 3) for numbers in windows)))
    ran = run_sanitized("max_pool3d_front", SANITIZED, json.dumps(cases))
    assert ran.returncode == 0 and ran.stdout.strip() == "clean", ran.stderr[-4000:]


def test_every_kernel_is_emulated(front: ModuleType) -> None:
    assert tuple(front.kernels()) == KERNELS
