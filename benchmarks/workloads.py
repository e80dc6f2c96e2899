"""Layers that are measured: those of C3D and torchvision's r3d_18, for clips of 16 frames of 112 x 112 pixels; grouped ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from captum_dtd import kernels, ops
from captum_dtd.kernels import Precision

Triple = tuple[int, int, int]

CLIP: Triple = (16, 112, 112)


@dataclass(frozen=True)
class Convolution:
    """A convolution; ``size`` is (T, H, W) of its input. A linear layer is one of kernel 1 at one position."""

    network: str
    name: str
    c_in: int
    c_out: int
    size: Triple
    kernel: Triple = (3, 3, 3)
    stride: Triple = (1, 1, 1)
    padding: Triple = (1, 1, 1)
    groups: int = 1

    @property
    def weight(self) -> tuple[int, ...]:
        """Shape of its weights."""
        return (self.c_out, self.c_in // self.groups, *self.kernel)

    @property
    def output_size(self) -> Triple:
        """(T, H, W) of its output."""
        t, h, w = (
            (n + 2 * p - k) // s + 1
            for n, k, s, p in zip(self.size, self.kernel, self.stride, self.padding, strict=True)
        )
        return t, h, w

    @property
    def flops(self) -> int:
        """Of z and its adjoint, by z+: two convolutions."""
        return 4 * math.prod(self.weight) * math.prod(self.output_size)

    def __str__(self) -> str:
        kernel, stride, size = ("x".join(map(str, numbers)) for numbers in (self.kernel, self.stride, self.size))
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.network} {self.name} {self.c_in}->{self.c_out}{groups} k{kernel} s{stride} {size}"


@dataclass(frozen=True)
class Pooling:
    """A max pooling whose windows do not overlap; ``size`` is (T, H, W) of its input."""

    network: str
    name: str
    channels: int
    size: Triple
    kernel: Triple = (2, 2, 2)
    padding: Triple = (0, 0, 0)

    @property
    def output_size(self) -> Triple:
        """(T, H, W) of its output."""
        t, h, w = ((n + 2 * p) // k for n, k, p in zip(self.size, self.kernel, self.padding, strict=True))
        return t, h, w

    @property
    def tiles(self) -> bool:
        """Whether the windows tile the input, with nothing left over and no padding."""
        return not any(self.padding) and not any(n % k for n, k in zip(self.size, self.kernel, strict=True))

    def __str__(self) -> str:
        kernel, size = ("x".join(map(str, numbers)) for numbers in (self.kernel, self.size))
        return f"{self.network} {self.name} {self.channels} k{kernel} {size}"


@dataclass(frozen=True)
class Addition:
    """An addition of two summands of ``size`` (T, H, W), as it ends a residual block."""

    network: str
    name: str
    channels: int
    size: Triple

    def __str__(self) -> str:
        return f"{self.network} {self.name} {self.channels} add {'x'.join(map(str, self.size))}"


def _shortcut(name: str, c_in: int, c_out: int, size: Triple) -> Convolution:
    return Convolution("r3d_18", name, c_in, c_out, size, (1, 1, 1), (2, 2, 2), (0, 0, 0))


C3D_CONVOLUTIONS = (
    Convolution("C3D", "conv1a", 3, 64, (16, 112, 112)),
    Convolution("C3D", "conv2a", 64, 128, (16, 56, 56)),
    Convolution("C3D", "conv3a", 128, 256, (8, 28, 28)),
    Convolution("C3D", "conv3b", 256, 256, (8, 28, 28)),
    Convolution("C3D", "conv4a", 256, 512, (4, 14, 14)),
    Convolution("C3D", "conv4b", 512, 512, (4, 14, 14)),
    Convolution("C3D", "conv5a", 512, 512, (2, 7, 7)),
    Convolution("C3D", "conv5b", 512, 512, (2, 7, 7)),
)

R3D_18_CONVOLUTIONS = (
    Convolution("r3d_18", "stem.0", 3, 64, (16, 112, 112), (3, 7, 7), (1, 2, 2), (1, 3, 3)),
    Convolution("r3d_18", "layer1.0.conv1.0", 64, 64, (16, 56, 56)),
    Convolution("r3d_18", "layer2.0.conv1.0", 64, 128, (16, 56, 56), stride=(2, 2, 2)),
    _shortcut("layer2.0.downsample.0", 64, 128, (16, 56, 56)),
    Convolution("r3d_18", "layer2.0.conv2.0", 128, 128, (8, 28, 28)),
    Convolution("r3d_18", "layer3.0.conv1.0", 128, 256, (8, 28, 28), stride=(2, 2, 2)),
    _shortcut("layer3.0.downsample.0", 128, 256, (8, 28, 28)),
    Convolution("r3d_18", "layer3.0.conv2.0", 256, 256, (4, 14, 14)),
    Convolution("r3d_18", "layer4.0.conv1.0", 256, 512, (4, 14, 14), stride=(2, 2, 2)),
    _shortcut("layer4.0.downsample.0", 256, 512, (4, 14, 14)),
    Convolution("r3d_18", "layer4.0.conv2.0", 512, 512, (2, 7, 7)),
)
"""Each shape once; the network repeats most of them."""

CONVOLUTIONS = C3D_CONVOLUTIONS + R3D_18_CONVOLUTIONS

GROUPED_LAYERS = (
    Convolution("X3D-M", "stem in time", 24, 24, (16, 112, 112), (5, 1, 1), padding=(2, 0, 0), groups=24),
    Convolution("X3D-M", "res2", 54, 54, (16, 56, 56), groups=54),
    Convolution("X3D-M", "res3", 108, 108, (16, 28, 28), groups=108),
    Convolution("X3D-M", "res4, first", 216, 216, (16, 28, 28), stride=(1, 2, 2), groups=216),
    Convolution("X3D-M", "res5", 432, 432, (16, 7, 7), groups=432),
    Convolution("3D ResNeXt-101", "layer1", 128, 128, (8, 28, 28), groups=32),
    Convolution("3D ResNeXt-101", "layer2", 256, 256, (4, 14, 14), groups=32),
    Convolution("3D ResNeXt-101", "layer3", 512, 512, (2, 7, 7), groups=32),
)
"""Depthwise layers (Feichtenhofer 2020), and of a few channels each (Hara et al. 2018)."""

PIXEL_LAYERS = tuple(layer for layer in CONVOLUTIONS if layer.size == CLIP)

LINEAR_LAYERS = tuple(
    Convolution("C3D", name, c_in, c_out, (1, 1, 1), (1, 1, 1), padding=(0, 0, 0))
    for name, c_in, c_out in (("fc6", 8192, 4096), ("fc7", 4096, 4096), ("fc8", 4096, 101))
)

POOLINGS = (
    Pooling("C3D", "pool1", 64, (16, 112, 112), kernel=(1, 2, 2)),
    Pooling("C3D", "pool2", 128, (16, 56, 56)),
    Pooling("C3D", "pool3", 256, (8, 28, 28)),
    Pooling("C3D", "pool4", 512, (4, 14, 14)),
    Pooling("C3D", "pool5", 512, (2, 7, 7), padding=(0, 1, 1)),
)

ADDITIONS = tuple(
    Addition("r3d_18", f"layer{number}", channels, size)
    for number, channels, size in (
        (1, 64, (16, 56, 56)),
        (2, 128, (8, 28, 28)),
        (3, 256, (4, 14, 14)),
        (4, 512, (2, 7, 7)),
    )
)

LOW, HIGH = (-102.0, -98.0, -90.0), (153.0, 157.0, 165.0)
"""The darkest and the brightest pixel of C3D's clips: RGB from 0 to 255 minus the mean of its training set."""


