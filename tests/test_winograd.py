"""Winograd's transforms: the accuracy of what is multiplied for every single number, also of those that transforms would drown
in noise.

The oracle is torch's convolution in float64 and its gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_dtd import kernels, ops

pytestmark = pytest.mark.usefixtures("cpu_kernels")

KERNELS = [name for name in kernels.available("conv3d", "cpu", torch.float32) if kernels.transforms(name)] or ["none"]
OF_ALL = {"winograd": 2e-6, "winograd_bf16": 3e-3}
"""Relative L2 error of relevance."""

OF_EACH = {"winograd": 2e-4, "winograd_bf16": 0.1}
"""Relative error of a number that is a sum of terms of one sign: what the smallest that is not computed again may have."""


@dataclass(frozen=True)
class Case:
    """A convolution that the transforms serve."""

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    padding: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("whole tiles", (1, 32, 4, 16, 16), (16, 32, 3, 3, 3)),
    Case("cut tiles, odd channels", (2, 19, 5, 13, 10), (35, 19, 3, 3, 3)),
    Case("no time", (3, 24, 1, 9, 30), (17, 24, 1, 3, 3), (0, 1, 1)),
    Case("two taps of time, unpadded", (1, 16, 6, 15, 12), (40, 16, 2, 3, 3), (0, 0, 0)),
    Case("padded as far as may be", (1, 20, 3, 12, 9), (24, 20, 3, 3, 3), (2, 2, 2)),
    Case("all times at the border", (2, 16, 2, 14, 14), (16, 16, 5, 3, 3), (2, 1, 1)),
    Case("groups", (2, 48, 3, 11, 17), (34, 24, 3, 3, 3), groups=2),
    Case("several slabs", (1, 64, 9, 21, 60), (24, 64, 3, 3, 3)),
    Case("several blocks of channels", (2, 72, 3, 14, 14), (150, 72, 3, 3, 3)),
    Case("last tiles of three", (1, 32, 4, 15, 11), (20, 32, 3, 3, 3)),
    Case("last tiles of two and three", (2, 32, 3, 10, 7), (20, 32, 3, 3, 3)),
    Case("one tile, of three", (10, 32, 4, 3, 3), (16, 32, 3, 3, 3)),
    Case("one tile, of two", (12, 32, 4, 2, 2), (16, 32, 3, 3, 3)),
    Case("two rows", (4, 32, 4, 2, 30), (16, 32, 3, 3, 3)),
    Case("one column of tiles", (4, 32, 4, 30, 3), (16, 32, 3, 3, 3)),
]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}


def drawn(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Input and weight."""
    generator = torch.Generator().manual_seed(len(case.name))
    x = torch.randn(case.x, generator=generator).to(dtype)
    weight = (torch.randn(case.weight, generator=generator) / 20).to(dtype)
    return x, weight


