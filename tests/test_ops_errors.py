"""What a fused operation cannot do it refuses by name: the same way from its definition, its compiled kernels and its fake."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from op_cases import DEVICES, THREE, explicit
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from captum_dtd import kernels, ops

CONVOLUTIONS = ("z_plus_conv3d", "z_beta_conv3d", "conv3d")
RULES = ("z_plus_conv3d", "z_beta_conv3d", "max_pool3d_relevance")
POOLING_RULES = ("max_pool3d_relevance",)
POOLING = (*POOLING_RULES, "max_pool3d")
BOXED = ("z_beta_conv3d",)
ADDITION = ("z_plus_add",)
WINDOWS = (*CONVOLUTIONS, *POOLING)
ALL = (*WINDOWS, *ADDITION)
SHARING = (*RULES, *ADDITION)
FROZEN_RULES = ("frozen_z_plus_conv3d", "frozen_z_beta_conv3d")
FROZEN_CONVOLUTIONS = (*FROZEN_RULES, "frozen_conv3d")
FROZEN_POOLING_RULES = ("frozen_max_pool3d_relevance",)
FROZEN_POOLING = (*FROZEN_POOLING_RULES, "frozen_max_pool3d")
FROZEN = (*FROZEN_CONVOLUTIONS, *FROZEN_POOLING)
FROZEN_SHARING = (*FROZEN_RULES, *FROZEN_POOLING_RULES)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def valid(op: str, device: str) -> dict[str, Any]:
    """Arguments that every operation takes, to be spoiled one at a time."""
    if op in FROZEN_POOLING:
        given = {
            "x": torch.rand(2, 6, 3, 5, 5, device=device),
            "kernel_size": [3, 3, 3],
            "reads": THREE,
            "stride": [2, 2],
            "padding": [1, 0],
        }
        if op in FROZEN_POOLING_RULES:
            given |= {"relevance": torch.rand(2, 6, 5, 3, 2, device=device), "gives": THREE, "times": 3}
        return given
    if op in FROZEN:
        given = {
            "x": torch.rand(2, 6, 3, 5, 5, device=device),
            "weight": torch.randn(4, 3, 3, 3, 3, device=device),
            "bias": torch.randn(4, device=device),
            "reads": THREE,
            "stride": [2, 2],
            "padding": [1, 0],
            "groups": 2,
        }
        if op in FROZEN_RULES:
            given |= {"relevance": torch.rand(2, 4, 5, 3, 2, device=device), "gives": THREE, "times": 3}
        if op == "frozen_z_beta_conv3d":
            given |= {"low": torch.full((6, 1, 1, 1), -1.0, device=device), "high": torch.ones(1, device=device)}
        return given
    if op in POOLING:
        given = {
            "x": torch.rand(2, 6, 5, 5, 5, device=device),
            "kernel_size": [2, 2, 2],
            "stride": [2, 2, 2],
            "padding": [0, 1, 1],
            "dilation": [1, 1, 1],
        }
        if op in POOLING_RULES:
            given["relevance"] = torch.rand(2, 6, 2, 3, 3, device=device)
        return given
    if op == "z_plus_add":
        return {name: torch.rand(2, 6, 4, 5, 5, device=device) for name in ("x", "other", "relevance")}
    given = {
        "x": torch.rand(2, 6, 4, 5, 5, device=device),
        "weight": torch.randn(4, 3, 3, 3, 3, device=device),
        "bias": torch.randn(4, device=device),
        "stride": [1, 2, 2],
        "padding": [1, 1, 1, 0, 0, 0],
        "dilation": [1, 1, 1],
        "groups": 2,
    }
    if op != "conv3d":
        given["relevance"] = torch.rand(2, 4, 4, 2, 2, device=device)
    if op == "z_beta_conv3d":
        given |= {"low": torch.full((6, 1, 1, 1), -1.0, device=device), "high": torch.ones(1, device=device)}
    return given


@dataclass(frozen=True)
class Refusal:
    """One spoiled argument, and what the error must say: the argument and what was given."""

    operations: tuple[str, ...]
    argument: str
    spoil: Callable[[Any], Any]
    message: str


def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


def on_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def of(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.new_ones(shape)


def value(instead: Any) -> Callable[[Any], Any]:
    return lambda _: instead


REFUSALS = {
    "x without a batch": Refusal(ALL, "x", of(6, 4, 5, 5), r"x must have 5 dimensions.*\(6, 4, 5, 5\)"),
    "x of integers": Refusal(ALL, "x", to(torch.int32), r"x must be float32.*int32"),
    "x of bytes": Refusal(ALL, "x", to(torch.uint8), r"x must be float32.*uint8"),
    "x of another type than the rest": Refusal(
        (*CONVOLUTIONS, *POOLING_RULES, *ADDITION),
        "x",
        to(torch.float64),
        r"(weight|relevance|other) must be .*float64.*float32",
    ),
    "weight of a 2D layer": Refusal(CONVOLUTIONS, "weight", of(4, 3, 3, 3), r"weight must have 5 dim.*\(4, 3, 3, 3\)"),
    "weight of another type": Refusal(
        CONVOLUTIONS, "weight", to(torch.bfloat16), r"weight must be .*float32.*bfloat16.*\(4, 3, 3, 3, 3\)"
    ),
    "weight elsewhere": Refusal(CONVOLUTIONS, "weight", on_meta, r"weight must be on .* as x is, got meta"),
    "weight without taps": Refusal(CONVOLUTIONS, "weight", of(4, 3, 0, 3, 3), r"weight.*at least 1.*\[0, 3, 3\]"),
    "weight for fewer channels": Refusal(
        CONVOLUTIONS, "weight", of(4, 2, 3, 3, 3), r"weight .*\(4, 2, 3, 3, 3\).* x .*\(2, 6, 4, 5, 5\).*groups=2"
    ),
    "weight that groups do not divide": Refusal(
        CONVOLUTIONS, "weight", of(5, 3, 3, 3, 3), r"weight .*\(5, 3, 3, 3, 3\)"
    ),
    "weight larger than x": Refusal(
        CONVOLUTIONS,
        "weight",
        of(4, 3, 7, 3, 3),
        r"weight's kernel \(7, 3, 3\).*\(2, 6, 4, 5, 5\).*\[1, 1, 1, 0, 0, 0\]",
    ),
    "dilation beyond x": Refusal(
        CONVOLUTIONS, "dilation", value([1, 3, 1]), r"dilation \[1, 3, 1\].*\(2, 6, 4, 5, 5\)"
    ),
    "bias of a matrix": Refusal(CONVOLUTIONS, "bias", of(4, 1), r"bias must have 1 dim.*\(4, 1\)"),
    "bias too long": Refusal(CONVOLUTIONS, "bias", of(6), r"bias must have 4 .*6"),
    "bias of another type": Refusal(CONVOLUTIONS, "bias", to(torch.float64), r"bias must be .*float32.*float64"),
    "bias elsewhere": Refusal(CONVOLUTIONS, "bias", on_meta, r"bias must be on .* as x is, got meta"),
    "stride zero": Refusal(WINDOWS, "stride", value([1, 0, 1]), r"stride must be at least 1.*\[1, 0, 1\]"),
    "stride negative": Refusal(WINDOWS, "stride", value([1, 1, -2]), r"stride must be at least 1.*\[1, 1, -2\]"),
    "dilation zero": Refusal(WINDOWS, "dilation", value([0, 1, 1]), r"dilation must be at least 1.*\[0, 1, 1\]"),
    "dilation negative": Refusal(WINDOWS, "dilation", value([1, -1, 1]), r"dilation must be at least 1.*\[1, -1, 1\]"),
    "padding negative": Refusal(
        CONVOLUTIONS, "padding", value([0, 0, 0, -1, 0, 0]), r"padding must be at least 0.*\[0, 0, 0, -1, 0, 0\]"
    ),
    "stride beyond 31 bits": Refusal(WINDOWS, "stride", value([1, 2**31, 1]), r"stride must be at most 2147483647"),
    "dilation beyond 31 bits": Refusal(
        WINDOWS, "dilation", value([2**60, 1, 1]), r"dilation must be at most 2147483647"
    ),
    "padding beyond memory": Refusal(
        CONVOLUTIONS, "padding", value([2**20, 2**20, 2**20, 2**20, 0, 0]), r"padding .* makes .* larger than 2\*\*40"
    ),
    "weight without input channels": Refusal(
        CONVOLUTIONS, "weight", of(4, 0, 3, 3, 3), r"weight must have at least one input channel.*\(4, 0, 3, 3, 3\)"
    ),
    "groups zero": Refusal(CONVOLUTIONS, "groups", value(0), r"groups must be at least 1.*0"),
    "groups negative": Refusal(CONVOLUTIONS, "groups", value(-2), r"groups must be at least 1.*-2"),
    "groups that do not divide": Refusal(CONVOLUTIONS, "groups", value(4), r"groups=4"),
    "relevance of the input's shape": Refusal(
        RULES, "relevance", of(2, 6, 4, 5, 5), r"relevance must have the shape \(2, [46], .*\).*got \(2, 6, 4, 5, 5\)"
    ),
    "relevance of one example": Refusal(
        ("z_plus_conv3d", "z_beta_conv3d"),
        "relevance",
        of(1, 4, 4, 2, 2),
        r"relevance must .*\(2, 4, 4, 2, 2\).*\(1, 4, 4, 2, 2\)",
    ),
    "relevance of a vector": Refusal(SHARING, "relevance", of(8), r"relevance must have 5 dim.*\(8,\)"),
    "relevance of another type": Refusal(
        SHARING, "relevance", to(torch.float16), r"relevance must be .*float32.*float16"
    ),
    "relevance elsewhere": Refusal(SHARING, "relevance", on_meta, r"relevance must be on .* as x is, got meta"),
    "stabilizer negative": Refusal(SHARING, "stabilizer", value(-1e-6), r"stabilizer must be .*positive.*-1e-06"),
    "stabilizer NaN": Refusal(SHARING, "stabilizer", value(math.nan), r"stabilizer must be .*positive.*nan"),
    "low of another number of channels": Refusal(
        BOXED, "low", of(3, 1, 1, 1), r"low .*\(3, 1, 1, 1\).*broadcast.* x .*\(2, 6, 4, 5, 5\)"
    ),
    "high of too many dimensions": Refusal(
        BOXED, "high", of(1, 1, 1, 1, 1, 1), r"high .*\(1, 1, 1, 1, 1, 1\).*broadcast.* x .*\(2, 6, 4, 5, 5\)"
    ),
    "high one per channel, undimensioned": Refusal(
        BOXED, "high", of(6), r"high .*\(6,\).*broadcast.* x .*\(2, 6, 4, 5, 5\)"
    ),
    "low of another type": Refusal(BOXED, "low", to(torch.float64), r"low must be .*float32.*float64"),
    "high elsewhere": Refusal(BOXED, "high", on_meta, r"high must be on .* as x is, got meta"),
    "windows of nothing": Refusal(
        POOLING, "kernel_size", value([2, 0, 2]), r"kernel_size must be at least 1.*\[2, 0, 2\]"
    ),
    "nothing to pool": Refusal(POOLING, "x", of(2, 6, 5, 5, 0), r"x must have channels.*\(2, 6, 5, 5, 0\)"),
    "windows larger than x": Refusal(
        POOLING, "kernel_size", value([6, 2, 2]), r"kernel_size \[6, 2, 2\].*\(2, 6, 5, 5, 5\).*\[0, 1, 1\]"
    ),
    "pooling padding negative": Refusal(
        POOLING, "padding", value([0, 0, -1]), r"padding must be at least 0.*\[0, 0, -1\]"
    ),
    "padding over half a window": Refusal(
        POOLING, "padding", value([0, 2, 1]), r"padding must be at most half of kernel_size \[2, 2, 2\].*\[0, 2, 1\]"
    ),
    "relevance of other windows": Refusal(
        POOLING_RULES,
        "relevance",
        of(2, 6, 2, 2, 2),
        r"relevance must have the shape \(2, 6, 2, 3, 3\).*\(2, 6, 2, 2, 2\)",
    ),
    "ceil_mode's windows": Refusal(
        POOLING_RULES, "ceil_mode", value(True), r"relevance must have the shape \(2, 6, 3, 3, 3\).*\(2, 6, 2, 3, 3\)"
    ),
    "other without a batch": Refusal(ADDITION, "other", of(6, 4, 5, 5), r"other must have 5 dim.*\(6, 4, 5, 5\)"),
    "other of one example": Refusal(
        ADDITION, "other", of(1, 6, 4, 5, 5), r"other must have the shape \(2, 6, 4, 5, 5\) of x.*\(1, 6, 4, 5, 5\)"
    ),
    "other of another type": Refusal(ADDITION, "other", to(torch.bfloat16), r"other must be .*float32.*bfloat16"),
    "other elsewhere": Refusal(ADDITION, "other", on_meta, r"other must be on .* as x is, got meta"),
    "relevance of other summands": Refusal(
        ADDITION,
        "relevance",
        of(2, 6, 4, 5, 4),
        r"relevance must have the shape \(2, 6, 4, 5, 5\) of the sum.*\(2, 6, 4, 5, 4\)",
    ),
    "alpha infinite": Refusal(ADDITION, "alpha", value(math.inf), r"alpha must be finite, got inf"),
    "alpha NaN": Refusal(ADDITION, "alpha", value(math.nan), r"alpha must be finite, got nan"),
}
"""Every refusal, by name."""

OF_TWO = [[[0, 0, 0]] * 5] * 2
FROZEN_REFUSALS = {
    "x without a batch": Refusal(FROZEN, "x", of(6, 3, 5, 5), r"x must have 5 dimensions.*\(6, 3, 5, 5\)"),
    "weight of another type": Refusal(
        FROZEN_CONVOLUTIONS, "weight", to(torch.bfloat16), r"weight must be .*float32.*bfloat16"
    ),
    "bias too long": Refusal(FROZEN_CONVOLUTIONS, "bias", of(6), r"bias must have 4 .*6"),
    "stride zero": Refusal(FROZEN, "stride", value([0, 1]), r"stride must be at least 1.*\[1, 0, 1\]"),
    "dilation beyond x": Refusal(FROZEN, "dilation", value([4, 1]), r"dilation \[1, 4, 1\].*\(2, 6, 3, 5, 5\)"),
    "relevance of other times": Refusal(
        FROZEN_RULES,
        "relevance",
        of(2, 4, 4, 3, 2),
        r"reads must have 12 numbers, one for each output time and tap.*15",
    ),
    "relevance of another size": Refusal(
        FROZEN_RULES,
        "relevance",
        of(2, 4, 5, 3, 3),
        r"relevance must have the shape \(2, 4, 5, 3, 2\).*\(2, 4, 5, 3, 3\)",
    ),
    "relevance of a vector": Refusal(FROZEN_SHARING, "relevance", of(8), r"relevance must have 5 dim.*\(8,\)"),
    "stabilizer negative": Refusal(
        FROZEN_SHARING, "stabilizer", value(-1e-6), r"stabilizer must be .*positive.*-1e-06"
    ),
    "high of another type": Refusal(
        ("frozen_z_beta_conv3d",), "high", to(torch.float64), r"high must be .*float32.*float64"
    ),
    "reads with too few taps": Refusal(
        FROZEN, "reads", value([[[0, 0]] * 5]), r"reads must have 15 numbers, one for each output time and tap.*got 10"
    ),
    "reads for three of two examples": Refusal(
        FROZEN, "reads", value([[[0, 0, 0]] * 5] * 3), r"reads must have 15 numbers.*or 2 times as many, got 45"
    ),
    "reads beyond x": Refusal(
        FROZEN, "reads", value([[[0, 1, 3]] * 5]), r"reads must be times from 0 to 2, or -1.*\[0, 1, 3"
    ),
    "reads before x": Refusal(
        FROZEN, "reads", value([[[-2, 0, 0]] * 5]), r"reads must be times from 0 to 2, or -1.*\[-2, 0"
    ),
    "reads of a clip without times": Refusal(
        FROZEN, "x", lambda x: x[:, :, :0], r"reads must be times of x, and x has none"
    ),
    "reads of nothing": Refusal(FROZEN, "reads", value([[[]] * 5]), r"reads must have 15 numbers.*got 0"),
    "gives with too few times": Refusal(
        FROZEN_SHARING, "gives", value([[[0, 0, 0]] * 4]), r"gives must have 15 numbers.*got 12"
    ),
    "gives beyond the result": Refusal(
        FROZEN_SHARING, "gives", value([[[0, 1, 3]] * 5]), r"gives must be times from 0 to 2, or -1"
    ),
    "gives a time to two": Refusal(
        FROZEN_SHARING,
        "gives",
        value(OF_TWO),
        r"gives must name a time of the result for one time of x only, got 0 for .* 0 and 1",
    ),
    "times zero": Refusal(FROZEN_SHARING, "times", value(0), r"times must be at least 1, got 0"),
}
"""Those of operations on layers of frozen clips; what they check as the others do is only sampled."""

OPERATOR_REFUSALS = {
    "two strides": Refusal(WINDOWS, "stride", value([1, 1]), r"stride must have 3 numbers.*\[1, 1\]"),
    "one dilation": Refusal(WINDOWS, "dilation", value([1]), r"dilation must have 3 numbers.*\[1\]"),
    "three paddings": Refusal(CONVOLUTIONS, "padding", value([1, 1, 1]), r"padding must have 6 numbers.*\[1, 1, 1\]"),
    "six paddings of a pooling": Refusal(
        POOLING, "padding", value([0] * 6), r"padding must have 3 numbers.*\[0, 0, 0, 0, 0, 0\]"
    ),
    "padding along T": Refusal(
        FROZEN_CONVOLUTIONS,
        "padding",
        value([1, 1, 0, 0, 0, 0]),
        r"reads takes the place of .* along T: they must be .* got 1, \(1, 1\) and 1",
    ),
    "stride along T": Refusal(FROZEN, "stride", value([2, 1, 1]), r"reads takes the place of .* got 2, \(0, 0\) and 1"),
    "a pooling's padding along T": Refusal(
        FROZEN_POOLING, "padding", value([1, 1, 0]), r"reads takes the place of .* got 1, \(1, 1\) and 1"
    ),
    "two sizes of a window": Refusal(
        POOLING, "kernel_size", value([2, 2]), r"kernel_size must have 3 numbers.*\[2, 2\]"
    ),
}
"""What only the torch operators can be given: the Python functions write numbers out."""


def refusals(table: dict[str, Refusal]) -> list[Any]:
    return [
        pytest.param(op, refusal, id=f"{op}-{name}") for name, refusal in table.items() for op in refusal.operations
    ]


def first(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def function(op: str, kernel: str, arguments: dict[str, Any]) -> Tensor:
    return first(getattr(ops, op)(**arguments, kernel=kernel))


def operator(op: str, kernel: str, arguments: dict[str, Any]) -> Tensor:
    defaults = explicit(op, arguments, kernel)
    return first(getattr(torch.ops.captum_dtd, op)(**defaults))


def faked(op: str, kernel: str, arguments: dict[str, Any]) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        return operator(op, kernel, fakes)


def spoiled(op: str, refusal: Refusal, device: str) -> dict[str, Any]:
    arguments = valid(op, device)
    return arguments | {refusal.argument: refusal.spoil(arguments.get(refusal.argument))}


def said(run: Callable[..., Tensor], op: str, kernel: str, arguments: dict[str, Any]) -> str:
    """The first line of the error's message; what torch adds below it, where it was raised, is not ours."""
    with pytest.raises(RuntimeError) as caught:
        run(op, kernel, arguments)
    return str(caught.value).splitlines()[0]


