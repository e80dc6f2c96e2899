"""The walk's fast lane: every rule and operation in its table, by every kernel at hand, against the oracle.

Each case is a small network whose layer under test follows the rule; the choice of kernels is taken over, so that each
one serves in turn, and the rule table is asked whether it did.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import between
from oracle import Node, Walk, assert_agrees, explain
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from captum_dtd import DeepTaylor, DiscriminativeDeepTaylor, doctor, fused, kernels, native
from captum_dtd.fused import FUSED
from captum_dtd.layers import Call
from captum_dtd.rules import Proportional, WinnerTakesAll, ZBeta, ZPlus

LOW, HIGH = -1.5, 2.5


class Net(nn.Module):
    """Pixel layer, ReLU, the layer under test, head; each operation stands in a module of its own."""

    def __init__(self, pixel: nn.Module, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.pixel, self.layer = pixel, layer
        self.head = nn.Linear(layer(pixel(torch.zeros(1, *shape))).numel(), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.relu(self.pixel(x))).flatten(1))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.each(torch.relu, w.pixel(self.pixel, x))
        if isinstance(self.layer, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
            x = w.max_pool(self.layer, x)
        elif isinstance(self.layer, (Joined, Broadcast)):
            x = self.layer.join(w, x)
        else:
            x = w.dense(self.layer, x)
        return w.dense(self.head, w.move(lambda v: v.flatten(1), x))


class Joined(nn.Module):
    """What entered, and what a layer makes of it, added or subtracted."""

    def __init__(self, layer: nn.Module, alpha: float = 1.0, subtracts: bool = False) -> None:
        super().__init__()
        self.beside, self.alpha, self.subtracts = layer, alpha, subtracts

    def forward(self, x: Tensor) -> Tensor:
        join = torch.sub if self.subtracts else torch.add
        return join(x, self.beside(x), alpha=self.alpha)

    def join(self, w: Walk, x: Node) -> Node:
        sign = -self.alpha if self.subtracts else self.alpha
        return w.add(lambda a, b: a + sign * b, x, w.conv(self.beside, x))


class Broadcast(nn.Module):
    """Adds to every position what its channel has on average: summands of two shapes."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean((2, 3), keepdim=True)

    def join(self, w: Walk, x: Node) -> Node:
        return w.add(lambda a, b: a + b, x, w.add(lambda a: a.mean((2, 3), keepdim=True), x))


