"""What the fused operations compute, in plain ATen: the definition that every kernel is held to, on any device.

Arithmetic is IEEE in the accumulator's precision: float64 for float64, float32 for everything narrower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which relevance is kept and sums are taken for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def divide(relevance: Tensor, denominator: Tensor, stabilizer: float, is_positive: bool = False) -> Tensor:
    """``R / (z + stabilizer sign(z))`` with sign(0) = 1; without a stabilizer a zero (or subnormal) z passes nothing.

    A subnormal denominator counts as zero because ``R / z`` would overflow. NaN is passed on, not hidden. ``is_positive``
    promises that no denominator is negative: then fewer passes over memory do.
    """
    if stabilizer:
        return relevance / torch.where(denominator < 0, denominator - stabilizer, denominator + stabilizer)
    limits = torch.finfo(denominator.dtype)
    if is_positive:
        largest_subnormal = limits.tiny * (1 - limits.eps)
        return relevance / F.threshold(denominator, largest_subnormal, math.inf)
    vanishing = denominator.abs() < limits.tiny
    return (relevance / denominator).masked_fill_(vanishing, 0)


def z_plus_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relevance: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    non_negative: bool,
    stabilizer: float,
    divided: bool,
) -> Tensor:
    """z+ on a convolution: ``R_in = x+ adj_v+(s) + x- adj_v-(s)``, ``s = R / (conv_v+(x+) + conv_v-(x-) + bias+)``.

    ``non_negative`` promises that x has no negative element: x- is then not looked at. Where ``divided``, ``relevance`` is s.
    """
    parts = _signs(x.to(relevance.dtype), non_negative)
    return _share(parts, weight, bias, relevance, stride, padding, dilation, groups, stabilizer, divided)


def z_beta_conv3d(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relevance: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    stabilizer: float,
    divided: bool,
) -> Tensor:
    """z-beta on a convolution: z+ of the distances to the box, ``x - low`` with v+ and ``x - high`` with v-."""
    parts = _distances(x.to(relevance.dtype), low, high)
    return _share(parts, weight, bias, relevance, stride, padding, dilation, groups, stabilizer, divided)


def frozen_z_plus_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relevance: Tensor,
    reads: Sequence[int],
    gives: Sequence[int],
    times: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    non_negative: bool,
    stabilizer: float,
    divided: bool,
) -> Tensor:
    """z+ on a convolution whose output times read and give to times by a table: every output time as a clip of its own."""
    parts = _signs(x.to(relevance.dtype), non_negative)
    geometry = (stride, padding, dilation, groups, stabilizer, divided)
    return _share_convolution_by_table(parts, weight, bias, relevance, reads, gives, times, *geometry)


def frozen_z_beta_conv3d(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relevance: Tensor,
    reads: Sequence[int],
    gives: Sequence[int],
    times: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    stabilizer: float,
    divided: bool,
) -> Tensor:
    """z-beta on such a convolution: z+ of the distances to the box."""
    parts = _distances(x.to(relevance.dtype), low, high)
    geometry = (stride, padding, dilation, groups, stabilizer, divided)
    return _share_convolution_by_table(parts, weight, bias, relevance, reads, gives, times, *geometry)


def max_pool3d_relevance(
    x: Tensor,
    relevance: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    winner_takes_all: bool,
    stabilizer: float,
) -> Tensor:
    """Max pooling, ``sum over windows of x+ / (sum of x+ in the window) R``, or each window's R to its first maximum.

    A window without a positive element passes nothing; a NaN wins its window, as in torch.
    """
    x = x.to(relevance.dtype)
    if winner_takes_all:
        geometry = (kernel_size, stride, padding, dilation, ceil_mode)
        _, indices = aten.max_pool3d_with_indices(x, *geometry)
        # Of a window that lies beside the input, torch's index does so, too.
        reads = aten.max_pool3d(x.new_ones(1, 1, *x.shape[2:]), *geometry) > 0
        given = x.new_zeros(x.shape).flatten(2)
        indices, relevance = (torch.where(reads, each, 0).flatten(2) for each in (indices, relevance))
        return given.scatter_add_(2, indices, relevance).view(x.shape)
    u = x.clamp(min=0)
    after = [
        max(0, (o - 1) * s + d * (k - 1) + 1 - p - n)
        for n, o, k, s, p, d in zip(
            x.shape[2:], relevance.shape[2:], kernel_size, stride, padding, dilation, strict=True
        )
    ]
    sides = [side for pair in zip(padding, after, strict=True) for side in pair]
    ones = x.new_ones(1, 1, *kernel_size)
    planes, given = u.flatten(0, 1).unsqueeze(1), relevance.flatten(0, 1).unsqueeze(1)
    shared = _share([(planes, "v+")], ones, None, given, stride, sides, dilation, 1, stabilizer)
    return shared.view(x.shape)


def frozen_max_pool3d_relevance(
    x: Tensor,
    relevance: Tensor,
    reads: Sequence[int],
    gives: Sequence[int],
    times: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    winner_takes_all: bool,
    stabilizer: float,
) -> Tensor:
    """Max pooling whose windows read and give to times by a table: every window along T as a clip of its own.

    What is read from nowhere is -inf: it has no positive part, and wins no window that reads anything finite. (Where all that
    a window reads is -inf too, its winner is left open.)
    """

    def share(windows: Sequence[Tensor], here: Tensor) -> Tensor:
        geometry = (kernel_size, stride, padding, dilation, ceil_mode)
        (window,) = windows
        return max_pool3d_relevance(window, here, *geometry, winner_takes_all, stabilizer)

    return _share_by_table([x.to(relevance.dtype)], relevance, reads, gives, times, kernel_size[0], share, -math.inf)


def z_plus_add(x: Tensor, other: Tensor, relevance: Tensor, alpha: float, stabilizer: float) -> tuple[Tensor, Tensor]:
    """z+ on ``x + alpha other``: to each summand ``u R / (sum of u)``, where u is its positive part."""
    u, v = x.to(relevance.dtype).clamp(min=0), other.to(relevance.dtype).mul(alpha).clamp_(min=0)
    s = divide(relevance, u + v, stabilizer)
    return u * s, v * s


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """The convolution itself, or its positive part, zero-padded by (front, back) of T, of H, of W, in the type of ``x``."""
    dtype = accumulator(x.dtype)
    padded = F.pad(x.to(dtype), [padding[4], padding[5], padding[2], padding[3], padding[0], padding[1]])
    wide = None if bias is None else bias.to(dtype)
    out = F.conv3d(padded, weight.to(dtype), wide, stride, 0, dilation, groups)
    return (out.relu_() if relu else out).to(x.dtype)


def max_pool3d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """The max pooling itself: the largest element of every window, -inf where it lies in the padding alone."""
    return aten.max_pool3d(x, kernel_size, stride, padding, dilation, ceil_mode)  # type: ignore[no-any-return]


def frozen_max_pool3d(
    x: Tensor,
    reads: Sequence[int],
    times: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """The max pooling of a frozen clip's layer, whose windows read times of ``x`` by a table; -1 reads nothing."""
    taps = kernel_size[0]
    read = _rows(reads, x.shape[0], times, taps)
    windows = (_windows(x, [row[q] for row in read], taps, -math.inf) for q in range(times))
    return torch.cat([max_pool3d(one, kernel_size, stride, padding, dilation, ceil_mode) for one in windows], 2)


