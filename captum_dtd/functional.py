"""What torch.export records, made functional by hand where that is simple.

export's own pass (``run_decompositions``) makes any program functional, but takes longer than the recording itself. Most models
need little of it: ReLUs and additions that write over a new tensor, and batch norm in evaluation mode. What returns its input
itself, as dropout in evaluation mode does, is taken out by hand for every model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import fx

from captum_dtd.decompositions import RECURRENT
from captum_dtd.nodes import become, replace
from captum_dtd.operations import (
    ADAPTIVE_AVERAGES,
    AVERAGE_POOLS,
    CONVOLUTIONS,
    MAX_POOLS,
    REDUCTIONS,
    aten,
    batch_norm,
)

_NEW = (
    CONVOLUTIONS
    | MAX_POOLS
    | AVERAGE_POOLS
    | ADAPTIVE_AVERAGES
    | REDUCTIONS
    | {aten.group_norm.default, aten.instance_norm.default, aten.layer_norm.default, aten.rms_norm.default}
    | {aten.linear.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.leaky_relu.default}
    | {aten.elu.default, aten.silu.default, aten.gelu.default, aten.hardtanh.default, aten.softmax.int}
    | {aten.matmul.default, aten.bmm.default, aten.scaled_dot_product_attention.default}
    | {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.cat.default, aten.stack.default}
)
"""Operations that return a new tensor, and that export's pass leaves as they are."""

_READS_AND_MAKES_NEW = _NEW | {aten.batch_norm.default}

_VIEWS = frozenset(
    {aten.view.default, aten.permute.default, aten.transpose.int, aten.slice.Tensor, aten.select.int, aten.split.Tensor}
    | {aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.sym_size.int, operator.getitem}
)
"""Operations that return a part of their input, and that export's pass leaves as they are."""

_IN_PLACE: dict[Any, Any] = {
    aten.relu_.default: aten.relu.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.elu_.default: aten.elu.default,
    aten.silu_.default: aten.silu.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
}


def step_over_aliases(module: fx.GraphModule) -> None:
    """Take out of a recorded program what returns its input itself: dropout that does nothing, casts to a tensor's own type.

    Who writes over the one writes over the other. export's pass copies casts instead, as it did dropout until
    https://github.com/pytorch/pytorch/pull/185981, and what was written is lost: so they must be gone before that pass, also
    where a part of the program sets gradients or autocast.
    """
    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        idle = [node for node in part.graph.nodes if _returns_its_input(node)]
        for node in idle:
            replace(node.graph, node, node.all_input_nodes[0])
        if idle:
            part.recompile()  # whoever runs its code, not its graph, sees the same


def _returns_its_input(node: fx.Node) -> bool:
    if node.target is aten.dropout.default:  # without training, or with a probability of 0
        return not (node.args[2] and node.args[1])
    if node.target is aten.type_as.default:
        own, other = (node.args[i].meta["val"] for i in (0, 1))  # type: ignore[union-attr]
        return bool(own.dtype == other.dtype and own.device == other.device)
    return False


def drawn_numbers(module: fx.GraphModule) -> Iterator[fx.Node]:
    """What draws random numbers in a recorded program, dropout that does something among it."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield from filter(_draws, part.graph.nodes)


def _draws(node: fx.Node) -> bool:
    if node.target in _DROPOUTS:
        return bool(node.args[1] and node.args[2])
    if node.target in _ATTENTION:
        return bool(node.args[4:] and node.args[4])
    if node.target in _RANDOM_IN_TRAINING:
        return bool(node.args[3:] and node.args[3])
    if node.target in RECURRENT:  # a probability, and whether they are in training
        return bool(node.args[5] and node.args[6])
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


_DROPOUTS = frozenset(
    {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default}
    | {aten.dropout_.default, aten.feature_dropout_.default, aten.alpha_dropout_.default}
)
_ATTENTION = frozenset({aten.scaled_dot_product_attention.default})
"""Its fifth argument is a probability, and it drops out in evaluation mode, too."""
_RANDOM_IN_TRAINING = frozenset({aten.rrelu.default, aten.rrelu_.default})


def functionalize(graph: fx.Graph) -> bool:
    """Rewrite a recorded graph in place as export's pass would; False, and nothing changed, where that takes more than this.

    Args:
        graph: of a program that ``torch.export.export`` gave, after ``step_over_aliases``.
    """
    rewrites: list[Callable[[], None]] = []
    place = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op != "call_function" or (node.target in _NEW or node.target in _VIEWS):
            continue
        rewrite = _REWRITES[node.target](node, place) if node.target in _REWRITES else None
        if rewrite is None:
            return False
        rewrites.append(rewrite)
    for rewrite in rewrites:
        rewrite()
    return True


def _in_place(node: fx.Node, place: Mapping[fx.Node, int]) -> _Rewrite | None:
    """The tensor that is written over must be new, and nothing may read it, or hold a part of it, later than this node."""
    own, *others = node.args
    assert isinstance(own, fx.Node)
    is_new = own.target in _READS_AND_MAKES_NEW or own.target in _IN_PLACE
    is_read_no_more = all(
        user is node or (user.target in _READS_AND_MAKES_NEW and place[user] < place[node]) for user in own.users
    )
    dtypes = {other.meta["val"].dtype for other in (own, *others) if isinstance(other, fx.Node)}
    if not is_new or not is_read_no_more or len(dtypes) > 1:
        return None
    return lambda: become(node, _IN_PLACE[node.target], *node.args, **node.kwargs)


def _batch_norm(node: fx.Node, place: Mapping[fx.Node, int]) -> _Rewrite | None:
    if len(node.args) != 9 or node.args[5] or node.args[3] is None:
        return None  # it normalises by what is in the batch
    return lambda: become(node, batch_norm, *node.args[:5], node.args[7])


def _flatten(node: fx.Node, place: Mapping[fx.Node, int]) -> _Rewrite | None:
    """As a view; sizes that are not known must stand before what is flattened."""
    source, first, *_ = (*node.args, 0)
    assert isinstance(source, fx.Node) and isinstance(first, int)
    sizes = list(node.meta["val"].shape)
    if len(sizes) == source.meta["val"].ndim:  # there is nothing to flatten
        return lambda: replace(node.graph, node, node.all_input_nodes[0])
    unknown = [dim for dim, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
    if any(dim >= first % source.meta["val"].ndim for dim in unknown):
        return None

    def rewrite() -> None:
        for dim in unknown:
            with node.graph.inserting_before(node):
                size = node.graph.call_function(aten.sym_size.int, (node.args[0], dim))
            size.meta["val"], sizes[dim] = sizes[dim], size
        become(node, aten.view.default, node.args[0], sizes)

    return rewrite


_Rewrite: TypeAlias = Callable[[], None]

_REWRITES: dict[Any, Callable[[fx.Node, Mapping[fx.Node, int]], _Rewrite | None]] = {
    **dict.fromkeys(_IN_PLACE, _in_place),
    aten.batch_norm.default: _batch_norm,
    aten.flatten.using_ints: _flatten,
}
