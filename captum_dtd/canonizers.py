"""Rewrites of a traced graph that leave its outputs as they are and make its relevance well defined.

Each canonizer takes a ``torch.fx.Graph`` and changes it in place. Weights stay symbolic: a folded weight is a node computed
from the layer's and the batch norm's parameters, so it always follows the user's current values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from captum_dtd.nodes import args_of, become, chosen_along, depending, insert, operation_name, replace, shape_of, traced
from captum_dtd.operations import (
    ADAPTIVE_AVERAGES,
    ADAPTIVE_MAXIMA,
    AVERAGE_POOLS,
    CASTS,
    CHOICES,
    CONVOLUTIONS,
    GATES,
    MAX_POOLS,
    REDUCTIONS,
    SHAPE_ONLY,
    SOFTMAX,
    aten,
    attention,
    batch_norm,
    group_norm,
    maximum_over,
    signs_of,
)
from captum_dtd.patterns import PARTS, SUMMARIES, comes_from, mark_varying, varies


def canonize(graph: fx.Graph, inputs: Collection[fx.Node], explained: Collection[fx.Node]) -> tuple[str, ...]:
    """Apply every canonizer, in order, and return a note for every softmax or sigmoid at the end that was stepped over.

    Args:
        graph: changed in place.
        inputs: its placeholders that are no tensors of the model's own.
        explained: those of them that are explained.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and operation_name(node).startswith(("assert", "sym_constrain")):
            graph.erase_node(node)
        elif node.target in (aten.detach.default, aten.alias.default, aten.clone.default):
            # What cuts gradients does not cut relevance, and nothing is written to any more.
            replace(graph, node, node.args[0])
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            # A view was legal for the strides of the traced example; reshape is for any, and is a view where it can be.
            node.target = aten.reshape.default
        elif node.target is aten.squeeze.dim:
            become(node, aten.squeeze.dims, node.args[0], [node.args[1]])
        elif node.target is aten.copy.default:
            # Writing into a tensor in place: what was there before is gone, only its shape matters.
            old, new = node.args[0], node.args[1]
            if new.meta["val"].dtype != old.meta["val"].dtype:
                cast = insert(graph, node, aten.to.dtype, (new, old.meta["val"].dtype), like=new)
                new = traced(cast)
            become(node, aten.expand_as.default, new, old)
        elif node.target in _OTHER_NAMES:
            node.target = _OTHER_NAMES[node.target]
        elif node.target is aten.hstack.default:
            become(node, aten.cat.default, node.args[0], min(1, len(shape_of(node)) - 1))
        elif node.target is aten.type_as.default:
            become(node, aten.to.dtype, node.args[0], node.meta["val"].dtype)
        elif node.target is aten.rrelu.default:
            x, lower, upper, *_ = args_of(node)  # in training it is refused before, since it draws numbers
            become(node, aten.leaky_relu.default, x, (lower + upper) / 2)
        elif node.target is aten.addmm.default and node.kwargs:
            become(node, node.target, *_scaled(graph, node))
        elif node.target is aten.zero.default:
            become(node, aten.fill.Scalar, node.args[0], 0)
        elif node.target is aten.rsub.Tensor:
            become(node, aten.sub.Tensor, node.args[1], node.args[0], **node.kwargs)
        elif node.target is aten.diff.default:
            replace(graph, node, _differences(graph, node))
        elif node.target is aten.group_norm.default:
            become(node, group_norm, *node.args[:5])
        elif node.target is aten.instance_norm.default:
            x, weight, bias, mean, var, of_input, _, eps, _ = args_of(node)
            if of_input:
                become(node, group_norm, x, shape_of(x)[1], weight, bias, eps)
            else:
                become(node, batch_norm, x, weight, bias, mean, var, eps)
        elif node.target is aten.scaled_dot_product_attention.default:
            replace(graph, node, _weighted_values(graph, node))
        elif node.target in _OF_A_SAMPLE:
            x, dim, unbiased, keep = args_of(node)
            become(node, _OF_A_SAMPLE[node.target], x, dim, correction=int(unbiased), keepdim=keep)
        elif node.target is aten.glu.default:
            signal, gate = _halves(graph, node)
            gate = insert(graph, node, aten.sigmoid.default, (gate,), like=gate)
            become(node, aten.mul.Tensor, signal, gate)
        elif (softmax := _softmax_by_hand(node)) is not None:
            become(node, aten.softmax.int, *softmax)
        elif _is_shifted_relu6(node):
            gate = insert(graph, node, aten.hardsigmoid.default, (node.args[0].args[0],), like=node)
            become(node, aten.mul.Tensor, gate, 6.0)
    gather_choices(graph)
    write_out_blends(graph, explained)
    stack_maxima(graph, explained)
    drop_expands(graph)
    single_outputs(graph)
    stepped_over = step_over_softmax(graph)
    join_reshapes(graph)
    fold_batch_norm(graph)
    fold_channelwise(graph, inputs)
    fold_signs(graph, inputs)
    drop_identity_windows(graph)
    average_before_linear(graph)
    graph.eliminate_dead_code()
    graph.lint()
    return stepped_over


