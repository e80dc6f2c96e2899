# ruff: noqa: N803, N806 - matrices and relevance are named as in the formulas
"""Every kernel of every fused operation against the oracle, and what each must keep to besides the numbers."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    ADDS,
    CHANNELS_LAST,
    CONVS,
    DEVICES,
    DTYPES,
    EACH,
    FORWARD,
    FROZEN,
    FROZEN_POOLS,
    LAYOUTS,
    POOLING,
    POOLS,
    SMALL_GROUPS,
    THREE,
    VARIANTS,
    Add,
    Case,
    Conv,
    Frozen,
    FrozenPool,
    Pool,
    Problem,
    Variant,
    accumulator,
    disagreement,
    explicit,
    kind,
    lay_out,
    problem,
    tolerance,
    windows,
)
from oracle import matrix
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from captum_dtd import kernels, native, ops

CASES: dict[str, tuple[Any, ...]] = {op: FROZEN if op.startswith("frozen") else CONVS for op in VARIANTS} | {
    **dict.fromkeys(POOLING, POOLS),
    **dict.fromkeys((f"frozen_{op}" for op in POOLING), FROZEN_POOLS),
    "z_plus_add": ADDS,
}
EVERY = [pytest.param(op, case, id=f"{op}-{case.name}") for op, cases in CASES.items() for case in cases]
CONVOLUTIONS = [op for op, cases in CASES.items() if cases is CONVS]
RULES = [op for op in VARIANTS if kind(op) not in FORWARD]

NAMES: dict[str, Any] = {case.name: case for case in (*CONVS, *FROZEN, *POOLS, *FROZEN_POOLS, *ADDS)}
SAMPLE = {
    op: [NAMES[name] for name in names]
    for op, names in (
        *dict.fromkeys(
            CONVOLUTIONS,
            (
                "3x3x3",
                "2 groups of 17, stride 2",
                "dilation 2x3x2, stride 2x2x3",
                "1x1x1",
                "linear",
                "frozen clip",
                "stem",
            ),
        ).items(),
        *dict.fromkeys(
            (op for op, cases in CASES.items() if cases is FROZEN),
            ("frozen 3x3x3", "frozen three", "frozen, each its own", "frozen, stride 2", "frozen stem"),
        ).items(),
        *dict.fromkeys(POOLING, ("2x2x2", "overlapping", "ceil, padded", "dilated, padded, stride 2, ceil")).items(),
        *dict.fromkeys(
            (f"frozen_{op}" for op in POOLING),
            ("frozen pool", "frozen pool of three", "frozen pool, batch of 3", "frozen pool, one to several"),
        ).items(),
        ("z_plus_add", ("summands", "summands of 17 channels", "summands in vectors", "summands, one frozen")),
    )
}
"""A few shapes of every operation, for properties that do not hang on the shape."""

AMBIGUOUS = (
    "one example, one channel to one",
    "empty batch",
    "linear",
    "depthwise",
    "one frame",
    "28 wide",
    "C3D's last",
    "summands, one channel",
    "summands, empty batch",
    "summands, features",
    "summands, one frame",
)
"""Shapes of which more than one layout is contiguous."""


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def every_kernel(op: str, device: str, *dtypes: torch.dtype) -> Iterator[tuple[str, torch.dtype]]:
    for dtype in dtypes or DTYPES:
        for kernel in kernels.available(op, device, dtype):
            yield kernel, dtype


def results(op: str, arguments: dict[str, Any], kernel: str = "auto") -> tuple[Tensor, ...]:
    found = getattr(ops, op)(**arguments, kernel=kernel)
    return found if isinstance(found, tuple) else (found,)


def call(op: str, arguments: dict[str, Any], kernel: str = "auto") -> Tensor:
    """The result, or several side by side along the channels."""
    found = results(op, arguments, kernel)
    return torch.cat(found, 1) if len(found) > 1 else found[0]


def report(failures: list[str]) -> None:
    assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures[:8])


def bits(tensor: Tensor) -> Tensor:
    """For comparisons in which NaN equals itself and 0 does not equal -0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


# ------------------------------------------------------------------------------------------------- the numbers


def test_every_operation_has_an_oracle() -> None:
    assert set(VARIANTS) == set(ops.SCHEMAS), "an operation without variants in op_cases.py is not tested"


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_compiled_kernels_are_tested(device_type: str) -> None:
    """Where they are not, this is the one test that says so."""
    if device_type in native.missing:
        pytest.skip(f"this installation has no kernels for {device_type} to test: {native.missing[device_type]}")
    if device_type not in DEVICES:
        pytest.skip(f"runs kernels on a {device_type} device, and torch finds none here: test_cuda_*.py emulate them")
    for op in ops.SCHEMAS:
        for dtype in DTYPES:
            names = kernels.available(op, device_type, dtype)
            # float64 would gain nothing from CUDA's tensor cores: its convolutions are left to the definition.
            compiled = device_type == "cpu" or not (dtype == torch.float64 and op.endswith("conv3d"))
            assert (len(names) > 1) == compiled and names[-1] == "reference", f"{op} {dtype}: {names}"
            assert {name.split("/")[-1] for name in names[:-1]} <= set(kernels.ARITHMETICS)


ARITHMETICS_OF = {
    "amx": {"bf16x3", "mixed", "bf16"},
    "avx512": {"ieee", "winograd"},
    "avx2": {"ieee", "winograd"},
    "generic": {"ieee", "winograd", "bf16x3", "mixed", "bf16"},
}
"""What an instruction set's kernels of convolutions compute by, at least: not every processor with AVX-512 has bfloat16."""


@pytest.mark.parametrize("instructions", ARITHMETICS_OF)
def test_instruction_set_is_tested(instructions: str) -> None:
    """Where it is not, this is the one test that says so."""
    tested = {op: {kernel.partition("/")[::2] for kernel, _ in every_kernel(op, "cpu")} for op in CONVOLUTIONS}
    if not any(isa == instructions for names in tested.values() for isa, _ in names):
        pytest.skip(f"this processor lacks {instructions}, or no compiler built kernels for it: here they are not run")
    for op, names in tested.items():
        found = {arithmetic for isa, arithmetic in names if isa == instructions}
        assert found >= ARITHMETICS_OF[instructions], op
        assert ("winograd_bf16" in found) == ("bf16" in found), op


def bfloat16_kernels(op: str) -> list[str]:
    return [name for name in kernels.available(op, "cpu", torch.float32) if name.endswith("/bf16")]


