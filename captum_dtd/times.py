"""What operations do along time, so that equal times of a frozen clip need computing only once.

All frames of a frozen clip are equal, so a value is equal at all times that do not feel the ends of the clip: zero padding
is what tells times apart. `Times` says which times of a value are equal, `in_time` how an operation reads its source's times
and which of its output's are equal then::

    input                      0 0 0 0 0 0 0 0     one class of equal times
    3x3x3, padding 1           0 1 1 1 1 1 1 2     an end, the middle, an end
    3x3x3, padding 1           0 1 2 2 2 2 3 4
    max pooling 2              0 1 1 2

Nothing here touches a tensor: what is said depends on the graph and on the number of frames alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torch import Tensor, fx

from captum_dtd.layers import NON_NEGATIVE_ACTIVATIONS, SIGN_PRESERVING_ACTIVATIONS
from captum_dtd.nodes import args_of, shape_of
from captum_dtd.operations import (
    ADAPTIVE_AVERAGES,
    ADAPTIVE_MAXIMA,
    CASTS,
    CLAMPS,
    REDUCTIONS,
    SOFTMAX,
    aten,
    batch_norm,
    group_norm,
    maximum_over,
)


@dataclass(frozen=True)
class Times:
    """The time axis of a value: which dimension it is, and the class of every time; equal times have one class.

    Classes are numbered in the order in which they appear, so a value without equal times has the classes 0, 1, 2, ...
    """

    dim: int
    classes: tuple[int, ...]

    @property
    def length(self) -> int:
        """How many times there are."""
        return len(self.classes)

    @property
    def distinct(self) -> int:
        """How many of them differ."""
        return max(self.classes, default=-1) + 1

    def numbers(self, times: Iterable[int]) -> list[int]:
        """The classes of some times; -1 stays."""
        return [time if time < 0 else self.classes[time] for time in times]

    @property
    def first(self) -> tuple[int, ...]:
        """The first time of every class."""
        return tuple(self.classes.index(number) for number in range(self.distinct))


@dataclass(frozen=True)
class Window:
    """What an output's time reads: the source's times ``time * stride - before + tap * dilation``, one for every tap."""

    taps: int
    stride: int = 1
    before: int = 0
    dilation: int = 1

    def reads(self, time: int, length: int) -> tuple[int, ...]:
        """The times that are read, tap by tap; -1 for one outside of a source of this length, or for no time at all."""
        if time < 0:
            return (-1,) * self.taps
        at = (time * self.stride - self.before + tap * self.dilation for tap in range(self.taps))
        return tuple(t if 0 <= t < length else -1 for t in at)


Way: TypeAlias = Literal["pointwise", "windows", "convolution", "whole"]
"""How an operation treats time: each time by itself; pools and the like; convolutions; in a way that is not known, or not at
all, so that it needs every time of its sources."""


@dataclass(frozen=True)
class InTime:
    """What one operation does along time.

    Attributes:
        way: see `Way`.
        times: of its output; None where it has no time axis, or none that is known.
        window: what an output's time reads, of "windows" and "convolution".
        args: its arguments for another number of times in its output (a norm's for its distinct ones: relevance passes through
            it, so that no more is asked of it); None: as they are. "windows" are given end to end; of a "convolution" these are
            the arguments of a single tap.
        fill: what "windows" read outside of their source.
    """

    way: Way
    times: Times | None
    window: Window | None = None
    args: Callable[[int], tuple[Any, ...]] | None = None
    fill: float = 0.0

    def reads(self, times: Iterable[int], length: int) -> tuple[int, ...]:
        """The times of a source of this length that outputs at ``times`` read, end to end; -1 reads nothing."""
        if self.way == "whole":
            return tuple(range(length))
        if self.window is None:
            return tuple(times)
        return tuple(t for time in times for t in self.window.reads(time, length))


TimesOf: TypeAlias = Callable[[fx.Node], "Times | None"]

_Treatment: TypeAlias = Callable[[fx.Node, TimesOf], "InTime | None"]


def in_time(node: fx.Node, times_of: TimesOf) -> InTime:
    """What an operation does along time, given the times of what it reads.

    Args:
        node: of a canonized graph.
        times_of: the times of a node before it; None where it has none.
    """
    found = _treated(node, times_of)
    return found if found and _keeps_examples(node, times_of) else InTime("whole", None)


def time_axis(node: fx.Node, times_of: TimesOf) -> Times | None:
    """The times of an operation's output, even where examples become part of another dimension; None where it has none."""
    found = _treated(node, times_of)
    return found.times if found else None


