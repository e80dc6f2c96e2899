"""Nodes of a traced graph: what they stand for, where they come from, and how they are rewritten.

An operation of ATen has all of its arguments spelled out: the positional ones with their defaults, by name only those that are no
defaults.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from captum_dtd.operations import aten


def spell_out(graph: fx.Graph) -> None:
    """Spell out the arguments of every operation."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = spelled_out(node.target, node.args, node.kwargs)


def spelled_out(target: Any, args: tuple[Any, ...], kwargs: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of an operation, all of the former and no defaults among the latter.

    Example:
        >>> spelled_out(torch.ops.aten.slice.Tensor, (None, 2), {"end": 3})
        ((None, 2, None, 3, 1), {})
    """
    named = dict(kwargs or {})
    if not isinstance(target, torch._ops.OpOverload):
        return args, named
    every = list(args)
    for argument in target._schema.arguments[len(args) :]:
        default = argument.default_value
        if not argument.kwarg_only:
            every.append(named.pop(argument.name, list(default) if isinstance(default, list) else default))
        elif argument.name in named and named[argument.name] == default:
            del named[argument.name]
    return tuple(every), named


def args_of(node: Any) -> tuple[Any, ...]:
    """A node's positional arguments, of whatever types."""
    return tuple(node.args)


def become(node: Any, target: Any, *args: Any, **kwargs: Any) -> None:
    """Make a node another operation."""
    node.target = target
    node.args, node.kwargs = spelled_out(target, args, kwargs)


def insert(graph: fx.Graph, before: fx.Node, target: Any, args: tuple[Any, ...], like: Any) -> fx.Node:
    """A new node before ``before`` that carries the names, source line and traced value of ``like``."""
    with graph.inserting_before(before):
        node = graph.call_function(target, *spelled_out(target, args))
    node.meta = dict(like.meta)
    return node


def traced(node: fx.Node) -> fx.Node:
    """Give a rewritten node the traced value that follows from its new arguments."""
    args = fx.map_arg(node.args, lambda argument: argument.meta["val"])
    target: Any = node.target
    with enable_python_dispatcher():  # without it some operations ask for sizes that are symbols
        node.meta["val"] = target(*args)
    return node


def replace(graph: fx.Graph, old: fx.Node, new: Any) -> None:
    """Let others read another node in place of this one, which goes."""
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def shape_of(node: Any) -> tuple[Any, ...]:
    """The traced shape of a node's value; the batch dimension may be symbolic."""
    return tuple(node.meta["val"].shape)


def chosen_along(node: fx.Node) -> int:
    """The dimension along which one of `captum_dtd.operations.CHOICES` chooses."""
    if node.target is aten.sort.stable:
        dim: Any = node.kwargs.get("dim", -1)
    else:
        dim = node.args[2 if node.target in (aten.topk.default, aten.kthvalue.default) else 1]
    return int(dim) % len(shape_of(node.args[0]))


def module_path(node: fx.Node) -> str:
    """The dotted path of the module in whose forward the operation stands; empty for the model's own forward."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return re.sub(r"@\d+|\._orig_mod|^_orig_mod\.?", "", path)


def source_line(node: fx.Node) -> str:
    """``file.py:12: code`` of the line that asked for the operation, in the user's code rather than in torch's."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n([^\n]*)', node.meta.get("stack_trace") or "")
    library = str(Path(torch.__file__).parent) + os.sep
    own = [frame for frame in frames if not frame[0].startswith(library)] or frames
    if not own:
        return ""
    file, line, code = own[-1]
    return f"{Path(file).name}:{line}: {code.strip()}"


def depending(
    graph: fx.Graph, inputs: Collection[fx.Node], carries: Callable[[fx.Node], bool] = lambda _: True
) -> set[fx.Node]:
    """Some inputs, and every value that is computed from one of them, by way of those that ``carries`` says yes to."""
    found = set(inputs)
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes) and carries(node):
            found.add(node)
    return found


def operation_name(node: fx.Node) -> str:
    """A short name of the operation, ``conv3d`` for ``aten.conv3d.default``."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removeprefix("aten::").lstrip("_")
    return str(getattr(node.target, "__name__", node.target))