@pytest.mark.parametrize("op", [*ALL, *FROZEN])
def test_the_arguments_are_valid_before_they_are_spoiled(op: str, device: str) -> None:
    for kernel in ("auto", *kernels.available(op, device, torch.float32)):
        assert function(op, kernel, valid(op, device)).dtype == torch.float32
    assert operator(op, "auto", valid(op, device)).dtype == torch.float32
    assert faked(op, "auto", valid(op, device)).dtype == torch.float32


@pytest.mark.parametrize(("op", "refusal"), refusals(REFUSALS) + refusals(FROZEN_REFUSALS))
def test_refused(op: str, refusal: Refusal, device: str) -> None:
    arguments = spoiled(op, refusal, device)
    messages = {"fake": said(faked, op, "auto", arguments), "operator": said(operator, op, "auto", arguments)}
    for kernel in ("auto", *kernels.available(op, device, torch.float32)):
        messages[f"function, {kernel}"] = said(function, op, kernel, arguments)
    for way, message in messages.items():
        assert re.search(refusal.message, message), f"{way}: {message}"
        assert message == messages["fake"], f"{way} says {message!r}, the fake {messages['fake']!r}"


@pytest.mark.parametrize(("op", "refusal"), refusals(OPERATOR_REFUSALS))
def test_refused_by_the_operator(op: str, refusal: Refusal, device: str) -> None:
    arguments = explicit(op, valid(op, device))
    arguments[refusal.argument] = refusal.spoil(None)
    raw = getattr(torch.ops.captum_dtd, op)
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        fake = said(lambda *_: raw(**fakes), op, "auto", {})
    real = said(lambda *_: raw(**arguments), op, "auto", {})
    assert re.search(refusal.message, real), real
    assert real == fake