def test_what_several_outputs_pass_to_one_time_is_added_before_it_is_rounded(cpu_kernels: Any) -> None:
    """Quotients 1 + 2^-9 and -1: neither sum nor second one needs rounding, but the first would be rounded to 1."""
    x = torch.zeros(1, 32, 1, 1, 1)
    x[:, 0] = 1
    relevance = torch.tensor([1 + 2**-9, -1.0]).view(1, 1, 2, 1, 1)
    for kernel in bfloat16_kernels("frozen_z_plus_conv3d"):
        shared = ops.frozen_z_plus_conv3d(
            x, torch.ones(1, 32, 1, 1, 1), relevance, [[[0], [0]]], [[[0], [0]]], 1, non_negative=True, kernel=kernel
        )
        assert torch.equal(shared, x * 2**-9), kernel


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_what_is_multiplied_by_planes_is_rounded_where_two_channels_are_multiplied_at_once(
    cpu_kernels: Any, channels: int
) -> None:
    """An adjoint to a single channel is multiplied by planes, of one channel or of two: of 1 + 2^-9 a bfloat16 is 1."""
    x = torch.ones(1, 1, 1, 16, 16)
    relevance = torch.full((1, channels, 1, 16, 16), 1 + 2**-9)
    weight = torch.ones(channels, 1, 1, 1, 1)
    rounded = 1.0 if channels % 2 == 0 else 1 + 2**-9
    for kernel in bfloat16_kernels("z_plus_conv3d"):
        shared = ops.z_plus_conv3d(x, weight, relevance, non_negative=True, kernel=kernel)
        assert torch.equal(shared, x * channels * rounded), kernel


def disagreements(op: str, case: Case, device: str, layout: str) -> list[str]:
    """Of every kernel in every type, under all variants of an operation."""
    failures = []
    for variant in VARIANTS[op]:
        for short in (True, False):
            if variant.exact_only and not short:
                continue
            shared = problem(op, case, variant, torch.float32, True)
            for dtype in DTYPES:
                # Short operands are the same in every type.
                posed = shared if short else problem(op, case, variant, dtype, False)
                arguments = posed.on(device, dtype, layout)
                for kernel in kernels.available(op, device, dtype):
                    actual = call(op, arguments, kernel)
                    assert actual.dtype == (dtype if kind(op) in FORWARD else accumulator(dtype))
                    wrong = disagreement(actual, posed, tolerance(op, kernel, dtype, short))
                    if wrong:
                        operands = "short" if short else "full"
                        failures.append(f"{op} {kernel} {dtype} [{case.name}] {variant.name}, {operands}: {wrong}")
    return failures


@pytest.mark.parametrize(("op", "case"), EVERY)
def test_agrees_with_the_oracle(op: str, case: Case, device: str) -> None:
    report(disagreements(op, case, device, "contiguous"))


@pytest.mark.parametrize("layout", CHANNELS_LAST)
@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op}-{case.name}")
        for op in VARIANTS
        for case in SMALL_GROUPS
        if type(case) is type(CASES[op][0])
    ],
)
def test_small_groups_agree_where_channels_are_last(op: str, case: Case, layout: str, device: str) -> None:
    report(disagreements(op, case, device, layout))


@pytest.mark.parametrize("op", [op for op in RULES if op in CONVOLUTIONS])
def test_quotients_are_rounded_as_the_arithmetic_says(op: str, device: str) -> None:
    """Where only s has more bits than any arithmetic takes: two halves of it are no less than two."""
    failures = []
    for case in SAMPLE[op]:
        posed = problem(op, case, VARIANTS[op][0], torch.float32, True, short_quotients=False)
        for kernel in kernels.available(op, device, torch.float32):
            actual = call(op, posed.on(device, torch.float32), kernel)
            wrong = disagreement(actual, posed, tolerance(op, kernel, torch.float32, True, short_quotients=False))
            if wrong:
                failures.append(f"{op} {kernel} [{case.name}]: {wrong}")
    report(failures)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", VARIANTS)
def test_strides_are_free(op: str, layout: str, device: str) -> None:
    """A slice's surroundings are NaN, so that nothing beside it may be read; and inputs stay as they are."""
    failures = []
    for case in SAMPLE[op]:
        for variant in VARIANTS[op]:
            posed = problem(op, case, variant, torch.float32, True)
            for kernel, dtype in every_kernel(op, device):
                arguments = posed.on(device, dtype, layout)
                actual = call(op, arguments, kernel)
                where = f"{op} {kernel} {dtype} [{case.name}] {variant.name}, {layout}"
                wrong = disagreement(actual, posed, tolerance(op, kernel, dtype, True))
                if wrong:
                    failures.append(f"{where}: {wrong}")
                for name, value in posed.on(device, dtype, layout).items():
                    if isinstance(value, Tensor) and not torch.equal(value, arguments[name]):
                        failures.append(f"{where}: {name} was written to")
                format = torch.channels_last_3d if layout in CHANNELS_LAST else torch.contiguous_format
                for result in results(op, arguments, kernel):
                    if not result.is_contiguous(memory_format=format):
                        failures.append(f"{where}: the result has strides {result.stride()}")
    report(failures)


# ------------------------------------------------------------------------------------------------- one answer


LARGE = {
    op: [Pool("overlapping", (1, 17, 5, 80, 31), 3, 2, 1), Pool("apart", (1, 17, 8, 40, 30), 2)]
    if cases is POOLS
    else [
        FrozenPool("wide pool", (2, 70, 3, 31, 40), 3, 1, 1, reads=THREE, gives=THREE, times=3),
        FrozenPool("strided pool", (3, 20, 2, 40, 31), (2, 3, 3), 2, (0, 1, 1), reads=EACH, gives=EACH, times=2),
    ]
    if cases is FROZEN_POOLS
    else [Add("many", (2, 40, 9, 21, 60)), Add("rows that fill no vectors", (3, 17, 5, 19, 31), frozen=True)]
    if cases is ADDS
    else [
        Frozen("wide", (2, 40, 3, 21, 60), 70, padding=(0, 1, 1), reads=THREE, gives=THREE, times=3),
        Frozen("deep and small", (5, 300, 3, 7, 7), 90, padding=(0, 1, 1), reads=THREE, gives=THREE, times=3),
        Frozen(
            "each its own, strided",
            (2, 24, 2, 18, 31),
            17,
            3,
            (1, 2, 1),
            (0, 1, 1),
            times=3,
            reads=(((-1, 0, 0), (0, 0, 1)), ((0, 0, 1), (0, 1, -1))),
            gives=(((-1, 0, 1), (0, 1, 2)), ((0, 1, 2), (1, 2, -1))),
        ),
    ]
    if cases is FROZEN
    else [
        Conv("many positions", (1, 24, 5, 18, 31), 17, 3, (1, 2, 1), 1),
        Conv("long rows of many channels", (1, 96, 1, 2, 150), 50, (1, 3, 3), (1, 1, 2), (0, 1, 1)),
        Conv("wide and linear", (5, 1100, 1, 1, 1), 130, 1),
        Conv("many examples", (1001, 150, 1, 1, 1), 17, 1),
        Conv("many small examples", (97, 9, 2, 5, 5), 20, (1, 3, 3), padding=(0, 1, 1)),
        Conv("tiles of several slabs", (1, 40, 9, 21, 60), 70, 3, padding=1),
        Conv("phases of several slabs", (1, 20, 9, 43, 61), 90, 3, 2, 1),
        Conv("phases that begin apart", (1, 20, 3, 43, 61), 90, (1, 3, 3), (2, 2, 4), (0, 3, 3), (1, 3, 6)),
    ]
    for op, cases in CASES.items()
}
"""Enough work to be split over threads, blocks and caches. Their Jacobians are too large."""


