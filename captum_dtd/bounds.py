"""The darkest and the brightest pixel a network can see: the box in which the z-beta rule looks for its root point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Bound: TypeAlias = float | Sequence[float] | Tensor
"""A pixel bound after normalisation: one number, one per channel, or a tensor that broadcasts against the input."""


def pixel_bounds(mean: Sequence[float], std: Sequence[float], scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Bounds of a pixel after the usual normalisation ``(pixel - mean) / std``, one per channel.

    ``low = (0 - mean) / std`` and ``high = (scale - mean) / std``.

    Args:
        mean: mean that the preprocessing subtracts, one per channel.
        std: standard deviation that it divides by, one per channel, positive.
        scale: the largest pixel before normalisation: 1 for pixels in 0..1, 255 for pixels in 0..255 (C3D).

    Returns:
        ``(low, high)``, two float64 tensors with one value per channel: what ``DeepTaylor(model, low, high)`` takes.

    Raises:
        ValueError: if ``mean`` and ``std`` differ in length, ``std`` or ``scale`` is not positive, or any of them not finite.

    Example:
        >>> low, high = pixel_bounds(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> low.tolist(), high.tolist()
        ([-2.0, -2.0, -2.0], [2.0, 2.0, 2.0])
    """
    if len(mean) != len(std):
        raise ValueError(f"mean has {len(mean)} channels and std has {len(std)}; give one value per channel in both")
    deviations = torch.tensor([float(value) for value in std], dtype=torch.float64, device="cpu")
    means = torch.tensor([float(value) for value in mean], dtype=torch.float64, device="cpu")
    if not bool(torch.isfinite(means).all()):
        raise ValueError(f"mean must be finite, got {tuple(mean)}")
    if not bool(((deviations > 0) & torch.isfinite(deviations)).all()) or not 0 < scale < math.inf:
        raise ValueError(f"std and scale must be positive and finite, got std={tuple(std)} and scale={scale}")
    return -means / deviations, (scale - means) / deviations


def without_repeats(bound: Tensor) -> Tensor:
    """A view of a bound that has every number once; it broadcasts as the bound itself does.

    Example:
        >>> without_repeats(torch.tensor([0.0, 1.0]).view(1, 2, 1).expand(4, 2, 100)).shape
        torch.Size([1, 2, 1])
    """
    return bound[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in bound.stride())]


def lies_within(tensor: Tensor, low: Tensor, high: Tensor) -> bool:
    """Whether no number is below ``low`` or above ``high``, bounds of the tensor's shape.

    Some rounding steps are let pass: normalising a black or a white pixel may land just outside its bound.
    """
    if tensor.numel() == 0:
        return True
    low, high = without_repeats(low), without_repeats(high)
    slack = 4 * torch.finfo(tensor.dtype).eps * (high - low)
    low, high = low - slack, high + slack
    # The extremes of all numbers that share a bound, since there are few of those.
    shared = [dim for dim, size in enumerate(low.shape) if size == 1 and tensor.shape[dim] > 1]
    least, most = (tensor.amin(shared, True), tensor.amax(shared, True)) if shared else (tensor, tensor)
    return not bool(((least < low) | (most > high)).any())


def broadcast_bound(name: str, bound: Bound, like: Tensor) -> Tensor:
    """The bound as a tensor of the shape, dtype and device of ``like`` (N, C, ...), without copying it per pixel.

    Args:
        name: ``"low"`` or ``"high"``, for the error message.
        bound: a number, one value per channel, or a tensor that broadcasts against ``like``.
        like: shaped like what is explained.

    Raises:
        TypeError: if the bound is not numbers.
        ValueError: if it neither has one value per channel nor broadcasts, or is not finite.
    """
    # Torch takes no arrays that run backwards.
    numbers = bound.copy() if isinstance(bound, np.ndarray) else bound
    try:
        value = torch.as_tensor(numbers, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be a number, one number per channel, or a tensor, got the {type(bound).__name__} {bound!r}"
        ) from None
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite, got {bound}")
    shape = tuple(value.shape)
    if value.ndim == 1 and like.ndim > 2:
        value = value.view(-1, *[1] * (like.ndim - 2))
    try:
        return value.expand(like.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {shape} does not fit the input {tuple(like.shape)}; give a number, "
            f"one per channel ({like.shape[1] if like.ndim > 1 else 1}), or a tensor that broadcasts against the input"
        ) from None
