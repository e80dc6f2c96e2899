"""The walk: forward through the graph once, then relevance back, layer by layer, freeing what was used."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from captum_dtd import fused, native, room
from captum_dtd.canonizers import canonize, only_output
from captum_dtd.composites import Composite, Selector
from captum_dtd.graph import TracedModel, UnsupportedOperationError
from captum_dtd.kernels import Precision
from captum_dtd.layers import (
    Call,
    Elementwise,
    Interpolation,
    Layer,
    Limits,
    LinearMap,
    MaxPool,
    Rearrangement,
    Weighted,
    in_type,
    is_non_negative,
    layer_for,
    signal_positions,
)
from captum_dtd.modes import exact_modes
from captum_dtd.nodes import module_path, operation_name, source_line
from captum_dtd.operations import CONVOLUTIONS, NORMS, SHAPE_READERS, aten
from captum_dtd.patterns import holds_numbers, mark_varying
from captum_dtd.rules import Group, MaxPoolRule, Rule
from captum_dtd.structure import ordinary, tensor_of


@dataclass(frozen=True)
class Step:
    """One operation that carries relevance: the layer it is, the rule it follows, and where it stands in the model."""

    node: fx.Node
    layer: Layer
    rule: Rule | MaxPoolRule | None
    positions: tuple[int, ...]
    sources: tuple[fx.Node, ...]
    is_pixel_layer: bool
    path: str

    @property
    def rule_text(self) -> str:
        """The rule as shown in tables; layers without a choice say what they do."""
        return self.layer.text if self.rule is None else str(self.rule)


Observer: TypeAlias = Callable[[Step, Any, Sequence[Tensor]], None]
"""Is told, after every step, what relevance arrived at its output and what left to each of its inputs."""

Values: TypeAlias = dict[fx.Node, Any]
ValueOf: TypeAlias = Callable[[fx.Node], Any]
Compute: TypeAlias = Callable[[fx.Node, Values], Any]
Share: TypeAlias = Callable[[Step, Values, "Box", list[Any]], Sequence[Sequence[Tensor]]]


@dataclass(frozen=True)
class Activations:
    """What a forward pass leaves for the walk back: values where a rule needs them, shapes elsewhere."""

    values: Values
    output: Tensor


@dataclass(frozen=True)
class Box:
    """Pixel bounds at every node between the inputs and their first linear layers."""

    low: Values
    high: Values

    def around(self, step: Step, value_of: Callable[[Values, fx.Node], Any]) -> Limits | None:
        """The bounds of what a pixel layer reads, where its rule needs them; ``value_of`` takes them from low and high."""
        if not (step.is_pixel_layer and isinstance(step.rule, Rule) and step.rule.reads_bounds):
            return None
        low, high = ([value_of(end, source) for source in step.sources] for end in (self.low, self.high))
        return low, high


class Network:
    """A traced and canonized model with a rule for every layer: runs forward, and relevance backward.

    Args:
        model: the user's module; its weights are read anew by every `weights`.
        traced: its graph, changed in place.
        explained: how many of the graph's inputs, from the first, are explained.
        composite: which rule is used where.
        precision: how much kernels may round; None: everything is evaluated by its definition, and forward by torch.

    Raises:
        UnsupportedOperationError: if an operation that relevance has to cross is not covered.
        ValueError: if no linear layer is reached from the input, or the composite names a layer that does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        traced: TracedModel,
        explained: int,
        composite: Composite,
        precision: Precision | None = None,
    ) -> None:
        self.precision = precision
        given = [node for node in traced.inputs if node is not None]
        self.inputs = tuple(node for node in traced.inputs[:explained] if node is not None)
        self.notes = canonize(traced.graph, given, self.inputs)
        self.any_batch = traced.any_batch
        self.mixing = traced.mixing
        self._traced = traced
        self._model_name = type(model).__name__
        output = only_output(traced.graph)
        if output is None or not isinstance(output.meta.get("val"), Tensor):
            raise ValueError(f"{self._model_name} must return one tensor of scores, (N,) or (N, classes, ...)")
        if output.meta["val"].ndim == 0:
            raise UnsupportedOperationError(
                f"{self._model_name} must return a score for each example, (N,) or (N, classes, ...), and returns one number: "
                f"{operation_name(output)} joins all examples ({source_line(output) or 'no source line'})"
            )
        self.output = output
        self.nodes = [node for node in traced.graph.nodes if node.op in ("placeholder", "call_function")]
        self._non_negative: set[fx.Node] = set()
        self.pixels: set[fx.Node] = set(self.inputs)
        self.steps = self._plan(model, composite)
        self._filters = {node.args[1] for node in self.nodes if node.target in CONVOLUTIONS}
        self._last_uses = self._find_last_uses()
        self._kept = self._find_kept()
        self._last_reads = self._find_last_reads()
        self._overwrites = self._find_overwrites()
        self._rectified = frozenset(
            source for node in self._overwrites if (source := node.all_input_nodes[0]).target is not aten.add.Tensor
        )
        self.bytes_per_example = self._estimate_bytes()

    @property
    def ends_in_probabilities(self) -> bool:
        """Whether the model's output is a softmax or sigmoid of what is explained: nothing else is noted."""
        return bool(self.notes)

    def _plan(self, model: nn.Module, composite: Composite) -> tuple[Step, ...]:
        crossed = self._crossed()
        uncovered = [node for node, layer, _ in crossed if layer is None]
        if uncovered:
            raise UnsupportedOperationError(_uncovered(self._model_name, uncovered))
        joining = _after_the_last_linear_layers(self.output, crossed)
        steps: list[Step] = []
        used: set[Selector] = set()
        outside: Counter[str] = Counter()  # operations in the model's own forward, by name
        for node, layer, positions in crossed:
            assert layer is not None
            sources = _arguments(node, positions)
            is_pixel_layer = isinstance(layer, LinearMap) and self.pixels.issuperset(sources)
            path = module_path(node)
            if not path:
                name = operation_name(node)
                path = f"{name}_{outside[name]}" if outside[name] else name
                outside[name] += 1
            module = _module_at(model, module_path(node))
            rule, chosen = composite.rule_for(layer, is_pixel_layer, node in joining, path, module)
            if isinstance(rule, Rule) and rule.reads_bounds and not is_pixel_layer:
                raise ValueError(
                    f"composite: {rule} needs pixel bounds, and {path} ({operation_name(node)}) is a hidden layer"
                )
            if isinstance(layer, Interpolation) and isinstance(rule, Rule) and not _reads_signs_only(rule):
                raise ValueError(
                    f"composite: {rule} needs single weights, and {path} ({operation_name(node)}) interpolates; choose another "
                    "rule for it"
                )
            used |= chosen
            steps.append(Step(node, layer, rule, positions, sources, is_pixel_layer, path))
        if not any(step.is_pixel_layer for step in steps):
            raise ValueError(
                f"{self._model_name} has no pixel layer: no convolution or linear layer is reached from the input through "
                "affine steps, slices, pads, permutes and reshapes only, so pixel bounds do not apply"
                + self._in_the_way(steps)
            )
        composite.check_selectors(used, [step.path for step in steps if step.rule is not None])
        return tuple(steps)

    def _in_the_way(self, steps: Sequence[Step]) -> str:
        """What stands between the pixels and the first linear layers."""
        first = [step for step in steps if self.pixels.issuperset(step.sources) and step.node not in self.pixels]
        names = dict.fromkeys(f"{operation_name(step.node)} in {module_path(step.node) or 'forward'}" for step in first)
        return (
            f"; in the way: {', '.join(names)} (if it prepares pixels, do so before the model is called)"
            if names
            else ""
        )

    def _crossed(self) -> list[tuple[fx.Node, Layer | None, tuple[int, ...]]]:
        """Operations between input and output that relevance crosses, their layers, and where their signals are.

        What leads to nothing but gates is left out: no relevance goes there, so anything may happen on that path.
        """
        mark_varying(self._traced.graph, self.inputs)
        signals: set[fx.Node] = set(self.inputs)
        found: list[tuple[fx.Node, Layer | None, tuple[int, ...]]] = []
        for node in self.nodes:
            if node.op == "placeholder" or node.target in SHAPE_READERS or not holds_numbers(node):
                continue
            positions = signal_positions(node, signals.__contains__)
            if not positions:
                continue
            signals.add(node)
            layer = Rearrangement() if node.target is operator.getitem else layer_for(node, positions)
            if layer is None:
                found.append((node, layer, positions))
                continue
            positions = layer.carriers(positions)
            found.append((node, layer, positions))
            if is_non_negative(node, layer, self._non_negative.__contains__):
                self._non_negative.add(node)
            affine = isinstance(layer, (Rearrangement, Interpolation)) or (
                isinstance(layer, Elementwise) and layer.affine
            )
            if affine and self.pixels.issuperset(_arguments(node, positions)):
                self.pixels.add(node)
        if self.output not in signals:
            raise ValueError(f"the output of {self._model_name} does not depend on the input that is to be explained")
        crossed: set[fx.Node] = {self.output}
        for node, _, positions in reversed(found):
            if node in crossed:
                crossed.update(_arguments(node, positions))
        return [entry for entry in found if entry[0] in crossed]

    def _find_last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                last[source] = node
        uses: dict[fx.Node, list[fx.Node]] = {}
        for source, user in last.items():
            uses.setdefault(user, []).append(source)
        return uses

    def _find_kept(self) -> frozenset[fx.Node]:
        """Nodes whose values the walk back needs: where rules read activations, and what layers read besides signals."""
        kept = {source for step in self.steps if step.layer.needs_activations for source in step.sources}
        for step in self.steps:
            if step.node in self.pixels or not isinstance(step.layer, Elementwise):
                kept.update(node for node in step.node.all_input_nodes if node not in step.sources)
        return frozenset(kept)

    def _find_last_reads(self) -> dict[fx.Node, list[fx.Node]]:
        """For every step what is no step itself and is read by none before it: on the way back it is the last that reads this."""
        known = {*self.inputs, *(step.node for step in self.steps)}
        last: dict[fx.Node, list[fx.Node]] = {}
        for step in self.steps:
            last[step.node] = [node for node in step.node.all_input_nodes if node not in known]
            known.update(last[step.node])
        return last

    def _find_overwrites(self) -> frozenset[fx.Node]:
        """ReLUs that may write over what they read: a new tensor of the operation before them, which nothing else needs."""
        fresh = CONVOLUTIONS | NORMS | {aten.linear.default, aten.add.Tensor}
        return frozenset(
            node
            for node in self.nodes
            if node.target is aten.relu.default
            and (source := node.all_input_nodes[0]).target in fresh
            and len(source.users) == 1
            and source not in self._kept
        )

    def _estimate_bytes(self) -> int:
        """About how much memory one example takes: every value that is kept, and some of the largest for the layer at work."""
        sizes = {node: _bytes(node) for node in self.nodes}
        return (sum(sizes[node] for node in self._kept) + 6 * max(sizes.values())) // max(1, self._traced.batch)

    def weights(self, model: nn.Module) -> Values:
        """The model's tensors as they are now, and everything the graph derives from them alone (folded weights).

        Derived weights are made anew by every call, so they cannot be stale however the model was changed.
        """
        with exact_modes():
            values: Values = dict(self._traced.constants)
            values.update(zip(self._traced.tensors, self.reads(model), strict=True))
            values = {node: ordinary(value) for node, value in values.items()}
            for node in self.nodes:
                sources = node.all_input_nodes
                if node.op == "call_function" and all(source in values for source in sources):
                    values[node] = _run(node, values.__getitem__)
            if self.precision is not None and "cpu" in native.loaded:
                # As the CPU's kernels read them, which would copy others at every use: a model moved to channels_last has such.
                filters = {node: values[node] for node in self._filters if node in values}
                values.update((node, each.contiguous()) for node, each in filters.items() if each.device.type == "cpu")
            return values

    def reads(self, model: nn.Module) -> list[Tensor]:
        """The model's tensors that the graph reads, where they lie."""
        return [tensor_of(model, name).detach() for name in self._traced.tensors.values()]

    def forward(self, weights: Values, arguments: Sequence[Any], compute: Compute | None = None) -> Activations:
        """Run the network on ``arguments`` (tensors in order, explained ones first), keeping what the walk back needs.

        ``compute`` gives a node's value, by default `compute` on the values before it.
        """
        compute = compute or (lambda node, values: self.compute(node, values.__getitem__))
        with exact_modes():
            values = dict(weights)
            for node, argument in zip(self._traced.inputs, arguments, strict=True):
                if node is not None:
                    values[node] = ordinary(argument) if isinstance(argument, Tensor) else argument
            if self.precision is not None:
                compiled = (node for node in self.inputs if values[node].device.type in native.loaded)
                values.update((node, _channels_last(values[node])) for node in compiled)
            for node in self.nodes:
                if node not in values:
                    values[node] = compute(node, values)
                for source in self._last_uses.get(node, ()):
                    if source not in weights and source not in self._kept and source is not self.output:
                        values[source] = pytree.tree_map_only(Tensor, _shape_only, values[source])
            output = values[self.output]
            assert isinstance(output, Tensor)
            return Activations(values, output)

    def rectifies(self, node: fx.Node) -> bool:
        """Whether an operation gives the positive part of its output at once: a ReLU alone reads it."""
        return node in self._rectified

    def compute(self, node: fx.Node, value_of: ValueOf, args: tuple[Any, ...] | None = None) -> Any:
        """A node's value, by its kernel; ``args`` stand for its own arguments, nodes of the graph among them."""
        if node in self._overwrites:
            source = node.all_input_nodes[0]
            value = value_of(source)
            if self.rectifies(source):
                return value
            is_repeated = 0 in value.stride()  # equal times of a frozen clip, in one place
            return value.relu() if is_repeated else value.relu_()
        relu = self.rectifies(node)
        if self.precision is not None and fused.kind_of(node) in ("convolution", "linear", "max pool"):
            call = Call(node, (0,), value_of, args)
            kernel = self.forward_kernel(call)
            if kernel != "reference":
                return fused.forward(call, kernel, relu=relu)
        value = _run(node, value_of, args)
        return value.relu_() if relu else value

    def forward_kernel(self, call: Call) -> str:
        """Name of the kernel that computes a convolution, linear layer or max pooling forward; "reference" is torch's own."""
        if self.precision is None:
            return "reference"
        return fused.forward_kernel_for(call, call.node.meta["val"].shape, self.precision)

    def kernel_of(self, step: Step, call: Call | None = None) -> str:
        """Name of the kernel that shares a step's relevance, for this call or for any like the traced one."""
        if self.precision is None or step.rule is None:
            return "reference"
        if call is None:
            call = Call(step.node, step.positions, lambda node: node.meta["val"])
        return fused.kernel_for(call, step.node.meta["val"].shape, step.rule, self.precision)

    def backward(
        self,
        activations: Activations,
        seeds: Sequence[Tensor],
        bounds: Sequence[tuple[Tensor, Tensor]],
        observe: Observer | None = None,
    ) -> list[tuple[Tensor, ...]]:
        """Walk relevance from the output to the explained inputs, for several targets at once: they share denominators.

        Args:
            activations: of the same examples; consumed: every value is freed once its layer is done.
            seeds: for every target relevance of the output, in the precision of the walk.
            bounds: (low, high) of every explained input, which broadcast to it.
            observe: called after every step and for every target with the relevance that arrived at its output and that left
                to its inputs.

        Returns:
            For every target relevance of every explained input, shaped like it.
        """
        values, seed = activations.values, seeds[0]

        def share(step: Step, values: Values, box: Box, arriving: list[Any]) -> Sequence[Sequence[Tensor]]:
            leaving = self.share(step, values.__getitem__, box.around(step, dict.__getitem__), arriving)
            if observe is not None:
                for arrived, left in zip(arriving, leaving, strict=True):
                    observe(step, arrived, left)
            return leaving

        with exact_modes():
            box = self.box(values, seed, bounds, lambda node, values: _run(node, values.__getitem__))
            return [
                tuple(
                    relevance[node]
                    if node in relevance
                    else torch.zeros_like(values[node], dtype=seed.dtype, device=seed.device)
                    for node in self.inputs
                )
                for relevance in self.walk(values, seeds, box, share)
            ]

    def walk(self, values: Values, seeds: Sequence[Tensor], box: Box, share: Share) -> list[Values]:
        """For every target the relevance of every input that any reaches.

        ``share`` gives for every target that of a step's sources, given its node's. Values are consumed: each is freed
        once its layer is done.
        """
        relevances: list[Values] = [{self.output: seed} for seed in seeds]
        for step in reversed(self.steps):
            if step.node in relevances[0]:
                arriving = [relevance.pop(step.node) for relevance in relevances]
                for relevance, leaving in zip(relevances, share(step, values, box, arriving), strict=True):
                    for source, part in zip(step.sources, leaving, strict=True):
                        _add(relevance, step, source, part)
            for node in (step.node, *self._last_reads[step.node]):
                values.pop(node, None)
        return relevances

    def share(
        self,
        step: Step,
        value_of: ValueOf,
        limits: Limits | None,
        arriving: list[Any],
        args: tuple[Any, ...] | None = None,
    ) -> Sequence[Sequence[Tensor]]:
        """For every target the relevance of a step's sources, given that of its output.

        ``args`` stand for the operation's own arguments.
        """
        if step.node.target is operator.getitem:
            return [(one,) for one in arriving]
        call, rule, layer = Call(step.node, step.positions, value_of, args), step.rule, step.layer
        kernel = self.kernel_of(step, call)
        if kernel == "reference" or rule is None:
            dtype = pytree.tree_leaves(arriving)[0].dtype
            return layer.redistribute(call.to(dtype), arriving, self.reference_rule(step), limits)
        non_negative = self.is_non_negative(step)
        if len(arriving) == 1 or not isinstance(layer, Weighted) or not isinstance(rule, Rule):
            return [fused.redistribute(call, one, rule, limits, non_negative, kernel) for one in arriving]
        (group,) = rule.groups
        z = fused.denominator(call, rule, limits, non_negative, kernel)
        with_bias = call.to(z.dtype)
        quotients = (layer.quotient(with_bias, one, z, group, rule.stabilizer) for one in arriving)
        return [fused.redistribute(call, s, rule, limits, non_negative, kernel, divided=True) for s in quotients]

    def is_non_negative(self, step: Step) -> bool:
        """Whether nothing that a step reads can be negative."""
        return all(source in self._non_negative for source in step.sources)

    def reference_rule(self, step: Step) -> Any:
        """The rule as layers evaluate it: without the terms that are known to be zero."""
        if isinstance(step.rule, Rule) and self.is_non_negative(step):
            return _WithoutNegativeParts(step.rule)
        return step.rule

    def box(self, values: Values, seed: Tensor, bounds: Sequence[tuple[Tensor, Tensor]], compute: Compute) -> Box:
        """The pixel bounds at every node between the inputs and their first linear layers."""
        low: Values = {}
        high: Values = {}
        for node, (lower, upper) in zip(self.inputs, bounds, strict=True):
            shape = values[node].shape
            low[node], high[node] = (end.to(seed.dtype).expand(shape) for end in (lower, upper))
        for step in self.steps:
            if step.node not in self.pixels:
                continue
            other = {n: in_type(values[n], seed.dtype) for n in step.node.all_input_nodes}
            ends = [compute(step.node, {**other, **{n: end[n] for n in step.sources}}) for end in (low, high)]
            if isinstance(step.layer, Elementwise):
                ends = [torch.minimum(*ends), torch.maximum(*ends)]
            low[step.node], high[step.node] = ends
        return Box(low, high)