@pytest.mark.parametrize("op", [*ALL, *FROZEN])
@pytest.mark.parametrize("kernel", ["avx1024/ieee", "", "AUTO", "avx512", "cuda"])
def test_kernels_that_do_not_exist_are_refused(op: str, kernel: str, device: str) -> None:
    """Where it runs: a traced program may yet be run where there is such a kernel, so its fake is silent."""
    for run in (function, operator):
        message = said(run, op, kernel, valid(op, device))
        assert repr(kernel) in message and "kernel" in message, message
        known = kernels.available(op, device, torch.float32)
        assert any(name in message for name in known), f"what there is instead: {message}"


@pytest.mark.parametrize("op", ALL)
def test_kernels_of_another_type_or_operation_are_refused(op: str, device: str) -> None:
    everything = {k for each in ALL for d in (torch.float32, torch.float64) for k in kernels.available(each, device, d)}
    foreign = everything - set(kernels.available(op, device, torch.float64)) - {"reference"}
    if not foreign:
        pytest.skip(f"nothing could be refused: every kernel that {device} has here serves {op} in float64")
    arguments = {
        name: given.double() if isinstance(given, Tensor) else given for name, given in valid(op, device).items()
    }
    for kernel in foreign:
        message = said(function, op, kernel, arguments)
        assert repr(kernel) in message, message
        there = [name for name in kernels.available(op, device, torch.float64) if name != "reference"]
        assert all(name in message for name in there), f"what there is instead: {message}"