def unanswered(op: str, case: Case, variant: Variant, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Operands of a case that is too large for a Jacobian."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, type: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, type)

    arguments: dict[str, Any] = {"x": normal(*case.x).relu()} | case.options | variant.options
    if kind(op) in FORWARD:
        arguments = {name: value for name, value in arguments.items() if name not in ("gives", "times")}
    if isinstance(case, Pool):
        out = case(arguments["x"].float())
    elif isinstance(case, Add):
        out = arguments["other"] = normal(*case.x)
        if case.frozen:
            arguments["x"] = arguments["x"][:, :, :1].expand(case.x)
    else:
        arguments["weight"] = normal(*case.weight)
        if variant.bias:
            arguments["bias"] = normal(case.out)
        if variant.box:
            arguments["low"] = -normal(1, type=accumulator(dtype)).abs()
            arguments["high"] = 5 + normal(1, case.x[1], 1, 1, 1, type=accumulator(dtype)).abs()
        out = case(arguments["x"].float(), arguments["weight"].float())
    if kind(op) not in FORWARD:
        arguments["relevance"] = normal(*out.shape, type=accumulator(dtype))
    return arguments


@pytest.mark.parametrize("op", VARIANTS)
def test_same_bits_in_every_run_and_for_any_number_of_threads(op: str, device: str) -> None:
    failures = []
    for case, dtype in itertools.product(LARGE[op], (torch.float32, torch.float64)):
        arguments = unanswered(op, case, VARIANTS[op][:2][-1], dtype, device)
        for kernel in kernels.available(op, device, dtype):
            if kernel == "reference":
                continue  # torch's own convolutions may split their sums otherwise
            once = call(op, arguments, kernel)
            torch.set_num_threads(2)
            again = call(op, arguments, kernel)
            torch.set_num_threads(1)
            if not torch.equal(bits(once), bits(again)):
                failures.append(f"{op} {kernel} {dtype} [{case.name}]: a run on one thread and one on two differ")
    report(failures)


@pytest.mark.parametrize("op", VARIANTS)
def test_large_results_agree_with_the_definition(op: str, device: str) -> None:
    """In float64 the definition agrees with the oracle to the last places, on whatever shape the oracle can serve."""
    failures = []
    for case in LARGE[op]:
        has_weights = isinstance(case, Conv)
        for variant in VARIANTS[op][1:2] if has_weights else VARIANTS[op]:
            for given in (torch.float32,) if has_weights else DTYPES:
                arguments = unanswered(op, case, variant, given, device)
                wide = {k: v.cpu().double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
                signless = {name: wide[name].abs() for name in ("relevance",) if kind(op) not in FORWARD}
                if kind(op) == "conv3d":
                    signless = {name: wide[name].abs() for name in ("x", "weight", "bias") if name in wide}
                posed = Problem(op, {}, {}, call(op, wide, "reference"), call(op, wide | signless, "reference"))
                for dtype in (given, torch.float64) if has_weights else (given,):  # the same numbers
                    same = wide if dtype == torch.float64 else arguments
                    same = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in same.items()}
                    for kernel in kernels.available(op, device, dtype):
                        wrong = disagreement(call(op, same, kernel), posed, tolerance(op, kernel, dtype, False))
                        if wrong:
                            failures.append(f"{op} {kernel} {dtype} [{case.name}] {variant.name}: {wrong}")
    report(failures)


TWINS = (
    Conv("twin", (1, 3, 3, 5, 5), 4, padding=1),
    Conv("twin", (1, 6, 3, 5, 5), 4, padding=1, groups=2),
    Conv("twin", (1, 3, 3, 5, 5), 4, stride=2, padding=1),
    Conv("twin", (1, 3, 3, 5, 5), 4, stride=(1, 2, 1), padding=1, dilation=(1, 1, 2)),
    Conv("twin", (1, 4, 3, 5, 5), 3, padding=1),
    Conv("twin", (1, 12, 3, 5, 5), 12, padding=1, groups=12),
    Conv("twin", (1, 3, 5, 9, 1), 4, (3, 9, 1)),
    Conv("twin", (2, 81, 1, 1, 1), 4, 1),
)
"""Convolutions whose weights are the same bytes."""


@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_calls_do_not_take_each_other_s_weights(op: str, device: str) -> None:
    """Kernels may keep what they made of a weight: not for another geometry, rule, type or kernel that reads it otherwise."""
    failures = []
    posed = [problem(op, case, variant, torch.float32, True) for case in TWINS for variant in VARIANTS[op]]
    calls = [(each, kernel, dtype) for each in posed for kernel, dtype in every_kernel(op, device)]
    random.Random(0).shuffle(calls)
    for each, kernel, dtype in calls:
        wrong = disagreement(call(op, each.on(device, dtype), kernel), each, tolerance(op, kernel, dtype, True))
        if wrong:
            failures.append(f"{op} {kernel} {dtype} {each.options}: {wrong}")
    report(failures)


@pytest.mark.parametrize("name", ["3x3x3", "linear"])
@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_a_weight_is_read_at_every_call(op: str, name: str, device: str) -> None:
    """Also where it was changed behind torch's back, and where the same bits are numbers of another type."""
    for kernel, dtype in every_kernel(op, device):
        arguments = problem(op, NAMES[name], VARIANTS[op][0], dtype, True).on(device, dtype)
        channel = int(arguments["x"][0].flatten(1).sum(1).argmax())  # one that is not zero everywhere
        before = call(op, arguments, kernel)
        arguments["weight"].data[-1, channel, -1, -1, -1] = 5
        after = call(op, arguments, kernel)
        assert not torch.equal(before, after), f"{kernel} {dtype}"
        fresh = call(op, arguments | {"weight": arguments["weight"].clone()}, kernel)
        assert torch.equal(after, fresh), f"{kernel} {dtype}"
    serve_all = (set(kernels.available(op, device, dtype)) for dtype in (torch.float16, torch.bfloat16, torch.float32))
    for kernel in sorted(set.intersection(*serve_all)):
        half = problem(op, NAMES[name], VARIANTS[op][0], torch.float16, True).on(device, torch.float16)
        brain = half | {name: half[name].view(torch.bfloat16) for name in ("x", "weight")}
        wide = brain | {name: brain[name].float() for name in ("x", "weight")}
        call(op, half, kernel)
        actual, expected = call(op, brain, kernel).float(), call(op, wide, kernel)
        assert torch.allclose(actual, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item()), kernel


@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_a_weight_that_will_not_change_is_looked_through_once(op: str) -> None:
    """Until the promise ends, however it does; by the thread that gave it, and not of what begins where the weight does."""
    for kernel, dtype in every_kernel(op, "cpu"):
        if kernel == "reference":
            continue
        arguments = problem(op, NAMES["3x3x3"], VARIANTS[op][0], dtype, True).on("cpu", dtype)
        weight, asked = arguments["weight"].clone(), f"{kernel} {dtype}"

        def result(weight: Tensor = weight, arguments: Any = arguments, kernel: str = kernel) -> Tensor:
            return call(op, arguments | {"weight": weight}, kernel)

        with native.unchanging([weight]):
            before = result()
            with native.unchanging([weight, weight[:1], None]):
                pass
            weight[-1, -1, -1, -1, -1] = 5
            assert torch.equal(result(), before), asked
            with ThreadPoolExecutor(1) as pool:
                elsewhere = pool.submit(result).result()
            assert not torch.equal(elsewhere, before), asked
        assert torch.equal(result(), elsewhere), asked
        with pytest.raises(KeyError), native.unchanging([weight]):
            raise KeyError(result())
        weight[-1, -1, -1, -1, -1] = 7
        assert not torch.equal(result(), elsewhere), asked

        whole = torch.cat([weight, weight])
        with native.unchanging([whole]):
            before = result(whole[: len(weight)])
            whole[len(weight) - 1].neg_()
            assert not torch.equal(result(whole[: len(weight)]), before), asked


def test_small_changes_of_a_big_weight_are_seen(device: str) -> None:
    """One number, a sign, two numbers that change places or signs, however far they are apart."""
    x = torch.rand(1, 96, 1, 3, 3, device=device)
    weight = torch.randn(96, 96, 1, 3, 3, generator=torch.Generator().manual_seed(0)).to(device)
    for kernel in kernels.available("conv3d", device, torch.float32):
        before = ops.conv3d(x, weight, padding=(0, 1, 1), kernel=kernel)
        for first, apart in itertools.product((0, 1000), (0, 1, *(2**n for n in range(2, 17)))):
            places = torch.tensor([first, first + apart])
            pair = weight.view(-1)[places]
            for changed in (-pair, pair * 1.5, pair.flip(0)) if apart else (-pair, pair * 1.5):
                other = weight.clone()
                other.view(-1)[places] = changed
                after = ops.conv3d(x, other, padding=(0, 1, 1), kernel=kernel)
                assert not torch.equal(before, after), f"{kernel}: {first}, {apart} further"


def test_calls_from_several_threads_at_once(device: str) -> None:
    calls = []
    for op in VARIANTS:
        for case in SAMPLE[op]:
            arguments = problem(op, case, VARIANTS[op][0], torch.float32, False).on(device, torch.float32)
            names = kernels.available(op, device, torch.float32)
            # A GPU may take the definition's sums in any order.
            calls += [(op, arguments, kernel) for kernel in names if device == "cpu" or kernel != "reference"]
    expected = [call(*each) for each in calls]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda each: call(*each), calls * 4))
    failures = [
        f"{op} {kernel}"
        for n, (op, _, kernel) in enumerate(calls * 4)
        if not torch.equal(actual[n], expected[n % len(calls)])
    ]
    report(failures)


