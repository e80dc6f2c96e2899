"""Where a value of the graph comes from, as far as that decides what an operation is to relevance.

A product of two values that both depend on the input is explained only where one of them is plainly not the signal: a gate,
attention's weights, or what was found in the other one to divide it by.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from captum_dtd.operations import ADDITIONS, CASTS, CLAMPS, NEAREST, REDUCTIONS, SHAPE_ONLY, aten, maximum_over

RESHAPED = SHAPE_ONLY | CASTS | {aten.expand.default}
"""Operations that keep every value of their first argument."""

PARTS = (
    RESHAPED
    | {aten.expand_as.default, aten.repeat.default, aten.slice.Tensor, aten.select.int}
    | {aten.narrow.default, aten.index_select.default, aten.flip.default, aten.unbind.int, aten.chunk.default}
    | {aten.split.Tensor, aten.split_with_sizes.default, operator.getitem}
    | {aten.gather.default, aten.repeat_interleave.self_int, aten.masked_fill.Scalar}
    | NEAREST
)
"""Operations whose every value is one of their first argument's, or a constant."""

SUMMARIES = PARTS | REDUCTIONS | CLAMPS | {maximum_over, aten.pow.Tensor_Scalar}
"""Operations that leave a gate a gate: means, maxima, limits and powers of what lies between 0 and 1."""


def holds_numbers(node: fx.Node) -> bool:
    """Whether a node's value is a tensor of real or complex numbers, or several: not an index, a size or a mask."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in leaves)


def comes_from(node: Any, targets: Collection[Any], moved: Collection[Any]) -> bool:
    """Whether a value is the result of one of these operations: ``moved`` by others, joined, multiplied, scaled or shifted."""
    node = _unscaled(node, moved)
    if node.target in targets:
        return True
    parts: Any = ()
    if node.target in (aten.cat.default, aten.stack.default):
        parts = node.args[0]
    elif node.target is aten.mul.Tensor:
        parts = node.args
    return bool(parts) and all(comes_from(part, targets, moved) for part in parts)


def divided(node: fx.Node) -> tuple[Any, Any] | None:
    """The value that is divided, and what it is divided by, where that is found in the value itself; else None.

    That is what norms written by hand do: ``x / sqrt(mean(x^2))``, ``x * rsqrt(mean(x^2))``.
    """
    if not (len(node.args) == 2 and all(isinstance(each, fx.Node) for each in node.args)):
        return None
    one, other = node.args
    pairs: list[tuple[Any, Any]] = [(one, other)] if node.target is aten.div.Tensor else []
    if node.target is aten.mul.Tensor:
        pairs = [pair for pair in ((one, other), (other, one)) if _is_inverse(pair[1])]
    return next((pair for pair in pairs if _is_found_in(pair[1], pair[0])), None)


def is_centred_to_be_divided(node: fx.Node) -> bool:
    """Whether a mean is taken from the value that it is the mean of, and what is left is then divided by what is found in it."""
    if node.target is not aten.sub.Tensor:
        return False
    x, mean = node.args
    mean = _unscaled(mean, RESHAPED)
    if mean.target is not aten.mean.dim or mean.args[0] is not x:
        return False
    divisors = {user: pair[1] for user in node.users if (pair := divided(user)) is not None and pair[0] is node}
    found = {each for divisor in divisors.values() for each in _ancestors(divisor)}
    return bool(divisors) and found.union(divisors).issuperset(node.users)


def _unscaled(node: Any, moved: Collection[Any]) -> Any:
    """What a value is, apart from being ``moved`` by some operations, and scaled or shifted by numbers."""
    while node.target in moved or (node.target in _BY_A_NUMBER and isinstance(node.args[1], (int, float))):
        node = node.args[0]
    return node


_BY_A_NUMBER = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar})


def _is_inverse(node: Any) -> bool:
    """Whether a value is one over another, however it is scaled and moved."""
    node = _unscaled(node, RESHAPED)
    if node.target is aten.pow.Tensor_Scalar:
        return isinstance(node.args[1], (int, float)) and node.args[1] < 0
    return node.target in (aten.rsqrt.default, aten.reciprocal.default)


def _is_found_in(node: Any, signal: Any) -> bool:
    """Whether a value is computed from a signal, and from nothing that the signal depends on but by way of it.

    Of a signal that was shifted by a number, or by what is found in it (a mean, say), it may also be by way of what was shifted.
    """
    while node is not signal:
        origins = _ancestors(node, besides=signal)
        if any(signal in each.all_input_nodes for each in origins) and _ancestors(signal).isdisjoint(origins):
            return True
        if signal.target not in ADDITIONS or not isinstance(signal.args[0], fx.Node):
            return False
        whole, shift = signal.args
        if isinstance(shift, fx.Node) and not _is_found_in(shift, whole):
            return False
        signal = whole
    return False


def _ancestors(node: fx.Node, besides: fx.Node | None = None) -> set[fx.Node]:
    """What numbers a value is computed from, itself among them, without going beyond one of them."""
    found, left = {node}, [node]
    while left:
        for source in left.pop().all_input_nodes:
            if source is not besides and source not in found and holds_numbers(source):
                found.add(source)
                left.append(source)
    return found