@pytest.mark.parametrize("op", CONVOLUTIONS)
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_geometry_that_the_functions_cannot_write_out(op: str, kernel: str) -> None:
    given = valid(op, "cpu")
    for changed, message in (
        ({"padding": "valid"}, r"padding .*'same'.*'valid'"),
        ({"padding": "same", "stride": 2}, r"padding='same'.*stride"),
        ({"padding": (1, 1)}, r"padding .*\(1, 1\)"),
        ({"padding": (1, 1, 1, 1)}, r"padding .*\(1, 1, 1, 1\)"),
        ({"stride": (1, 2)}, r"stride .*\(1, 2\)"),
        ({"dilation": (1, 1, 1, 1)}, r"dilation .*\(1, 1, 1, 1\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            function(op, kernel, given | changed)


@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_a_2d_weight_is_refused_with_padding_same_too(op: str) -> None:
    arguments = valid(op, "cpu") | {"weight": torch.ones(4, 3, 3, 3), "padding": "same", "stride": 1}
    for kernel in ("auto", "reference"):
        with pytest.raises(RuntimeError, match=r"weight must have 5 dim.*\(4, 3, 3, 3\)"):
            function(op, kernel, arguments)


@pytest.mark.parametrize("op", FROZEN)
def test_tables_and_geometry_that_the_functions_cannot_write_out(op: str) -> None:
    given = valid(op, "cpu")
    for changed, message in (
        ({"padding": (1, 1, 1)}, r"padding must be one number or two \(H, W\).*\(1, 1, 1\)"),
        ({"stride": (1, 2, 2)}, r"stride must be one number or two \(H, W\)"),
        ({"dilation": (1, 1, 1)}, r"dilation must be one number or two \(H, W\)"),
        ({"reads": [[[0, 0, 0], [0, 0]]]}, r"reads must have the same number of output times and taps in every row"),
        ({"reads": []}, r"reads must have the same number of output times and taps in every row"),
        (
            {"reads": [[[0, 0, 0]], [[0, 0, 0]] * 2]},
            r"reads must have the same number of output times and taps in every row",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            function(op, "auto", given | changed)


@pytest.mark.parametrize("op", POOLING)
def test_pooling_geometry_that_the_function_cannot_write_out(op: str) -> None:
    given = valid(op, "cpu")
    for name in ("kernel_size", "stride", "padding", "dilation"):
        with pytest.raises(RuntimeError, match=rf"{name} .*\(1, 1\)"):
            function(op, "auto", given | {name: (1, 1)})


def test_a_refused_call_changes_nothing(device: str) -> None:
    for op in (*ALL, *FROZEN):
        arguments = valid(op, device)
        before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
        bad = {"alpha": math.nan} if op in ADDITION else {"stride": [1, 0] if op in FROZEN else [1, 0, 1]}
        with pytest.raises(RuntimeError):
            operator(op, "auto", arguments | bad)
        assert all(torch.equal(arguments[name], value) for name, value in before.items())