@pytest.mark.parametrize("op", VARIANTS)
def test_a_batch_is_its_clips(op: str, device: str) -> None:
    """To rounding: a kernel may choose its blocks by the size of the batch."""
    named = {
        **dict.fromkeys(POOLING, "batch of 3, 33 channels"),
        **dict.fromkeys((f"frozen_{op}" for op in POOLING), "frozen pool, clips alike"),
        "z_plus_add": "summands, batch of 3",
    }
    case = NAMES[named.get(op, "frozen batch of 3" if CASES[op] is FROZEN else "batch of 3")]
    failures = []
    for variant in VARIANTS[op]:
        for kernel, dtype in every_kernel(op, device):
            posed = problem(op, case, variant, dtype, False)
            batch = posed.on(device, dtype)
            together = call(op, batch, kernel)
            for n in range(case.x[0]):
                clip = {
                    name: value[n : n + 1]
                    if isinstance(value, Tensor) and value.shape[:1] == (3,) and value.dim() == 5
                    else value
                    for name, value in batch.items()
                }
                alone = call(op, clip, kernel)
                expected = Problem(op, {}, {}, together[n : n + 1].cpu().double(), posed.scale[n : n + 1])
                wrong = disagreement(alone, expected, 2 * tolerance(op, kernel, dtype, False))
                if wrong:
                    failures.append(f"{op} {kernel} {dtype} {variant.name}, clip {n}: {wrong}")
    report(failures)


# ------------------------------------------------------------------------------------------------- algebra


@pytest.mark.parametrize("op", RULES)
def test_linear_in_the_relevance(op: str, device: str) -> None:
    failures = []
    for case in SAMPLE[op]:
        for variant in VARIANTS[op]:
            for kernel, dtype in every_kernel(op, device, torch.float32, torch.float64):
                posed = problem(op, case, variant, dtype, variant.exact_only)
                arguments = posed.on(device, dtype)
                R = arguments["relevance"]
                halves = [R.clone(), R.clone()]
                halves[0][..., ::2], halves[1][..., 1::2] = 0, 0
                parts = [call(op, arguments | {"relevance": part * 2}, kernel) for part in halves]
                both = Problem(op, {}, {}, call(op, arguments, kernel).cpu().double() * 2, posed.scale)
                wrong = disagreement(parts[0] + parts[1], both, 4 * tolerance(op, kernel, dtype, variant.exact_only))
                if wrong:
                    failures.append(f"{op} {kernel} {dtype} [{case.name}] {variant.name}: {wrong}")
    report(failures)