def _treated(node: fx.Node, times_of: TimesOf) -> InTime | None:
    if node.target not in _TREATMENTS or all(times_of(source) is None for source in node.all_input_nodes):
        return None
    return _TREATMENTS[node.target](node, times_of)


def _keeps_examples(node: fx.Node, times_of: TimesOf) -> bool:
    """Whether the output's first dimension is that of what is read, as far as sizes tell: clips are told apart by it."""
    timed = [source.meta["val"] for source in node.all_input_nodes if times_of(source) is not None]
    values = [value for value in (*timed, node.meta["val"]) if isinstance(value, Tensor)]
    return all(value.ndim > 0 and value.shape[0] == values[0].shape[0] for value in values)


def numbered(keys: Iterable[Hashable]) -> tuple[int, ...]:
    """Equal keys get equal numbers, in the order of their first appearance."""
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


# ---------------------------------------------------------------------------------------------------- each time by itself


def _pointwise(times: Times, dim: int | None = None, args: Callable[[int], tuple[Any, ...]] | None = None) -> InTime:
    return InTime("pointwise", times if dim is None else replace(times, dim=dim), args=args)


def _only_source(node: fx.Node, times_of: TimesOf) -> Times | None:
    """The times of the first argument, where no other one has any."""
    timed = [source for source in node.all_input_nodes if times_of(source) is not None]
    return times_of(timed[0]) if timed == [node.args[0]] else None


def _elementwise(node: fx.Node, times_of: TimesOf) -> InTime | None:
    times = _only_source(node, times_of)
    return None if times is None else _pointwise(times)


def _by_channel(node: fx.Node, times_of: TimesOf) -> InTime | None:
    """Batch norm and PReLU: dimension 1 has numbers of its own."""
    times = _only_source(node, times_of)
    return None if times is None or times.dim == 1 else _pointwise(times)


def _group_norm(node: fx.Node, times_of: TimesOf) -> InTime | None:
    """Of clips: statistics are of all times, and equal ones count as often as they occur."""
    times = _only_source(node, times_of)
    if times is None or times.dim != 2 or len(shape_of(node)) != 5:
        return None
    counts = tuple(times.classes.count(number) for number in range(times.distinct))
    return _pointwise(times, args=lambda _: (*node.args[:5], counts))


def _layer_norm(node: fx.Node, times_of: TimesOf) -> InTime | None:
    """Layer and RMS norm, of positions that are no time's."""
    times, sizes = _only_source(node, times_of), node.args[1]
    assert isinstance(sizes, (list, tuple))
    return None if times is None or times.dim >= len(shape_of(node)) - len(sizes) else _pointwise(times)


def _linear(node: fx.Node, times_of: TimesOf) -> InTime | None:
    times = _only_source(node, times_of)
    return None if times is None or times.dim == len(shape_of(node)) - 1 else _pointwise(times)


def _softmax(node: fx.Node, times_of: TimesOf) -> InTime | None:
    times, dim = _only_source(node, times_of), node.args[1]
    assert isinstance(dim, int)
    return None if times is None or times.dim == dim % len(shape_of(node)) else _pointwise(times)


