"""The CUDA convolution kernels, run by the emulator (tests/emulator): against the oracle, in every layout, tile and order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulator.build import load, run_sanitized
from numpy.typing import NDArray
from op_cases import (
    CONVS,
    FROZEN,
    LAYOUTS,
    SMALL_GROUPS,
    VARIANTS,
    Conv,
    Frozen,
    Problem,
    disagreement,
    kind,
    problem,
    tolerance,
)
from oracle import tuples
from torch import Tensor

KERNELS = {
    torch.float32: ["wgmma/bf16x3", "cuda/tf32x3", "cuda/tf32", "wgmma/bf16", "cuda/bf16"],
    torch.bfloat16: ["wgmma/bf16", "cuda/bf16", "cuda/tf32", "wgmma/bf16x3", "cuda/tf32x3"],
    torch.float16: ["wgmma/f16", "cuda/f16", "cuda/tf32", "wgmma/bf16x3", "cuda/tf32x3"],
}
PAIRS = [(dtype, kernel) for dtype, kernels in KERNELS.items() for kernel in kernels]
OPS = ("z_plus_conv3d", "z_beta_conv3d", "conv3d")
EVERY_VARIANT = [(op, variant.name) for op in OPS for variant in VARIANTS[op]]
EVERY_FROZEN_VARIANT = [(f"frozen_{op}", name) for op, name in EVERY_VARIANT]
TILES = [(128, 128), (128, 64), (64, 64), (128, 16)]
TILES_OF = {
    "cuda/bf16": TILES,
    "cuda/tf32": TILES,
    "cuda/tf32x3": TILES[2:],
    "wgmma/bf16": [(128, 256), (256, 128), (192, 128), (128, 128), (128, 64), (128, 16)],
    "wgmma/bf16x3": [(256, 64), (128, 64), (128, 16)],
}
"""Rows and columns of the blocks that a kernel comes in."""
EVERY_TILE = [(kernel, tile) for kernel, tiles in TILES_OF.items() for tile in tiles]
FIRST = [(torch.float32, "cuda/tf32x3"), (torch.bfloat16, "wgmma/bf16"), (torch.float16, "cuda/f16")]
"""One kernel of each way to multiply, and of each type."""
CASES = {case.name: case for case in (*CONVS, *FROZEN, *SMALL_GROUPS)}


@pytest.fixture
def front() -> Iterator[ModuleType]:
    module = load("conv3d_front")
    yield module
    module.set_seed(0)


def array(tensor: Tensor | None) -> NDArray[Any] | None:
    if tensor is None:
        return None
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def triples(case: Conv) -> tuple[Any, ...]:
    """Stride, padding before the input, and dilation; of a frozen clip's layer there are none along T."""
    if isinstance(case, Frozen):
        given = triples(case.spread)
        return tuple((neutral, *flat[1:]) for neutral, flat in zip((1, 0, 1), given, strict=True))
    kernel, stride, dilation = (tuples(v, 3) for v in (case.kernel, case.stride, case.dilation))
    if case.padding == "same":
        padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    else:
        assert not isinstance(case.padding, str)
        padding = tuples(case.padding, 3)
        padding = padding[::2] if len(padding) == 6 else padding
    return stride, padding, dilation