def _reads_signs_only(rule: Rule) -> bool:
    """Whether a rule takes weights as they are or leaves them out, by their signs."""
    return all(term.weight in ("v", "v+", "v-") for group in rule.groups for term in group.terms)


@dataclass(frozen=True)
class _WithoutNegativeParts(Rule):
    """The same rule where the input is known not to be negative: its x- terms are zero and x+ is x itself."""

    rule: Rule

    @property
    def stabilizer(self) -> float:  # type: ignore[override]
        return self.rule.stabilizer

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(
            Group(
                tuple(
                    replace(term, input="x") if term.input == "x+" else term
                    for term in group.terms
                    if term.input != "x-"
                ),
                group.bias,
                group.coefficient,
                group.outputs,
            )
            for group in self.rule.groups
        )


def _run(node: fx.Node, value_of: ValueOf, args: tuple[Any, ...] | None = None) -> Any:
    given: Any = fx.map_arg(node.args if args is None else args, value_of)
    named: Any = fx.map_arg(node.kwargs, value_of)
    target: Any = node.target
    if target is aten.add.Tensor and all(isinstance(each, Tensor) for each in given):
        target = room.add
    return target(*given, **named)


def _channels_last(tensor: Tensor) -> Tensor:
    """Channels innermost, as the kernels read them; whatever follows keeps the layout."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.ndim]) if tensor.ndim in formats else tensor


def _add(relevance: Values, step: Step, source: fx.Node, part: Tensor) -> None:
    """Add relevance to a node's; a node with several outputs (a split) collects it per output."""
    into: dict[Any, Any] = relevance
    key: Any = source
    if step.node.target is operator.getitem:
        into, key = relevance.setdefault(source, {}), step.node.args[1]
    into[key] = room.add(into[key], part) if key in into else part