@pytest.mark.parametrize("op", RULES)
def test_relevance_is_conserved(op: str, device: str) -> None:
    """All of it arrives where every window has something positive, whatever the arithmetic rounds."""
    failures = []
    for case in SAMPLE[op]:
        for variant in VARIANTS[op]:
            if variant.stabilizer or variant.bias or variant.options.get("divided"):
                continue
            for kernel, dtype in every_kernel(op, device):
                arguments = problem(op, case, variant, dtype, False).on(device, dtype)
                arguments["x"] = arguments["x"].abs() + 0.5
                if "weight" in arguments:
                    arguments["weight"] = arguments["weight"].abs() + 0.125
                R = arguments["relevance"]
                gap = (call(op, arguments, kernel).double().sum() - R.double().sum()).abs() / R.double().abs().sum()
                if not gap <= tolerance(op, kernel, dtype, False):
                    failures.append(
                        f"{op} {kernel} {dtype} [{case.name}] {variant.name}: {gap:.3g} of the relevance is lost"
                    )
    report(failures)


@pytest.mark.parametrize("case", SAMPLE["conv3d"], ids=lambda case: case.name)
def test_adjoint_identity(case: Conv, device: str) -> None:
    """<conv(y), s> = <y, adj(s)>, where z+ on u > 0 with v > 0 is u adj(R / conv(u))."""
    for kernel, dtype in every_kernel("conv3d", device, torch.float32, torch.float64):
        given = problem("z_plus_conv3d", case, VARIANTS["z_plus_conv3d"][0], dtype, False).on(device, dtype)
        u, v, s = given["x"] + 0.5, given["weight"].abs() + 0.1, given["relevance"]
        y = torch.randn(case.x, dtype=dtype).to(device)
        geometry = {**case.options, "kernel": kernel}
        adjoint = ops.z_plus_conv3d(u, v, s * ops.conv3d(u, v, **geometry), non_negative=True, **geometry) / u
        left, right = ops.conv3d(y, v, **geometry) * s, y * adjoint
        terms = (ops.conv3d(y.abs(), v, **geometry) * s.abs()).double().sum()
        gap = (left.double().sum() - right.double().sum()).abs()
        allowed = 3 * sum(tolerance(op, kernel, dtype, False) for op in ("conv3d", "z_plus_conv3d"))
        assert gap <= allowed * terms, f"{kernel} {dtype}: {gap / terms:.3g} of the terms"


# ------------------------------------------------------------------------------------------------- special values


def tiny_case(op: str, x: float, dtype: torch.dtype, device: str, R: float = 1.0) -> dict[str, Any]:
    """Every denominator is x itself: windows of one element, weights of one, a box that begins at zero."""
    wide = accumulator(dtype)
    shape = (1, 1, 1, 2, 9)
    arguments: dict[str, Any] = {
        "x": torch.full(shape, x, dtype=wide).to(device, dtype),
        "relevance": torch.full(shape, R, dtype=wide, device=device),
    }
    if kind(op) != op:
        arguments |= {"reads": [[(0,)]], "gives": [[(0,)]], "times": 1}
    if kind(op) == "max_pool3d_relevance":
        return arguments | {"kernel_size": 1}
    if op == "z_plus_add":
        return arguments | {"other": torch.zeros_like(arguments["x"])}
    if kind(op) == "z_beta_conv3d":
        arguments |= {
            "low": torch.zeros(1, dtype=wide, device=device),
            "high": torch.ones(1, dtype=wide, device=device),
        }
    return arguments | {"weight": torch.ones(1, 1, 1, 1, 1, dtype=dtype, device=device)}


@pytest.mark.parametrize("op", RULES)
def test_tiny_denominators_do_not_overflow(op: str, device: str) -> None:
    """A subnormal z passes nothing: R / z would overflow. Float16 has no subnormal that is one in float32."""
    failures = []
    for kernel, dtype in every_kernel(op, device):
        for x in {torch.float16: (0.0,), torch.float64: (0.0, 1e-310, 5e-324)}.get(dtype, (0.0, 1e-39, 1e-40, 1e-45)):
            for R in (1.0, 0.0, -3e4):
                shared = call(op, tiny_case(op, x, dtype, device, R), kernel)
                if shared.count_nonzero():
                    failures.append(f"{op} {kernel} {dtype}, x = {x}, R = {R}: {shared.flatten()[0]}")
    report(failures)


@pytest.mark.parametrize("op", RULES)
@pytest.mark.parametrize("x", [6e-8, 1e-5, 65504.0])
def test_float16_range(op: str, x: float, device: str) -> None:
    """Quotients of float16 subnormals, and sums of its largest numbers, lie beyond float16; relevance is still conserved."""
    failures = []
    for kernel, dtype in every_kernel(op, device, torch.float16):
        arguments = tiny_case(op, x, dtype, device)
        if "weight" in arguments:
            arguments["weight"] = torch.ones(1, 1, 1, 1, 3, dtype=dtype, device=device)
            arguments["padding"] = (0, 0, 1) if kind(op) == op else (0, 1)
        elif "kernel_size" in arguments:
            padding = (0, 0, 1) if kind(op) == op else (0, 1)
            arguments |= {"kernel_size": (1, 1, 3), "stride": 1, "padding": padding}
        else:
            arguments["other"] = arguments["x"]
        if kind(op) == "z_beta_conv3d":
            arguments["high"] = arguments["high"] * 1e5
        total = call(op, arguments, kernel).double().sum().item()
        if not abs(total - 18) <= 18 * tolerance(op, kernel, dtype, False):
            failures.append(f"{op} {kernel}: {total} of 18 arrive")
    report(failures)


@pytest.mark.parametrize("op", RULES)
def test_nothing_comes_from_zeros(op: str, device: str) -> None:
    """R = 0, z = 0, or both: exact zeros, no NaN."""
    failures = []
    for case in SAMPLE[op]:
        variant = VARIANTS[op][0]
        for kernel, dtype in every_kernel(op, device):
            given = problem(op, case, variant, dtype, False).on(device, dtype)
            zeros = {name: torch.zeros_like(value) for name, value in given.items() if isinstance(value, Tensor)}
            silent: dict[str, dict[str, Any]] = {"R = 0": {"relevance": zeros["relevance"]}}
            if kind(op) == "z_beta_conv3d":
                silent["x = low = high"] = {name: zeros[name] for name in ("x", "low", "high")}
            else:
                nothing = {name: zeros[name] for name in ("x", "other") if name in zeros}
                silent["x = 0"] = nothing
                silent["x = R = 0"] = nothing | {"relevance": zeros["relevance"]}
            if "other" in given:
                silent["x, other < 0"] = {"x": -given["x"].abs(), "other": -given["other"].abs()}
            if "weight" in given:
                silent["v = 0"] = {"weight": zeros["weight"]}
            if kind(op) == "z_plus_conv3d":
                silent["x >= 0, v < 0"] = {"x": given["x"].abs(), "weight": -given["weight"].abs()}
            for why, changed in silent.items():
                shared = call(op, given | changed, kernel)
                if shared.count_nonzero():
                    failures.append(f"{op} {kernel} {dtype} [{case.name}] {why}: {shared.abs().max()}")
    report(failures)


