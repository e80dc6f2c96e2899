"""What the scripts published with Hiley et al. 2019 (arXiv 1908.01536) compute, written again from its description.

It shares nothing with the package: no tracing, no autograd, one clip at a time, on a chain of layers that is walked
by hand. Convolutions are those of C3D: stride 1, 3x3x3, padding 1. Pooling windows do not overlap.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def tiny_c3d(width: int, classes: int, size: int = 32) -> nn.Sequential:
    """C3D's chain of layers with `width` channels throughout, for clips of 16 frames of `size` x `size` pixels."""

    def conv(channels: int) -> list[nn.Module]:
        return [nn.Conv3d(channels, width, 3, padding=1), nn.ReLU()]

    pool = (2, 2, 2)
    last = (size // 16 + 2) // 2  # the spatial size after pool5, which pads
    return nn.Sequential(
        *conv(3), nn.MaxPool3d((1, 2, 2)),
        *conv(width), nn.MaxPool3d(pool),
        *conv(width), *conv(width), nn.MaxPool3d(pool),
        *conv(width), *conv(width), nn.MaxPool3d(pool),
        *conv(width), *conv(width), nn.MaxPool3d(pool, padding=(0, 1, 1)),
        nn.Flatten(),
        nn.Linear(width * last * last, 4 * width), nn.ReLU(), nn.Dropout(),
        nn.Linear(4 * width, 4 * width), nn.ReLU(), nn.Dropout(),
        nn.Linear(4 * width, classes),
    )  # fmt: skip


def ratio(relevance: Tensor, z: Tensor) -> Tensor:
    """relevance / z, and nothing where z is zero."""
    return torch.where(z == 0, 0, relevance / torch.where(z == 0, 1, z))


def through_linear(layer: nn.Linear, u: Tensor, relevance: Tensor) -> Tensor:
    positive = layer.weight.detach().clamp(min=0)
    return u * (ratio(relevance, u @ positive.T) @ positive)


def through_conv(layer: nn.Conv3d, u: Tensor, relevance: Tensor) -> Tensor:
    positive = layer.weight.detach().clamp(min=0)
    share = ratio(relevance, F.conv3d(u, positive, padding=1))
    return u * F.conv_transpose3d(share, positive, padding=1)


def through_pixels(layer: nn.Conv3d, x: Tensor, relevance: Tensor, low: float, high: float) -> Tensor:
    weight = layer.weight.detach()
    darkest, brightest = torch.full_like(x, low), torch.full_like(x, high)
    parts = [(x, weight, 1), (darkest, weight.clamp(min=0), -1), (brightest, weight.clamp(max=0), -1)]
    z = sum(sign * F.conv3d(image, kernel, padding=1) for image, kernel, sign in parts)
    share = ratio(relevance, z)
    return sum(sign * image * F.conv_transpose3d(share, kernel, padding=1) for image, kernel, sign in parts)


def through_pool(layer: nn.MaxPool3d, u: Tensor, relevance: Tensor) -> Tensor:
    """Each pixel of a window gets its share of the sum over the window."""
    kernel = layer.kernel_size if isinstance(layer.kernel_size, tuple) else (layer.kernel_size,) * 3
    t, h, w = layer.padding if isinstance(layer.padding, tuple) else (layer.padding,) * 3
    padded = F.pad(u, (w, w, h, h, t, t))
    spread = torch.zeros_like(padded)
    places = [  # the pixels at one place in every window, for each of the places
        (..., *(slice(i, i + k * n, k) for i, k, n in zip(place, kernel, relevance.shape[2:], strict=True)))
        for place in itertools.product(*map(range, kernel))
    ]
    share = ratio(relevance, sum(padded[place] for place in places))
    for place in places:
        spread[place] = padded[place] * share
    return spread[:, :, t : t + u.shape[2], h : h + u.shape[3], w : w + u.shape[4]]


def relevance_of(net: nn.Sequential, clip: Tensor, target: int, low: float, high: float) -> Tensor:
    """Deep Taylor relevance (T, H, W), summed over colour, of one clip (3, T, H, W), from a seed of 1."""
    inputs, activation = [], clip[None]
    with torch.no_grad():
        for layer in net:
            inputs.append(activation)
            activation = layer(activation)
    relevance = torch.zeros_like(activation)
    relevance[0, target] = 1
    for layer, u in reversed(list(zip(net, inputs, strict=True))):
        if layer is net[0]:
            relevance = through_pixels(layer, u, relevance, low, high)
        elif isinstance(layer, nn.Linear):
            relevance = through_linear(layer, u, relevance)
        elif isinstance(layer, nn.Conv3d):
            relevance = through_conv(layer, u, relevance)
        elif isinstance(layer, nn.MaxPool3d):
            relevance = through_pool(layer, u, relevance)
        else:
            relevance = relevance.reshape(u.shape)
    return relevance[0].sum(0)


def explain(
    net: nn.Sequential, clip: Tensor, target: int, low: float = -102, high: float = 255 - 90
) -> tuple[Tensor, Tensor, Tensor]:
    """The authors' spatial, temporal and total maps, each (T, H, W), of one clip (3, T, H, W)."""

    def normalised(relevance: Tensor) -> Tensor:
        return ratio(relevance, relevance.abs().max())

    total = normalised(relevance_of(net, clip, target, low, high))
    spatial = torch.empty_like(total)
    for t in range(clip.shape[1]):
        frozen = clip[:, t : t + 1].repeat(1, clip.shape[1], 1, 1)
        spatial[t] = normalised(relevance_of(net, frozen, target, low, high))[0]
    return spatial, total - spatial, total