def dtype_of(precision: Precision) -> torch.dtype:
    """Type of activations and weights that a precision is measured in."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def reduced(layer: Convolution) -> Convolution:
    """A layer of the same kind that takes no time: a few channels and a few positions."""
    t, h, w = (min(n, 2 * s + 2) for n, s in zip(layer.size, layer.stride, strict=True))
    if layer.groups > 1:
        of_group = layer.c_in // layer.groups
        return replace(layer, c_in=2 * of_group, c_out=2 * of_group, groups=2, size=(t, h, w))
    return replace(layer, c_in=min(layer.c_in, 4), c_out=min(layer.c_out, 6), size=(t, h, w))


def reduced_pooling(layer: Pooling) -> Pooling:
    """A pooling of the same kind that takes no time."""
    t, h, w = (min(n, 4 * k) for n, k in zip(layer.size, layer.kernel, strict=True))
    return replace(layer, channels=3, size=(t, h, w))


def reduced_addition(layer: Addition) -> Addition:
    """An addition of the same kind that takes no time."""
    t, h, w = (min(n, 4) for n in layer.size)
    return replace(layer, channels=3, size=(t, h, w))


@dataclass(frozen=True)
class Tensors:
    """What one layer is given: ``x`` and ``weight`` in the type of the measured grade, relevance and bounds in float32."""

    x: Tensor
    weight: Tensor
    relevance: Tensor
    low: Tensor
    high: Tensor

    def in_layout(self, memory_format: torch.memory_format) -> Tensors:
        """The same with x and relevance in a memory layout."""
        x, relevance = (t.contiguous(memory_format=memory_format) for t in (self.x, self.relevance))
        return replace(self, x=x, relevance=relevance)


@dataclass(frozen=True)
class Batch:
    """How many clips are given at once, and on which device."""

    clips: int
    device: torch.device

    def generator(self, seed: int) -> torch.Generator:
        """Of numbers on that device."""
        return torch.Generator(self.device).manual_seed(seed)


ONE_CLIP = Batch(1, torch.device("cpu"))


def draw(
    layer: Convolution, dtype: torch.dtype, pixels: bool = False, seed: int = 0, batch: Batch = ONE_CLIP
) -> Tensors:
    """Tensors for a convolution: pixels in their box, or what a ReLU leaves; channels last, as both sides like it best."""
    generator = batch.generator(seed)
    random = partial(torch.rand, generator=generator, device=batch.device)
    normal = partial(torch.randn, generator=generator, device=batch.device)
    low, high = (torch.tensor(bound, device=batch.device).view(1, 3, 1, 1, 1) for bound in (LOW, HIGH))
    shape = (batch.clips, layer.c_in, *layer.size)
    x = low + (high - low) * random(shape) if pixels else normal(shape).clamp(min=0)
    weight = normal(layer.weight) / math.sqrt(math.prod(layer.weight[1:]))
    relevance = random(batch.clips, layer.c_out, *layer.output_size)
    return Tensors(_channels_last(x.to(dtype)), weight.to(dtype), _channels_last(relevance), low, high)


def draw_pooling(layer: Pooling, dtype: torch.dtype, seed: int = 0, batch: Batch = ONE_CLIP) -> tuple[Tensor, Tensor]:
    """Input and relevance of a pooling: what a ReLU leaves, channels last."""
    generator, shape = batch.generator(seed), (batch.clips, layer.channels)
    x = torch.randn(*shape, *layer.size, generator=generator, device=batch.device).clamp(min=0)
    relevance = torch.rand(*shape, *layer.output_size, generator=generator, device=batch.device)
    return _channels_last(x.to(dtype)), _channels_last(relevance)


def draw_addition(
    layer: Addition, dtype: torch.dtype, seed: int = 0, batch: Batch = ONE_CLIP
) -> tuple[Tensor, Tensor, Tensor]:
    """What a residual block made, of either sign, its shortcut, which follows a ReLU, and relevance; channels last."""
    generator, shape = batch.generator(seed), (batch.clips, layer.channels, *layer.size)
    made = torch.randn(shape, generator=generator, device=batch.device)
    shortcut = torch.randn(shape, generator=generator, device=batch.device).clamp(min=0)
    relevance = torch.rand(shape, generator=generator, device=batch.device)
    return _channels_last(made.to(dtype)), _channels_last(shortcut.to(dtype)), _channels_last(relevance)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last_3d)


# --- the fused operations on them --------------------------------------------------------------------------------------


def joined(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """An operation's result, or several side by side along the channels."""
    return torch.cat(result, 1) if isinstance(result, tuple) else result