class Widened(Broadcast):
    """Adds to every position as much in double precision: summands of two types."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + x.double()).float()

    def join(self, w: Walk, x: Node) -> Node:
        return w.add(lambda a: 2 * a, x)


Same = nn.Identity
# (rule, kind): [(pixel layer, layer under test, input shape)]; z-beta is tried on the pixel layer.
CASES: dict[tuple[type, str], list[tuple[nn.Module, nn.Module, tuple[int, ...]]]] = {
    (ZPlus, "convolution"): [
        (nn.Conv1d(3, 5, 1), nn.Conv1d(5, 6, 3, stride=2, padding=1), (3, 9)),
        (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2)), (3, 5, 6)),
        (nn.Conv3d(3, 6, 1), nn.Conv3d(6, 4, 3, stride=(1, 2, 1), padding=1, groups=2), (3, 3, 5, 6)),
    ],
    (ZPlus, "linear"): [
        (nn.Linear(4, 5), nn.Linear(5, 7), (4,)),
        (nn.Conv2d(3, 4, 1), nn.Linear(6, 5), (3, 3, 6)),
    ],
    (ZBeta, "convolution"): [
        (nn.Conv1d(1, 4, 3, padding=2, dilation=2), Same(), (1, 8)),
        (nn.Conv2d(3, 4, 3, stride=2), Same(), (3, 7, 6)),
        (nn.Conv3d(3, 5, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2)), Same(), (3, 3, 7, 6)),
    ],
    (ZBeta, "linear"): [(nn.Linear(6, 5), Same(), (6,))],
    (Proportional, "max pool"): [
        (nn.Conv1d(3, 4, 1), nn.MaxPool1d(3, 2, 1), (3, 8)),
        (nn.Conv2d(3, 4, 1), nn.MaxPool2d(2, ceil_mode=True), (3, 5, 7)),
        (nn.Conv3d(3, 4, 1), nn.MaxPool3d((1, 2, 3), 2, dilation=(1, 2, 1)), (3, 4, 6, 5)),
    ],
    (WinnerTakesAll, "max pool"): [
        (nn.Conv1d(3, 4, 1), nn.MaxPool1d(2), (3, 8)),
        (nn.Conv2d(3, 4, 1), nn.MaxPool2d(3, 2, 1), (3, 5, 7)),
        (nn.Conv3d(3, 4, 1), nn.MaxPool3d(3, 2, 1, ceil_mode=True), (3, 4, 6, 5)),
    ],
    (ZPlus, "average pool"): [
        (nn.Conv1d(3, 4, 1), nn.AvgPool1d(3, 2, 1), (3, 8)),
        (nn.Conv2d(3, 4, 1), nn.AvgPool2d((2, 3), 1, ceil_mode=True, count_include_pad=False), (3, 5, 7)),
        (nn.Conv3d(3, 4, 1), nn.AvgPool3d(2, 2, 1, True, False), (3, 4, 5, 5)),
    ],
    (ZPlus, "addition"): [
        (nn.Linear(4, 5), Joined(nn.Linear(5, 5)), (4,)),
        (nn.Conv1d(3, 4, 1), Joined(nn.Conv1d(4, 4, 3, padding=1), alpha=0.5), (3, 9)),
        (nn.Conv2d(3, 4, 1), Joined(nn.Conv2d(4, 4, 3, padding=1), subtracts=True), (3, 5, 6)),
        (nn.Conv3d(3, 6, 1), Joined(nn.Conv3d(6, 6, 3, padding=1), 2.0), (3, 3, 4, 5)),
    ],
}
# Sums of so few terms; bfloat16 keeps eight bits.
TOLERANCES = {
    "ieee": 1e-5,
    "winograd": 1e-5,
    "bf16x3": 5e-5,
    "tf32x3": 5e-5,
    "mixed": 2e-2,
    "tf32": 5e-3,
    "bf16": 3e-2,
    "winograd_bf16": 3e-2,
    "f16": 5e-3,
}
DEVICES = [device for device in ("cpu", "cuda") if device in native.loaded or device == "cpu"]
SERVED = [
    (device, rule, kind, kernel)
    for device in DEVICES
    for (rule, kind), op in FUSED.items()
    for kernel in kernels.available(op, device, torch.float32)
]


def test_every_entry_of_the_table_has_cases() -> None:
    assert CASES.keys() == FUSED.keys()


@cache
def posed(device: str, rule: type, kind: str) -> list[tuple[DeepTaylor, Tensor, Tensor]]:
    """For every case its method, which kernels take turns in, its input, and the oracle's answer for classes 0 and 2."""
    found = []
    for pixel, layer, shape in CASES[rule, kind]:
        torch.manual_seed(1)
        for module in (*pixel.modules(), *layer.modules()):  # they were made before anything was seeded
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                module.reset_parameters()
        model = Net(pixel, layer, shape).eval()
        x = between(LOW, HIGH, (2, *shape), 3, torch.float32)
        expected = explain(model, x, LOW, HIGH, [0, 2], walk=partial(Walk, winner=rule is WinnerTakesAll))
        composite = {"layer": WinnerTakesAll()} if rule is WinnerTakesAll else "dtd"
        model = copy.deepcopy(model).to(device)
        found.append((DeepTaylor(model, LOW, HIGH, composite=composite), x.to(device), expected))
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("device", "rule", "kind", "kernel"), SERVED)
def test_serves_as_the_oracle_says(
    device: str, rule: type, kind: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = FUSED[rule, kind]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("runs kernels on a CUDA device, and torch finds none here: test_cuda_*.py emulate them")

    def choose(op: str, *_: Any) -> str:
        return kernel if op == wanted else "reference"

    monkeypatch.setattr(kernels, "choose", choose)
    tolerance = TOLERANCES[kernel.split("/")[1]] if kernel != "reference" else 1e-5
    for method, x, expected in posed(device, rule, kind):
        found = method.attribute(x, torch.tensor([0, 2])).cpu()
        assert_agrees(found, expected, tolerance)
        under_test = "pixel" if rule is ZBeta else "layer"
        rows = {row.module: row.kernel for row in method.rule_table(x).rows}
        assert rows[under_test] == kernel


@pytest.mark.parametrize("layer", [Broadcast(), Widened()], ids=["shapes", "types"])
def test_summands_of_two_shapes_or_types_keep_to_the_definition(layer: nn.Module) -> None:
    model = Net(nn.Conv2d(3, 4, 1), layer, (3, 4, 5)).eval()
    x = between(LOW, HIGH, (2, 3, 4, 5), 3, torch.float32)
    method = DeepTaylor(model, LOW, HIGH)
    assert {row.operation: row.kernel for row in method.rule_table(x).rows}["add"] == "reference"
    assert_agrees(method.attribute(x, 1), explain(model, x, LOW, HIGH, 1), 1e-5)


def test_stabilizer_of_an_average_is_not_that_of_a_sum() -> None:
    """An average pooling under a stabilized z+ keeps to the definition: the fused operation divides by sums."""
    model = Net(nn.Conv3d(3, 4, 1), nn.AvgPool3d(2), (3, 4, 4, 4)).eval()
    method = DeepTaylor(model, LOW, HIGH, composite={"layer": ZPlus(stabilizer=0.5)})
    table = method.rule_table(torch.zeros(1, 3, 4, 4, 4))
    assert {row.module: row.kernel for row in table.rows}["layer"] == "reference"


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_stabilizer_of_a_max_pool_takes_its_share(backend: Any) -> None:
    """Of relevance R of a window with the positive sum u, R * u / (u + stabilizer) arrives."""
    model = nn.Sequential(nn.Conv3d(3, 4, 1), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(4 * 8, 3)).eval()
    x = between(LOW, HIGH, (2, 3, 4, 4, 4), 3, torch.float32)
    with torch.no_grad():
        entered = model[:2](x)
        shares = model[2:4](entered) * model[4].weight[1].clamp(min=0)
        arriving = model(x)[:, 1:2] * shares / shares.sum(1, keepdim=True)
        sums = 8 * nn.functional.avg_pool3d(entered, 2).flatten(1)
        expected = (arriving * sums / (sums + 0.5)).sum(1)
        assert ((expected - arriving.sum(1)).abs() > 0.01 * expected.abs()).all()
    method = DeepTaylor(model, LOW, HIGH, composite={"2": Proportional(stabilizer=0.5)}, backend=backend)
    torch.testing.assert_close(method.attribute(x, 1).flatten(1).sum(1), expected, rtol=1e-4, atol=1e-6)


def test_mixed_precision_is_of_the_walk_back_only(monkeypatch: pytest.MonkeyPatch, cpu_kernels: Any) -> None:
    choose, asked = kernels.choose, set()

    def noted(op: str, device: str, dtype: torch.dtype, precision: kernels.Precision, *shape: Any) -> str:
        asked.add((op in ("conv3d", "max_pool3d"), precision))
        return choose(op, device, dtype, precision, *shape)

    monkeypatch.setattr(kernels, "choose", noted)
    model = nn.Sequential(nn.Conv3d(3, 4, 1), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(4 * 8, 3)).eval()
    DeepTaylor(model, LOW, HIGH, precision="mixed").attribute(torch.rand(1, 3, 4, 4, 4), 1)
    assert asked == {(True, "float32"), (False, "mixed")}


def test_signed_inputs_join_in_where_denominators_are_shared(cpu_kernels: Any) -> None:
    """Negative inputs with negative weights, in a layer whose input nothing rectifies: of several targets at once."""
    torch.manual_seed(0)
    layers = [nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3)).eval()
    x = between(LOW, HIGH, (1, 3, 8, 6, 6), 3, torch.float32)
    method = DeepTaylor(model, LOW, HIGH, seed="one")
    assert {row.module: row.kernel for row in method.rule_table(x).rows}["1"] != "reference"
    for found, target in zip(method.attribute_targets(x, [1, 2]), (1, 2), strict=True):
        expected = DeepTaylor(model, LOW, HIGH, seed="one", backend="reference").attribute(x, target)
        assert_agrees(found, expected, 1e-4)
    both = DiscriminativeDeepTaylor(model, LOW, HIGH, seed="one").attribute_targets(x, [1, 2])
    definition = DiscriminativeDeepTaylor(model, LOW, HIGH, seed="one", backend="reference")
    for maps, target in zip(both, (1, 2), strict=True):
        assert_agrees(maps.spatial, definition.attribute(x, target).spatial, 1e-4)


