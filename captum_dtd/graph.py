"""From a user's model to a list of about ten kinds of ATen operations, without touching the model.

``torch.export`` sees what the model does, not how it is written: reused modules, functional calls, in-place ReLUs and
``out += residual`` all become plain nodes. Nothing of the model is changed: the export works on a copy of its structure that
shares its parameters, because export itself would swap them under other threads and fire the user's hooks.
"""

from __future__ import annotations

import inspect
import io
import itertools
import logging
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from captum_dtd.decompositions import DECOMPOSITIONS, RECURRENT
from captum_dtd.functional import drawn_numbers, functionalize, step_over_aliases
from captum_dtd.locks import Lock
from captum_dtd.modes import plain_modes, readable_switches
from captum_dtd.nodes import chosen_along, depending, operation_name, source_line, spell_out
from captum_dtd.operations import CHOICES, CONVOLUTIONS, SOFTMAX, aten
from captum_dtd.structure import structural_copy, tensor_of

# torch.export patches process-wide state while it runs, so two traces never overlap.
_EXPORT_LOCK = Lock()


def check_not_tracing() -> None:
    """Raise RuntimeError if this thread traces a model already: its forward, or a hook, asks for an explanation."""
    if _EXPORT_LOCK.held_here:
        raise RuntimeError(
            "a model cannot be explained while another is traced: a forward, or a hook of all modules, asks for an "
            "explanation; explain before or after it"
        )


# torch.export treats sizes 0 and 1 as special.
_FREE_BATCH = 2

# A limit of so many examples is none of the model's: cuDNN's batch normalization has one, of 65,535, which decides who computes
# it and nothing else.
_ANY = 2**15


class UnsupportedOperationError(ValueError):
    """The model does something that no layer covers; the message lists every such operation and where it stands."""


class InputMismatchError(ValueError):
    """The model itself does not run on such inputs."""


@dataclass(frozen=True)
class TracedModel:
    """A model as a graph of ATen operations.

    Attributes:
        graph: the operations in execution order; placeholders are parameters, buffers, constants and inputs.
        inputs: for every tensor or number given to ``forward``, in order, its placeholder (None: it does not enter).
        tensors: placeholder -> name of the parameter, buffer or tensor attribute of the model that it reads.
        constants: placeholder -> tensor that the model's code makes on the way.
        any_batch: whether the graph holds for every batch size, or only for the one it was traced with.
        batch: the number of examples it was traced with.
        mixing: the operation that makes values of all examples together, such as a mean over everything, and where it stands;
            empty where each example's scores are its own, as far as sizes tell.
    """

    graph: fx.Graph
    inputs: tuple[fx.Node | None, ...]
    tensors: dict[fx.Node, str]
    constants: dict[fx.Node, Tensor]
    any_batch: bool
    batch: int
    mixing: str


def trace(model: nn.Module, arguments: Sequence[Any], batch: int) -> TracedModel:
    """Trace ``model(*arguments)`` into a graph of ATen operations, functional and free of dead code.

    Args:
        model: any module; it is read, never changed.
        arguments: what ``forward`` is called with; tensors whose first dimension is ``batch`` may vary in it.
        batch: the number of examples.

    Returns:
        The traced model; its batch dimension is free unless the model's own code fixes it.

    Raises:
        InputMismatchError: if the model does not run on such inputs.
        ValueError: if torch.export cannot trace it, or it does not return one tensor.
    """
    try:
        return _trace(model, arguments, batch)
    except ValueError as error:
        tensors = (*model.named_parameters(), *model.named_buffers())
        if lazy := [name for name, tensor in tensors if is_lazy(tensor)]:
            raise ValueError(
                f"{type(model).__name__} has lazy parameters without a shape ({', '.join(lazy[:3])}): run it once on such "
                "inputs before it is explained"
            ) from error
        raise


