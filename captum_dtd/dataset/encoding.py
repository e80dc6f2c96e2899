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

__all__ = ["decode_maps", "encode_map"]


def encode_map(values: Tensor, encoding: Encoding) -> tuple[Tensor, float]:
    """A map as it is stored, and its scale.

    Args:
        values: a finite map of any shape and floating-point type.
        encoding: "float32", "float16" or "int8".

    Returns:
        A tensor of that type and shape, on the same device, and the scale, a positive float32 number.

    Example:
        >>> stored, scale = encode_map(torch.tensor([0.0, 0.5, -2.54]), "int8")
        >>> stored.tolist(), round(scale, 6)
        ([0, 25, -127], 0.02)
    """
    values = values.float()
    if encoding == "float32":
        return values, 1.0
    steps = 127 if encoding == "int8" else 1
    # as float32 throughout, since that is how the scale is kept
    scale = float(values.abs().amax() / steps)
    if scale == 0:  # no relevance, or too little for a float32 scale
        return torch.zeros_like(values, dtype=getattr(torch, encoding)), 1.0
    scaled = (values / scale).clamp(-steps, steps)
    return (scaled.round() if encoding == "int8" else scaled).to(getattr(torch, encoding)), scale


def decode_maps(stored: NDArray[np.generic], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Maps (N, ...) from what is stored and one scale each, (N,); a scale of NaN, for a row without maps, gives NaN.

    Example:
        >>> decode_maps(np.array([[25, -127], [0, 0]], dtype=np.int8), np.array([0.02, np.nan], dtype=np.float32))
        array([[ 0.5 , -2.54],
               [  nan,   nan]], dtype=float32)
    """
    shape = (-1, *[1] * (stored.ndim - 1))
    return stored.astype(np.float32) * scales.astype(np.float32).reshape(shape)