def test_forward_on_a_gpu_takes_tensor_units_where_torch_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch multiplies floats as they are; in 16 bits, and where weights are read once, it is as good as any."""
    monkeypatch.setattr(kernels, "_table", dict)
    monkeypatch.setattr(kernels, "available", lambda *_: ["cuda/tf32x3", "cuda/tf32", "cuda/bf16", "reference"])

    def forward(dtype: torch.dtype, precision: kernels.Precision, shape: kernels.ShapeClass) -> str:
        return kernels._choose.__wrapped__("conv3d", "cuda", dtype, precision, shape, "sm_90")

    assert forward(torch.float32, "ieee", "dense") == "reference"
    assert forward(torch.float32, "float32", "dense") == "cuda/tf32x3"
    assert forward(torch.float32, "bfloat16", "strided") == "cuda/bf16"
    assert forward(torch.float32, "bfloat16", "linear") == "reference"
    assert forward(torch.bfloat16, "bfloat16", "dense") == "reference"


def test_kernels_are_those_of_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where GPUs of several kinds are in one machine, the current one may be another."""
    current = [0]

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        current.append(int(which.index))
        yield
        current.pop()

    def kernel_there(*_: Any) -> str:
        return f"of {current[-1]}"

    monkeypatch.setattr(native, "loaded", {"cpu": None, "cuda": None})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(kernels, "choose", kernel_there)
    monkeypatch.setattr(kernels, "available", lambda *_: [kernel_there()])
    node = fx.Graph().call_function(torch.ops.aten.add.Tensor)
    with FakeTensorMode():
        for where, index in (("cuda:1", 1), ("cuda:0", 0), ("cpu", 0)):
            x = torch.empty(2, 3, device=where)
            call = Call(node, (0, 1), lambda _, x=x: x, (x, x))
            assert fused._choose("z_plus_add", call, (2, 3), "float32") == f"of {index}"
            assert fused.serves_frozen(f"of {index}", node, x)
    assert current == [0]