def _trace(model: nn.Module, arguments: Sequence[Any], batch: int) -> TracedModel:
    with _EXPORT_LOCK, plain_modes(), readable_switches(), _failed_attempts_untold():
        double = structural_copy(model)
        try:
            with_free_batch = _export(double, [_example(a, batch) for a in arguments], _FREE_BATCH)
            if with_free_batch.any_batch or batch == _FREE_BATCH:
                return with_free_batch
        except InputMismatchError:
            # It may run on this number of examples only, or an argument may only look as if it had one row for each.
            if batch == _FREE_BATCH:
                raise
        return _export(double, list(arguments), None)


@contextmanager
def _failed_attempts_untold() -> Iterator[None]:
    """Where a trace fails torch logs tracebacks and graphs, though one more attempt is made or an error raised."""
    logs = [
        logging.getLogger(f"torch.{name}") for name in ("_subclasses.fake_tensor", "fx.experimental.symbolic_shapes")
    ]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _example(argument: Any, batch: int) -> Any:
    """The argument with two examples: tracing needs shapes, not values, and two stand for any number where one does not."""

    def resized(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch:
            return leaf.new_zeros((_FREE_BATCH, *leaf.shape[1:]))
        return leaf

    return pytree.tree_map(resized, argument)


def _export(model: nn.Module, arguments: list[Any], batch: int | None) -> TracedModel:
    """Trace with a free batch dimension wherever a tensor has ``batch`` rows, or with all sizes fixed (None)."""

    def has_free_batch(leaf: Any) -> bool:
        return batch is not None and isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == batch

    def dynamic(leaf: Any) -> Any:
        return {0: Dim.AUTO} if has_free_batch(leaf) else None

    shapes = tuple(pytree.tree_map(dynamic, argument) for argument in arguments)
    parameters = inspect.signature(model.forward).parameters.values()
    named = sum(
        parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) for parameter in parameters
    )
    if len(shapes) > named:
        # export binds arguments to the names of forward: those that fall to ``*args`` are one tuple.
        shapes = (*shapes[:named], shapes[named:])
    try:
        with warnings.catch_warnings(), _partial_graph_unprinted(), _DataIsDetached():
            warnings.simplefilter("ignore")  # of export's own doings, which no user can act on
            program = export(model, tuple(arguments), dynamic_shapes=shapes)
            step_over_aliases(program.graph_module)
            drawn = next(drawn_numbers(program.graph_module), None)
            if not functionalize(program.graph):
                program = program.run_decompositions(DECOMPOSITIONS)
            spell_out(program.graph)
    except Exception as error:
        failure: Exception | None = error
    else:
        failure = None
    if failure is not None:  # out here, since the model's own error is not one that came while export's was handled
        raise _interrupt(failure) or _untraceable(model, arguments, failure)

    _check_types(model, program.graph)
    if drawn is not None:
        reason = (
            "dropout is active although the model is in evaluation mode: pass training=self.training"
            if drawn.target in RECURRENT or any(word in operation_name(drawn) for word in ("dropout", "attention"))
            else f"{operation_name(drawn)} draws random numbers, and relevance would be random: draw them before forward"
        )
        raise UnsupportedOperationError(f"{type(model).__name__}: {reason} ({source_line(drawn) or 'no source line'})")
    if not program.call_spec.out_spec.is_leaf():
        raise _not_one_tensor(model)
    graph, signature = program.graph, program.graph_signature
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), Tensor) and free_unbacked_symbols(node.meta["val"]):
            raise UnsupportedOperationError(
                f"{type(model).__name__}: how many elements {operation_name(node)} gives depends on values "
                f"({source_line(node) or 'no source line'}); in place of a boolean mask index by numbers that are made "
                "before forward, mask.nonzero().flatten()"
            )
    # Inputs and buffers that forward changes in place come back as further outputs: nobody asked for them.
    own = [spec.kind == OutputKind.USER_OUTPUT for spec in signature.output_specs]
    returned: Any = graph.output_node().args[0]
    graph.output_node().args = (tuple(itertools.compress(returned, own)),)
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    tensors: dict[fx.Node, str] = {}
    constants: dict[fx.Node, Tensor] = {}
    for spec in signature.input_specs:
        if spec.kind == InputKind.USER_INPUT or not isinstance(spec.arg, TensorArgument) or spec.target is None:
            continue
        node = placeholders[spec.arg.name]
        if spec.kind == InputKind.CONSTANT_TENSOR and not _has_tensor(model, spec.target):
            constant = program.constants[spec.target]
            # A forward that was wrapped calls the model that it was taken from, whose tensors export knows by no name.
            name = _name_of(model, constant)
            if name is None:
                constants[node] = constant
            else:
                tensors[node] = name
        else:
            tensors[node] = spec.target
    inputs = tuple(
        placeholders.get(spec.arg.name) for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT
    )
    leaves = pytree.tree_leaves(tuple(arguments))
    free = batch is not None and all(
        _is_free(node.meta["val"].shape[0], program.range_constraints)
        for node, leaf in zip(inputs, leaves, strict=True)
        if node is not None and has_free_batch(leaf)
    )
    mixing = _mixing(graph, [node for node in inputs if node is not None]) if free else ""
    return TracedModel(graph, inputs, tensors, constants, free, len(leaves[0]), mixing)