def run(
    front: ModuleType,
    case: Conv,
    posed: Problem,
    dtype: torch.dtype,
    kernel: str,
    layout: str = "contiguous",
    tile: tuple[int, int] = (0, 0),
    splits: int = 0,
) -> Tensor:
    given = posed.on("cpu", dtype, layout)
    x, weight = given["x"], given["weight"].contiguous()
    bias = given["bias"].contiguous() if "bias" in given else None
    shared = array(x), array(weight), array(bias)
    geometry = *triples(case), case.groups
    reads, gives = (np.array(case.reads), np.array(case.gives)) if isinstance(case, Frozen) else (None, None)
    if kind(posed.op) == "conv3d":
        out = torch.full_like(x, torch.nan).new_full(posed.expected.shape, torch.nan)
        relu = posed.options.get("relu", False)
        front.forward(*shared, array(out), *geometry, kernel, (*tile, splits), reads, relu)
        return out
    low, high = (given[name].expand(x.shape) if name in given else None for name in ("low", "high"))
    lift = "box" if low is not None else "none" if posed.options.get("non_negative") else "signed"
    out = torch.full_like(x, torch.nan, dtype=torch.float32)
    if out.shape != posed.expected.shape:
        out = out.new_full(posed.expected.shape, torch.nan)
    bounds = array(given["relevance"]), array(low), array(high)
    stabilizer = posed.options.get("stabilizer", 0.0)
    divided = posed.options.get("divided", False)
    asked = lift, stabilizer, divided, kernel, (*tile, splits), reads, gives
    front.relevance(*shared, *bounds, array(out), *geometry, *asked)
    return out


def posed_for(case: Conv, op: str, name: str, dtype: torch.dtype, short: bool = False) -> tuple[Problem, bool]:
    """The problem, and whether its operands have so few bits that products are exact."""
    (variant,) = (v for v in VARIANTS[op] if v.name == name)
    short = short or variant.exact_only
    return problem(op, case, variant, dtype, short), short


def assert_right(
    front: ModuleType,
    case: Conv,
    op: str,
    name: str,
    dtype: torch.dtype,
    kernel: str,
    short: bool = False,
    **options: Any,
) -> Tensor:
    posed, short = posed_for(case, op, name, dtype, short)
    actual = run(front, case, posed, dtype, kernel, **options)
    wrong = disagreement(actual, posed, tolerance(op, kernel, dtype, short))
    assert wrong is None, f"{case.name}, {op}, {name}, {dtype}, {kernel}, {options}: {wrong}"
    return actual


@pytest.mark.parametrize(("op", "name"), EVERY_VARIANT)
def test_every_shape_and_lift(front: ModuleType, op: str, name: str) -> None:
    """By warps and by warpgroups in turn: each shape meets each of them with half of the variants."""
    kernels = itertools.cycle(("cuda/tf32x3", "wgmma/bf16x3"))
    for _ in range(EVERY_VARIANT.index((op, name)) % 2):
        next(kernels)
    for case in CONVS:
        assert_right(front, case, op, name, torch.float32, next(kernels))


@pytest.mark.parametrize(("dtype", "kernel"), PAIRS)
def test_every_shape_and_arithmetic(front: ModuleType, dtype: torch.dtype, kernel: str) -> None:
    """Variants take turns, and so do operands with few bits, which every arithmetic multiplies exactly."""
    first = PAIRS.index((dtype, kernel))
    for number, case in enumerate(CONVS):
        op, name = EVERY_VARIANT[(first + number) % len(EVERY_VARIANT)]
        assert_right(front, case, op, name, dtype, kernel, short=number % 2 == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "kernel"), FIRST)
def test_small_groups_in_every_layout(front: ModuleType, dtype: torch.dtype, kernel: str, layout: str) -> None:
    """Threads sum four channels at once where these lie together, and go along rows where channels are far apart."""
    for name in (
        "depthwise, 32 channels",
        "depthwise, 35 channels, stride 2",
        "depthwise, two each",
        "9 groups, three to one",
        "6 groups of 4, 19 wide",
        "frozen, depthwise, of 20",
        "frozen, 9 groups of 2",
    ):
        case = CASES[name]
        for op, variant in EVERY_FROZEN_VARIANT if isinstance(case, Frozen) else EVERY_VARIANT:
            assert_right(front, case, op, variant, dtype, kernel, layout=layout)