@pytest.mark.parametrize(
    ("precision", "kernel"),
    [("ieee", "reference"), ("float32", "wgmma/bf16x3"), ("mixed", "wgmma/bf16x3"), ("bfloat16", "wgmma/bf16")],
)
def test_warpgroups_serve_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch, precision: kernels.Precision, kernel: str
) -> None:
    names = ["wgmma/bf16x3", "cuda/tf32x3", "cuda/tf32", "wgmma/bf16", "cuda/bf16", "reference"]
    monkeypatch.setattr(kernels, "_table", dict)
    monkeypatch.setattr(kernels, "available", lambda *_: names)
    for op in ("conv3d", "z_plus_conv3d", "frozen_z_beta_conv3d"):
        assert kernels._choose.__wrapped__(op, "cuda", torch.float32, precision, "dense", "sm_90") == kernel


def test_definitions_serve_on_a_gpu_that_kernels_do_not_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refusal() -> str:
        asked.append(torch.cuda.current_device())
        return "" if asked[-1] == 1 else "no kernel image is available for execution on the device"

    lists = dict.fromkeys(("conv3d_kernels", "max_pool3d_kernels", "add_kernels"), lambda _: ["cuda/tf32x3"])
    module: Any = SimpleNamespace(refusal=refusal, **lists)
    monkeypatch.setitem(native.loaded, "cuda", module)
    monkeypatch.delitem(native.missing, "cuda", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    native._refusal.cache_clear()
    told: list[str] = []
    for device in (0, 1, 0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            names = kernels.available("z_plus_conv3d", "cuda", torch.float32)
        told += [str(each.message) for each in caught]
        assert names == ["cuda/tf32x3", "reference"][device == 0 :]
        assert doctor._kernels("cuda") == (
            "cuda/tf32x3, reference"
            if device
            else "reference (plain ATen), because compiled kernels do not run on this GPU: no kernel image is available for "
            "execution on the device"
        )
    native._refusal.cache_clear()
    assert asked == [0, 1]  # once of each
    assert len(told) == 1
    assert "no kernel image" in told[0]


@pytest.mark.parametrize("shape", ["dense", "strided"])
def test_forward_is_torchs_own_where_nothing_was_measured_and_transforms_do_not_serve(
    monkeypatch: pytest.MonkeyPatch, shape: kernels.ShapeClass
) -> None:
    monkeypatch.setattr(kernels, "_table", dict)
    kernels._choose.cache_clear()
    chosen = {op: kernels.choose(op, "cpu", torch.float32, "float32", shape) for op in {*FUSED.values(), "conv3d"}}
    exact = kernels.choose("conv3d", "cpu", torch.float32, "ieee", shape)
    kernels._choose.cache_clear()
    assert chosen["conv3d"].endswith("/winograd") == (shape == "dense" and "cpu" in native.loaded)
    assert chosen["conv3d"].endswith("/winograd") or chosen["conv3d"] == "reference"
    assert exact == "reference"
    assert (chosen["z_plus_conv3d"] == "reference") == ("cpu" in native.missing)


def test_filters_that_lie_channels_last_are_laid_out_once(cpu_kernels: Any) -> None:
    """Of a model that was moved to channels_last: operations would copy them at every use."""
    model = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 3), nn.Flatten())
    model = model.append(nn.Linear(4 * 2 * 4 * 4, 3)).eval()
    moved = copy.deepcopy(model).to(memory_format=torch.channels_last_3d)
    assert not moved[3].weight.is_contiguous()
    read: list[Tensor] = []

    class Filters(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "captum_dtd":
                read.extend(each for each in args if isinstance(each, Tensor) and each.shape[2:] == (3, 3, 3))
            return func(*args, **(kwargs or {}))

    x = torch.rand(1, 3, 4, 6, 6)
    with Filters():
        found = DeepTaylor(moved, LOW, HIGH, precision="ieee").attribute(x, 1)
    assert len(read) >= 3 and all(filter.is_contiguous() for filter in read)
    assert torch.equal(found, DeepTaylor(model, LOW, HIGH, precision="ieee").attribute(x, 1))
    assert not moved[3].weight.is_contiguous()