def _mixing(graph: fx.Graph, inputs: Collection[fx.Node]) -> str:
    """The first operation that makes values of several examples together, as far as sizes and dimensions tell.

    Its output depends on inputs and has no dimension left that grows with the examples, or two of them; or it goes along one.
    """

    def growing(node: fx.Node) -> list[int]:
        shapes = [value.shape for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
        is_free = [
            [isinstance(size, torch.SymInt) and not size.node.expr.is_number for size in shape] for shape in shapes
        ]
        return [dim for sizes in is_free for dim, free in enumerate(sizes) if free]

    def holds_values(node: fx.Node) -> bool:
        name = operation_name(node)
        is_number = isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, type(None)))
        return node.op != "output" and not is_number and not name.startswith("new_") and not name.endswith("_like")

    def mixes(node: fx.Node) -> bool:
        if not growing(node) or (isinstance(node.meta["val"], Tensor) and len(growing(node)) > 1):
            return True
        source: Any = node.args[0]
        if node.target in CHOICES:
            return chosen_along(node) in growing(source)
        if node.target is aten.index_put.default:  # an index that grows with the examples names each
            first: Any = node.args[1][0]  # type: ignore[index]
            return 0 in growing(source) and first is not None and not growing(first)
        if node.target not in _ALONG:
            return False
        dims: Any = node.args[_ALONG[node.target]]
        rank = source.meta["val"].ndim
        along = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims or range(rank))}
        return not along.isdisjoint(growing(source))

    reached = depending(graph, {node for node in inputs if growing(node)}, holds_values)
    read: set[fx.Node] = set()  # what the output is made of, by values
    for node in reversed(graph.nodes):
        if node in reached and any(user.op == "output" or user in read for user in node.users):
            read.add(node)
    for node in graph.nodes:
        if (
            node in read
            and node.op == "call_function"
            and any(growing(source) for source in node.all_input_nodes)
            and mixes(node)
        ):
            return f"{operation_name(node)} ({source_line(node) or 'no source line'})"
    return ""


_ALONG = {
    **dict.fromkeys(SOFTMAX, 1),
    **dict.fromkeys((aten.flip.default, aten.index_select.default, aten.gather.default), 1),
    **dict.fromkeys((aten.index_copy.default, aten.scatter.src), 1),
    **dict.fromkeys((aten.roll.default, aten.take_along_dim.default), 2),
}
"""Operations that go along dimensions without ending them, and which argument names these."""


def _check_types(model: nn.Module, graph: fx.Graph) -> None:
    """Raise InputMismatchError where a layer is given another type than its weights have, which export lets pass."""
    for node in graph.nodes:
        if node.target in CONVOLUTIONS or node.target is aten.linear.default:
            given, own = (argument.meta["val"].dtype for argument in node.args[:2])
            if given != own:
                raise InputMismatchError(
                    f"{type(model).__name__} does not run on such inputs: {operation_name(node)} is given {given}, and its "
                    f"weights are {own}"
                )