@pytest.mark.parametrize(("op", "name"), EVERY_FROZEN_VARIANT)
def test_layers_of_frozen_clips(front: ModuleType, op: str, name: str) -> None:
    """By tables, one for all examples or one for each; where several outputs give to one time their quotients are added."""
    for number, case in enumerate(FROZEN):
        dtype, kernel = PAIRS[number % len(PAIRS)]
        assert_right(front, case, op, name, torch.float32, "cuda/tf32x3")
        assert_right(front, case, op, name, dtype, kernel, short=number % 2 == 0)
        assert_right(front, case, op, name, torch.bfloat16, "wgmma/bf16", layout=LAYOUTS[number % len(LAYOUTS)])


def test_tables_of_many_examples(front: ModuleType) -> None:
    """More numbers than the parameters of a launch hold, in each table."""
    rows = tuple(tuple((n % 2, (n + out) % 2, -1 if n % 3 else 1) for out in range(6)) for n in range(120))
    case = Frozen("many", (120, 4, 2, 1, 1), 5, (3, 1, 1), reads=rows, gives=rows, times=2)
    for op, name in (("frozen_z_plus_conv3d", "non-negative"), ("frozen_conv3d", "bias")):
        assert_right(front, case, op, name, torch.float32, "cuda/tf32x3")


def test_tables_of_many_patterns(front: ModuleType) -> None:
    """Outputs that read by the same taps are multiplied together: more such groups than one launch takes, some of no tap."""
    drawn = torch.randint(-1, 3, (3, 9, 4), generator=torch.Generator().manual_seed(0)).tolist()
    rows = tuple(tuple(map(tuple, row)) for row in drawn)
    case = Frozen("many", (3, 4, 3, 3, 2), 5, (4, 1, 1), reads=rows, gives=rows, times=3)
    for kernel in ("cuda/tf32x3", "wgmma/bf16x3"):
        for op, name in (("frozen_z_plus_conv3d", "signed, bias, stabilizer"), ("frozen_conv3d", "bias")):
            assert_right(front, case, op, name, torch.float32, kernel)