def _shape_only(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def elements(traced: Tensor) -> int:
    """How many elements a value had when it was traced."""
    return math.prod(size.node.hint if isinstance(size, torch.SymInt) else size for size in traced.shape)


def _bytes(node: fx.Node) -> int:
    """Size of a node's value as it was traced."""
    tensors = (value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor))
    return sum(elements(tensor) * tensor.element_size() for tensor in tensors)


def _arguments(node: fx.Node, positions: Sequence[int]) -> tuple[fx.Node, ...]:
    """The nodes at these positions among a node's flattened arguments."""
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return tuple(leaves[position] for position in positions)


def _after_the_last_linear_layers(
    output: fx.Node, crossed: Sequence[tuple[fx.Node, Layer | None, tuple[int, ...]]]
) -> set[fx.Node]:
    """Operations on logits: between the output and the last linear layers, with no activation in between."""
    joining = {output}
    for node, layer, positions in reversed(crossed):
        if node not in joining:
            continue
        affine = isinstance(layer, Elementwise) and layer.affine
        combines = isinstance(layer, (LinearMap, MaxPool, Rearrangement)) and not isinstance(layer, Weighted)
        if affine or combines:
            joining.update(_arguments(node, positions))
        else:
            joining.discard(node)
    return joining


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module that an operation stands in; None for the model's own forward."""
    try:
        return model.get_submodule(path) if path else None
    except AttributeError:
        return None