def frozen_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reads: Sequence[int],
    times: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """The convolution of a frozen clip's layer, whose output times read times of ``x`` by a table; -1 reads zeros."""
    taps = weight.shape[2]
    read = _rows(reads, x.shape[0], times, taps)
    outputs = [
        conv3d(_windows(x, [row[q] for row in read], taps), weight, bias, stride, padding, dilation, groups, relu)
        for q in range(times)
    ]
    return torch.cat(outputs, 2)


def _signs(x: Tensor, non_negative: bool) -> list[tuple[Tensor, str]]:
    """What of an input goes with which weights in z+."""
    return [(x, "v+")] if non_negative else [(x.clamp(min=0), "v+"), (x.clamp(max=0), "v-")]


def _distances(x: Tensor, low: Tensor, high: Tensor) -> list[tuple[Tensor, str]]:
    """The same in z-beta."""
    return [(x - low, "v+"), (x - high, "v-")]


def _rows(table: Sequence[int], n: int, times: int, taps: int) -> list[list[list[int]]]:
    """A table by example, output time and tap."""
    by_time = [list(table[at : at + taps]) for at in range(0, len(table), taps)]
    rows = [by_time[at : at + times] for at in range(0, len(by_time), times)]
    return rows if len(rows) == n else rows * n