def test_a_table_of_more_taps_than_are_told_apart(front: ModuleType) -> None:
    row = tuple(tuple(-1 if tap % 5 == out else tap // 12 for tap in range(40)) for out in range(3))
    case = Frozen("long", (2, 4, 4, 1, 2), 5, (40, 1, 1), reads=(row,), gives=(row,), times=4)
    for op, name in (("frozen_z_plus_conv3d", "non-negative"), ("frozen_conv3d", "bias")):
        assert_right(front, case, op, name, torch.float32, "cuda/tf32x3")


@pytest.mark.parametrize(
    ("kernel", "weight", "expected"),
    [
        # Rounded to 1 and -1, as in the layer of a whole clip: what both round alike cancels where they are subtracted.
        ("cuda/bf16", (1 + 2**-9, 5.0, -1.0), 0.0),
        ("wgmma/bf16", (1 + 2**-9, 5.0, -1.0), 0.0),
        # Two halves keep all of the sum, and the second summand, but of the first not the last bit.
        ("wgmma/bf16x3", (1 + 2**-9 + 2**-18, 5.0, -1 - 2**-9), 2**-18),
    ],
)
def test_taps_that_read_one_frame(front: ModuleType, kernel: str, weight: tuple[float, ...], expected: float) -> None:
    """In the float32 grade they are multiplied once: their weights are added, and rounded then."""
    x, out = torch.arange(1.0, 9.0).view(1, 8, 1, 1, 1), torch.full((1, 8, 2, 1, 1), torch.nan)
    weights = torch.tensor(weight).view(1, 1, 3, 1, 1).repeat(8, 8, 1, 1, 1)
    reads = np.array([[[0, -1, 0], [-1, 0, -1]]])
    geometry = (1, 1, 1), (0, 0, 0), (1, 1, 1), 1
    front.forward(array(x), array(weights), None, array(out), *geometry, kernel, (0, 0, 0), reads)
    assert torch.equal(out[0, :, 0, 0, 0], torch.full((8,), 36 * expected))
    assert torch.equal(out[0, :, 1, 0, 0], torch.full((8,), 36 * 5.0))


@pytest.mark.parametrize("splits", [1, 3, 9])
@pytest.mark.parametrize(("kernel", "tile"), EVERY_TILE, ids=lambda value: str(value).replace(", ", "x"))
def test_every_tile_and_split(front: ModuleType, kernel: str, tile: tuple[int, int], splits: int) -> None:
    """The second case has 16 phases, in two launches; 9 splits are more than its stages."""
    front.set_seed(splits // 3)  # warpgroups' products are taken late, or at once
    for case in ("48 channels to 80, stride 2", "dilation 4x2x3, stride 2x4x6", "2 groups of 17, stride 2"):
        options = {"dtype": torch.float32, "kernel": kernel, "tile": tile, "splits": splits}
        assert_right(front, CASES[case], "z_plus_conv3d", "non-negative", **options)
        assert_right(front, CASES[case], "conv3d", "bias", **options)
        if tile == (64, 64) or kernel.startswith("wgmma"):  # others do not read a lifted input
            assert_right(front, CASES[case], "z_beta_conv3d", "box of channels, bias", **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "kernel"), [*FIRST, (torch.float32, "wgmma/bf16x3")])
def test_layouts(front: ModuleType, dtype: torch.dtype, kernel: str, layout: str) -> None:
    for case in ("48 channels to 80, stride 2", "stem of one frame", "2 groups of 32", "frozen clip"):
        assert_right(front, CASES[case], "z_plus_conv3d", "non-negative", dtype, kernel, layout=layout)
        assert_right(front, CASES[case], "z_beta_conv3d", "box of pixels, stabilizer", dtype, kernel, layout=layout)
        assert_right(front, CASES[case], "conv3d", "bias", dtype, kernel, layout=layout)


@pytest.mark.parametrize(("op", "name"), [("z_plus_conv3d", "non-negative"), ("z_beta_conv3d", "box of numbers")])
def test_order_of_threads_does_not_matter(front: ModuleType, op: str, name: str) -> None:
    case = CASES["48 channels to 80, stride 2"]
    for kernel, splits in itertools.product(("cuda/tf32x3", "cuda/bf16", "wgmma/bf16x3", "wgmma/bf16"), (1, 3)):
        results = []
        for seed in range(3):
            front.set_seed(seed)
            results.append(assert_right(front, case, op, name, torch.float32, kernel, splits=splits))
        assert all(torch.equal(one, results[0]) for one in results)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_shared_memory_has_no_bank_conflicts(front: ModuleType, layout: str) -> None:
    case = CASES["48 channels to 80, stride 2"]
    front.take_bank_conflicts()
    for kernel, tile in EVERY_TILE:
        assert_right(front, case, *EVERY_VARIANT[0], torch.float32, kernel, layout=layout, tile=tile)
    for kernel in ("cuda/tf32x3", "cuda/bf16", "wgmma/bf16x3", "wgmma/bf16"):
        assert_right(front, case, *EVERY_VARIANT[3], torch.float32, kernel, layout=layout)
    assert front.take_bank_conflicts() == 0


def relevance(
    front: ModuleType,
    x: Tensor,
    weight: Tensor,
    given: Tensor,
    kernel: str,
    lift: str = "none",
    splits: int = 0,
    padding: int = 0,
) -> Tensor:
    """z+ of one convolution of unit stride, without bias or stabilizer."""
    out = torch.full_like(x, torch.nan, dtype=torch.float32)
    geometry = (1, 1, 1), (padding,) * 3, (1, 1, 1), 1
    arrays = array(x), array(weight), None, array(given), None, None, array(out)
    front.relevance(*arrays, *geometry, lift, 0.0, False, kernel, (0, 0, splits))
    return out


@pytest.mark.parametrize(
    ("kernel", "of_each", "of_all"), [("cuda/tf32x3", 2e-6, 1e-6), ("wgmma/bf16x3", 1.1 * 2**-16, 4e-6)]
)
def test_long_sums_keep_float32_grade(
    front: ModuleType, generator: torch.Generator, kernel: str, of_each: float, of_all: float
) -> None:
    """Tensor cores cut sums off, as the emulator does: over a long depth that must not add up, to 1e-4 in one go."""
    x = torch.rand(2, 8192, 1, 1, 1, generator=generator)
    weight = torch.rand(3, 8192, 1, 1, 1, generator=generator)
    given = torch.rand(2, 3, 1, 1, 1, generator=generator)
    z = F.conv3d(x.double(), weight.double())
    expected = x * torch.einsum("nothw,oiabc->nithw", given / z, weight.double())
    actual = relevance(front, x, weight, given, kernel, splits=1)
    assert ((actual - expected).abs() / expected).max() < of_each
    assert abs(actual.double().sum() / given.double().sum() - 1) < of_all


@pytest.mark.parametrize(("dtype", "kernel"), PAIRS)
def test_zero_and_subnormal_denominators_pass_nothing(front: ModuleType, dtype: torch.dtype, kernel: str) -> None:
    x = torch.ones(1, 3, 1, 1, 2, dtype=dtype)
    x[..., 0] = 0
    weight = torch.ones(2, 3, 1, 1, 1, dtype=dtype)
    given = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1, 1).repeat(1, 1, 1, 1, 2)
    out = relevance(front, x, weight, given, kernel)
    assert (out[..., 0] == 0).all()
    torch.testing.assert_close(out[..., 1], torch.ones(1, 3, 1, 1), rtol=2**-6, atol=0)
    if dtype != torch.float16:  # whose smallest numbers have products above float32's subnormal ones
        tiny = torch.full_like(x, 2.0**-70)
        assert (relevance(front, tiny, weight * 2.0**-70, given, kernel) == 0).all()


@pytest.mark.parametrize(("dtype", "kernel"), PAIRS)
@pytest.mark.parametrize("lift", ["none", "signed"])
def test_nan_reaches_what_shares_a_window_with_it(
    front: ModuleType, lift: str, dtype: torch.dtype, kernel: str
) -> None:
    x = torch.ones(2, 8, 1, 1, 9, dtype=dtype)
    x[0, 5, 0, 0, 4] = torch.nan
    weight = torch.ones(4, 8, 1, 1, 3, dtype=dtype)
    out = relevance(front, x, weight, torch.ones(2, 4, 1, 1, 7), kernel, lift)
    reached = torch.zeros(2, 8, 1, 1, 9, dtype=torch.bool)
    reached[0, ..., 2:7] = True
    assert torch.equal(out.isnan(), reached)


@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [
        (torch.float32, "cuda/tf32x3"),
        (torch.float16, "cuda/f16"),
        (torch.float32, "wgmma/bf16x3"),
        (torch.float16, "wgmma/f16"),
    ],
)
def test_quotients_beyond_float16_keep_their_precision(front: ModuleType, dtype: torch.dtype, kernel: str) -> None:
    """R / z of 1e9 and of 1e-9 in one tensor."""
    x = torch.tensor([1e-5, 1.0], dtype=dtype).view(1, 1, 1, 1, 2)
    given = torch.tensor([1e4, 1e-9]).view(1, 1, 1, 1, 2)
    out = relevance(front, x, torch.ones(1, 1, 1, 1, 1, dtype=dtype), given, kernel)
    torch.testing.assert_close(out, given, rtol=2**-10, atol=0)