class _HeldBack:
    """A stream that keeps what this thread writes until it is let go, and hands everything else on."""

    def __init__(self, stream: Any) -> None:
        self.stream, self._text = stream, io.StringIO()
        self._thread: int | None = threading.get_ident()

    def write(self, text: str) -> int:
        return int((self._text if threading.get_ident() == self._thread else self.stream).write(text))

    def let_go(self) -> str:
        """What was kept; from now on nothing is, for whoever has this object still."""
        self._thread = None
        return self._text.getvalue()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def _partial_graph_unprinted() -> Iterator[None]:
    """Where export fails it prints the graph so far to stderr; what else this thread writes there is passed on afterwards."""
    if sys.stderr is None:  # a program without a console has none
        yield
        return
    held, graph = _HeldBack(sys.stderr), ""
    sys.stderr = held
    try:
        yield
    except Exception as error:
        if hasattr(error, "partial_fx_graph"):
            graph = f"{error.partial_fx_graph}\n"
        raise
    finally:
        if sys.stderr is held:  # another thread may have put its own there
            sys.stderr = held.stream
        print(held.let_go().replace(graph, ""), end="", file=held.stream)


class _DataIsDetached(TorchFunctionMode):
    """``tensor.data``, which export refuses, reads as ``tensor.detach()``: the same values in the same memory."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0].detach() if function == _READ_DATA else function(*args, **(kwargs or {}))


_READ_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


def _is_free(size: int | torch.SymInt, constraints: Mapping[Any, Any]) -> bool:
    """Whether a traced size may be any number, and not the traced one or a limited range only."""
    if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
        return False
    limits = constraints.get(size.node.expr)
    return limits is None or bool(limits.lower <= _FREE_BATCH and limits.upper >= _ANY)


def _name_of(model: nn.Module, tensor: Tensor) -> str | None:
    """Which of a model's parameters or buffers a tensor is another view of, in all of its memory; None if of none."""
    memory = _memory_of(tensor)
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return None if memory is None else next((name for name, own in named if _memory_of(own) == memory), None)


def _memory_of(tensor: Tensor) -> object:
    """What tensors have in common that are the same numbers in the same memory; None where that cannot be told."""
    if (
        type(tensor) not in (Tensor, nn.Parameter)
        or tensor.layout != torch.strided
        or tensor.is_meta
        or not tensor.numel()
    ):
        return None
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _has_tensor(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(tensor_of(model, name), Tensor)
    except (AttributeError, AssertionError):
        return False


def _not_one_tensor(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} must return one tensor of scores, (N,) or (N, classes, ...), not a tuple, list, dict or "
        "another object; wrap it in a module that returns the one to explain"
    )


def _interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The user's wish to stop, which torch may have lost while it tidied up after itself."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _untraceable(model: nn.Module, arguments: list[Any], error: Exception) -> ValueError:
    """Why export fails; its cause is export's error, or the model's own, whose traceback is the shorter one."""
    refusal = _refusal(model, arguments, error)
    refusal.__cause__ = refusal.__cause__ or error
    return refusal


def _refusal(model: nn.Module, arguments: list[Any], error: Exception) -> ValueError:
    name = type(model).__name__
    if len(arguments) > 1 and not _binds(model, arguments) and _binds(model, [arguments]):
        return InputMismatchError(
            f"{name} takes one argument and {len(arguments)} were given; if that is a list of inputs, explain a module whose "
            "forward(self, slow, fast) calls model([slow, fast])"
        )
    try:
        output = model(*arguments)
    except Exception as own_error:
        reason = str(own_error).strip().splitlines()[0] if str(own_error).strip() else type(own_error).__name__
        mismatch = InputMismatchError(f"{name} does not run on such inputs: {reason}")
        mismatch.__cause__ = own_error
        return mismatch
    if not isinstance(output, Tensor):
        return _not_one_tensor(model)
    shapes = ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else repr(a) for a in arguments)
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    advice = (
        "control flow that depends on values cannot be explained; decide before forward"
        if "data-dependent" in reason
        else "see torch.export's documentation"
    )
    return ValueError(f"torch.export cannot trace {name} on inputs of shape {shapes}: {reason} ({advice})")


def _binds(model: nn.Module, arguments: list[Any]) -> bool:
    """Whether forward takes so many arguments."""
    try:
        inspect.signature(model.forward).bind(*arguments)
    except TypeError:
        return False
    return True
