"""The vocabulary of traced graphs: which ATen operations are of one kind, and the two that the graph is rewritten to use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

CONVOLUTIONS = frozenset(
    getattr(aten, f"conv{n}d").__getattr__(overload) for n in (1, 2, 3) for overload in ("default", "padding")
)
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default})
AVERAGE_POOLS = frozenset({aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default})
ADAPTIVE_AVERAGES = frozenset(
    {aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default}
)
ADAPTIVE_MAXIMA = frozenset({F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d})
MAX_POOLS = frozenset({aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default})
ADDITIONS = frozenset({aten.add.Tensor, aten.sub.Tensor})
REDUCTIONS = frozenset({aten.mean.dim, aten.sum.dim_IntList})
SHAPE_ONLY = frozenset(
    {aten.reshape.default, aten.clone.default, aten.contiguous.default}
    | {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.flatten.using_ints}
    | {aten.permute.default, aten.transpose.int, aten.dropout.default}
)
"""Operations that only rename or reorder values, so that a softmax before them is still the end of the network."""


def maximum_over(x: Tensor, dims: list[int], keepdim: bool = False) -> Tensor:
    """Maximum over dimensions, as ``amax``, but routing to one maximum where several are equal (amax's gradient splits)."""
    moved = x.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims)).max(-1).values
    for dim in sorted(dim % x.ndim for dim in dims) if keepdim else ():
        moved = moved.unsqueeze(dim)
    return moved


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Batch norm in evaluation mode: an affine map of every channel."""
    return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
