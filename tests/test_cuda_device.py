"""What only a GPU can show: streams, graphs, devices, repetition, and layers of real size.

The oracle meets the device in test_ops.py, shape by shape; here kernels meet the definition in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from op_cases import tolerance
from torch import Tensor

from captum_dtd import DeepTaylor, DiscriminativeDeepTaylor, kernels, ops
from captum_dtd.models import c3d_mini


@dataclass(frozen=True)
class Layer:
    """A layer of real proportions: its operation, the size of its input and of its weight, and its geometry."""

    name: str
    op: str
    x: tuple[int, ...]
    out: tuple[int, ...]
    weight: tuple[int, ...] | None = None
    options: tuple[tuple[str, Any], ...] = ()


def layer(name: str, op: str, x: tuple[int, ...], out: tuple[int, ...], *weight: int, **options: Any) -> Layer:
    return Layer(name, op, x, out, weight or None, tuple(options.items()))


ENDS = [[[-1, 0, 0], [0, 0, 0], [0, 0, -1]]]
"""One frame in a padded clip, by taps of three times: the first output, those in the middle, the last."""
THREE = [[[-1, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 2], [1, 2, -1]]]
ONE_OF_THREE = [[[-1, 0, 1], [0, 1, 2], [1, 2, -1]]], [[[-1, -1, 0], [-1, 0, -1], [0, -1, -1]]]
EACH = [[[0, 0, 1], [0, 1, 1]], [[-1, 0, 1], [1, 1, 1]]]

LAYERS = (
    layer("conv4a", "z_plus_conv3d", (2, 256, 4, 14, 14), (2, 512, 4, 14, 14), 512, 256, 3, 3, 3, padding=1),
    layer("signed", "z_plus_conv3d", (2, 64, 4, 28, 28), (2, 64, 4, 28, 28), 64, 64, 3, 3, 3, padding=1),
    layer("strided", "z_plus_conv3d", (1, 64, 8, 28, 28), (1, 128, 4, 14, 14), 128, 64, 3, 3, 3, stride=2, padding=1),
    layer("shortcut", "z_plus_conv3d", (2, 64, 8, 28, 28), (2, 128, 4, 14, 14), 128, 64, 1, 1, 1, stride=2),
    layer("grouped", "z_plus_conv3d", (1, 60, 4, 14, 14), (1, 40, 4, 14, 14), 40, 15, 3, 3, 3, padding=1, groups=4),
    layer("depthwise", "z_plus_conv3d", (2, 64, 4, 14, 14), (2, 64, 4, 14, 14), 64, 1, 3, 3, 3, padding=1, groups=64),
    layer(
        *("depthwise, strided", "z_plus_conv3d", (2, 30, 4, 14, 14), (2, 30, 2, 7, 7), 30, 1, 3, 3, 3),
        **{"stride": 2, "padding": 1, "groups": 30},
    ),
    layer("small groups", "z_plus_conv3d", (1, 32, 4, 14, 14), (1, 32, 4, 14, 14), 32, 4, 3, 3, 3, padding=1, groups=8),
    # Of these three each takes a tile of its own, of the one or other kernel.
    layer("tall tiles", "z_plus_conv3d", (1, 64, 4, 28, 28), (1, 384, 4, 28, 28), 384, 64, 3, 3, 3, padding=1),
    layer("wide tiles", "z_plus_conv3d", (1, 128, 4, 28, 28), (1, 256, 4, 28, 28), 256, 128, 3, 3, 3, padding=1),
    layer("pointwise", "z_plus_conv3d", (1, 64, 8, 28, 28), (1, 192, 8, 28, 28), 192, 64, 1, 1, 1),
    layer("12 channels", "z_plus_conv3d", (2, 16, 4, 14, 14), (2, 12, 4, 14, 14), 12, 16, 3, 3, 3, padding=1),
    layer("linear", "z_plus_conv3d", (16, 4096, 1, 1, 1), (16, 101, 1, 1, 1), 101, 4096, 1, 1, 1),
    layer(
        *("stem", "z_beta_conv3d", (1, 3, 8, 56, 56), (1, 64, 8, 28, 28), 64, 3, 3, 7, 7),
        **{"stride": (1, 2, 2), "padding": (1, 3, 3)},
    ),
    layer(
        *("frozen conv4a", "frozen_z_plus_conv3d", (2, 256, 3, 14, 14), (2, 512, 5, 14, 14), 512, 256, 3, 3, 3),
        **{"padding": 1, "reads": THREE, "gives": THREE, "times": 3},
    ),
    layer(
        *("each frozen", "frozen_z_plus_conv3d", (2, 64, 2, 28, 28), (2, 64, 2, 28, 28), 64, 64, 3, 3, 3),
        **{"padding": 1, "reads": EACH, "gives": EACH, "times": 2},
    ),
    layer(
        *("one of three", "frozen_z_plus_conv3d", (2, 64, 3, 14, 14), (2, 64, 3, 14, 14), 64, 64, 3, 3, 3),
        **{"padding": 1, "reads": ONE_OF_THREE[0], "gives": ONE_OF_THREE[1], "times": 1},
    ),
    layer(
        *("frozen stem", "frozen_z_beta_conv3d", (2, 3, 1, 56, 56), (2, 64, 3, 28, 28), 64, 3, 3, 7, 7),
        **{"stride": 2, "padding": 3, "reads": ENDS, "gives": ENDS, "times": 1},
    ),
    layer(
        *("frozen forward", "frozen_conv3d", (2, 64, 3, 28, 28), (2, 96, 5, 28, 28), 96, 64, 3, 3, 3),
        **{"padding": 1, "reads": THREE},
    ),
    layer("forward", "conv3d", (2, 64, 4, 28, 28), (2, 96, 4, 28, 28), 96, 64, 3, 3, 3, padding=1),
    layer("pool", "max_pool3d_relevance", (2, 64, 8, 28, 28), (2, 64, 4, 14, 14), kernel_size=2),
    layer("pool5", "max_pool3d_relevance", (2, 64, 2, 7, 7), (2, 64, 1, 4, 4), kernel_size=2, padding=(0, 1, 1)),
    layer(
        *("overlapping", "max_pool3d_relevance", (2, 64, 8, 28, 28), (2, 64, 8, 28, 28)),
        **{"kernel_size": 3, "stride": 1, "padding": 1},
    ),
    layer(
        *("frozen pool", "frozen_max_pool3d_relevance", (2, 64, 3, 28, 28), (2, 64, 5, 14, 14)),
        **{"kernel_size": 3, "stride": 2, "padding": 1, "reads": THREE, "gives": THREE, "times": 3},
    ),
    layer("pooled", "max_pool3d", (2, 64, 8, 28, 28), (2, 64, 4, 14, 14), kernel_size=2),
    layer(
        *("largest", "max_pool3d", (2, 64, 8, 28, 28), (2, 64, 8, 28, 28)),
        **{"kernel_size": 3, "stride": 1, "padding": 1},
    ),
    layer(
        *("frozen, pooled", "frozen_max_pool3d", (2, 64, 3, 28, 28), (2, 64, 5, 14, 14)),
        **{"kernel_size": 3, "stride": 2, "padding": 1, "reads": THREE},
    ),
    layer(
        *("winner", "max_pool3d_relevance", (2, 64, 8, 28, 28), (2, 64, 4, 14, 14)),
        **{"kernel_size": 3, "stride": 2, "padding": 1, "winner_takes_all": True},
    ),
    layer("summands", "z_plus_add", (2, 64, 8, 28, 28), (2, 64, 8, 28, 28)),
)
SMALL = tuple(
    replace(each, x=(1, *each.x[1:2], *(min(n, 6) for n in each.x[2:])), out=())
    for each in LAYERS
    if each.name not in ("linear", "each frozen")
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)


def operands(
    layer: Layer, dtype: torch.dtype, layout: torch.memory_format, device: str = "cuda", seed: int = 0
) -> dict[str, Any]:
    """Random arguments; denominators are sums of many terms of one sign, so every arithmetic can be held to its roundoff."""
    generator = torch.Generator().manual_seed(seed)

    def random(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=generator).to(device, kind)
        return values.contiguous(memory_format=layout) if values.dim() == 5 else values

    given: dict[str, Any] = {**dict(layer.options), "x": random(layer.x, dtype)}
    op = layer.op.removeprefix(kernels.FROZEN)
    if layer.weight:
        given["weight"] = random(layer.weight, dtype)
    if op == "z_plus_conv3d" and layer.name != "signed":
        given |= {"x": given["x"].relu(), "non_negative": True}
    if op == "z_beta_conv3d":
        given |= {
            "low": given["x"].float().amin((0, 2, 3, 4), keepdim=True) - 0.1,
            "high": torch.full((1,), 6.0, device=device),
        }
    if op == "z_plus_add":
        given["other"] = random(layer.x, dtype)
    if op not in ("conv3d", "max_pool3d"):
        given["relevance"] = random(layer.out or output(layer, given), torch.float32)
    return given


def output(layer: Layer, given: dict[str, Any]) -> tuple[int, ...]:
    """Shape of the layer's output, where it is not written down."""
    x = torch.zeros(layer.x, device="meta")
    triples = {name: given.get(name, 0 if name == "padding" else 1) for name in ("stride", "padding")}
    if layer.weight:
        weight = torch.zeros(layer.weight, device="meta")
        if "reads" in given:
            windows = torch.zeros(
                len(x), x.shape[1], layer.weight[2] * len(given["reads"][0]), *x.shape[3:], device="meta"
            )
            flat = {
                name: (along, value, value)
                for (name, value), along in zip(triples.items(), (layer.weight[2], 0), strict=True)
            }
            return tuple(torch.nn.functional.conv3d(windows, weight, **flat).shape)
        return tuple(torch.nn.functional.conv3d(x, weight, groups=given.get("groups", 1), **triples).shape)
    if "kernel_size" not in given:
        return layer.x
    if "reads" in given:
        windows = torch.zeros(*x.shape[:2], 3 * len(given["reads"][0]), *x.shape[3:], device="meta")
        return tuple(torch.nn.functional.max_pool3d(windows, 3, (3, 2, 2), (0, 1, 1)).shape)
    triples["stride"] = given.get("stride", given["kernel_size"])
    return tuple(torch.nn.functional.max_pool3d(x, given["kernel_size"], **triples).shape)


