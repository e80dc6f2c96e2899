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

from captum_dtd.nodes import depending, shape_of
from captum_dtd.operations import (
    ADDITIONS,
    CASTS,
    CLAMPS,
    CONVOLUTIONS,
    NEAREST,
    REDUCTIONS,
    SHAPE_ONLY,
    SHAPE_READERS,
    aten,
    maximum_over,
)

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
"""Operations that leave a gate a gate: sums, means, maxima, limits and powers of what is bounded."""

PROJECTIONS = CONVOLUTIONS | {aten.linear.default, aten.matmul.default}
"""Layers that make a signal of another one."""


def holds_numbers(node: fx.Node) -> bool:
    """Whether a node's value is a tensor of real or complex numbers, or several: not an index, a size or a mask."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in leaves)


def mark_varying(graph: fx.Graph, inputs: Collection[fx.Node]) -> None:
    """Note on every value whether it is computed from inputs that are explained; all else is as good as constant."""
    varying = depending(graph, inputs, lambda node: node.target not in SHAPE_READERS and holds_numbers(node))
    for node in graph.nodes:
        node.meta[_VARIES] = node in varying


_VARIES = "captum_dtd varies"


def varies(value: Any) -> bool:
    """Whether a value is computed from what is explained; `mark_varying` has looked."""
    return isinstance(value, fx.Node) and bool(value.meta.get(_VARIES))


def comes_from(node: Any, targets: Collection[Any], moved: Collection[Any]) -> bool:
    """Whether a value is the result of one of these operations: ``moved`` by others, joined, multiplied, scaled, shifted, or
    divided by what is found in it."""
    node = _stepped(node, moved, _SCALED | _SHIFTED)
    if node.target in targets:
        return True
    parts: Any = ()
    if node.target in (aten.cat.default, aten.stack.default):
        parts = node.args[0]
    elif (pair := divided(node)) is not None:
        parts = pair[:1]
    elif node.target is aten.mul.Tensor:
        parts = node.args
    return bool(parts) and all(comes_from(part, targets, moved) for part in parts)


def gated_linear_unit(node: fx.Node) -> int | None:
    """Which factor of a product is the gate of a gated linear unit (Shazeer 2020, *GLU variants improve transformer*).

    It is SiLU or GELU of a projection, and the other factor is a projection as it is, for each number of the gate one, that was
    not made of the gate. Elsewhere the activated value may be the signal, as in large-kernel attention or squeeze-excitation.
    """
    for gate, signal in ((0, 1), (1, 0)):
        activated = _activated(node.args[gate])
        other: Any = node.args[signal]
        if (
            activated is not None
            and shape_of(node.args[gate]) == shape_of(other) == shape_of(node)
            and all(map(_is_projected, (activated[1], other)))
            and activated[0] not in _ancestors(other)
        ):
            return gate
    return None


def _activated(node: Any) -> tuple[fx.Node, Any] | None:
    """The SiLU or GELU of which a value is a part, and what it was applied to: by name, or times a sigmoid or erf of itself."""
    node = _stepped(node, PARTS, _SCALED)
    if node.target is not aten.mul.Tensor:
        return (node, node.args[0]) if node.target in (aten.silu.default, aten.gelu.default) else None
    for x, gate in (node.args, node.args[::-1]):
        if varies(x) and varies(gate):
            gate = _stepped(gate, (), _SCALED | _SHIFTED)
            is_gate = gate.target in (aten.sigmoid.default, aten.hardsigmoid.default, aten.erf.default)
            if is_gate and _stepped(gate.args[0], (), _SCALED) is _stepped(x, (), _SCALED):
                return node, x
    return None


def _is_projected(node: Any) -> bool:
    """Whether a value is what a linear layer or convolution makes, perhaps in part, scaled, shifted, or joined with others."""
    node = _stepped(node, PARTS, _SCALED | _SHIFTED)
    if node.target in (aten.cat.default, aten.stack.default):
        return all(map(_is_projected, node.args[0]))
    return node.target in PROJECTIONS


def are_weights(node: Any, dim: int) -> bool:
    """Whether a value is attention's weights over a dimension: a softmax over it, whose other dimensions, those of heads, a layer
    may have mixed since (Shazeer et al. 2020, *Talking-heads attention*)."""
    dim %= len(shape_of(node))
    while node.target not in (aten.softmax.int, aten._softmax.default):
        rank = len(shape_of(node))
        if node.target is aten.permute.default:
            dim = int(node.args[1][dim]) % rank
        elif node.target is aten.transpose.int:
            one, other = (int(each) % rank for each in node.args[1:3])
            dim = {one: other, other: one}.get(dim, dim)
        elif node.target is aten.linear.default:
            if dim == rank - 1:
                return False
        elif node.target in CONVOLUTIONS:
            if shape_of(node.args[1])[dim] != 1:
                return False
        elif node.target not in CASTS:
            return False
        node = node.args[0]
    return int(node.args[1]) % len(shape_of(node)) == dim


def averages_by(gates: Collection[Any], dividend: Any, divisor: Any) -> bool:
    """Whether sums of a signal times gates are divided by what is computed from these gates alone, as weighted averages are."""
    product = _stepped(dividend, RESHAPED | REDUCTIONS)
    for factor in product.args if product.target is aten.mul.Tensor else ():
        if varies(factor) and comes_from(factor, gates, RESHAPED):
            weights = _stepped(factor, RESHAPED)
            origins = _ancestors(divisor, besides=weights)
            is_read = any(weights in each.all_input_nodes for each in origins)
            if is_read and not any(each.op == "placeholder" for each in origins):
                return True
    return False


def divided(node: fx.Node) -> tuple[Any, Any] | None:
    """Where a value is divided by what is found in itself, the value, and the divisor or one over it; else None.

    That is what norms written by hand do: ``x / sqrt(mean(x^2))``, ``x * rsqrt(mean(x^2))``.
    """
    if len(node.args) != 2 or not all(map(varies, node.args)):
        return None
    one, other = node.args
    pairs: list[tuple[Any, Any]] = [(one, other)] if node.target is aten.div.Tensor else []
    if node.target is aten.mul.Tensor:
        pairs = [pair for pair in ((one, other), (other, one)) if _is_inverse(pair[1])]
    return next((pair for pair in pairs if _is_found_in(pair[1], pair[0])), None)


def is_centred_to_be_divided(node: fx.Node) -> bool:
    """Whether a mean is taken from the value that it is the mean of, and what is left is divided by what is found in it.

    What is left may be scaled before, and is read for nothing else.
    """
    if node.target is not aten.sub.Tensor or node.kwargs or not all(map(varies, node.args)):
        return False
    x, mean = (_stepped(each, RESHAPED) for each in node.args)
    if mean.target is not aten.mean.dim or _stepped(mean.args[0], RESHAPED) is not x:
        return False
    divisors, ends = _divisors(node)
    statistics = {each for divisor in divisors for each in _ancestors(divisor)}
    left, seen = [node], {node}
    while left:
        for user in left.pop().users:
            if user in ends or user in seen:
                continue
            is_scaled = user.target in RESHAPED or _constant_operand(user, _SCALED) is not None
            if user not in statistics and not (is_scaled and _divisors(user)[0]):
                return False
            seen.add(user)
            left.append(user)
    return bool(divisors)


def _divisors(node: fx.Node) -> tuple[list[fx.Node], set[fx.Node]]:
    """What a value is divided by, perhaps after it was scaled by constants, and the operations that divide it."""
    divisors: list[fx.Node] = []
    ends: set[fx.Node] = set()
    for user in node.users:
        pair = divided(user)
        if pair is not None and pair[0] is node:
            divisors.append(pair[1])
            ends.add(user)
        elif user.target in RESHAPED or _constant_operand(user, _SCALED) is not None:
            further = _divisors(user)
            divisors += further[0]
            ends |= further[1]
    return divisors, ends


_SCALED = frozenset({aten.mul.Tensor, aten.div.Tensor})
_SHIFTED = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar})


def _constant_operand(node: Any, arithmetic: Collection[Any]) -> Any:
    """The operand that is scaled or shifted by a constant; None where none is. One over it is not a scaled value."""
    if node.target not in arithmetic:
        return None
    one, other = node.args[:2]
    if not varies(other):
        return one
    return other if not varies(one) and node.target is not aten.div.Tensor else None


def _stepped(node: Any, moved: Collection[Any], arithmetic: Collection[Any] = ()) -> Any:
    """What a value is, apart from being ``moved`` by some operations, and scaled or shifted by constants."""
    while True:
        if node.target in moved:
            node = node.args[0]
        elif (operand := _constant_operand(node, arithmetic)) is not None and isinstance(operand, fx.Node):
            node = operand
        else:
            return node


def _is_inverse(node: Any) -> bool:
    """Whether a value is a constant over another, however it is moved."""
    node = _stepped(node, RESHAPED, _SCALED)
    if node.target is aten.pow.Tensor_Scalar:
        return isinstance(node.args[1], (int, float)) and node.args[1] < 0
    if node.target is aten.div.Tensor:
        return not varies(node.args[0])
    return node.target in (aten.rsqrt.default, aten.reciprocal.default)


def _is_found_in(node: Any, signal: Any) -> bool:
    """Whether a value is computed from a signal, and from nothing that is explained but by way of it.

    Of a signal that was moved, scaled or shifted by constants, or shifted by what is found in it (a mean, say), it may also be
    by way of what it was before.
    """
    while node is not signal:
        origins = _ancestors(node, besides=signal)
        is_read = any(signal in each.all_input_nodes for each in origins)
        if is_read and not any(each.op == "placeholder" for each in origins):
            return True
        before = signal.args[0] if signal.target in RESHAPED else _constant_operand(signal, _SCALED | _SHIFTED)
        if before is None and signal.target in ADDITIONS and _is_found_in(signal.args[1], signal.args[0]):
            before = signal.args[0]
        if not varies(before):
            return False
        signal = before
    return False


def _ancestors(node: fx.Node, besides: fx.Node | None = None) -> set[fx.Node]:
    """Of what is explained, all that a value is computed from, itself among it, but not by way of ``besides``."""
    found, left = {node}, [node]
    while left:
        for source in left.pop().all_input_nodes:
            if source is not besides and source not in found and varies(source):
                found.add(source)
                left.append(source)
    return found
