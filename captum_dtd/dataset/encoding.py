"""Relevance maps as they are stored: each one divided by a scale of its own, then float32, float16 or int8.

Relevance is small: nearly all of a map lies below float16's normal range, so values are first divided by the map's largest
magnitude. ``stored = map / scale``, and ``map = stored * scale``, with

- float32: scale 1, exact;
- float16: scale = max |map|, off by at most 1/4096 of it;
- int8: scale = max |map| / 127, off by at most 1/254 of max |map|. Relevance has both signs, so int8 and not uint8.

A map that is derived from two stored ones is off by at most the sum of what those two are off.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_dtd.dataset.configuration import Encoding

__all__ = ["decode_maps", "encode_maps"]


def encode_maps(values: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """Maps as they are stored, and their scales.

    Args:
        values: finite maps (N, ...) of any floating-point type.
        encoding: "float32", "float16" or "int8".

    Returns:
        A tensor of that type and shape, and the scales, positive float32 numbers (N,), both on the same device.

    Example:
        >>> stored, scales = encode_maps(torch.tensor([[0.0, 0.5, -2.54], [0.0, 0.0, 0.0]]), "int8")
        >>> stored.tolist(), scales.tolist()
        ([[0, 25, -127], [0, 0, 0]], [0.019999999552965164, 1.0])
    """
    values = values.float()
    if encoding == "float32":
        return values, values.new_ones(len(values))
    steps = 127 if encoding == "int8" else 1
    scales = values.flatten(1).abs().amax(1) / steps
    none = scales == 0  # no relevance, or too little for a float32 scale
    scales = torch.where(none, torch.ones_like(scales), scales)
    shape = (-1, *[1] * (values.ndim - 1))
    scaled = (values / scales.view(shape)).clamp(-steps, steps)
    scaled = torch.where(none.view(shape), torch.zeros_like(scaled), scaled)
    return (scaled.round() if encoding == "int8" else scaled).to(getattr(torch, encoding)), scales


def decode_maps(stored: NDArray[np.generic], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Maps (N, ...) from what is stored and one scale each, (N,); a scale of NaN, for a row without maps, gives NaN.

    Example:
        >>> decode_maps(np.array([[25, -127], [0, 0]], dtype=np.int8), np.array([0.02, np.nan], dtype=np.float32))
        array([[ 0.5 , -2.54],
               [  nan,   nan]], dtype=float32)
    """
    shape = (-1, *[1] * (stored.ndim - 1))
    return stored.astype(np.float32) * scales.astype(np.float32).reshape(shape)
