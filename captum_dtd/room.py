"""Room for the big tensors that ATen's operations write: on the CPU, memory that the process keeps for them.

The C library gives big blocks back to the system, and asks for them again: 150,000 pages in one discrimination of r3d_18, a
tenth of its time. Results of the compiled kernels lie in memory that is used again; here, so do those of additions and copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_dtd import native
from captum_dtd.ops import empty_like_x

__all__ = ["add", "empty_along", "empty_like"]

_NUMBERS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def empty_like(x: Tensor, size: Sequence[int]) -> Tensor:
    """Room for a tensor (N, C, T, H, W) of another size than ``x``, of its type and in its layout; not yet written.

    Example:
        >>> x = torch.rand(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)
        >>> room = empty_like(x, (2, 3, 1, 5, 6))
        >>> room.shape, room.is_contiguous(memory_format=torch.channels_last_3d)
        (torch.Size([2, 3, 1, 5, 6]), True)
    """
    if _is_kept(x):
        room: Tensor = torch.ops.captum_dtd.room(x, size)
        return room
    return empty_like_x(x, x.dtype, size)


def empty_along(x: Tensor, dim: int, size: int) -> Tensor:
    """Room for a tensor like ``x``, in its layout, with another size along one dimension; not yet written.

    Example:
        >>> empty_along(torch.rand(2, 3, 4, 5, 6), 2, 7).shape
        torch.Size([2, 3, 7, 5, 6])
    """
    shape = list(x.shape)
    shape[dim] = size
    return empty_like(x, shape)


def add(x: Tensor, other: Tensor, alpha: float = 1.0) -> Tensor:
    """``x + alpha other``, as ``torch.add`` has it.

    Example:
        >>> add(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0]), alpha=-1)
        tensor([-2., -3.])
    """
    if _is_kept(x) and other.shape == x.shape and other.dtype == x.dtype and other.device == x.device:
        return torch.add(x, other, alpha=alpha, out=empty_like(x, x.shape))
    return torch.add(x, other, alpha=alpha)


def _is_kept(x: Tensor) -> bool:
    return (
        x.ndim == 5 and x.device.type == "cpu" and "cpu" in native.loaded and x.dtype in _NUMBERS and type(x) is Tensor
    )
