"""The vocabulary of traced graphs: which ATen operations are of one kind, and those that the graph is rewritten to use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

CONVOLUTIONS = frozenset(
    getattr(getattr(aten, f"conv{n}d"), overload) for n in (1, 2, 3) for overload in ("default", "padding")
)
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default})
GATES = frozenset({aten.sigmoid.default, aten.hardsigmoid.default, *SOFTMAX})
CASTS = frozenset({aten._to_copy.default, aten.to.dtype})
CLAMPS = frozenset({aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default})
NEAREST = frozenset(
    {aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec}
    | {aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact3d.vec}
)
SHAPE_READERS = frozenset(
    {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default}
    | {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default}
)
"""Operations that read a signal's shape and not its values."""
AVERAGE_POOLS = frozenset({aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default})
ADAPTIVE_AVERAGES = frozenset(
    {aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default}
)
ADAPTIVE_MAXIMA = frozenset({F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d})
MAX_POOLS = frozenset({aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default})
CHOICES = frozenset(
    {aten.topk.default, aten.sort.default, aten.sort.stable, aten.kthvalue.default, aten.median.dim, aten.mode.default}
    | {aten.min.dim}
)
"""Operations that choose some values along a dimension by comparing them, and say which ones they were."""
ADDITIONS = frozenset({aten.add.Tensor, aten.sub.Tensor})
REDUCTIONS = frozenset({aten.mean.dim, aten.sum.dim_IntList})
SHAPE_ONLY = frozenset(
    {aten.reshape.default, aten.contiguous.default}
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


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Group norm; instance norm where every channel is a group.

    ``counts`` says how often each time of clips (N, C, T, H, W) occurs, where equal ones are there once only.
    """
    if counts is None:
        return F.group_norm(x, groups, weight, bias, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    of_groups = wide.reshape(len(x), groups, x.shape[1] // groups, *x.shape[2:])
    mean = _mean_in_time(of_groups, counts)
    centred = of_groups - mean
    scale = torch.rsqrt(_mean_in_time(centred.square(), counts) + eps)
    normalised = (centred * scale).reshape(x.shape)
    if weight is not None:
        normalised = normalised * weight.view(-1, 1, 1, 1)
    if bias is not None:
        normalised = normalised + bias.view(-1, 1, 1, 1)
    return normalised.to(x.dtype)


NORMS = frozenset({group_norm, aten.layer_norm.default, aten.rms_norm.default})
"""Norms that divide by what they find in their input."""


def _mean_in_time(of_groups: Tensor, counts: Sequence[int]) -> Tensor:
    """Of each group (N, groups, channels, T, H, W) the mean over all times, each as often as it occurs."""
    each = of_groups.mean((2, 4, 5), keepdim=True)
    # No tensor is made of the counts: where a GPU's work is recorded, nothing may be copied to it.
    return sum(each[:, :, :, t : t + 1] * count for t, count in enumerate(counts)) / sum(counts)  # type: ignore[return-value]


def signs_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """-1 where a weight is negative, else 1, in a row."""
    return torch.where(weight < 0, -1.0, 1.0).to(dtype).flatten()


def attention(
    query: Tensor, key: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """The weights of scaled dot-product attention: ``softmax(query key^T scale + mask)``, by default ``scale = 1 / sqrt(E)``."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scaled = query.to(wide) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scaled @ key.to(wide).transpose(-2, -1)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    if mask is not None:  # a query that may look at nothing gets nothing
        weights = weights.masked_fill(scores.isneginf().all(-1, keepdim=True), 0)
    return weights.to(query.dtype)
