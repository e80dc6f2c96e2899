"""What the fused operations are measured against: the same relevance composed of the fastest calls that PyTorch offers.

A composition of z+ is a convolution, an elementwise division (zero where z is zero), the convolution's adjoint and an
elementwise multiplication, with v+ = max(v, 0) prepared beforehand and every elementwise step in place. PyTorch has several
ways to take each half; which one is fastest depends on the layer, so all are timed and the best of them is the rival.
Everything of a composition, relevance too, is in the measured type, which spares it conversions that the fused operations
make: those keep relevance in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from workloads import Convolution, Pooling, Tensors

aten = torch.ops.aten

Result: TypeAlias = Tensor | tuple[Tensor, ...]

LinearMap = Callable[[Tensor], Tensor]
"""A convolution or its adjoint, with its weights bound."""

Way = Callable[[Convolution, Tensor, Tensor], LinearMap]
"""A way to take a convolution or its adjoint: of the layer, its weights, and tensors like its input."""

# Calls of oneDNN by name, which torch.compile cannot trace.
_BY_NAME = ("prepacked", "mkldnn")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}

ONE: tuple[int, int, int] = (1, 1, 1)
NONE: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Rival:
    """A composition, ready to be timed."""

    name: str
    run: Callable[[], Result]


# --- a convolution ---------------------------------------------------------------------------------------------------


def _conv3d(layer: Convolution, weight: Tensor, x: Tensor) -> LinearMap:
    return partial(F.conv3d, weight=weight, stride=layer.stride, padding=layer.padding, groups=layer.groups)


def _mkldnn(layer: Convolution, weight: Tensor, x: Tensor) -> LinearMap:
    """oneDNN, also where F.conv3d would choose a slower path for few examples."""
    return lambda u: aten.mkldnn_convolution(u, weight, None, layer.padding, layer.stride, ONE, layer.groups)


def _prepacked(layer: Convolution, weight: Tensor, x: Tensor) -> LinearMap:
    """oneDNN with the weights reordered beforehand, as torch.compile freezes them."""
    shape = [layer.padding, layer.stride, ONE, layer.groups]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *shape, list(x.shape))
    pointwise = torch.ops.mkldnn._convolution_pointwise
    return lambda u: pointwise(u, packed, None, *shape, "none", [], "")


CONVOLUTIONS = {"conv3d": _conv3d, "mkldnn_convolution": _mkldnn, "prepacked": _prepacked}

# --- its adjoint -----------------------------------------------------------------------------------------------------


def _left_over(layer: Convolution) -> list[int]:
    """How many input positions behind the last window the adjoint must still write."""
    return [
        n + 2 * p - k - (o - 1) * s
        for n, o, k, s, p in zip(layer.size, layer.output_size, layer.kernel, layer.stride, layer.padding, strict=True)
    ]


def _conv_transpose3d(layer: Convolution, weight: Tensor, x: Tensor) -> LinearMap:
    left_over = _left_over(layer)
    return lambda s: F.conv_transpose3d(s, weight, None, layer.stride, layer.padding, left_over, layer.groups)


def _convolution_backward(layer: Convolution, weight: Tensor, x: Tensor) -> LinearMap:
    def backward(s: Tensor) -> Tensor:
        only_input = [True, False, False]
        pulled: Tensor = aten.convolution_backward(
            s, x, weight, None, layer.stride, layer.padding, ONE, False, NONE, layer.groups, only_input
        )[0]
        return pulled

    return backward


def _prepacked_transpose(layer: Convolution, weight: Tensor, x: Tensor) -> LinearMap:
    left_over, shape = _left_over(layer), [1, layer.c_out, *layer.output_size]
    packed = torch.ops.mkldnn._reorder_convolution_transpose_weight(
        weight, layer.padding, left_over, layer.stride, ONE, layer.groups, shape
    )
    pointwise = torch.ops.mkldnn._convolution_transpose_pointwise
    return lambda s: pointwise(
        s, packed, None, layer.padding, left_over, layer.stride, ONE, layer.groups, "none", [], ""
    )


ADJOINTS = {
    "conv_transpose3d": _conv_transpose3d,
    "convolution_backward": _convolution_backward,
    "prepacked transpose": _prepacked_transpose,
}


def _usable(ways: Mapping[str, Way], dtype: torch.dtype) -> dict[str, Way]:
    """Without what oneDNN refuses by name: bfloat16 on a machine that has too few instructions for it."""
    refused = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return {name: make for name, make in ways.items() if not (refused and name.startswith(_BY_NAME))}


def _flipped(layer: Convolution) -> Convolution:
    """The convolution that is the adjoint of one with unit stride."""
    t, h, w = (k - 1 - p for k, p in zip(layer.kernel, layer.padding, strict=True))
    return replace(layer, c_in=layer.c_out, c_out=layer.c_in, size=layer.output_size, padding=(t, h, w))


def _adjoints(layer: Convolution, weight: Tensor, x: Tensor) -> Iterator[tuple[str, LinearMap]]:
    for name, make in _usable(ADJOINTS, weight.dtype).items():
        yield name, make(layer, weight, x)
    if layer.stride == ONE:
        turned = (
            weight.view(layer.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
        )  # in and out, within each group
        flipped = _like(turned.flip(2, 3, 4), weight)
        s = weight.new_empty(1, layer.c_out, *layer.output_size)
        for name, make_convolution in _usable(CONVOLUTIONS, weight.dtype).items():
            yield f"flipped {name}", make_convolution(_flipped(layer), flipped, s)


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    last = other.is_contiguous(memory_format=torch.channels_last_3d) and not other.is_contiguous()
    return tensor.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


# --- whole layers ----------------------------------------------------------------------------------------------------


def _divide_(relevance: Tensor, z: Tensor) -> Tensor:
    """R / z in the memory of z, and zero where z is zero."""
    return torch.div(relevance, z.masked_fill_(z == 0, torch.inf), out=z)


def _z_plus(u: Tensor, relevance: Tensor, convolve: LinearMap, pull: LinearMap) -> Tensor:
    return pull(_divide_(relevance, convolve(u))).mul_(u)


def _lifted_z_beta(
    x: Tensor, low: Tensor, high: Tensor, relevance: Tensor, convolve: LinearMap, pull: LinearMap
) -> Tensor:
    first, second = _z_plus(torch.cat([x - low, high - x], 1), relevance, convolve, pull).chunk(2, 1)
    return first + second


def z_plus_rivals(layer: Convolution, given: Tensors, compiled: bool = True) -> list[Rival]:
    """z+ on a convolution: in each layout the fastest convolution with the fastest adjoint, as it is and compiled.

    The first is what one writes without further thought: F.conv3d and F.conv_transpose3d on contiguous tensors.
    """
    return _rivals(layer, given.x, given.weight.clamp(min=0), given.relevance, _z_plus, (given.x,), compiled)


def lifted_z_beta_rivals(layer: Convolution, given: Tensors, compiled: bool = True) -> list[Rival]:
    """z-beta as z+ of the distances to the box, twice the channels: one convolution and one adjoint."""
    x, v, low, high = given.x, given.weight, given.low.to(given.x.dtype), given.high.to(given.x.dtype)
    lifted = torch.cat([x - low, high - x], 1)
    weight = torch.cat([v.clamp(min=0), -v.clamp(max=0)], 1)
    twice = replace(layer, c_in=2 * layer.c_in)
    return _rivals(twice, lifted, weight, given.relevance, _lifted_z_beta, (x, low, high), compiled)


def _rivals(
    layer: Convolution,
    u: Tensor,
    positive: Tensor,
    relevance: Tensor,
    body: Callable[..., Tensor],
    read: tuple[Tensor, ...],
    compiled: bool,
) -> list[Rival]:
    """``body(*read, relevance, convolution, adjoint)`` by the fastest ways to convolve ``u`` with the positive weights."""
    rivals: list[Rival] = []
    for layout, memory_format in LAYOUTS.items():
        x, weight, given, *arguments = (
            t.to(u.dtype).contiguous(memory_format=memory_format) for t in (u, positive, relevance, *read)
        )
        convolutions = {name: make(layer, weight, x) for name, make in _usable(CONVOLUTIONS, u.dtype).items()}
        adjoints = dict(_adjoints(layer, weight, x))
        if layout == "contiguous":
            pair = convolutions["conv3d"], adjoints["conv_transpose3d"]
            rivals.append(Rival("conv3d + conv_transpose3d, contiguous", partial(body, *arguments, given, *pair)))
        for wrapper, left_out in (("", ()), ("compiled ", _BY_NAME))[: 1 + compiled]:
            there, back = (
                fastest({n: partial(run, t) for n, run in maps.items() if not any(part in n for part in left_out)})
                for maps, t in ((convolutions, x), (adjoints, given))
            )
            whole = torch.compile(body, dynamic=False) if wrapper else body
            run = partial(whole, *arguments, given, convolutions[there], adjoints[back])
            rivals.append(Rival(f"{wrapper}{there} + {back}, {layout}", run))
    return rivals


def z_beta_rivals(layer: Convolution, given: Tensors) -> list[Rival]:
    """z-beta as its formula reads, with v, v+ and v-: three convolutions and three adjoints, the fastest of each layout."""
    rivals = []
    for layout, memory_format in LAYOUTS.items():
        dtype = given.x.dtype
        x, relevance = (t.to(dtype).contiguous(memory_format=memory_format) for t in (given.x, given.relevance))
        low, high = (b.to(dtype).expand_as(x).contiguous(memory_format=memory_format) for b in (given.low, given.high))
        v = given.weight.contiguous(memory_format=memory_format)
        there = fastest({n: partial(make(layer, v, x), x) for n, make in _usable(CONVOLUTIONS, dtype).items()})
        back = fastest({n: partial(run, relevance) for n, run in _adjoints(layer, v, x)})
        parts = (v, v.clamp(min=0), v.clamp(max=0))
        convolutions = [CONVOLUTIONS[there](layer, part, x) for part in parts]
        adjoints = [dict(_adjoints(layer, part, x))[back] for part in parts]
        run = partial(_z_beta, x, low, high, relevance, convolutions, adjoints)
        rivals.append(Rival(f"3 x ({there} + {back}), {layout}", run))
    return rivals


def _z_beta(
    x: Tensor, low: Tensor, high: Tensor, relevance: Tensor, convolve: list[LinearMap], pull: list[LinearMap]
) -> Tensor:
    s = _divide_(relevance, convolve[0](x).sub_(convolve[1](low)).sub_(convolve[2](high)))
    return pull[0](s).mul_(x).sub_(pull[1](s).mul_(low)).sub_(pull[2](s).mul_(high))


def max_pool_rivals(layer: Pooling, x: Tensor, relevance: Tensor) -> list[Rival]:
    """Proportional max pooling by average pooling, which adds up windows, and its adjoint."""
    rivals = []
    for layout, memory_format in LAYOUTS.items():
        u, given = (t.to(x.dtype).contiguous(memory_format=memory_format) for t in (x, relevance))
        rivals.append(Rival(f"avg_pool3d + backward, {layout}", partial(_pooled, layer, u, given)))
    return rivals


def _pooled(layer: Pooling, x: Tensor, relevance: Tensor) -> Tensor:
    window = (layer.kernel, layer.kernel, layer.padding, False, True, 1)
    u = x.float()  # average pooling has no CPU kernel of less
    s = _divide_(relevance, F.avg_pool3d(u, *window))
    pulled: Tensor = aten.avg_pool3d_backward(s, u, *window)
    return pulled.mul_(u)


def block_max_pool_rivals(layer: Pooling, x: Tensor, relevance: Tensor, compiled: bool = True) -> list[Rival]:
    """The same without a pooling, where windows tile the input: sums over its view as blocks, in plain elementwise steps."""
    if not layer.tiles:
        return []
    rivals = []
    for layout, memory_format in LAYOUTS.items():
        u, given = (t.to(x.dtype).contiguous(memory_format=memory_format) for t in (x, relevance))
        rivals.append(Rival(f"blocks, {layout}", partial(_blocks, layer, u, given)))
        if compiled:
            run = torch.compile(_blocks, dynamic=False)
            rivals.append(Rival(f"compiled blocks, {layout}", partial(run, layer, u, given)))
    return rivals


def _blocks(layer: Pooling, x: Tensor, relevance: Tensor) -> Tensor:
    (t, h, w), (kt, kh, kw) = layer.output_size, layer.kernel
    blocks = x.view(*x.shape[:2], t, kt, h, kh, w, kw)
    z = blocks.sum((3, 5, 7))
    s = relevance / z.masked_fill(z == 0, torch.inf)
    return (blocks * s[:, :, :, None, :, None, :, None]).view(x.shape)


def addition_rivals(x: Tensor, other: Tensor, relevance: Tensor, compiled: bool = True) -> list[Rival]:
    """z+ on an addition, in plain elementwise steps."""
    rivals = []
    for layout, memory_format in LAYOUTS.items():
        arguments = [t.to(x.dtype).contiguous(memory_format=memory_format) for t in (x, other, relevance)]
        rivals.append(Rival(f"elementwise, {layout}", partial(_summands, *arguments)))
        if compiled:
            rivals.append(
                Rival(f"compiled elementwise, {layout}", partial(torch.compile(_summands, dynamic=False), *arguments))
            )
    return rivals


def _summands(x: Tensor, other: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    u, v = x.clamp(min=0), other.clamp(min=0)
    s = _divide_(relevance, u + v)
    return u.mul_(s), v.mul_(s)


def fastest(runs: dict[str, Callable[[], Result]], repetitions: int = 3) -> str:
    """The name of the fastest, by its best time after a warm-up: enough to choose what is then measured properly."""
    best: dict[str, float] = {}
    for name, run in runs.items():
        run()
        times = []
        for _ in range(repetitions):
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
        best[name] = min(times)
    return min(best, key=lambda name: best[name])


def fastest_rival(rivals: list[Rival]) -> Rival:
    """The one that `fastest` finds."""
    name = fastest({rival.name: rival.run for rival in rivals})
    return next(rival for rival in rivals if rival.name == name)