@pytest.mark.parametrize("kernel", KERNELS[torch.float16])
def test_boxes_wider_than_float16(front: ModuleType, kernel: str) -> None:
    """Distances to a bound may leave the range of x: no infinity times zero comes of that."""
    x = torch.tensor([1.0, -3.0], dtype=torch.float16).view(1, 1, 1, 1, 2)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float16).view(2, 1, 1, 1, 1)
    given = torch.ones(1, 2, 1, 1, 2)
    low, high = (torch.full(x.shape, bound) for bound in (-2e5, 1e5))
    out = torch.full(x.shape, torch.nan)
    arrays = (array(tensor) for tensor in (x, weight, None, given, low, high, out))
    front.relevance(*arrays, (1, 1, 1), (0, 0, 0), (1, 1, 1), 1, "box", 0.0, False, kernel, (0, 0, 0))
    torch.testing.assert_close(out, torch.ones(x.shape), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kernel", ["cuda/tf32", "wgmma/bf16x3"])
@pytest.mark.parametrize("lift", ["none", "signed"])
@pytest.mark.parametrize("channels", [8, 3])
def test_offsets_of_more_than_32_bits(front: ModuleType, tmp_path: Path, channels: int, lift: str, kernel: str) -> None:
    """Two examples lie 2^31 + 64 elements apart, in sparse files."""
    apart = 2**31 + 64
    x = torch.rand(2, 2, 3, 3, channels).permute(0, 4, 1, 2, 3)
    weight = torch.rand(4, channels, 1, 3, 3)
    given = torch.rand(2, 4, 2, 1, 1)
    far = []
    for name, tensor in {"x": x, "relevance": given, "out": torch.full_like(x, torch.nan)}.items():
        base = np.memmap(tmp_path / name, np.float32, "w+", shape=(apart + tensor[0].numel(),))
        strides = [4 * apart, *(4 * s for s in tensor.stride()[1:])]
        far.append(np.lib.stride_tricks.as_strided(base, tensor.shape, strides, writeable=True))
        far[-1][...] = tensor.numpy()
    expected = relevance(front, x, weight, given, kernel, lift)
    geometry = (1, 1, 1), (0, 0, 0), (1, 1, 1), 1
    front.relevance(
        far[0], array(weight), None, far[1], None, None, far[2], *geometry, lift, 0.0, False, kernel, (0, 0, 0)
    )
    assert np.array_equal(far[2], expected.numpy())


@pytest.mark.parametrize(("dtype", "kernel"), PAIRS)
def test_an_input_of_nothing_but_padding(front: ModuleType, dtype: torch.dtype, kernel: str) -> None:
    x, weight, bias = (
        torch.empty(2, 3, 1, 0, 4, dtype=dtype),
        torch.ones(5, 3, 1, 2, 1, dtype=dtype),
        torch.ones(5, dtype=dtype),
    )
    out = torch.full((2, 5, 1, 1, 4), torch.nan, dtype=dtype)
    arrays = array(x), array(weight), array(bias), array(out)
    front.forward(*arrays, (1, 1, 1), (0, 1, 0), (1, 1, 1), 1, kernel, (0, 0, 0))
    assert (out == 1).all()


def test_windows_wider_than_can_be_counted_are_errors(front: ModuleType) -> None:
    """Rows that read nothing are told by a position that no tap may bring back inside."""
    x, weight, out = torch.ones(1, 8, 1, 1, 1), torch.ones(1, 8, 1, 2, 1), torch.empty(1, 1, 1, 1, 1)
    arrays = array(x), array(weight), None, array(out)
    with pytest.raises(ValueError, match="windows are wider"):
        front.forward(*arrays, (1, 1, 1), (0, 2**30, 0), (1, 2**30, 1), 1, "cuda/tf32", (0, 0, 0))


def test_unknown_kernels_and_tiles_are_errors(front: ModuleType) -> None:
    x, weight, given = torch.ones(1, 4, 1, 1, 1), torch.ones(1, 4, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)
    with pytest.raises(
        ValueError, match=r"named cuda/f16.*wgmma/bf16x3, cuda/tf32x3, cuda/tf32, wgmma/bf16, cuda/bf16"
    ):
        relevance(front, x, weight, given, "cuda/f16")
    out = torch.empty(1, 1, 1, 1, 1)
    geometry = (1, 1, 1), (0, 0, 0), (1, 1, 1), 1
    with pytest.raises(ValueError, match="no such tile"):
        front.forward(array(x), array(weight), None, array(out), *geometry, "cuda/tf32x3", (128, 128, 0))
    for dtype, kernels in KERNELS.items():
        assert front.kernels(array(x.to(dtype))) == kernels


def test_nothing_runs_over_the_end_of_memory() -> None:
    """Odd shapes of every lift, arithmetic and tile under the address and undefined-behaviour sanitizers."""
    script = """if True:
        import itertools, numpy as np, conv3d_front as front
        rng = np.random.default_rng(0)
        tiles = itertools.cycle([(0, 0, 0), (0, 0, 3), (0, 0, 2), (128, 16, 2)])
        geometries = itertools.cycle([(1, 1), (2, 1), (3, 2)])
        kernels = "cuda/tf32x3", "cuda/bf16", "wgmma/bf16x3"
        for c, lift, kernel in itertools.product((1, 3, 8), ("none", "signed", "box"), kernels):
            stride, dilation = next(geometries)
            x = rng.random((2, c, 2, 6, 5), np.float32)
            weight, bias = rng.random((5, c, 2, 3, 2), np.float32) - 0.5, rng.random(5, np.float32)
            size = [(n + 2 - dilation * (k - 1) - 1) // stride + 1 for n, k in zip((2, 6, 5), (2, 3, 2))]
            given = rng.random((2, 5, *size), np.float32)
            low, high = (np.full(x.shape, bound, np.float32) if lift == "box" else None for bound in (0, 1))
            out, forward = np.full_like(x, np.nan), np.full_like(given, np.nan)
            geometry = (stride,) * 3, (1, 1, 1), (dilation,) * 3, 1
            front.relevance(x, weight, bias, given, low, high, out, *geometry, lift, 0.1, c == 3, kernel, next(tiles))
            front.forward(x, weight, bias, forward, *geometry, kernel, next(tiles))
            assert np.isfinite(out).all() and np.isfinite(forward).all()
            # The same input in a layer of frozen clips, whose two times are read and given to by a table.
            tables = [np.array(rows) for rows in ([[[-1, 0], [0, 0], [0, 1]]], [[[0, 0]] * 3, [[-1, 1], [1, 0], [0, 0]]])]
            given = rng.random((2, 5, 3, *size[1:]), np.float32)
            geometry = (1, stride, stride), (0, 1, 1), (1, dilation, dilation), 1
            for reads in tables:
                out, forward = np.full_like(x, np.nan), np.full_like(given, np.nan)
                asked = lift, 0.1, c == 3, kernel, next(tiles), reads, reads
                front.relevance(x, weight, bias, given, low, high, out, *geometry, *asked)
                front.forward(x, weight, bias, forward, *geometry, kernel, next(tiles), reads)
                assert np.isfinite(out).all() and np.isfinite(forward).all()
        # Channels last, where quads of channels are read at once, and the last quotients are padding.
        for c_out, kernel, splits in itertools.product((4, 12), ("cuda/tf32x3", "cuda/bf16", "wgmma/bf16x3"), (1, 2)):
            last = lambda c: np.moveaxis(rng.random((1, 1, 1, 70, c), np.float32), -1, 1)
            x, given, weight = last(8), last(c_out), rng.random((c_out, 8, 1, 1, 1), np.float32)
            out = np.full_like(x, np.nan)
            geometry = (1, 1, 1), (0, 0, 0), (1, 1, 1), 1
            front.relevance(x, weight, None, given, None, None, out, *geometry, "none", 0.0, False, kernel, (0, 0, splits))
            assert np.isfinite(out).all()
        print("all ran")
    """
    done = run_sanitized("conv3d_front", script)
    assert done.stdout == "all ran\n", done.stderr[-4000:]