def call(layer: Layer, given: dict[str, Any], kernel: str = "auto") -> Tensor:
    """The result, or several side by side."""
    result = getattr(ops, layer.op)(**given, kernel=kernel)
    return torch.cat(result, 1) if isinstance(result, tuple) else result


def names(layer: Layer, dtype: torch.dtype) -> list[str]:
    return [name for name in kernels.available(layer.op, "cuda", dtype) if name != "reference"]


@pytest.fixture(autouse=True)
def device() -> None:
    if not torch.cuda.is_available():
        pytest.skip(
            "runs kernels on a CUDA device, and torch finds none here: test_cuda_*.py emulate them, make gpu-check runs this"
        )


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is NaN, so that an element that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_agrees_with_the_definition_in_float64(layer: Layer, layout: torch.memory_format, poisoned: None) -> None:
    failures = []
    for dtype in DTYPES:
        given = operands(layer, dtype, layout)
        wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
        expected = call(layer, wide, "reference")
        for kernel in names(layer, dtype):
            actual = call(layer, given, kernel).double()
            error = float((actual - expected).norm() / expected.norm())
            allowed = tolerance(layer.op, kernel, dtype, short=False)
            if not error <= allowed:
                failures.append(f"{kernel} {dtype}: relative L2 error {error:.3g}, tolerance {allowed:.3g}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_same_bits_every_time(layer: Layer) -> None:
    """Also while another stream keeps the device busy, which changes the order of blocks."""
    busy = torch.rand(4096, 4096, device="cuda")
    other = torch.cuda.Stream()
    for dtype in DTYPES:
        given = operands(layer, dtype, torch.channels_last_3d)
        for kernel in names(layer, dtype):
            first = call(layer, given, kernel)
            for _ in range(8):
                with torch.cuda.stream(other):
                    busy @ busy
                assert torch.equal(call(layer, given, kernel), first), f"{kernel} {dtype}"
            torch.cuda.synchronize()


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_runs_on_the_current_stream(layer: Layer) -> None:
    """What the stream has been told before, the kernel sees; on the default stream it would not wait for it."""
    early, late = (operands(layer, torch.float32, torch.contiguous_format, seed=seed) for seed in (0, 1))
    expected = call(layer, late)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for name, value in early.items():
            if isinstance(value, Tensor):
                value.copy_(late[name])
        actual = call(layer, early)
    stream.synchronize()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_a_graph_captures_everything(layer: Layer) -> None:
    for dtype in DTYPES:
        given, changed = (operands(layer, dtype, torch.channels_last_3d, seed=seed) for seed in (0, 1))
        for kernel in names(layer, dtype):
            expected = call(layer, changed, kernel)
            static = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call(layer, static, kernel)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = call(layer, static, kernel)
            for name, value in static.items():
                if isinstance(value, Tensor):
                    value.copy_(changed[name])
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(result, expected), f"{kernel} {dtype}"


def test_runs_on_the_tensors_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("calls kernels on a second GPU, and this machine has one")
    for layer in LAYERS:
        given = operands(layer, torch.float32, torch.contiguous_format)
        there = {name: value.to("cuda:1") if isinstance(value, Tensor) else value for name, value in given.items()}
        with torch.cuda.device(0):
            actual = call(layer, there)
            assert torch.cuda.current_device() == 0
        assert actual.device == torch.device("cuda:1")
        torch.testing.assert_close(actual.cpu(), call(layer, given).cpu())


def test_operands_of_two_devices_are_refused() -> None:
    for layer in LAYERS:
        given = operands(layer, torch.float32, torch.contiguous_format)
        for name, value in given.items():
            if isinstance(value, Tensor) and name != "x":
                with pytest.raises(RuntimeError, match=name):
                    call(layer, {**given, name: value.cpu()})


@pytest.mark.parametrize("readout", ["own", "first", "mean"])
@pytest.mark.parametrize("precision", ["ieee", "float32", "mixed", "bfloat16"])
def test_a_whole_job_is_that_of_the_cpu(precision: Any, readout: Any) -> None:
    torch.manual_seed(0)
    model, clips, targets = c3d_mini().eval(), torch.rand(2, 3, 16, 32, 32), torch.tensor([1, 2])
    expected = DiscriminativeDeepTaylor(model, 0.0, 1.0, readout=readout, precision="ieee").attribute(clips, targets)
    there = DiscriminativeDeepTaylor(model.cuda(), 0.0, 1.0, readout=readout, precision=precision)
    for size in (None, 3):
        actual = there.attribute(clips.cuda(), targets.cuda(), internal_batch_size=size)
        allowed = {"ieee": 1e-5, "float32": 1e-4}.get(precision, 1e-2)
        for part in ("spatial", "total"):
            found, right = getattr(actual, part).cpu(), getattr(expected, part)
            assert (found - right).norm() <= allowed * right.norm(), (part, size)


@pytest.mark.parametrize("readout", ["own", "mean"])
def test_replayed_jobs_are_those_of_the_walk(readout: Any) -> None:
    """To the bit, on whatever stream: of other clips and targets, of weights edited in place, and of others in their place."""
    torch.manual_seed(0)
    model = c3d_mini().eval().cuda()
    plain, replayed = (
        DiscriminativeDeepTaylor(model, 0.0, 1.0, readout=readout, cuda_graphs=graphs) for graphs in (False, True)
    )
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    for call in range(8):
        torch.cuda.synchronize()  # weights were edited on the other stream
        with torch.cuda.stream(streams[call % 2]):
            clips = torch.rand(2, 3, 16, 32, 32, device="cuda")
            expected, actual = (method.attribute(clips, [call, 9 - call]) for method in (plain, replayed))
            assert all(torch.equal(found, right) for found, right in zip(actual, expected, strict=True)), call
            with torch.no_grad():
                for parameter in model.parameters():
                    if call == 5:
                        parameter.data = parameter.data.clone()
                    parameter.mul_(1.01)
    assert len(replayed.method._replay._recorded) == 4


def test_nothing_waits_for_the_gpu() -> None:
    """While it explains some clips, the next ones are prepared: torch itself says where anything would wait."""
    method = DeepTaylor(c3d_mini().eval().cuda(), 0.0, 1.0)
    clips = (torch.rand(1, 3, 16, 32, 32, device="cuda"),)
    frozen = method.frozen_clips(clips, ())
    assert frozen is not None
    frames = torch.rand(4, 3, 1, 32, 32, device="cuda")
    for wanted in ("all", "classes", [(0,), (1, 2), (3,), (9,)]):
        for mode in ("default", "error"):  # what is worked out once may take its time
            torch.cuda.set_sync_debug_mode(mode)
            try:
                frozen.explain((frames,), [[3, 1, 4, 1]], (), wanted)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def small_layers() -> None:
    """Every kernel once on small operands: what `make gpu-check` shows compute-sanitizer."""
    for layer in SMALL:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                given = operands(layer, dtype, layout)
                for kernel in names(layer, dtype):
                    call(layer, given, kernel)
    torch.cuda.synchronize()