@lru_cache(maxsize=4)
def reached(case: Case, place: int) -> Tensor:
    """What shares a window, and of a convolution a group, with one place of x; and that place."""
    marked = torch.zeros(case.x, dtype=torch.float64)
    marked.view(-1)[place] = 1.0
    if isinstance(case, Add):
        return torch.cat([marked, marked], 1) > 0
    if isinstance(case, Pool):
        member, read = windows(case.spread).double(), case.read(marked, 0.0)
        rows = read.reshape(-1, member.shape[1])
        return case.collect(((rows @ member.T @ member) + rows).view(read.shape)) > 0
    read = case.read(marked)
    ones = torch.ones(case.weight, dtype=torch.float64)
    member = matrix(partial(case.spread, weight=ones), read[:1].shape)[0]
    rows = read.flatten(1)
    return case.collect((rows @ member.T @ member + rows).view(read.shape)) > 0


def only(case: Conv, place: int) -> Tensor:
    """Where the result has one place of x."""
    marked = torch.zeros(case.x)
    marked.view(-1)[place] = 1.0
    return case.collect(case.read(marked)) > 0


@pytest.mark.parametrize("op", RULES)
def test_nan_stays_visible(op: str, device: str) -> None:
    """A NaN of x makes NaN of whatever shares a denominator with it, and of nothing else."""
    failures = []
    for case in SAMPLE[op]:
        for variant in VARIANTS[op]:
            if variant.options.get("winner_takes_all") or variant.exact_only:
                continue
            for kernel, dtype in every_kernel(op, device):
                posed = problem(op, case, variant, dtype, False)
                arguments = posed.on(device, dtype)
                place = arguments["x"].numel() // 3
                arguments["x"] = arguments["x"].clone()
                arguments["x"].view(-1)[place] = math.nan
                expected = reached(case, place)
                if variant.options.get("divided"):
                    expected = only(case, place)
                shared = call(op, arguments, kernel).cpu()
                where = f"{op} {kernel} {dtype} [{case.name}] {variant.name}"
                if not torch.equal(shared.isnan(), expected):
                    failures.append(f"{where}: NaN at {int(shared.isnan().sum())} of {int(expected.sum())} elements")
                else:
                    rest = Problem(
                        op, {}, {}, posed.expected.masked_fill(expected, 0), posed.scale.masked_fill(expected, 0)
                    )
                    wrong = disagreement(shared.masked_fill(expected, 0), rest, tolerance(op, kernel, dtype, False))
                    if wrong:
                        failures.append(f"{where}: beside the NaN, {wrong}")
    report(failures)


@pytest.mark.parametrize("name", ["relevance", "weight", "bias", "low", "other"])
def test_nan_of_other_arguments_stays_visible(name: str, device: str) -> None:
    op = {"bias": "z_plus_conv3d", "other": "z_plus_add"}.get(name, "z_beta_conv3d")
    variant = next(v for v in VARIANTS[op] if v.bias or op == "z_plus_add")
    for kernel, dtype in every_kernel(op, device):
        arguments = problem(op, SAMPLE[op][0], variant, dtype, False).on(device, dtype)
        arguments[name] = arguments[name].clone()
        arguments[name].view(-1)[0] = math.nan
        assert call(op, arguments, kernel).isnan().any(), f"{kernel} {dtype}"


def test_nan_wins_its_window(device: str) -> None:
    """As in torch: the winner's index is that of the NaN, and relevance stays a number."""
    op = "max_pool3d_relevance"
    for kernel, dtype in every_kernel(op, device):
        x = torch.arange(8.0).view(1, 1, 1, 1, 8).to(device, dtype)
        x[..., 1], x[..., 4] = math.nan, math.nan
        R = torch.tensor([3.0, 5.0]).view(1, 1, 1, 1, 2).to(device, accumulator(dtype))
        shared = ops.max_pool3d_relevance(x, R, (1, 1, 4), winner_takes_all=True, kernel=kernel)
        assert shared.flatten().tolist() == [0, 3, 0, 0, 5, 0, 0, 0], f"{kernel} {dtype}"
        assert ops.max_pool3d(x, (1, 1, 2), kernel=kernel).isnan().flatten().tolist() == [True, False, True, False]


def test_windows_without_a_winner(device: str) -> None:
    """All negative, all zero, all -inf: proportionally nobody gets anything; the first of equals always wins."""
    op = "max_pool3d_relevance"
    x = torch.tensor([[-3.0, -1.0, -1.0], [0.0, -0.0, 0.0], [-math.inf] * 3, [-5.0, 2.0, 2.0]]).view(1, 1, 1, 4, 3)
    for kernel, dtype in every_kernel(op, device):
        R = torch.ones(1, 1, 1, 4, 1, device=device, dtype=accumulator(dtype))
        options = {"x": x.to(device, dtype), "relevance": R, "kernel_size": (1, 1, 3)}
        shared = call(op, options, kernel).view(4, 3).tolist()
        assert shared == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0.5, 0.5]], f"{kernel} {dtype}"
        shared = call(op, options | {"winner_takes_all": True}, kernel).view(4, 3).tolist()
        assert shared == [[0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]], f"{kernel} {dtype}"


def test_the_promise_of_no_negative_element_is_taken(device: str) -> None:
    """With ``non_negative`` x is read as it is; on an x that keeps the promise both ways agree."""
    case = NAMES["3x3x3"]
    posed = problem("z_plus_conv3d", case, VARIANTS["z_plus_conv3d"][0], torch.float32, True)
    unpromised = Problem(posed.op, posed.tensors, case.options, posed.expected, posed.scale)
    for kernel, dtype in every_kernel(posed.op, device):
        wrong = disagreement(
            call(posed.op, unpromised.on(device, dtype), kernel), posed, tolerance(posed.op, kernel, dtype, True)
        )
        assert wrong is None, f"{kernel} {dtype}: {wrong}"


def test_results_keep_their_memory_for_as_long_as_anything_looks_at_them(device: str) -> None:
    """Big ones are made where those were that are gone: not where one is that a view, or another thread, still has."""
    weight = torch.ones(4, 4, 1, 1, 1, device=device)

    def made(value: float) -> Tensor:
        return ops.conv3d(torch.full((1, 4, 4, 160, 160), value, device=device), weight)[:, 1:, ::2]

    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(made, map(float, range(24))))
        for _ in range(3):
            kept[::3] = pool.map(made, map(float, range(0, 24, 3)))
            assert all(bool((result == 4.0 * value).all()) for value, result in enumerate(kept))