def _broadcast(node: fx.Node, times_of: TimesOf) -> InTime | None:
    """Operations on two tensors, or a tensor and a number: what has no times must be the same at all of them."""
    rank = len(shape_of(node))
    operands = [source for source in node.all_input_nodes if isinstance(source.meta["val"], Tensor)]
    timed = [(times, len(shape_of(source))) for source in operands if (times := times_of(source)) is not None]
    from_behind = {own - times.dim for times, own in timed}
    if any(own != rank for _, own in timed) or len(from_behind) != 1 or len({times.length for times, _ in timed}) != 1:
        return None
    (behind,) = from_behind
    for source in operands:
        shape = shape_of(source)
        if times_of(source) is None and len(shape) >= behind and shape[-behind] != 1:
            return None
    classes = numbered(zip(*(times.classes for times, _ in timed), strict=True))
    return InTime("pointwise", Times(rank - behind, classes))


def _cat(node: fx.Node, times_of: TimesOf) -> InTime | None:
    tensors, along = args_of(node)
    assert isinstance(tensors, (list, tuple))
    every = [times_of(tensor) for tensor in tensors]
    dim = int(along) % len(shape_of(node))
    if any(times is None or times.dim != every[0].dim for times in every) or dim == every[0].dim:  # type: ignore[union-attr]
        return None
    known = [times for times in every if times is not None]
    return InTime("pointwise", Times(known[0].dim, numbered(zip(*(t.classes for t in known), strict=True))))


def _stack(node: fx.Node, times_of: TimesOf) -> InTime | None:
    tensors, dim = args_of(node)
    dim %= len(shape_of(node))
    known = [times for tensor in tensors if (times := times_of(tensor)) is not None]
    if dim == 0 or len(known) < len(tensors) or len({times.dim for times in known}) != 1:
        return None
    classes = numbered(zip(*(times.classes for times in known), strict=True))
    return InTime("pointwise", Times(known[0].dim + (dim <= known[0].dim), classes))


def _split(node: fx.Node, times_of: TimesOf) -> InTime | None:
    times = _only_source(node, times_of)
    dim = int(node.args[2])  # type: ignore[arg-type]
    if times is None or dim % len(shape_of(node.args[0])) == times.dim:
        return None
    return _pointwise(times)


def _reduction(node: fx.Node, times_of: TimesOf, over: int = 1) -> InTime | None:
    """``over`` says which argument has the dimensions; whether they are kept is said by the next, or by name."""
    times = _only_source(node, times_of)
    if times is None or not node.args[over]:
        return None
    rank = len(shape_of(node.args[0]))
    dims = {int(dim) % rank for dim in node.args[over]}  # type: ignore[union-attr, arg-type]
    if times.dim in dims:
        return None
    keeps = bool(node.args[over + 1 :] and node.args[over + 1]) or bool(node.kwargs.get("keepdim"))
    return _pointwise(times, times.dim - (0 if keeps else sum(dim < times.dim for dim in dims)))


def _vector_norm(node: fx.Node, times_of: TimesOf) -> InTime | None:
    return _reduction(node, times_of, over=2)


def _adaptive(node: fx.Node, times_of: TimesOf) -> InTime | None:
    times, size = _only_source(node, times_of), node.args[1]
    if times is None or not isinstance(size, (list, tuple)) or len(shape_of(node)) != 5 or times.dim != 2:
        return None
    if size[0] not in (None, times.length):
        return None
    return _pointwise(times, args=lambda count: (node.args[0], [count, *size[1:]]))


# ------------------------------------------------------------------------------------------------------- rearrangements


