"""What a user should know before the frozen clips of a model are believed: whether time is where they are repeated, and
whether equal times compete."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx

from captum_dtd import fused
from captum_dtd.nodes import args_of, operation_name, shape_of, source_line
from captum_dtd.operations import CHOICES, aten, maximum_over
from captum_dtd.patterns import holds_numbers
from captum_dtd.propagate import Network, elements
from captum_dtd.rules import WinnerTakesAll
from captum_dtd.times import Times, time_axis


def check_order(network: Network, sizes: tuple[int, ...]) -> str | None:
    """What a user should know about a model that moves the dimension which is repeated as time; None if it does not.

    What takes the frames of clips of one channel for its channels, as 2D networks may, is not looked at.

    Args:
        network: traced.
        sizes: of clips (N, C, T, H, W), the last four.

    Raises:
        ValueError: the first convolution takes another dimension than 1 for channels, as a model of clips (N, T, C, H, W)
            does: to repeat what lies at an index of dimension 2 would repeat a colour, or a row.
    """
    clips = network.inputs[0].meta["val"]
    for step in network.steps:
        seen = step.sources[0].meta["val"]
        if not step.is_pixel_layer or fused.kind_of(step.node) != "convolution" or elements(seen) != elements(clips):
            continue
        found = [_follow(network, step.sources[0], dim, size) for dim, size in enumerate(sizes, 1)]
        if clips.shape[1] == 1 or found == [1, 2, 3, 4] or 1 not in found:
            continue
        channels = found.index(1) + 1
        # of what the model takes, in the names of N, C, T, H, W; where frames are examples, time has none of its own
        order = _ORDERS.get(channels) if None in found else (0, *(dim for dim in found if dim is not None))
        if order is None:
            continue
        names, back = "".join(f", {'NCTHW'[dim]}" for dim in order[1:]), tuple(order.index(dim) for dim in range(5))
        where, shape = f"{step.path} ({operation_name(step.node)})", ", ".join(map(str, clips.shape[1:]))
        how = f"explain a module that calls model(x.permute{order}), on inputs.permute{back}"
        if channels != 1:
            raise ValueError(
                f"inputs must be clips (N, C, T, H, W), but of clips (N, {shape}) the model takes dimension {channels} for "
                f"channels, as of (N{names}): {where} does; {how}"
            )
        return (
            f"dimension 2 of the inputs is repeated as time, and the model moves it to dimension {order[2]} for {where}: if its "
            f"clips are (N{names}), {how}"
        )
    return None


def check_winners(network: Network, frames: int) -> str | None:
    """What a user should know where one of several times of a frozen clip, which are all alike, gets all relevance.

    Args:
        network: traced on clips of so many frames.
        frames: their number.
    """
    if frames == 1:
        return None
    times = _followed(network, network.nodes, 2, frames)
    # Frames that become examples, as in networks of pictures, are times again where a dimension is as long as the clip.
    are_examples = any(
        times.get(node.args[0]) is not None and times.get(node) is None
        for node in network.nodes
        if node.target is aten.reshape.default and node.meta["val"].shape[0] != node.args[0].meta["val"].shape[0]
    )
    for step in network.steps:
        chosen = _chosen(step.node)
        if not isinstance(step.rule, WinnerTakesAll) and chosen is None:
            continue
        (source,) = step.sources
        before, shape = times.get(source), source.meta["val"].shape
        over: Any = step.node.args[1]
        if step.node.target is maximum_over or chosen is not None:
            reduced = {chosen[0]} if chosen is not None else {dim % len(shape) for dim in over}
            again = are_examples and shape[0] == network.inputs[0].meta["val"].shape[0]
            competes = (
                again and any(shape[dim] == frames for dim in reduced) if before is None else before.dim in reduced
            )
        elif before is None:
            competes = False
        elif step.node.target in _POOLED:
            sizes = over if isinstance(over, (list, tuple)) else [over]
            axis = before.dim - len(shape) + _POOLED[step.node.target]
            competes = axis >= 0 and sizes[axis % len(sizes)] > 1
        else:
            competes = step.node.meta["val"].shape[before.dim] != shape[before.dim]
        if competes and chosen is not None:
            return (
                f"{operation_name(chosen[1])} ({source_line(chosen[1]) or 'no source line'}) chooses among several times by "
                "comparing them: in a frozen clip they are alike, so that which are chosen says nothing, and what the others "
                "look like counts as temporal. An average over times shares between all of them"
            )
        if competes:
            return (
                f"{step.path} ({operation_name(step.node)}) gives everything to the largest of several times: in a frozen clip "
                "they are alike, so that the first one wins, and what the others look like counts as temporal. Proportional() "
                "pooling shares between them, and so does an average in place of a maximum over logits"
            )
    return None


def _chosen(node: fx.Node) -> tuple[int, fx.Node] | None:
    """Along which dimension some values are read that were found by comparing, and what found them; None where that is not so."""
    indices: list[tuple[Any, Any]] = []
    if node.target is aten.gather.default:
        _, dim, index = args_of(node)
        indices = [(dim, index)]
    elif node.target is aten.take_along_dim.default:
        _, index, dim = args_of(node)
        indices = [(dim, index)]
    elif node.target is aten.index.Tensor:
        indices = list(enumerate(args_of(node)[1]))
    for dim, index in indices:
        origin = _compared(index)
        if origin is not None and isinstance(dim, int):
            dim %= len(shape_of(node.args[0]))
            keeps = shape_of(node)[dim : dim + 1] == shape_of(node.args[0])[dim : dim + 1]
            if not keeps or any(_takes_some(user, dim) for user in node.users):
                return dim, origin
    return None


def _compared(index: Any) -> fx.Node | None:
    """What made an index by comparing values, if anything did."""
    left, seen = [index], set()
    while left:
        node = left.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        if node.target in CHOICES | _PLACES:
            return node
        seen.add(node)
        left += [] if holds_numbers(node) else node.all_input_nodes
    return None


def _takes_some(node: fx.Node, dim: int) -> bool:
    """Whether it reads a part of its input along a dimension."""
    return node.target in {aten.slice.Tensor, aten.select.int, aten.narrow.default} and args_of(node)[1] == dim


_PLACES = frozenset({aten.argmax.default, aten.argmin.default, aten.argsort.default, aten.argsort.stable})
"""Operations that say where the largest or smallest values are."""

_POOLED = {aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3}
"""Over how many of the last dimensions a max pooling's windows reach."""

_ORDERS = {2: (0, 2, 1, 3, 4), 4: (0, 2, 3, 4, 1)}
"""By the dimension of channels: (N, T, C, H, W) and (N, T, H, W, C)."""


def _follow(network: Network, to: fx.Node, dim: int, size: int) -> int | None:
    """Which dimension of a value a dimension of the inputs is, None if that cannot be told."""
    found = _followed(network, network.pixels, dim, size).get(to)
    return None if found is None else found.dim


def _followed(network: Network, nodes: Collection[fx.Node], dim: int, size: int) -> dict[fx.Node, Times | None]:
    """Where a dimension of the inputs is in some values, also where it is a part of another; None if that cannot be told."""
    times: dict[fx.Node, Times | None] = dict.fromkeys(network.inputs, Times(dim, (0,) * size))
    for node in network.nodes:
        if node in nodes and node not in times:
            times[node] = time_axis(node, times.get)
    return times