BIG = {
    "forward": ("conv3d", 3, 1, {}),
    "signed": ("z_plus_conv3d", 3, 1, {}),
    "non-negative": ("z_plus_conv3d", 3, 1, {"non_negative": True}),
    "strided": ("z_plus_conv3d", 3, 2, {"non_negative": True}),
    "positions left out": ("z_plus_conv3d", 1, 2, {"non_negative": True}),
    "pixels": ("z_beta_conv3d", 3, 2, {"low": -6.0, "high": 6.0}),
    "overlapping windows": ("max_pool3d_relevance", 3, 2, {}),
    "windows apart": ("max_pool3d_relevance", 2, 2, {}),
    "largest of windows": ("max_pool3d", 3, 1, {}),
    "summands": ("z_plus_add", 1, 1, {}),
}
"""Operation, size of its window, stride, and what else it is told."""


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", BIG)
def test_many_megabytes_are_what_a_few_are(name: str, layout: str, device: str) -> None:
    """Results too big for caches may be written past them, by whole lines: on several threads, by rows that do not begin where
    lines do, position by position; so may s = R / z of 32 channels, where it is rounded. Each example by itself is less than
    the megabyte from which on that is done."""
    op, size, stride, more = BIG[name]
    memory_format = torch.channels_last_3d if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    for channels, width in ((32, 112), (19, 95)):
        x = torch.randn(3, channels, 2, 31, width, generator=generator).to(device, memory_format=memory_format)
        assert x[0].nbytes < 1 << 20 < x.nbytes
        if more.get("non_negative"):
            x = x.relu()
        options: dict[str, Any] = {"stride": stride, "padding": size // 2}
        window = (channels, channels, size, size, size)
        options |= {
            option: torch.tensor(value, device=device) if option in ("low", "high") else value
            for option, value in more.items()
        }
        by_example = {"x": x}
        if op in POOLING:
            options["kernel_size"] = size
        elif op == "z_plus_add":
            by_example["other"], options = x.flip(-1), {"alpha": -0.5}
        else:
            options["weight"] = torch.randn(window, generator=generator).to(device)
        if op not in FORWARD:
            out = F.max_pool3d(x, size, stride, size // 2).shape
            relevance = torch.randn(out, generator=generator)
            by_example["relevance"] = relevance.to(device, memory_format=memory_format)
        for kernel in kernels.available(op, device, torch.float32):
            if device == "cpu" and not kernel.endswith(("/ieee", "/winograd", "/bf16")):
                continue  # others end in the same loops
            few = [
                call(op, {key: value[n : n + 1] for key, value in by_example.items()} | options, kernel)
                for n in range(len(x))
            ]
            torch.set_num_threads(2)
            whole = call(op, by_example | options, kernel)
            torch.set_num_threads(1)
            expected = torch.cat(few)
            assert torch.allclose(whole, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()), kernel
            whole.fill_(math.nan)  # the next result may lie in the same memory


@pytest.mark.parametrize("lifted", [False, True], ids=["non-negative", "signed"])
@pytest.mark.parametrize(
    ("groups", "channels", "size"),
    [(64, 64, (3, 11, 37)), (16, 64, (3, 11, 37)), (530, 530, (1, 3, 18)), (96, 1536, (1, 2, 20))],
    ids=["blocks of rows", "of groups of 4", "parts of rows", "of groups of 16"],
)
def test_more_sums_of_small_groups_than_are_kept_near(
    groups: int, channels: int, size: tuple[int, ...], lifted: bool, cpu_kernels: Any
) -> None:
    """Rows are cut where all of one are too many, and threads share them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, *size, generator=generator)
    x = (x if lifted else x.relu()).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(channels, channels // groups, 1 if size[0] == 1 else 3, 3, 3, generator=generator)
    relevance = torch.rand(x.shape, generator=generator).contiguous(memory_format=torch.channels_last_3d)
    options: dict[str, Any] = {"padding": "same", "groups": groups, "non_negative": not lifted}
    exact = ops.z_plus_conv3d(x.double(), weight.double(), relevance.double(), **options, kernel="reference")
    forward = ops.conv3d(x.double(), weight.double(), padding="same", groups=groups, kernel="reference")
    for kernel in kernels.available("z_plus_conv3d", "cpu", torch.float32):
        if kernel.endswith("/ieee"):
            torch.set_num_threads(2)
            actual = ops.z_plus_conv3d(x, weight, relevance, **options, kernel=kernel)
            torch.set_num_threads(1)
            again = ops.z_plus_conv3d(x, weight, relevance, **options, kernel=kernel)
            assert torch.equal(actual, again), kernel
            assert torch.allclose(actual.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item()), kernel
            plain = ops.conv3d(x, weight, padding="same", groups=groups, kernel=kernel)
            assert torch.allclose(plain.double(), forward, rtol=1e-4, atol=1e-5 * forward.abs().max().item()), kernel


@pytest.mark.parametrize(
    ("x", "weight", "options"),
    [
        ((1, 4112, 1, 2, 2), (16, 257, 1, 1, 1), {"groups": 16}),
        ((1, 16, 1, 2, 2), (8208, 1, 1, 1, 1), {"groups": 16}),
        ((1, 64, 8, 14, 14), (32, 64, 3, 3, 3), {"padding": "same", "dilation": 6}),
    ],
    ids=["many channels to one", "one channel to many", "widely dilated"],
)
def test_shapes_of_which_kernels_can_do_little_at_once(
    x: tuple[int, ...], weight: tuple[int, ...], options: dict[str, Any], cpu_kernels: Any
) -> None:
    """More channels in all groups than are packed at once; positions that read more than a cache holds."""
    generator = torch.Generator().manual_seed(0)
    inputs, filters = torch.rand(x, generator=generator), torch.randn(weight, generator=generator)
    relevance = torch.rand((x[0], weight[0], *x[2:]), generator=generator)
    exact = ops.z_plus_conv3d(inputs.double(), filters.double(), relevance.double(), **options, kernel="reference")
    for layout in ("contiguous", "channels_last"):
        given = [lay_out(tensor, layout) for tensor in (inputs, filters, relevance)]
        for kernel in kernels.available("z_plus_conv3d", "cpu", torch.float32):
            if kernel.endswith(("/ieee", "/bf16x3")):
                actual = ops.z_plus_conv3d(given[0], given[1], given[2], **options, kernel=kernel).double()
                assert torch.allclose(actual, exact, rtol=1e-4, atol=1e-5 * exact.max().item()), (kernel, layout)


def test_every_half_is_read_as_it_is_whatever_becomes_of_subnormal_floats(cpu_kernels: Any) -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).view(1, 1, 1, 1, -1)
    for kernel in kernels.available("max_pool3d", "cpu", torch.float16):
        try:
            for flush in (False, True):
                torch.set_flush_denormal(flush)
                pooled = ops.max_pool3d(halves, 1, kernel=kernel)
                number = ~halves.isnan()
                assert torch.equal(pooled.view(torch.int16)[number], halves.view(torch.int16)[number]), (kernel, flush)
                assert pooled[~number].isnan().all(), (kernel, flush)
        finally:
            torch.set_flush_denormal(False)


def test_a_batch_too_large_for_one_workspace(device: str) -> None:
    """Quotients of 3 examples take 192 MiB: a kernel may walk them in pieces. Every weight is one, and so is every share."""
    x = torch.rand(3, 1, 1, 512, 512).to(device) + 0.5
    relevance = torch.randn(3, 64, 1, 1, 1).to(device).expand(3, 64, 1, 512, 512)
    weight = torch.ones(64, 1, 1, 1, 1, device=device)
    expected = relevance[..., :1, :1].double().sum(1, keepdim=True).expand(x.shape)
    for kernel in kernels.available("z_plus_conv3d", device, torch.float32)[:1]:
        shared = ops.z_plus_conv3d(x, weight, relevance, kernel=kernel)
        assert torch.allclose(shared.double(), expected, rtol=1e-4, atol=1e-4), kernel


@pytest.mark.slow
def test_pooling_of_more_than_two_to_the_31_elements(device: str) -> None:
    """Indices do not fit into 32 bits: 4 GiB of float16, and 8 GiB of relevance that comes out. Kernels share their indexing."""
    kernel = kernels.available("max_pool3d_relevance", device, torch.float16)[0]
    if kernel == "reference":
        pytest.skip(f"no compiled kernels for {device}; the definition would need 40 GiB")
    side = 1 << 10
    x = torch.zeros(1, 2, side + 2, side, side, dtype=torch.float16, device=device)
    assert x.numel() > 1 << 31
    x[0, 1, -1, -1, -2:] = torch.tensor([1.0, 3.0])
    relevance = torch.zeros(1, 2, (side + 2) // 2, side // 2, side // 2, device=device)
    relevance[0, 1, -1, -1, -1] = 8.0
    shared = ops.max_pool3d_relevance(x, relevance, 2, kernel=kernel)
    assert shared[0, 1, -1, -1, -2:].tolist() == [2.0, 6.0]
    assert [shared[0, channel].amax().item() for channel in (0, 1)] == [0.0, 6.0]


# ------------------------------------------------------------------------------------------------- torch's operators


def operator(op: str) -> Any:
    return getattr(torch.ops.captum_dtd, op).default


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("contiguous", torch.float32), ("channels_last", torch.bfloat16), ("permuted", torch.float64)],
)
@pytest.mark.parametrize("op", VARIANTS)
def test_opcheck(op: str, layout: str, dtype: torch.dtype, device: str) -> None:
    if len(kernels.available(op, device, dtype)) == 1 < len(kernels.available(op, device, torch.float32)):
        dtype = torch.float32  # the operators themselves have no kernel for this one: functions ask for the definition
    for case, variant in zip(SAMPLE[op][1:3], VARIANTS[op], strict=False):
        opcheck(operator(op), (), explicit(op, problem(op, case, variant, dtype, False).on(device, dtype, layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", VARIANTS)
def test_fake_results_look_like_real_ones(op: str, layout: str, device: str) -> None:
    failures = []
    for case in SAMPLE[op] + [NAMES[name] for name in AMBIGUOUS if NAMES[name] in CASES[op]]:
        for dtype in (torch.float32, torch.bfloat16):
            arguments = problem(op, case, VARIANTS[op][0], torch.float32, True).on(device, dtype, layout)
            with FakeTensorMode() as mode:
                fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
                faked = results(op, fakes)
            for kernel in kernels.available(op, device, dtype):
                for fake, real in zip(faked, results(op, arguments, kernel), strict=True):
                    for what, f, r in (
                        ("shape", fake.shape, real.shape),
                        ("strides", fake.stride(), real.stride()),
                        ("dtype", fake.dtype, real.dtype),
                        ("device", fake.device.type, real.device.type),
                    ):
                        if f != r:
                            failures.append(f"{op} {kernel} {dtype} [{case.name}]: {what} {r}, as a fake {f}")
    report(failures)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", VARIANTS)
def test_compiles_into_one_graph(op: str, layout: str, device: str) -> None:
    """Between pointwise steps that a compiler would like to fuse and lay out its own way."""
    case, variant = SAMPLE[op][0], VARIANTS[op][-1]
    arguments = problem(op, case, variant, torch.float32, True).on(device, torch.float32, layout)

    def around(**given: Any) -> Tensor:
        return call(op, given | {"x": given["x"] * 2}) + 1

    expected = around(**arguments)
    torch._dynamo.reset()
    actual = torch.compile(around, fullgraph=True, backend="aot_eager")(**arguments)
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("op", VARIANTS)
def test_one_compiled_graph_serves_any_batch_and_length(op: str) -> None:
    case, graphs = SAMPLE[op][0], []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    options = problem(op, case, VARIANTS[op][0], torch.float32, True).options
    options = {name: value for name, value in options.items() if name in case.options}
    torch._dynamo.reset()
    compiled = torch.compile(lambda given: call(op, given | options), fullgraph=True, backend=backend, dynamic=True)
    for n, t in ((7, 10), (8, 14), (9, 16)):  # unequal to all other sizes, which a tracer would take for the same
        resized = type(case)(**{**vars(case), "x": (n, case.x[1], t, *case.x[3:])})
        arguments = unanswered(op, resized, VARIANTS[op][-1], torch.float32, "cpu")
        given = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
        assert torch.equal(compiled(given), call(op, given | options)), (n, t)
    assert len(graphs) == 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("op", VARIANTS)
def test_is_not_differentiable_in_any_mode(op: str, mode: Callable[[], Any], device: str) -> None:
    """The same numbers in every mode, and no gradient is made up for inputs that want one."""
    posed = problem(op, SAMPLE[op][0], VARIANTS[op][-1], torch.float32, True)
    for kernel in kernels.available(op, device, torch.float32):
        plain = posed.on(device, torch.float32)
        expected = call(op, plain, kernel)
        wanting = {
            k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in posed.on(device, torch.float32).items()
        }
        with mode():
            actual = call(op, wanting, kernel)
        assert not actual.requires_grad, kernel
        assert torch.equal(actual, expected), kernel
        assert all(v.grad is None for v in wanting.values() if isinstance(v, Tensor))


def test_an_inference_tensor_is_taken() -> None:
    """Weights made under inference mode refuse whatever would be recorded of them."""
    for op in VARIANTS:
        with torch.inference_mode():
            arguments = problem(op, SAMPLE[op][0], VARIANTS[op][0], torch.float32, True).on("cpu", torch.float32)
        for kernel in kernels.available(op, "cpu", torch.float32):
            assert not call(op, arguments, kernel).is_inference(), f"{op} {kernel}"
