"""Every layer and shape corner against the oracle: as a hidden layer under z+, and as a pixel layer under z-beta."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import between
from oracle import Node, Walk, assert_agrees, explain
from torch import Tensor, nn

from captum_dtd import DeepTaylor

pytestmark = pytest.mark.usefixtures("one_trace")

LOW, HIGH = (-2.1, -2.0, -1.8), (2.2, 2.4, 2.6)
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def step(w: Walk, layer: nn.Module, x: Node) -> Node:
    """One layer as the oracle sees it."""
    if isinstance(layer, MAX_POOLS):
        return w.max_pool(layer, x)
    if isinstance(layer, tuple(CONVS.values())):
        return w.conv(layer, x)
    return w.dense(layer, x) if isinstance(layer, nn.Linear) else w.add(layer, x)


class Sandwich(nn.Module):
    """A 1x1 pixel convolution, an activation (identity: signed features), the layer under test, a linear head."""

    def __init__(self, layer: nn.Module, channels: int, shape: tuple[int, ...], signed: bool = False) -> None:
        super().__init__()
        self.pixel = CONVS[len(shape)](3, channels, 1)
        self.activation = nn.Identity() if signed else nn.ReLU()
        self.layer = layer
        self.flatten = nn.Flatten()
        self.head = nn.Linear(layer(torch.zeros(1, channels, *shape)).numel(), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.layer(self.activation(self.pixel(x)))))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.each(self.activation, w.pixel(self.pixel, x))
        return w.dense(self.head, w.move(lambda v: v.flatten(1), step(w, self.layer, x)))


class Pixels(nn.Module):
    """The layer under test on the pixels, ReLU, a linear head."""

    def __init__(self, layer: nn.Module, channels: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer(torch.zeros(1, channels, *shape)).numel(), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(x)).flatten(1))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.each(torch.relu, w.pixel(self.layer, x))
        return w.dense(self.head, w.move(lambda v: v.flatten(1), x))


# name: layer, channels in, its input's size
CONV_CORNERS: dict[str, tuple[int, dict[str, Any], int, int, tuple[int, ...]]] = {
    "1d": (1, {"kernel_size": 3, "padding": 1}, 3, 4, (7,)),
    "1d stride > kernel": (1, {"kernel_size": 2, "stride": 3}, 3, 4, (8,)),
    "2d": (2, {"kernel_size": 3, "padding": 1}, 3, 5, (5, 6)),
    "2d same, even": (2, {"kernel_size": (4, 2), "padding": "same"}, 3, 4, (5, 6)),
    "3d": (3, {"kernel_size": 3, "padding": 1}, 3, 4, (3, 4, 5)),
    "3d no padding": (3, {"kernel_size": (2, 3, 2)}, 3, 5, (3, 4, 5)),
    "3d stride 2": (3, {"kernel_size": 3, "stride": 2, "padding": 1}, 3, 4, (4, 5, 6)),
    "3d stem": (3, {"kernel_size": (3, 7, 7), "stride": (1, 2, 2), "padding": (1, 3, 3)}, 3, 2, (2, 6, 7)),
    "3d shortcut": (3, {"kernel_size": 1, "stride": 2}, 3, 4, (3, 4, 5)),
    "3d stride > kernel": (3, {"kernel_size": (1, 2, 1), "stride": (2, 3, 2)}, 3, 4, (4, 7, 4)),
    "3d input left over": (3, {"kernel_size": 2, "stride": 2}, 3, 4, (3, 5, 5)),
    "3d same, even": (3, {"kernel_size": (2, 4, 2), "padding": "same"}, 3, 3, (3, 5, 4)),
    "3d same, even, dilated": (3, {"kernel_size": 2, "padding": "same", "dilation": (1, 2, 3)}, 3, 3, (3, 4, 5)),
    "3d dilation": (3, {"kernel_size": (1, 3, 2), "dilation": (1, 2, 3), "padding": (0, 2, 1)}, 3, 4, (2, 5, 6)),
    "3d dilation and stride": (3, {"kernel_size": 3, "dilation": 2, "stride": 2, "padding": 2}, 3, 2, (3, 5, 6)),
    "3d groups": (3, {"kernel_size": 3, "padding": 1, "groups": 3}, 3, 6, (2, 4, 4)),
    "3d depthwise": (3, {"kernel_size": (3, 1, 1), "padding": (1, 0, 0), "groups": 3}, 3, 3, (3, 3, 3)),
    "3d padding beyond the kernel": (3, {"kernel_size": (1, 2, 2), "padding": (2, 2, 1)}, 3, 3, (2, 3, 3)),
    "3d one frame": (3, {"kernel_size": 3, "padding": 1}, 3, 4, (1, 4, 4)),
    "3d one voxel": (3, {"kernel_size": 3, "padding": 1}, 3, 4, (1, 1, 1)),
    "3d kernel 1": (3, {"kernel_size": 1}, 3, 4, (2, 3, 3)),
    "3d no bias": (3, {"kernel_size": 2, "bias": False}, 3, 4, (2, 3, 3)),
    "3d one channel in": (3, {"kernel_size": 2}, 1, 5, (2, 3, 3)),
    "3d one channel out": (3, {"kernel_size": 2}, 3, 1, (3, 4, 4)),
    "3d odd channels": (3, {"kernel_size": 2, "padding": 1}, 7, 5, (2, 3, 3)),
}

POOL_CORNERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "max 1d": (nn.MaxPool1d((3,), (2,), (1,), (1,)), (7,)),
    "max 2d": (nn.MaxPool2d(2), (4, 6)),
    "max 2d overlapping, padded": (nn.MaxPool2d(3, 2, 1), (5, 6)),
    "max 3d": (nn.MaxPool3d((1, 2, 2)), (2, 4, 4)),
    "max 3d overlapping": (nn.MaxPool3d(3, 1), (3, 4, 5)),
    "max 3d padded": (nn.MaxPool3d(3, 2, 1), (3, 5, 6)),
    "max 3d padded on two sides only": (nn.MaxPool3d(2, 2, (0, 1, 1)), (2, 3, 4)),
    "max 3d ceil mode": (nn.MaxPool3d(2, 2, ceil_mode=True), (3, 5, 4)),
    "max 3d ceil mode, padded": (nn.MaxPool3d(3, 2, 1, ceil_mode=True), (4, 5, 6)),
    "max 3d stride > kernel": (nn.MaxPool3d((1, 2, 2), 3), (4, 5, 6)),
    "max 3d dilated": (nn.MaxPool3d((1, 2, 3), 1, dilation=(1, 2, 2)), (2, 4, 6)),
    "max 3d dilated, padded, ceil mode": (nn.MaxPool3d(2, 2, 1, (1, 2, 3), ceil_mode=True), (3, 5, 6)),
    "max 3d one frame": (nn.MaxPool3d((1, 2, 2)), (1, 4, 4)),
    "max 3d padded, narrower than its kernel": (nn.MaxPool3d(3, 1, 1), (2, 2, 5)),
    "average 1d": (nn.AvgPool1d(3, 2, 1), (7,)),
    "average 2d": (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (6, 6)),
    "average 3d": (nn.AvgPool3d((2, 3, 2), 1), (3, 4, 4)),
    "average 3d padded": (nn.AvgPool3d(3, 2, 1), (3, 5, 4)),
    "average 3d padding not counted": (nn.AvgPool3d(3, 2, 1, count_include_pad=False), (3, 5, 4)),
    "average 3d ceil mode": (nn.AvgPool3d(2, 2, 1, ceil_mode=True), (4, 5, 4)),
    "average 3d ceil mode, padding not counted": (nn.AvgPool3d(2, 2, 1, True, False), (4, 5, 4)),
    "average 3d divisor": (nn.AvgPool3d(2, divisor_override=5), (2, 4, 4)),
    "adaptive 1d": (nn.AdaptiveAvgPool1d(3), (7,)),
    "adaptive 2d": (nn.AdaptiveAvgPool2d((2, None)), (5, 3)),
    "adaptive 3d": (nn.AdaptiveAvgPool3d((2, 3, 1)), (3, 5, 4)),
    "adaptive 3d to one": (nn.AdaptiveAvgPool3d(1), (2, 3, 3)),
    "adaptive 3d to its own size": (nn.AdaptiveAvgPool3d((2, 3, 3)), (2, 3, 3)),
    "adaptive 3d up": (nn.AdaptiveAvgPool3d((3, 4, 5)), (2, 3, 3)),
}


def convolution(corner: str) -> tuple[nn.Module, int, tuple[int, ...]]:
    dims, arguments, c_in, c_out, shape = CONV_CORNERS[corner]
    return CONVS[dims](c_in, c_out, **arguments), c_in, shape


def check(model: nn.Module, x: Tensor, low: Any = LOW, high: Any = HIGH, **options: Any) -> None:
    """The package explains these examples as the oracle does; its delta is what the oracle says was lost."""
    model = model.double().eval()
    targets = [(n + 1) % 3 for n in range(len(x))]
    expected = explain(model, x, low, high, targets)
    logits = model(x).detach()[range(len(x)), targets]
    lost = logits - expected.flatten(1).sum(1)
    for backend in ("auto", "reference"):
        method = DeepTaylor(model, low, high, backend=backend, **options)
        actual, delta = method.attribute(x, torch.tensor(targets), return_convergence_delta=True)
        assert actual.dtype == torch.float64
        assert_agrees(actual, expected)
        assert delta.shape == (len(x),)
        assert (delta - lost).abs().max() <= 1e-10 * logits.abs().max()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("corner", CONV_CORNERS)
def test_convolution_on_features(corner: str) -> None:
    layer, channels, shape = convolution(corner)
    check(Sandwich(layer, channels, shape), between(LOW, HIGH, (3, 3, *shape), 1))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("corner", CONV_CORNERS)
def test_convolution_on_pixels(corner: str) -> None:
    layer, channels, shape = convolution(corner)
    low, high = (LOW, HIGH) if channels == 3 else (-1.5, 2.5)
    check(Pixels(layer, channels, shape), between(low, high, (2, channels, *shape), 2), low, high)


@pytest.mark.parametrize("corner", POOL_CORNERS)
def test_pool(corner: str) -> None:
    layer, shape = POOL_CORNERS[corner]
    check(Sandwich(layer, 3, shape), between(LOW, HIGH, (2, 3, *shape), 3))


@pytest.mark.parametrize("corner", ["3d", "3d groups", "3d stride 2", "2d same, even"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolution_of_signed_features(corner: str) -> None:
    layer, channels, shape = convolution(corner)
    check(Sandwich(layer, channels, shape, signed=True), between(LOW, HIGH, (2, 3, *shape), 4))


@pytest.mark.parametrize("corner", ["max 3d padded", "max 2d", "average 3d", "adaptive 3d to one"])
def test_pool_of_signed_features(corner: str) -> None:
    layer, shape = POOL_CORNERS[corner]
    check(Sandwich(layer, 3, shape, signed=True), between(LOW, HIGH, (2, 3, *shape), 5))


@pytest.mark.parametrize("corner", [corner for corner in POOL_CORNERS if corner.startswith("max")])
def test_winner_takes_all(corner: str) -> None:
    """Features are rounded, so that windows hold equal maxima: the first of them wins."""
    from captum_dtd.rules import WinnerTakesAll

    layer, shape = POOL_CORNERS[corner]
    model = Sandwich(layer, 2, shape).double().eval()
    with torch.no_grad():
        model.pixel.weight.copy_(model.pixel.weight.sign())
        model.pixel.bias.fill_(1)
    x = between(-2, 2, (2, 3, *shape), 6).round()
    expected = explain(model, x, -2, 2, 1, walk=lambda: Walk(winner=True))
    for backend in ("auto", "reference"):
        method = DeepTaylor(model, -2, 2, composite={type(layer): WinnerTakesAll()}, backend=backend)
        assert_agrees(method.attribute(x, 1), expected)


def test_ties_share_alike() -> None:
    """Proportional pooling gives equal values equal relevance."""
    model = Sandwich(nn.MaxPool3d((1, 2, 2)), 2, (2, 4, 4)).double()
    x = torch.full((1, 3, 2, 4, 4), 0.5, dtype=torch.float64)
    relevance = DeepTaylor(model.eval(), LOW, HIGH).attribute(x, 0)
    windows = relevance.unfold(3, 2, 2).unfold(4, 2, 2)
    assert torch.allclose(windows, windows[..., :1, :1].expand_as(windows), rtol=1e-12)
    check(model, x)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_linear_over_the_last_of_many_dimensions(dims: int) -> None:
    shape = (2, 3, 4)[-dims:]
    check(Sandwich(nn.Linear(4, 3), 2, shape), between(LOW, HIGH, (2, 3, *shape), 7))


def test_linear_on_pixels() -> None:
    check(Pixels(nn.Linear(6, 4), 6, ()), between(-1, 2, (3, 6), 8), -1, 2)


@pytest.mark.parametrize("layout", ["channels_last_3d", "time last", "every other", "expanded", "offset"])
def test_memory_layouts(layout: str) -> None:
    x = between(LOW, HIGH, (2, 3, 4, 5, 6), 9)
    if layout == "channels_last_3d":
        x = x.to(memory_format=torch.channels_last_3d)
    elif layout == "time last":
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    elif layout == "every other":
        x = between(LOW, HIGH, (4, 3, 4, 5, 12), 9)[::2, ..., ::2]
    elif layout == "expanded":
        x = x[:, :, :1].expand(-1, -1, 4, -1, -1)
    else:
        x = between(LOW, HIGH, (5, 3, 4, 5, 6), 9)[3:]
    layer = nn.Conv3d(4, 3, 3, stride=(1, 2, 1), padding=1)
    check(Sandwich(layer, 4, (4, 5, 6)), x)
    check(Sandwich(nn.MaxPool3d(3, 2, 1), 4, (4, 5, 6)).to(memory_format=torch.channels_last_3d), x)


@pytest.mark.parametrize("bounds", ["number", "per channel", "0-d", "frame", "whole clip", "broadcast with batch"])
def test_bounds(bounds: str) -> None:
    shape = (3, 3, 4, 4)
    low: Any = {
        "number": -2.5,
        "per channel": list(LOW),
        "0-d": torch.tensor(-2.5),
        "frame": between(-3, -2, (3, 1, 4, 4), 10),
        "whole clip": between(-3, -2, shape, 10),
        "broadcast with batch": between(-3, -2, (1, 3, 1, 1, 1), 10),
    }[bounds]
    high = torch.tensor(HIGH, dtype=torch.float64)
    x = between(LOW, HIGH, (2, *shape), 11).clamp(min=-1.8)
    check(Pixels(nn.Conv3d(3, 4, 3, padding=1), 3, shape[1:]), x, low, high)


def test_dead_units_pass_nothing() -> None:
    """Where no input helped an output, its relevance is lost, and the convergence delta says how much."""
    layer = nn.Conv3d(3, 2, 3, padding=1)
    with torch.no_grad():
        layer.weight[0] = -layer.weight[0].abs()
    model = Sandwich(layer, 3, (3, 4, 4)).double().eval()
    x = between(LOW, HIGH, (2, 3, 3, 4, 4), 12)
    check(model, x)
    delta = DeepTaylor(model, LOW, HIGH).attribute(x, 0, return_convergence_delta=True)[1]
    assert (delta.abs() > 1e-6).all()


def test_pixels_at_their_bounds() -> None:
    """A black picture and a filter that only brightness could excite: nothing helped, nothing is relevant, no NaN."""
    layer = nn.Conv3d(3, 2, (1, 3, 3), padding=(0, 1, 1))
    with torch.no_grad():
        layer.weight[0] = layer.weight[0].abs()
        layer.bias.fill_(20.0)
    model = Pixels(layer, 3, (2, 4, 4))
    black = torch.tensor(LOW, dtype=torch.float64).reshape(1, 3, 1, 1, 1).expand(1, 3, 2, 4, 4)
    half = torch.cat([black, between(LOW, HIGH, (1, 3, 2, 4, 4), 13)], 4)[..., 2:6]
    check(model, torch.cat([black, half]))


def test_everything_dead() -> None:
    """All relevance is lost on the way: the answer is zero everywhere, and the delta is the whole logit."""
    model = Sandwich(nn.Conv3d(2, 2, 1), 2, (2, 3, 3)).double().eval()
    with torch.no_grad():
        model.pixel.weight.zero_()
        model.pixel.bias.fill_(-1.0)
    x = between(LOW, HIGH, (2, 3, 2, 3, 3), 14)
    relevance, delta = DeepTaylor(model, LOW, HIGH).attribute(x, 0, return_convergence_delta=True)
    assert (relevance == 0).all()
    assert torch.allclose(delta, model(x)[:, 0])


def test_float32_is_as_near_as_float32_can_be() -> None:
    model = Sandwich(nn.Conv3d(4, 3, 3, padding=1), 4, (3, 4, 5)).eval()
    x = between(LOW, HIGH, (2, 3, 3, 4, 5), 15, torch.float32)
    relevance = DeepTaylor(model, LOW, HIGH).attribute(x, 2)
    assert relevance.dtype == torch.float32
    assert_agrees(relevance, explain(model, x, LOW, HIGH, 2), 1e-4)