def _windows(x: Tensor, read: Sequence[Sequence[int]], taps: int, fill: float = 0.0) -> Tensor:
    """For every example the times that one output reads by so many taps; ``fill`` for -1."""
    chosen = x.new_full((x.shape[0], x.shape[1], taps, *x.shape[3:]), fill)
    for n, times in enumerate(read):
        for tap, time in enumerate(times):
            if time >= 0:
                chosen[n, :, tap] = x[n, :, time]
    return chosen


def _share_convolution_by_table(
    parts: Sequence[tuple[Tensor, str]],
    weight: Tensor,
    bias: Tensor | None,
    relevance: Tensor,
    reads: Sequence[int],
    gives: Sequence[int],
    times: int,
    *geometry: Any,
) -> Tensor:
    inputs, sides = zip(*parts, strict=True)

    def share(windows: Sequence[Tensor], here: Tensor) -> Tensor:
        return _share(list(zip(windows, sides, strict=True)), weight, bias, here, *geometry)

    return _share_by_table(inputs, relevance, reads, gives, times, weight.shape[2], share)


def _share_by_table(
    inputs: Sequence[Tensor],
    relevance: Tensor,
    reads: Sequence[int],
    gives: Sequence[int],
    times: int,
    taps: int,
    share: Callable[[Sequence[Tensor], Tensor], Tensor],
    fill: float = 0.0,
) -> Tensor:
    """Relevance of inputs whose windows read and give by tables; ``share`` is that of one window of each, which -1 fills."""
    n, channels, _, *size = inputs[0].shape
    outputs = relevance.shape[2]
    read, given = _rows(reads, n, outputs, taps), _rows(gives, n, outputs, taps)
    shared = relevance.new_zeros((n, channels, times, *size))
    for q in range(outputs):
        windows = [_windows(x, [row[q] for row in read], taps, fill) for x in inputs]
        of_window = share(windows, relevance[:, :, q : q + 1])
        for example in range(n):
            for tap, (source, to) in enumerate(zip(read[example][q], given[example][q], strict=True)):
                if source >= 0 and to >= 0:
                    shared[example, :, to] += of_window[example, :, tap]
    return shared


def _share(
    parts: Sequence[tuple[Tensor, str]],
    weight: Tensor,
    bias: Tensor | None,
    relevance: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    stabilizer: float,
    divided: bool = False,
) -> Tensor:
    if not relevance.numel():
        return torch.zeros_like(parts[0][0])
    v = weight.to(relevance.dtype)
    front = [padding[0], padding[2], padding[4]]
    sides = [padding[4], padding[5], padding[2], padding[3], padding[0], padding[1]]
    terms = [(F.pad(u, sides), u, v.clamp(min=0) if part == "v+" else v.clamp(max=0)) for u, part in parts]
    s = relevance
    if not divided:
        z = terms[0][0].new_zeros(())
        for padded, _, w in terms:
            z = z + aten.convolution(padded, w, None, stride, [0] * 3, dilation, False, [0] * 3, groups)
        if bias is not None:
            z = z + bias.to(z.dtype).clamp(min=0).view(-1, 1, 1, 1)
        s = divide(relevance, z, stabilizer)
    shared = torch.zeros_like(parts[0][0])
    for padded, u, w in terms:
        pulled, _, _ = aten.convolution_backward(
            s, padded, w, None, stride, [0] * 3, dilation, False, [0] * 3, groups, [True, False, False]
        )
        for axis, (start, size) in enumerate(zip(front, u.shape[2:], strict=True), start=2):
            pulled = pulled.narrow(axis, start, size)
        shared.addcmul_(u, pulled)
    return shared