def convolved(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv3d(x.double(), weight.double(), padding=case.padding, groups=case.groups)


def relevance_by_definition(case: Case, parts: list[tuple[Tensor, Tensor]], relevance: Tensor) -> Tensor:
    """R_in of inputs u and weights v of one sign each: sum of u * adjoint(R / z)."""
    inputs = [u.double().requires_grad_() for u, _ in parts]
    z = sum((convolved(case, u, v) for u, (_, v) in zip(inputs, parts, strict=True)), torch.zeros(()))
    assert isinstance(z, Tensor)
    s = torch.where(z == 0, 0.0, relevance.double() / torch.where(z == 0, 1.0, z)).detach()
    gradients = torch.autograd.grad(z, inputs, s)
    return sum((u.detach() * g for u, g in zip(inputs, gradients, strict=True)), torch.zeros(()))  # type: ignore[return-value]


def options(case: Case, kernel: str) -> dict[str, Any]:
    return {"padding": case.padding, "groups": case.groups, "kernel": kernel}


def off(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def off_each(actual: Tensor, expected: Tensor) -> float:
    """The largest relative error of a number; what is zero must be so."""
    error = (actual.double() - expected).abs()
    assert not error[expected == 0].any(), "what should be zero is not"
    return (error / expected.abs().clamp(min=1e-300)).max().item()


def directly(kernel: str) -> str:
    """The same instruction set by definition."""
    return kernel.replace("/winograd_bf16", "/bf16").replace("/winograd", "/ieee")


def in_floats(kernel: str, arithmetic: str) -> str:
    """What multiplies floats where a kernel's instruction set does not."""
    return f"{kernel.partition('/')[0].replace('amx', 'avx512')}/{arithmetic}"


def of_all(kernel: str) -> float:
    return OF_ALL[kernel.partition("/")[2]]


def of_each(kernel: str) -> float:
    return OF_EACH[kernel.partition("/")[2]]


def each(names: list[str], *lists: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test for every kernel and combination."""
    arguments = "kernel, case" if len(lists) == 1 else "kernel, case, layout"
    return pytest.mark.parametrize(arguments, list(itertools.product(names, *lists)), ids=str)


def test_there_is_one_for_every_instruction_set() -> None:
    names = kernels.available("conv3d", "cpu", torch.float32)
    assert [*map(directly, KERNELS)] == [name for name in names if name.endswith(("/ieee", "/bf16"))]


@each(KERNELS, CASES, LAYOUTS)
def test_convolutions_agree_with_the_definition(kernel: str, case: Case, layout: str) -> None:
    x, weight = drawn(case)
    x = x.to(memory_format=LAYOUTS[layout])
    bias = torch.linspace(-1, 1, len(weight))
    expected = convolved(case, x, weight) + bias.double().view(-1, 1, 1, 1)
    actual = ops.conv3d(x, weight, bias, **options(case, kernel))
    assert off(actual, expected) <= OF_ALL["winograd"]
    definition = ops.conv3d(x, weight, bias, **options(case, directly(kernel)))
    assert not torch.equal(actual, definition), "the transforms did not serve"
    as_floats = ops.conv3d(x, weight, bias, **options(case, in_floats(kernel, "winograd")))
    assert torch.equal(actual, as_floats), "forward nothing transformed is rounded"


@each(KERNELS, CASES, LAYOUTS)
def test_relevance_agrees_with_the_definition(kernel: str, case: Case, layout: str) -> None:
    """z+ of signed and of non-negative inputs, with quotients known already, and z-beta."""
    x, weight = drawn(case)
    x = x.to(memory_format=LAYOUTS[layout])
    shape = convolved(case, x, weight).shape
    relevance = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    v = weight.clamp(min=0), weight.clamp(max=0)

    def share(x: Tensor, **more: Any) -> Tensor:
        return ops.z_plus_conv3d(x, weight, relevance, **options(case, kernel), **more)

    u = x.relu()
    for actual, parts in (
        (share(x), [(x.clamp(min=0), v[0]), (x.clamp(max=0), v[1])]),
        (share(u, non_negative=True), [(u, v[0])]),
    ):
        expected = relevance_by_definition(case, parts, relevance)
        assert off(actual, expected) <= of_all(kernel)
        assert off_each(actual, expected) <= of_each(kernel)
    definition = ops.z_plus_conv3d(u, weight, relevance, non_negative=True, **options(case, directly(kernel)))
    assert not torch.equal(actual, definition), "the transforms did not serve"

    known = u.double().requires_grad_()
    (gradient,) = torch.autograd.grad(convolved(case, known, v[0]), known, relevance.double())
    assert off_each(share(u, non_negative=True, divided=True), u.double() * gradient) <= of_each(kernel)

    low, high = torch.tensor(-6.0), torch.full((case.x[1], 1, 1, 1), 7.0)
    actual = ops.z_beta_conv3d(x, low, high, weight, relevance, **options(case, kernel))
    expected = relevance_by_definition(case, [(x - low, v[0]), (x - high, v[1])], relevance)
    assert off_each(actual, expected) <= of_each(kernel)


@pytest.mark.parametrize("size", [14, 7, 5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_deep_layers_err_little_more_than_the_definition(kernel: str, size: int) -> None:
    case = Case("deep", (4, 512, 3, size, size), (16, 512, 3, 3, 3))
    x, weight = drawn(case)
    expected = convolved(case, x, weight)
    by_name = {name: ops.conv3d(x, weight, **options(case, name)) for name in (kernel, directly(kernel))}
    assert not torch.equal(*by_name.values())
    assert off(by_name[kernel], expected) <= 3 * off(by_name[directly(kernel)], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_shorter_types_are_multiplied_in_float32(kernel: str, dtype: torch.dtype) -> None:
    case = CASES[1]
    x, weight = drawn(case, dtype)
    expected = convolved(case, x, weight)
    assert off(ops.conv3d(x, weight, **options(case, kernel)), expected) <= torch.finfo(dtype).eps
    relevance = torch.rand(expected.shape)
    v = weight.clamp(min=0), weight.clamp(max=0)
    expected = relevance_by_definition(case, [(x.clamp(min=0), v[0]), (x.clamp(max=0), v[1])], relevance)
    assert off_each(ops.z_plus_conv3d(x, weight, relevance, **options(case, kernel)), expected) <= of_each(kernel)


# ------------------------------------------------------------------------------ what transforms alone would get wrong


def dark(case: Case) -> tuple[Tensor, Tensor]:
    """Non-negative inputs: bright, dark by six orders of magnitude, and black, side by side."""
    x, weight = drawn(case)
    x = x.abs()
    width = case.x[-1]
    x[..., width // 3 : 2 * width // 3] *= 1e-6
    x[..., 2 * width // 3 :] = 0
    x[:, ::3] *= (torch.rand(x[:, ::3].shape, generator=torch.Generator().manual_seed(2)) < 0.05).float()
    return x, weight


@each(KERNELS, CASES)
def test_the_dark_beside_the_bright_is_as_exact_and_black_stays_black(kernel: str, case: Case) -> None:
    u, weight = dark(case)
    v = weight.clamp(min=0)
    z = convolved(case, u, v)
    assert off_each(ops.conv3d(u, v, **options(case, kernel)), z) <= of_each(kernel)
    assert off_each(ops.conv3d(-u, -v, **options(case, kernel)), z) <= of_each(kernel)

    relevance = torch.rand(z.shape, generator=torch.Generator().manual_seed(3))
    expected = relevance_by_definition(case, [(u, v)], relevance)
    actual = ops.z_plus_conv3d(u, weight, relevance, non_negative=True, **options(case, kernel))
    assert off_each(actual, expected) <= of_each(kernel)
    passed = relevance.double()[z > 0].sum()
    assert abs(actual.double().sum() / passed - 1) < 5 * of_all(kernel), "relevance is kept"


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_shines_into_the_black_where_weights_have_both_signs(kernel: str) -> None:
    """The next layer's denominators would make relevance of it."""
    x, weight = drawn(Case("signed", (1, 64, 2, 24, 64), (64, 64, 3, 3, 3)))
    x = x.relu()
    x[..., 26:] = 0
    bias = torch.linspace(-1, 1, 64)
    for b, level in ((None, torch.zeros(())), (bias, bias.view(-1, 1, 1, 1))):
        actual = ops.conv3d(x, weight, b, padding=1, kernel=kernel)
        assert torch.equal(actual[..., 27:], level.expand(1, 64, 2, 24, 37))
        assert not torch.equal(actual, ops.conv3d(x, weight, b, padding=1, kernel=directly(kernel)))


@each(KERNELS, CASES)
def test_quotients_of_very_different_size_do_not_disturb_each_other(kernel: str, case: Case) -> None:
    u, weight = drawn(case)
    u = u.abs()
    s = torch.rand(convolved(case, u, weight).shape, generator=torch.Generator().manual_seed(4))
    s[..., ::7] *= 1e7
    s[:, :, :, ::5] = 0
    known = u.double().requires_grad_()
    (gradient,) = torch.autograd.grad(convolved(case, known, weight.clamp(min=0)), known, s.double())
    actual = ops.z_plus_conv3d(u, weight, s, non_negative=True, divided=True, **options(case, kernel))
    assert off_each(actual, u.double() * gradient) <= of_each(kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_black_hole_stays_black_where_all_channels_are_alike(kernel: str) -> None:
    """Then rounding errs alike in every channel, and does not average out."""
    weight = torch.rand(32, 32, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    u = torch.ones(12, 32, 1, 16, 16)
    levels = torch.linspace(0.5, 1, len(u)).view(-1, 1, 1, 1, 1)
    for y, x in itertools.product(range(2, 6), repeat=2):
        s = levels.expand(-1, 32, 1, 16, 16).clone()
        s[..., y : y + 3, x : x + 3] = 0
        shared = ops.z_plus_conv3d(u, weight, s, padding=(0, 1, 1), non_negative=True, divided=True, kernel=kernel)
        assert not shared[..., y + 1, x + 1].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_example_that_is_mostly_noise_is_computed_by_definition_and_no_other(kernel: str) -> None:
    """A few bright points on black, beside examples that are bright all over."""
    case = Case("batch", (3, 32, 4, 16, 16), (32, 32, 3, 3, 3))
    x, weight = drawn(case)
    bright = x.abs()
    points = bright.clone()
    points[1] = 0
    points[1, :, ::2, ::5, ::5] = bright[1, :, ::2, ::5, ::5]

    def forward(u: Tensor, name: str) -> Tensor:
        return ops.conv3d(u, weight.clamp(min=0), **options(case, name))

    def back(s: Tensor, name: str) -> Tensor:
        return ops.z_plus_conv3d(bright, weight, s, non_negative=True, divided=True, **options(case, name))

    for compute, by_definition in ((forward, in_floats(kernel, "ieee")), (back, directly(kernel))):
        found, alone, definition = compute(points, kernel), compute(bright, kernel), compute(points, by_definition)
        assert torch.equal(found[1], definition[1])
        for example in (0, 2):
            assert torch.equal(found[example], alone[example])
            assert not torch.equal(found[example], definition[example])


@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_layers_of_frozen_clips_are_held_to_the_same(kernel: str, by_example: bool) -> None:
    """Black beside bright and dim: products that several times share, and sums of several, are as exact as others."""
    reads = [[[-1, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 2], [1, 2, -1]]]
    reads += [[[-1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 2], [2, 2, -1]]] if by_example else []
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 24, 3, 17, 19, generator=generator)
    x[..., 5:12, :] = 0
    x[0, :, :, 9, 3] = 1e-6
    weight = torch.randn(40, 24, 3, 3, 3, generator=generator)
    relevance = torch.rand(2, 40, 5, 17, 19, generator=generator)
    options: dict[str, Any] = {"padding": 1, "kernel": kernel}
    v = weight.clamp(min=0)

    black = torch.zeros(2, 24, 1, 17, 19)
    rows = reads if by_example else reads * 2
    frames = torch.stack(
        [
            torch.cat([one, none], 1)[:, row].flatten(1, 2)
            for one, none, row in zip(x, black, torch.tensor(rows), strict=True)
        ]
    ).double()

    def convolved(frames: Tensor) -> Tensor:
        return F.conv3d(frames, v.double(), stride=(3, 1, 1), padding=(0, 1, 1))

    z = convolved(frames)
    found = ops.frozen_conv3d(x, v, reads, **options)
    assert off(found, z) < of_all(kernel) and off_each(found, z) < of_each(kernel)
    frames.requires_grad_()
    s = torch.where(z == 0, 0.0, relevance.double() / torch.where(z == 0, 1.0, z))
    (pulled,) = torch.autograd.grad(convolved(frames), frames, s)
    shared = (frames * pulled).detach().unflatten(2, (5, 3))
    expected = torch.zeros(2, 24, 3, 17, 19, dtype=torch.float64)
    for n, row in enumerate(rows):
        for q, times in enumerate(row):
            for tap, time in enumerate(times):
                if time >= 0:
                    expected[n, :, time] += shared[n, :, q, tap]
    found = ops.frozen_z_plus_conv3d(x, weight, relevance, reads, reads, 3, non_negative=True, **options)
    assert off(found, expected) < of_all(kernel) and off_each(found, expected) < of_each(kernel)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_goes_no_further_than_by_definition(kernel: str, value: float) -> None:
    case = CASES[0]
    x, weight = drawn(case)
    x[0, 3, 1, 6, 7] = value
    for v in (weight, weight.clamp(min=0)):
        actual = ops.conv3d(x.abs(), v * 8, **options(case, kernel))
        expected = ops.conv3d(x.abs(), v * 8, **options(case, directly(kernel)))
        assert not actual.isfinite().all() or value == 1e38
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isinf(), expected.isinf())


# --------------------------------------------------------------------------------------------------------- who is served


@pytest.mark.parametrize("op", ["conv3d", "z_plus_conv3d"])
def test_it_serves_float32_and_never_ieee(op: str) -> None:
    """Whatever the table says, on machines where it says nothing too."""
    for shape in ("small", "dense"):
        assert not kernels.choose(op, "cpu", torch.float32, "ieee", shape).endswith("winograd")
    if kernels.feature_level("cpu") in ("avx2", "generic", "avx512"):
        assert kernels.choose(op, "cpu", torch.float32, "float32", "dense").endswith("winograd")
    for shape in ("pixels", "linear", "pointwise", "strided"):
        assert not kernels.choose(op, "cpu", torch.float32, "float32", shape).endswith("winograd")
    assert not kernels.choose(op, "cpu", torch.float64, "float32", "dense").endswith("winograd")


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_too_long_for_the_caches_are_computed_by_definition(kernel: str) -> None:
    u, weight, s = torch.ones(1, 16, 1, 4, 6900), torch.rand(256, 16, 1, 3, 3), torch.rand(1, 256, 1, 4, 6900)
    options: dict[str, Any] = {"padding": (0, 1, 1), "non_negative": True, "divided": True}
    found = [ops.z_plus_conv3d(u, weight, s, kernel=name, **options) for name in (kernel, directly(kernel))]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("stride", "dilation", "weight"),
    [(2, 1, (16, 24, 3, 3, 3)), (1, 2, (16, 24, 3, 3, 3)), (1, 1, (16, 24, 3, 5, 3)), (1, 1, (16, 24, 3, 1, 1))],
    ids=["strided", "dilated", "5 taps", "1 tap"],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_other_convolutions_are_computed_by_definition(
    kernel: str, stride: int, dilation: int, weight: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(1, 24, 5, 16, 17, generator=generator), torch.randn(weight, generator=generator)
    found = [
        ops.conv3d(x, v, stride=stride, dilation=dilation, padding=2, kernel=name)
        for name in (kernel, directly(kernel))
    ]
    assert torch.equal(*found)