_OTHER_NAMES: dict[Any, Any] = {
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.clip.default: aten.clamp.default,
    aten.max.other: aten.maximum.default,
    aten.min.other: aten.minimum.default,
}


_OF_A_SAMPLE: dict[Any, Any] = {aten.var.dim: aten.var.correction, aten.std.dim: aten.std.correction}


def _scaled(graph: fx.Graph, node: fx.Node) -> tuple[Any, ...]:
    """The arguments of an ``addmm`` with its factors, alpha and beta, multiplied into the weights and the bias."""
    bias, x, weight = args_of(node)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if alpha != 1:
        weight = insert(graph, node, aten.mul.Tensor, (weight, alpha), like=weight)
    if beta == 0:  # then it is not read
        bias = insert(graph, node, aten.zeros_like.default, (bias,), like=bias)
    elif beta != 1:
        bias = insert(graph, node, aten.mul.Tensor, (bias, beta), like=bias)
    return bias, x, weight


def _differences(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``torch.diff`` as the differences of slices that it is."""

    def new(target: Any, *args: Any) -> fx.Node:
        return traced(insert(graph, node, target, args, like=node))

    x, count, dim, prepended, appended = args_of(node)
    parts = [part for part in (prepended, x, appended) if part is not None]
    values: fx.Node = x if len(parts) == 1 else new(aten.cat.default, parts, dim)
    for _ in range(count):
        later, earlier = (new(aten.slice.Tensor, values, dim, *ends) for ends in ((1, 2**63 - 1), (0, -1)))
        values = new(aten.sub.Tensor, later, earlier)
    return values


def _halves(graph: fx.Graph, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two halves of what a gated linear unit reads."""
    x, dim = args_of(node)
    size = shape_of(node)[dim]
    ends = ((0, size), (size, 2 * size))
    first, second = (traced(insert(graph, node, aten.slice.Tensor, (x, dim, *end), like=node)) for end in ends)
    return first, second


def _weighted_values(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Scaled dot-product attention as the product of its weights with the values."""
    query, key, value, mask, _, is_causal = args_of(node)
    if node.kwargs.get("enable_gqa"):  # several heads of queries share one of keys and values
        heads = shape_of(query)[-3] // shape_of(key)[-3]
        key, value = (
            traced(insert(graph, node, aten.repeat_interleave.self_int, (each, heads, -3), like=each))
            for each in (key, value)
        )
    weights = insert(graph, node, attention, (query, key, mask, is_causal, node.kwargs.get("scale")), like=node)
    return insert(graph, node, aten.matmul.default, (traced(weights), value), like=node)


def _is_shifted_relu6(node: fx.Node) -> bool:
    """Whether it is ``relu6(x + 3)``, which is ``6 hardsigmoid(x)``: so hardswish is written by hand."""
    clipped = node.target is aten.relu6.default or (
        node.target in (aten.hardtanh.default, aten.clamp.default) and tuple(node.args[1:]) == (0, 6)
    )
    if not clipped:
        return False
    shifted: Any = node.args[0]
    return shifted.target is aten.add.Tensor and shifted.args[1] == 3 and not shifted.kwargs


def _softmax_by_hand(node: fx.Node) -> tuple[Any, ...] | None:
    """What ``exp(x) / exp(x).sum(dim, keepdim=True)`` is the softmax of, and over which dimension; None where it is none."""
    if node.target is not aten.div.Tensor or not all(isinstance(each, fx.Node) for each in node.args):
        return None
    exponential: Any
    total: Any
    exponential, total = args_of(node)
    if exponential.target is not aten.exp.default or total.target is not aten.sum.dim_IntList or total.kwargs:
        return None
    summed, dims, keep = args_of(total)
    return (exponential.args[0], dims[0]) if _are_alike(summed, exponential) and keep and len(dims) == 1 else None


def _are_alike(one: Any, other: Any) -> bool:
    """Whether two values are computed alike from the same ones, as an expression is that was written twice."""
    if one is other or not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
        return one is other or (type(one) is type(other) and bool(one == other))
    if one.op != "call_function" or one.target is not other.target:
        return False
    leaves, others = (pytree.tree_leaves((node.args, dict(node.kwargs))) for node in (one, other))
    return len(leaves) == len(others) and all(map(_are_alike, leaves, others))


def single_outputs(graph: fx.Graph) -> None:
    """Replace operations that also return indices or statistics by their plain forms, where only the values are used."""
    plain: dict[Any, Callable[[fx.Node], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
        aten._native_batch_norm_legit_no_training.default: lambda n: (batch_norm, (*n.args[:5], n.args[6])),
        aten.max.dim: lambda n: (maximum_over, (n.args[0], [n.args[1]], *n.args[2:])),
        aten.max_pool2d_with_indices.default: lambda n: (aten.max_pool2d.default, n.args),
        aten.max_pool3d_with_indices.default: lambda n: (aten.max_pool3d.default, n.args),
        aten.adaptive_max_pool1d.default: lambda n: (F.adaptive_max_pool1d, n.args),
        aten.adaptive_max_pool2d.default: lambda n: (F.adaptive_max_pool2d, n.args),
        aten.adaptive_max_pool3d.default: lambda n: (F.adaptive_max_pool3d, n.args),
    }
    for node in list(graph.nodes):
        items = list(node.users)
        if node.target not in plain or any(u.target is not operator.getitem or u.args[1] != 0 for u in items):
            continue
        target, args = plain[node.target](node)
        for item in items:
            replace(graph, item, insert(graph, item, target, args, like=item))
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is aten.amax.default and node.args[1]:
            replace(graph, node, insert(graph, node, maximum_over, node.args, like=node))


def gather_choices(graph: fx.Graph) -> None:
    """Read what was chosen along a dimension (the largest values, the median) from where it was found."""
    for node in list(graph.nodes):
        values = next((user for user in node.users if node.target in CHOICES and user.args[1] == 0), None)
        if values is None:
            continue
        x, (_, places), rank = node.args[0], node.meta["val"], len(shape_of(values))
        dim = chosen_along(node)
        where = insert(graph, values, operator.getitem, (node, 1), like=values)
        where.meta["val"] = places
        is_squeezed = rank < len(shape_of(x))
        if is_squeezed:
            where = traced(insert(graph, values, aten.unsqueeze.default, (where, dim), like=where))
        found = traced(insert(graph, values, aten.gather.default, (x, dim, where), like=values))
        if is_squeezed:
            found = traced(insert(graph, values, aten.squeeze.dims, (found, [dim]), like=values))
        replace(graph, values, found)


def write_out_blends(graph: fx.Graph, inputs: Collection[fx.Node]) -> None:
    """``(a - b) * gate + b`` as ``a * gate + b * (1 - gate)``, in which nothing that is added was taken away before.

    So blend gated recurrent units, highway networks, running means, and whoever writes ``torch.lerp`` by hand. The gate
    is one, or a constant.
    """
    mark_varying(graph, inputs)
    for node in list(graph.nodes):
        found = _blend(node)
        if found is None or any(comes_from(part, GATES, SUMMARIES) for part in found[:2]):
            continue  # beside another gate a signal would not be told from it
        a, b, gate, product = found
        rest = (
            1 - gate if isinstance(gate, (int, float)) else insert(graph, node, aten.rsub.Scalar, (gate, 1), like=gate)
        )
        parts = (insert(graph, node, aten.mul.Tensor, pair, like=product) for pair in ((a, gate), (b, rest)))
        become(node, aten.add.Tensor, *map(traced, parts))
    graph.eliminate_dead_code()


def _blend(node: fx.Node) -> tuple[fx.Node, fx.Node, Any, fx.Node] | None:
    """What ``b + gate * (a - b)``, or ``b - gate * (b - a)``, is of: a, b, the gate and the product."""
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
        return None
    ways = (node.args, node.args[::-1]) if node.target is aten.add.Tensor else (node.args,)
    for b, product in ways:
        if not _is_read_once(product, aten.mul.Tensor):
            continue
        for difference, gate in (product.args, product.args[::-1]):  # type: ignore[union-attr]
            if not _is_read_once(difference, aten.sub.Tensor):
                continue
            first, second = args_of(difference)
            a, taken = (first, second) if node.target is aten.add.Tensor else (second, first)
            is_gate = not varies(gate) or comes_from(gate, GATES, PARTS)
            if taken is b and varies(b) and isinstance(a, fx.Node) and is_gate:
                return a, b, gate, product  # type: ignore[return-value]
    return None


def _is_read_once(node: Any, target: Any) -> bool:
    """Whether it is such an operation, as it is by default, and one other reads its value."""
    return isinstance(node, fx.Node) and node.target is target and not node.kwargs and len(node.users) == 1


def stack_maxima(graph: fx.Graph, inputs: Collection[fx.Node]) -> None:
    """The larger of two values of one shape is the maximum over a dimension along which they are stacked."""
    varying = depending(graph, inputs)
    for node in list(graph.nodes):
        if node.target is not aten.maximum.default or not varying.issuperset(node.all_input_nodes):
            continue
        one, other = args_of(node)
        if len(node.all_input_nodes) == 2 and shape_of(one) == shape_of(other):
            stacked = traced(insert(graph, node, aten.stack.default, ([one, other], -1), like=node))
            become(node, maximum_over, stacked, [-1])


def drop_expands(graph: fx.Graph) -> None:
    """Remove expands to the shape of another operand: operations broadcast, and frozen clips then keep their equal times."""
    for node in list(graph.nodes):
        if node.target is not aten.expand.default or len(shape_of(node)) != len(shape_of(node.args[0])):
            continue
        if all(_broadcasts(user, node) for user in node.users):
            replace(graph, node, node.args[0])


def _broadcasts(user: fx.Node, operand: fx.Node) -> bool:
    """Whether an operation's shape is that of another operand than this one."""
    if user.target not in {*_ARITHMETIC, aten.maximum.default, aten.minimum.default}:
        return False
    others = [each for each in user.args if isinstance(each, fx.Node) and each is not operand]
    return len(others) == 1 and shape_of(others[0]) == shape_of(user)


def folded_weight(weight: Tensor, gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """``v gamma / sqrt(var + eps)`` for every output channel (dimension 0 of the weight)."""
    scale = torch.rsqrt(var + eps) if gamma is None else gamma * torch.rsqrt(var + eps)
    return (weight * scale.view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)


def folded_bias(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    """``(b - mean) gamma / sqrt(var + eps) + beta``."""
    scale = torch.rsqrt(var + eps) if gamma is None else gamma * torch.rsqrt(var + eps)
    shifted = (-mean if bias is None else bias - mean) * scale
    return (shifted if beta is None else shifted + beta).to(weight.dtype)


def fold_batch_norm(graph: fx.Graph) -> None:
    """Fold a batch norm into the convolution or linear layer before it, if it is that layer's only user.

    A convolution followed by batch norm is one linear layer with other weights; only in that form do z+'s positive weights
    mean "excites". Anywhere else batch norm stays, as an elementwise affine step through which relevance passes.
    """
    for node in list(graph.nodes):
        if node.target is not batch_norm:
            continue
        source, gamma, beta, mean, var, eps = args_of(node)
        if not _is_weighted_for_one(source):
            continue
        # On (N, L, C) a batch norm acts on dimension 1 and a linear layer on the last: not the same channels.
        if source.target is aten.linear.default and len(shape_of(source)) != 2:
            continue
        x, weight, bias, *rest = args_of(source)
        new_weight = insert(graph, node, folded_weight, (weight, gamma, var, eps), like=weight)
        new_bias = insert(graph, node, folded_bias, (weight, bias, gamma, beta, mean, var, eps), like=mean)
        layer = insert(graph, node, source.target, (x, new_weight, new_bias, *rest), like=source)
        layer.kwargs = source.kwargs
        replace(graph, node, layer)
        graph.erase_node(source)


def fold_channelwise(graph: fx.Graph, inputs: Collection[fx.Node]) -> None:
    """Fold arithmetic with one constant number per channel into the layer before it, if it is that layer's only user.

    A batch norm that is frozen is often written out so, as ``x * scale + shift``. What is done to a layer's output is done to
    its weights and its bias.
    """
    varying = depending(graph, inputs)
    for node in list(graph.nodes):
        if node.target not in _ARITHMETIC or node.kwargs:
            continue
        source, numbers = args_of(node)
        if node.target in (aten.add.Tensor, aten.mul.Tensor) and numbers in varying:
            source, numbers = numbers, source
        if not _is_weighted_for_one(source) or not _is_channelwise(numbers, source) or numbers in varying:
            continue
        x, weight, bias, *rest = args_of(source)
        if node.target in (aten.mul.Tensor, aten.div.Tensor):
            by_row = _reshaped(graph, node, numbers, 0, weight)
            weight = insert(graph, node, node.target, (weight, by_row), like=weight)
        elif bias is None:
            bias = 0.0
        if bias is not None:
            row = traced(insert(graph, node, aten.reshape.default, (numbers, [-1]), like=numbers))
            bias = traced(insert(graph, node, _ARITHMETIC[node.target], (bias, row), like=numbers))
        layer = insert(graph, node, source.target, (x, weight, bias, *rest), like=source)
        layer.kwargs = source.kwargs
        varying.add(layer)
        replace(graph, node, layer)
        graph.erase_node(source)


_ARITHMETIC: dict[Any, Any] = {
    aten.add.Tensor: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.mul.Tensor: operator.mul,
    aten.div.Tensor: operator.truediv,
}


def _is_weighted_for_one(source: Any) -> bool:
    """Whether a value is a convolution's or linear layer's and has one user."""
    foldable = isinstance(source, fx.Node) and source.target in CONVOLUTIONS | {aten.linear.default}
    return foldable and len(source.users) == 1


def fold_signs(graph: fx.Graph, inputs: Collection[fx.Node]) -> None:
    """Fold the signs of a norm's weights, one for each channel, into the layer before it, if nothing else reads that layer.

    Group, instance, layer and RMS norm divide by what they find in their input, so that they cannot be folded whole as batch
    norm is. Given that, they scale every channel; z+ and z-beta without bias, which divide by sums of the same weights, see
    nothing of a scale but its sign: a channel that is turned round excites where its weights are negative. What stands between
    the two may move channels, as a permute does, and change their type.
    """
    varying = depending(graph, inputs)
    for node in list(graph.nodes):
        weight, dim = _channel_scale(node)
        if weight is None or weight in varying:
            continue
        between, source = [], node.args[0]
        while source.target in SHAPE_ONLY | CASTS and len(source.users) == 1:
            before = [place for place, after in _moved_dims(source) if after == dim]
            if len(before) != 1 or shape_of(source)[dim] != shape_of(source.args[0])[before[0]]:
                break
            between.append(source)
            (dim,), source = before, source.args[0]
        if not _is_weighted_for_one(source) or dim != _channel_dim(source):
            continue
        x, own, *rest = args_of(source)
        signs = traced(insert(graph, node, signs_of, (weight, own.meta["val"].dtype), like=weight))
        turned = insert(graph, node, aten.mul.Tensor, (own, _reshaped(graph, node, signs, 0, own)), like=own)
        if rest and rest[0] is not None:
            rest[0] = insert(graph, node, aten.mul.Tensor, (rest[0], signs), like=rest[0])
        layer = insert(graph, node, source.target, (x, turned, *rest), like=source)
        layer.kwargs = source.kwargs
        back = insert(graph, node, aten.mul.Tensor, (layer, _reshaped(graph, node, signs, dim, source)), like=source)
        varying.update((layer, back))
        for old in reversed(between):
            back = insert(graph, node, old.target, (back, *old.args[1:]), like=old)
            back.kwargs = old.kwargs
            varying.add(back)
        node.args = (back, *node.args[1:])
        for old in (*between, source):
            graph.erase_node(old)


def _channel_scale(node: fx.Node) -> tuple[Any, int]:
    """The weights of a norm that divides by what it finds in its input, and along which dimension there is one for each index."""
    if node.target is group_norm:
        return node.args[2], 1
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        _, (_, *others), weight, *_ = args_of(node)
        return (weight if _all_are(others, 1) else None), len(shape_of(node)) - 1 - len(others)
    return None, 0


def _reshaped(graph: fx.Graph, before: fx.Node, numbers: fx.Node, dim: int, like: fx.Node) -> fx.Node:
    """A row of numbers along a dimension of another value."""
    sizes = [1] * len(shape_of(like))
    sizes[dim] = -1
    return traced(insert(graph, before, aten.reshape.default, (numbers, sizes), like=numbers))


def _channel_dim(layer: fx.Node) -> int:
    """Which dimension of a convolution's or linear layer's output its channels are."""
    return len(shape_of(layer)) - 1 if layer.target is aten.linear.default else 1


def _is_channelwise(numbers: Any, layer: fx.Node) -> bool:
    """Whether a tensor has one number for each channel of a layer's output, and its type."""
    if not isinstance(numbers, fx.Node) or numbers.meta["val"].dtype != layer.meta["val"].dtype:
        return False
    channels, channel = list(shape_of(layer)), _channel_dim(layer)
    expected = [1] * len(channels)
    expected[channel] = channels[channel]
    return [1] * (len(channels) - len(shape_of(numbers))) + list(shape_of(numbers)) == expected


def step_over_softmax(graph: fx.Graph) -> tuple[str, ...]:
    """Remove softmax or sigmoid between the network and its output, so that the logits are explained.

    Several networks' probabilities may be added up or stacked: then all of them are removed, or none.
    """
    found = dict.fromkeys(_probabilities(only_output(graph), set()))
    for node in found:
        replace(graph, node, node.args[0])
    names = dict.fromkeys(operation_name(node) for node in found)
    return tuple(f"the model ends in {name}: its logits are explained, not its probabilities" for name in names)


def _probabilities(node: Any, averaged: set[int]) -> list[fx.Node]:
    """What makes probabilities of a value's logits; none where a part of it is not made of such, or is read elsewhere, too.

    Args:
        node: the value.
        averaged: over which of its dimensions an average is taken later: a softmax over those is not over classes.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function" or len(node.users) > 1:
        return []
    source: Any = node.args[0]
    if node.target is aten.sigmoid.default or node.target in SOFTMAX:
        over: Any = node.args[1] if node.target in SOFTMAX else None
        if over is not None and over % max(len(shape_of(node)), 1) in averaged:
            return []
        return [node, *_probabilities(source, averaged)]
    if node.target in REDUCTIONS:
        return _probabilities(source, _before_reduction(node, averaged))
    if node.target in SHAPE_ONLY:
        return _probabilities(source, {before for before, after in _moved_dims(node) if after in averaged})
    if node.target in AVERAGE_POOLS | ADAPTIVE_AVERAGES:
        changed = {dim for dim, size in enumerate(shape_of(source)) if size != shape_of(node)[dim]}
        return _probabilities(source, averaged | changed)
    if node.target in _ARITHMETIC and isinstance(node.args[1], (int, float)):
        is_turned = node.target in (aten.mul.Tensor, aten.div.Tensor) and node.args[1] <= 0
        return [] if is_turned else _probabilities(source, averaged)
    parts: list[Any] = []
    if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) > 0:  # type: ignore[operator]
        parts = [part for part in node.args if isinstance(part, fx.Node) and shape_of(part) == shape_of(node)]
        parts = parts if len(parts) == 2 else []
    elif node.target is aten.stack.default:
        (_, dim), parts = args_of(node), list(source)
        dim %= len(shape_of(node))
        averaged = {each - (each > dim) for each in averaged - {dim}}
    each_part = [_probabilities(part, averaged) for part in parts]
    return [found for each in each_part for found in each] if all(each_part) else []


def _before_reduction(node: Any, averaged: Collection[int]) -> set[int]:
    """Which dimensions of what is reduced are, or become, dimensions that are averaged."""
    count = len(shape_of(node.args[0]))
    own = {dim % count for dim in _integers(node.args[1])} if node.args[1] else set(range(count))
    left = list(range(count)) if len(shape_of(node)) == count else [dim for dim in range(count) if dim not in own]
    return own | {left[dim] for dim in averaged}


def _moved_dims(node: Any) -> list[tuple[int, int]]:
    """Pairs of a dimension before an operation that only moves values, and one after it that has some of its indices."""
    before, after = shape_of(node.args[0]), shape_of(node)
    if node.target is aten.permute.default:
        return [(dim % len(before), place) for place, dim in enumerate(_integers(node.args[1]))]
    if node.target is aten.transpose.int:
        order = list(range(len(before)))
        one, other = (dim % len(before) for dim in node.args[1:3])
        order[one], order[other] = other, one
        return [(dim, place) for place, dim in enumerate(order)]
    pairs: list[tuple[int, int]] = []
    i = j = 0
    while i < len(before) and j < len(after):  # dimensions that are as large together
        first, size, second, other = i, before[i], j, after[j]
        i, j = i + 1, j + 1
        while size != other:
            if size < other and i < len(before):
                size, i = size * before[i], i + 1
            elif j < len(after):
                other, j = other * after[j], j + 1
            else:
                break
        longer = [dim for dim in range(second, j) if after[dim] != 1]  # one index is no part of others
        pairs += [(one, two) for one in range(first, i) if before[one] != 1 for two in longer]
    return pairs


def join_reshapes(graph: fx.Graph) -> None:
    """Reshape once what is reshaped several times, so that what stands behind is seen to follow on what stands before."""
    moves = (aten.reshape.default, aten.flatten.using_ints)
    for node in list(graph.nodes):
        while node.target is aten.reshape.default and node.args[0].target in moves:
            source = node.args[0]
            node.args = (source.args[0], *node.args[1:])
            if not source.users:
                graph.erase_node(source)


def drop_identity_windows(graph: fx.Graph) -> None:
    """Remove pools and means whose windows hold one element each: they change nothing, yet z+ would drop negative values."""
    for node in list(graph.nodes):
        if node.target in REDUCTIONS:
            source, dims, keep = args_of(node)
            if not dims or any(shape_of(source)[dim] != 1 for dim in dims):
                continue
            new = source if keep else insert(graph, node, aten.squeeze.dims, (source, list(dims)), like=node)
            dtype = node.meta["val"].dtype
            if dtype != source.meta["val"].dtype:
                new = insert(graph, node, aten.to.dtype, (new, dtype), like=node)
            replace(graph, node, new)
        elif node.target in AVERAGE_POOLS | MAX_POOLS | ADAPTIVE_AVERAGES | ADAPTIVE_MAXIMA:
            source, window = node.args[:2]
            adaptive = node.target in ADAPTIVE_AVERAGES | ADAPTIVE_MAXIMA
            divided = node.target in AVERAGE_POOLS and node.args[6:] not in ((), (None,))
            if (adaptive or (_all_are(window, 1) and not divided)) and shape_of(node)[1:] == shape_of(source)[1:]:
                replace(graph, node, source)


def average_before_linear(graph: fx.Graph) -> None:
    """Move an average over class maps in front of the linear head that makes them: the two commute.

    S3D averages the logits of a 1x1x1 convolution, frame-wise 2D networks those of a linear layer. Averaged first, the head
    is the last layer and its inputs are activations; z+ on an average of signed logits would lose or flip relevance. Only
    averages between the head and the network's output are moved.
    """
    while any(_average_first(graph, average) for average in _averages_at_the_end(graph)):
        pass


def _averages_at_the_end(graph: fx.Graph) -> list[fx.Node]:
    """Averages behind which only rearrangements and other averages follow, the last first."""
    averages: list[fx.Node] = []
    node: Any = only_output(graph)
    while isinstance(node, fx.Node) and (node.target in SHAPE_ONLY or _is_average(node)):
        if _is_average(node):
            averages.append(node)
        node = node.args[0]
    return averages


def only_output(graph: fx.Graph) -> fx.Node | None:
    """The node that the graph returns, if it returns one."""
    outputs = graph.output_node().args[0]
    only = outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) == 1 else None
    return only if isinstance(only, fx.Node) else None


def _is_average(node: fx.Node) -> bool:
    if node.target is aten.mean.dim:
        return bool(node.args[1]) and not node.kwargs
    if node.target in AVERAGE_POOLS:
        _, _, _, padding, ceil_mode, _, *divisor = args_of(node)
        return _all_are(padding, 0) and not ceil_mode and divisor in ([], [None])
    return node.target in ADAPTIVE_AVERAGES


def _average_first(graph: fx.Graph, average: fx.Node) -> bool:
    """Move ``average`` one step toward the input, if what stands there is a linear head; say whether it moved."""
    head = average.args[0]
    if not isinstance(head, fx.Node) or len(head.users) > 1 or head.op != "call_function":
        return False
    pointwise = head.target in CONVOLUTIONS and _is_pointwise(head)
    if average.target is not aten.mean.dim:
        return pointwise and _swap(graph, average, head)
    rank = len(shape_of(head))
    dims = sorted(int(dim) % rank for dim in _integers(average.args[1]))
    if pointwise and not {0, 1} & set(dims):
        return _swap_mean(graph, average, head, dims)
    if head.target is aten.linear.default and rank - 1 not in dims:
        return _swap_mean(graph, average, head, dims)
    if head.target is aten.reshape.default and rank - 1 not in dims:
        return _swap_view(graph, average, head)
    if head.target is aten.squeeze.dims:
        return _swap_squeeze(graph, average, head, dims)
    return False


def _is_pointwise(conv: fx.Node) -> bool:
    weight = conv.args[1]
    assert isinstance(weight, fx.Node)
    _, _, _, stride, padding, *_ = args_of(conv)
    unpadded = padding in ("same", "valid") or _all_are(padding, 0)
    return unpadded and _all_are(shape_of(weight)[2:], 1) and _all_are(stride, 1)


def _all_are(sizes: Any, value: int) -> bool:
    """Whether an integer or every one of a list of them is ``value``."""
    return all(size == value for size in _integers(sizes))


def _integers(sizes: Any) -> list[Any]:
    """An operation's size argument as a list: one integer stands for a list of one."""
    return list(sizes) if isinstance(sizes, (list, tuple)) else [sizes]


def _swap(graph: fx.Graph, average: fx.Node, head: fx.Node) -> bool:
    """``pool(head(x))`` becomes ``head(pool(x))``."""
    x, *rest = head.args
    pooled = traced(insert(graph, average, average.target, (x, *average.args[1:]), like=average))
    moved = insert(graph, average, head.target, (pooled, *rest), like=head)
    moved.meta["val"] = average.meta["val"]
    replace(graph, average, moved)
    graph.erase_node(head)
    return True


def _swap_mean(graph: fx.Graph, average: fx.Node, head: fx.Node, dims: list[int]) -> bool:
    """``mean(head(x), dims)`` becomes ``squeeze(head(mean(x, dims, keepdim)), dims)``."""
    x, *rest = head.args
    kept = average.args[2]
    pooled = traced(insert(graph, average, aten.mean.dim, (x, dims, True), like=average))
    moved = traced(insert(graph, average, head.target, (pooled, *rest), like=head))
    new = moved if kept else insert(graph, average, aten.squeeze.dims, (moved, dims), like=average)
    replace(graph, average, new)
    graph.erase_node(head)
    return True


def _swap_view(graph: fx.Graph, average: fx.Node, view: fx.Node) -> bool:
    """``mean(view(linear(x)))`` becomes ``linear(mean(view(x)))``, where the view leaves the last dimension alone."""
    linear, shape = view.args
    if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default or len(linear.users) > 1:
        return False
    if shape_of(linear)[-1] != shape_of(view)[-1]:
        return False
    x, *rest = linear.args
    assert isinstance(x, fx.Node)
    assert isinstance(shape, (list, tuple))
    split = insert(graph, average, aten.reshape.default, (x, [*shape[:-1], shape_of(x)[-1]]), like=view)
    split.meta["val"] = view.meta["val"].new_empty((*shape_of(view)[:-1], shape_of(x)[-1]))
    mean = traced(insert(graph, average, aten.mean.dim, (split, *average.args[1:]), like=average))
    moved = insert(graph, average, linear.target, (mean, *rest), like=linear)
    moved.meta["val"] = average.meta["val"]
    replace(graph, average, moved)
    graph.erase_node(view)
    graph.erase_node(linear)
    return True


def _swap_squeeze(graph: fx.Graph, average: fx.Node, squeeze: fx.Node, dims: list[int]) -> bool:
    """``mean(squeeze(x), dims)`` becomes ``squeeze(mean(x, dims, keepdim))``, so that the mean can move on."""
    x: Any = squeeze.args[0]
    shape = shape_of(x)
    squeezed = {int(dim) % len(shape) for dim in _integers(squeeze.args[1])}
    squeezed = {dim for dim in squeezed if shape[dim] == 1}
    left = [dim for dim in range(len(shape)) if dim not in squeezed]
    averaged = [left[dim] for dim in dims]
    pooled = traced(insert(graph, average, aten.mean.dim, (x, averaged, True), like=average))
    gone = sorted(squeezed if average.args[2] else squeezed.union(averaged))
    replace(graph, average, insert(graph, average, aten.squeeze.dims, (pooled, gone), like=average))
    graph.erase_node(squeeze)
    return True