def chosen(op: str, layer: Convolution | Pooling | Addition, dtype: torch.dtype, precision: Precision) -> str:
    """Name of the kernel that serves a layer on this machine."""
    shape = shape_class(layer) if isinstance(layer, Convolution) else None
    return kernels.choose(op, "cpu", dtype, precision, shape)


def shape_class(layer: Convolution) -> kernels.ShapeClass:
    """What kind of convolution it is to the table of kernels."""
    return kernels.shape_class(layer.output_size, layer.weight, layer.stride, layer.groups)


def z_plus(layer: Convolution, given: Tensors, kernel: str) -> Tensor:
    """z+ on a convolution that follows a ReLU."""
    return ops.z_plus_conv3d(
        given.x,
        given.weight,
        given.relevance,
        stride=layer.stride,
        padding=layer.padding,
        groups=layer.groups,
        non_negative=True,
        kernel=kernel,
    )


def z_beta(layer: Convolution, given: Tensors, kernel: str) -> Tensor:
    """z-beta on a convolution of pixels."""
    x, low, high, weight, relevance = given.x, given.low, given.high, given.weight, given.relevance
    return ops.z_beta_conv3d(x, low, high, weight, relevance, stride=layer.stride, padding=layer.padding, kernel=kernel)


def convolved(layer: Convolution, given: Tensors, kernel: str) -> Tensor:
    """The convolution itself."""
    return ops.conv3d(
        given.x, given.weight, stride=layer.stride, padding=layer.padding, groups=layer.groups, kernel=kernel
    )


def pooled(layer: Pooling, x: Tensor, _: Tensor, kernel: str) -> Tensor:
    """The pooling itself."""
    return ops.max_pool3d(x, layer.kernel, padding=layer.padding, kernel=kernel)


def max_pool(layer: Pooling, x: Tensor, relevance: Tensor, kernel: str) -> Tensor:
    """Proportional max pooling."""
    return ops.max_pool3d_relevance(x, relevance, layer.kernel, padding=layer.padding, kernel=kernel)


def summands(x: Tensor, other: Tensor, relevance: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """z+ on an addition."""
    return ops.z_plus_add(x, other, relevance, kernel=kernel)