_AMBIGUOUS = {
    "mul": "  neither factor, or both, comes from a sigmoid, tanh, erf or softmax, is the gate of a gated linear unit, or is one "
    "over what is found in the other",
    "div": "  the divisor is no constant, nor found in the dividend or its weights alone",
    **dict.fromkeys(
        ("matmul", "bmm", "mm", "einsum", "tensordot"), "  not of two factors, one a constant or from a softmax"
    ),
    "native_batch_norm_legit": "  it normalises by the examples of the batch: give it running statistics",
}
"""Why nothing covers an operation, where that is not for want of a layer."""


def _register(names: set[str]) -> str:
    """What else helps with operations that no layer covers in any use."""
    which = ", ".join(sorted(names))
    return f", or register a layer for {which} with captum_dtd.layers.covers." if names else "."


def _uncovered(model: str, nodes: Sequence[fx.Node]) -> str:
    lines = Counter(
        f"  {operation_name(node):20} in {module_path(node) or 'forward'}  ({source_line(node) or 'no source line'})"
        + _AMBIGUOUS.get(operation_name(node), "")
        for node in nodes
    )
    return (
        f"{model} has {len(nodes)} operation(s) that no relevance rule covers:\n"
        + "\n".join(line if count == 1 else f"{line}  x{count}" for line, count in lines.items())
        + "\nReplace them by covered ones"
        + _register({operation_name(node) for node in nodes} - _AMBIGUOUS.keys())
    )