def _permute(node: fx.Node, times_of: TimesOf) -> InTime | None:
    times = _only_source(node, times_of)
    if times is None:
        return None
    rank = len(shape_of(node))
    order = list(range(rank))
    if node.target is aten.transpose.int:
        a, b = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    else:
        order = [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
    if order[0] != 0:
        return None
    return _pointwise(times, order.index(times.dim))


def _reshape(node: fx.Node, times_of: TimesOf) -> InTime | None:
    """Time stays a dimension of its own where as many elements lie behind it as before."""
    times = _only_source(node, times_of)
    if times is None:
        return None
    before, after = shape_of(node.args[0]), shape_of(node)
    behind = math.prod(before[times.dim + 1 :])
    dims = [d for d, size in enumerate(after) if size == times.length and math.prod(after[d + 1 :]) == behind]
    if len(dims) != 1 or not isinstance(behind, int):
        return None
    (dim,) = dims
    if node.target is not aten.reshape.default:
        return _pointwise(times, dim)
    sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    return _pointwise(times, dim, lambda count: (node.args[0], [*sizes[:dim], count, *sizes[dim + 1 :]]))


def _expand(node: fx.Node, times_of: TimesOf) -> InTime | None:
    times = _only_source(node, times_of)
    if times is None or len(shape_of(node)) != len(shape_of(node.args[0])):
        return None
    x, sizes = node.args[:2]
    before, behind = list(sizes[: times.dim]), list(sizes[times.dim + 1 :])  # type: ignore[index, arg-type]
    return _pointwise(times, args=lambda count: (x, [*before, count, *behind])) if times.length > 1 else None


def _squeeze(node: fx.Node, times_of: TimesOf) -> InTime | None:
    times = _only_source(node, times_of)
    if times is None:
        return None
    source, dims = args_of(node)
    before = shape_of(source)
    asked = {int(dim) % len(before) for dim in dims}
    if times.dim in asked and times.length == 1:
        return None  # time goes
    # Several times are not squeezed away, and one that is left of them must not be either.
    gone = [dim for dim in asked - {times.dim} if before[dim] == 1]
    return _pointwise(times, times.dim - sum(dim < times.dim for dim in gone), lambda _: (source, gone))


def _select(node: fx.Node, times_of: TimesOf) -> InTime | None:
    times = _only_source(node, times_of)
    dim = int(node.args[1]) % (len(shape_of(node)) + 1)  # type: ignore[arg-type]
    return None if times is None or dim == times.dim else _pointwise(times, times.dim - (dim < times.dim))


def _slice(node: fx.Node, times_of: TimesOf) -> InTime | None:
    times = _only_source(node, times_of)
    if times is None:
        return None
    x, dim, start, end, step = args_of(node)
    if dim % len(shape_of(node)) != times.dim:
        return _pointwise(times)
    if not all(isinstance(number, (int, type(None))) for number in (start, end, step)):
        return None
    taken = range(times.length)[start:end:step]
    return _windows(times, Window(1, taken.step, -taken.start), len(taken), (x, dim, 0, 2**63 - 1, 1), 0.0)


def _pad(node: fx.Node, times_of: TimesOf) -> InTime | None:
    times = _only_source(node, times_of)
    if times is None:
        return None
    x, padding, *options = args_of(node)
    sides = list(padding)
    at = 2 * (len(shape_of(node)) - 1 - times.dim)
    if at >= len(sides) or (sides[at] == 0 and sides[at + 1] == 0):
        return _pointwise(times)
    if node.target is aten.pad.default and options and options[0] != "constant":
        return None
    fill = options[-1] if options and isinstance(options[-1], (int, float)) else 0.0
    window, count = Window(1, 1, sides[at]), times.length + sides[at] + sides[at + 1]
    sides[at] = sides[at + 1] = 0
    return _windows(times, window, count, (x, sides, *options), float(fill))


# -------------------------------------------------------------------------------------------------------------- windows


def _windows(times: Times, window: Window, count: int, args: tuple[Any, ...], fill: float) -> InTime:
    return InTime("windows", _windowed(times, window, count), window, lambda _: args, fill)


def _windowed(times: Times, window: Window, count: int) -> Times:
    """Outputs are equal whose taps read equal times; the order matters: [a, a, b] and [a, b, b] are not shared alike."""
    keys = (tuple(times.numbers(window.reads(p, times.length))) for p in range(count))
    return Times(times.dim, numbered(keys))


def _triple(value: Any) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * 3 if len(values) == 1 else values


def _pool(node: fx.Node, times_of: TimesOf) -> InTime | None:
    times = _only_source(node, times_of)
    if times is None or len(shape_of(node)) != 5 or times.dim != 2:
        return None
    is_max = node.target is aten.max_pool3d.default
    x, kernel, stride, padding, *rest = args_of(node)
    size, steps, padding = _triple(kernel), _triple(stride or kernel), _triple(padding)
    dilation = _triple(rest[0]) if is_max else [1, 1, 1]
    if (size[0], steps[0], padding[0]) == (1, 1, 0):
        return _pointwise(times)
    window, count = Window(size[0], steps[0], padding[0], dilation[0]), int(shape_of(node)[2])
    if not is_max:
        _, include_padding, divisor = rest
        last = (count - 1) * steps[0] - padding[0] + size[0] - 1
        if divisor is None and (last >= times.length + padding[0] or (padding[0] and not include_padding)):
            return None  # windows of different sizes are divided by different numbers
    options = [[1, *dilation[1:]], *rest[1:]] if is_max else rest
    args = (x, size, [size[0], *steps[1:]], [0, *padding[1:]], *options)
    return _windows(times, window, count, args, -math.inf if is_max else 0.0)


def _convolution(node: fx.Node, times_of: TimesOf) -> InTime | None:
    times = _only_source(node, times_of)
    if times is None or len(shape_of(node)) != 5 or times.dim != 2:
        return None
    x, weight, bias, stride, padding, dilation, groups = args_of(node)
    taps = int(shape_of(weight)[2])
    steps, apart = _triple(stride), _triple(dilation)
    before = (
        {"same": apart[0] * (taps - 1) // 2, "valid": 0}.get(padding)
        if isinstance(padding, str)
        else _triple(padding)[0]
    )
    assert before is not None
    if (taps, steps[0], before) == (1, 1, 0):
        return _pointwise(times)
    window = Window(taps, steps[0], before, apart[0])
    of_a_tap = padding if isinstance(padding, str) else [0, *_triple(padding)[1:]]
    args = (x, weight, bias, [1, *steps[1:]], of_a_tap, [1, *apart[1:]], groups)
    return InTime("convolution", _windowed(times, window, int(shape_of(node)[2])), window, lambda _: args)


_ELEMENTWISE = (
    NON_NEGATIVE_ACTIVATIONS
    | SIGN_PRESERVING_ACTIVATIONS
    | CLAMPS
    | CASTS
    | {aten.neg.default, aten.rsub.Scalar, aten.contiguous.default, operator.getitem}
    | {aten.threshold.default, aten.erf.default, aten.exp.default, aten.log.default, aten.pow.Tensor_Scalar}
    | {aten.rsqrt.default, aten.reciprocal.default}
)

_TREATMENTS: dict[Any, _Treatment] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys((batch_norm, aten.prelu.default), _by_channel),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor), _broadcast),
    **dict.fromkeys((aten.maximum.default, aten.minimum.default, aten.expand_as.default), _broadcast),
    **dict.fromkeys(SOFTMAX, _softmax),
    **dict.fromkeys((*REDUCTIONS, maximum_over, aten.var.correction, aten.std.correction), _reduction),
    aten.linalg_vector_norm.default: _vector_norm,
    **dict.fromkeys((*ADAPTIVE_AVERAGES, *ADAPTIVE_MAXIMA), _adaptive),
    **dict.fromkeys((aten.permute.default, aten.transpose.int), _permute),
    **dict.fromkeys((aten.reshape.default, aten.flatten.using_ints, aten.unsqueeze.default), _reshape),
    aten.expand.default: _expand,
    aten.squeeze.dims: _squeeze,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default), _split),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _pad),
    **dict.fromkeys((aten.max_pool3d.default, aten.avg_pool3d.default), _pool),
    **dict.fromkeys((aten.conv3d.default, aten.conv3d.padding), _convolution),
    group_norm: _group_norm,
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), _layer_norm),
    aten.linear.default: _linear,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
}
"""What is not named here needs every time of its sources, and what follows it is computed at every time."""
