"""Layers: which operations carry relevance, and how.

A layer is what one operation of the traced graph is to relevance. Five kinds exist:

===============  ============================================================================================
`LinearMap`      a linear map and its adjoint; a rule shares relevance among its inputs (convolutions, linear
                 layers, sums and averages, additions)
`MaxPool`        shared within its windows or routed to their maxima
`Elementwise`    relevance passes: every output element depends on one input element (activations, scaling; norms, whose
                 statistics count as constants)
`Rearrangement`  relevance follows the element (views, slices, concatenation, padding)
`Gate`           relevance goes to the signal, none to its gate (``x * sigmoid(g)``); `Attention` is a `LinearMap` likewise
===============  ============================================================================================

The adjoint of a linear map is taken by differentiating that one operation: local, exact for every geometry (stride,
dilation, groups, 'same' padding, ceil mode), and with nothing kept from one layer to the next.

A layer for a further operation, as it stands in the canonized graph, is registered in one place::

    @covers(torch.ops.aten.my_op.default)
    def my_op(node, signals):
        return Elementwise()

Where some of what varies with the input gets no relevance, the layer's `Layer.carriers` says what does.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from captum_dtd.nodes import operation_name
from captum_dtd.operations import (
    ADAPTIVE_AVERAGES,
    ADAPTIVE_MAXIMA,
    ADDITIONS,
    AVERAGE_POOLS,
    CASTS,
    CLAMPS,
    CONVOLUTIONS,
    GATES,
    MAX_POOLS,
    NEAREST,
    NORMS,
    REDUCTIONS,
    SHAPE_ONLY,
    aten,
    attention,
    batch_norm,
    maximum_over,
)
from captum_dtd.patterns import (
    PARTS,
    RESHAPED,
    SUMMARIES,
    are_weights,
    averages_by,
    comes_from,
    divided,
    gated_linear_unit,
    holds_numbers,
    is_centred_to_be_divided,
)
from captum_dtd.reference import divide
from captum_dtd.rules import OUTPUT, Group, MaxPoolRule, Rule, WeightPart, WinnerTakesAll

# Under which name a node keeps its `Arguments`.
_FLAT = "captum_dtd arguments"

Limits: TypeAlias = tuple[Sequence[Tensor], Sequence[Tensor]]
"""The pixel bounds low and high of every signal of a layer."""


@dataclass(frozen=True)
class Arguments:
    """An operation's arguments, nodes of the graph among them, laid out flat; how, is worked out once, which takes a while.

    Attributes:
        leaves: all of them, in the order of ``pytree.tree_leaves((args, kwargs))``.
        parts: of every argument its name (None: it is positional), where its leaves are, and how they make it (None: it is
            the only one, or they are a list).
    """

    leaves: tuple[Any, ...]
    parts: tuple[tuple[str | None, int | slice, pytree.TreeSpec | None], ...]

    @staticmethod
    def of(node: fx.Node, args: tuple[Any, ...] | None = None) -> Arguments:
        """Of a node, or with others in place of its positional ones."""
        leaves: list[Any] = []
        parts: list[tuple[str | None, int | slice, pytree.TreeSpec | None]] = []
        for name, value in (*((None, value) for value in (node.args if args is None else args)), *node.kwargs.items()):
            own, spec = pytree.tree_flatten(value)
            start = len(leaves)
            leaves += own
            if spec.is_leaf():
                parts.append((name, start, None))
            else:
                is_list = isinstance(value, list) and spec.num_nodes == 1 + spec.num_leaves
                parts.append((name, slice(start, len(leaves)), None if is_list else spec))
        return Arguments(tuple(leaves), tuple(parts))

    def filled(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments with other leaves."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, place, spec in self.parts:
            value = leaves[place] if spec is None else pytree.tree_unflatten(leaves[place], spec)
            if name is None:
                args.append(value)
            else:
                kwargs[name] = value
        return tuple(args), kwargs


class Call:
    """One operation of the graph with its arguments at hand, as a function of the signals that enter it.

    A *signal* is an argument that depends on what is explained; everything else is bound. Signals are told apart by
    position, so ``x + x`` has two.
    """

    def __init__(
        self,
        node: fx.Node,
        positions: Sequence[int],
        value_of: Callable[[fx.Node], Any],
        args: tuple[Any, ...] | Arguments | None = None,
    ) -> None:
        self.node = node
        if args is None:
            self._flat: Arguments = node.meta.get(_FLAT) or node.meta.setdefault(_FLAT, Arguments.of(node))
        else:
            self._flat = args if isinstance(args, Arguments) else Arguments.of(node, args)
        self.arguments = [value_of(leaf) if isinstance(leaf, fx.Node) else leaf for leaf in self._flat.leaves]
        self.positions = tuple(positions)

    @property
    def signals(self) -> tuple[Tensor, ...]:
        """The tensors that depend on what is explained, in the order of the arguments."""
        return tuple(self.arguments[position] for position in self.positions)

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""
        return self._flat.filled(self.arguments)[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments."""
        return self._flat.filled(self.arguments)[1]

    def to(self, dtype: torch.dtype) -> Call:
        """The same call in another precision."""
        other = copy(self)
        other.arguments = [in_type(argument, dtype) for argument in self.arguments]
        return other

    def __call__(self, signals: Sequence[Tensor], replaced: dict[int, Any] | None = None) -> Any:
        """Run the operation on other signals, and with further arguments replaced by position."""
        arguments = list(self.arguments)
        for position, value in (*zip(self.positions, signals, strict=True), *(replaced or {}).items()):
            arguments[position] = value
        args, kwargs = self._flat.filled(arguments)
        return self.node.target(*args, **kwargs)  # type: ignore[operator]


def in_type(value: Any, dtype: torch.dtype) -> Any:
    """A value with its floating-point tensors in a type."""
    return pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, value
    )


@contextmanager
def local_gradients() -> Iterator[None]:
    """Differentiate inside, whatever the caller's mode: only one operation at a time, nothing is kept."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def adjoint(outputs: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The adjoint, applied to ``cotangents``, of the linear map that made ``outputs`` from ``leaves``; more may be asked for."""
    gradients = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, retain_graph=True)
    return tuple(
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=True)
    )


def weight_part(v: Tensor, part: WeightPart) -> Tensor:
    """The part of a weight that a term uses."""
    if part == "v":
        return v
    if part == "v+":
        return v.clamp(min=0)
    if part == "v-":
        return v.clamp(max=0)
    return v.square() if part == "v^2" else torch.ones_like(v)


class Layer(ABC):
    """What one operation is to relevance."""

    needs_activations: bool = False
    """Whether sharing relevance needs the values that entered, or their shapes only."""

    text: str = "passes"
    """What rule tables say of it where no rule is chosen."""

    def carriers(self, signals: Sequence[int]) -> tuple[int, ...]:
        """Which of the arguments that depend on what is explained get relevance; the others are as good as constants."""
        return tuple(signals)

    @abstractmethod
    def redistribute(self, call: Call, relevances: Sequence[Any], rule: Any, bounds: Any) -> list[tuple[Tensor, ...]]:
        """For each of several relevances of the output, that of every signal that entered."""


class LinearMap(Layer):
    """A linear map whose weights can be replaced by a part of them."""

    needs_activations = True

    @abstractmethod
    def apply(self, call: Call, inputs: Sequence[Tensor], part: WeightPart) -> Tensor:
        """The map on other inputs with a part of its weights and no bias."""

    def has(self, call: Call, part: WeightPart) -> bool:
        """Whether there are such weights; where not, they are not multiplied with."""
        return True

    def bias(self, call: Call, output: Tensor, part: WeightPart) -> Tensor | float:
        """The part of the bias, shaped to be added to ``output``; 0 if there is none."""
        return 0.0

    def redistribute(
        self, call: Call, relevances: Sequence[Tensor], rule: Rule, bounds: Limits | None
    ) -> list[tuple[Tensor, ...]]:
        """Share relevance by a rule: the one place where every rule meets every linear layer."""
        shared: list[list[Tensor | None]] = [[None] * len(call.signals) for _ in relevances]
        output = self.denominator(call, OUTPUT, bounds) if asks_for_signs(rule) else None
        for group in rule.groups:
            with local_gradients():
                z, leaves = self._contributions(call, group, bounds)
                if z is None:
                    continue
                for relevance, own in zip(relevances, shared, strict=True):
                    s = self.quotient(call, relevance, z.detach(), group, rule.stabilizer, output)
                    self._pull(own, z, leaves, s)
        return [_filled(call, own) for own in shared]

    def denominator(self, call: Call, group: Group, bounds: Limits | None) -> Tensor | None:
        """The denominator of a group's terms, before the bias; None where it has none."""
        z, _ = self._contributions(call, group, bounds)
        return None if z is None else z.detach()

    def quotient(
        self, call: Call, relevance: Tensor, z: Tensor, group: Group, stabilizer: float, output: Tensor | None = None
    ) -> Tensor:
        """``s = coefficient R / (z + bias)``, given the denominator before the bias, and that of `OUTPUT` where signs count."""
        given = relevance if group.coefficient == 1 else relevance * group.coefficient
        if group.outputs != "all":
            assert output is not None
            for part, scale in group.bias:
                output = output + scale * self.bias(call, output, part) if part == "v" else output
            given = torch.where((output < 0) == (group.outputs == "negative"), given, 0)
        for part, scale in group.bias:
            z = z + scale * self.bias(call, z, part)
        return divide(given, z, stabilizer, group.is_positive)

    def pull(self, call: Call, s: Tensor, group: Group, bounds: Limits | None) -> tuple[Tensor, ...]:
        """``sum over terms of input * adjoint(s)``: what is left of a group where the quotients s are known."""
        shared: list[Tensor | None] = [None] * len(call.signals)
        with local_gradients():
            z, leaves = self._contributions(call, group, bounds)
            if z is not None:
                self._pull(shared, z, leaves, s)
        return _filled(call, shared)

    def _contributions(self, call: Call, group: Group, bounds: Limits | None) -> tuple[Tensor | None, list[Tensor]]:
        """The sum of a group's terms, and the inputs that it is made of, term by term."""
        leaves: list[Tensor] = []
        z: Tensor | None = None
        for term in group.terms:
            if not self.has(call, term.weight):
                continue
            inputs = tuple(part.requires_grad_() for part in input_parts(call.signals, term.input, bounds))
            output = self.apply(call, inputs, term.weight)
            output = output if term.scale == 1 else output * term.scale
            z = output if z is None else z + output
            leaves += inputs
        return z, leaves

    @staticmethod
    def _pull(shared: list[Tensor | None], z: Tensor, leaves: list[Tensor], s: Tensor) -> None:
        for i, (value, gradient) in enumerate(zip(leaves, adjoint([z], leaves, [s]), strict=True)):
            sum_so_far = shared[i % len(shared)]
            if sum_so_far is None:
                shared[i % len(shared)] = value.detach() * gradient
            else:
                sum_so_far.addcmul_(value.detach(), gradient)


def asks_for_signs(rule: Rule) -> bool:
    """Whether a rule has groups for outputs of one sign."""
    return any(group.outputs != "all" for group in rule.groups)


def _filled(call: Call, shared: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(
        torch.zeros_like(x) if relevance is None else relevance
        for x, relevance in zip(call.signals, shared, strict=True)
    )


def input_parts(signals: Sequence[Tensor], part: str, bounds: Limits | None) -> tuple[Tensor, ...]:
    """The part of every signal that a term reads, as new leaves to differentiate by."""
    if part in ("x-low", "x-high"):
        if bounds is None:
            raise ValueError("the z-beta rule needs pixel bounds: it applies to pixel layers only, not to hidden ones")
        return tuple((x - bound).detach() for x, bound in zip(signals, bounds[part == "x-high"], strict=True))
    if part == "1":
        return tuple(torch.ones_like(x) for x in signals)
    if part == "x":
        return tuple(x.detach() for x in signals)
    return tuple((x.clamp(min=0) if part == "x+" else x.clamp(max=0)).detach() for x in signals)


@dataclass(frozen=True)
class Weighted(LinearMap):
    """Convolutions and linear layers: the arguments at positions ``weight`` and ``bias_position`` are its weights and its bias.

    A kernel that is made of the input, a dynamic convolution's, is taken as it is and gets nothing, as attention's weights do.
    """

    weight: int
    bias_position: int | None = None
    channel_dim: int = 1

    def carriers(self, signals: Sequence[int]) -> tuple[int, ...]:
        return tuple(signal for signal in signals if signal not in (self.weight, self.bias_position))

    def apply(self, call: Call, inputs: Sequence[Tensor], part: WeightPart) -> Tensor:
        replaced: dict[int, Any] = {self.weight: weight_part(call.arguments[self.weight], part)}
        if self._has_bias(call):
            assert self.bias_position is not None
            replaced[self.bias_position] = torch.zeros_like(call.arguments[self.bias_position])
        output = call(inputs, replaced)
        assert isinstance(output, Tensor)
        return output

    def bias(self, call: Call, output: Tensor, part: WeightPart) -> Tensor | float:
        if not self._has_bias(call):
            return 0.0
        assert self.bias_position is not None
        bias = weight_part(call.arguments[self.bias_position], part)
        spatial = call.arguments[self.weight].ndim - 2 if self.channel_dim == 1 else 0
        return bias.view(-1, *[1] * spatial)

    def _has_bias(self, call: Call) -> bool:
        position = self.bias_position
        return position is not None and position < len(call.arguments) and isinstance(call.arguments[position], Tensor)


@dataclass(frozen=True)
class Average(LinearMap):
    """Sums, means and average pools: constant positive weights, equal within a window."""

    def has(self, call: Call, part: WeightPart) -> bool:
        return part != "v-"

    def apply(self, call: Call, inputs: Sequence[Tensor], part: WeightPart) -> Tensor:
        output = call(inputs)
        assert isinstance(output, Tensor)
        return output


@dataclass(frozen=True)
class Interpolation(Average):
    """Linear upsampling: an average of neighbours, each with a weight of its own, which is known to nobody."""


@dataclass(frozen=True)
class Sum(LinearMap):
    """Addition and subtraction of two signals: weights 1 and ``sign`` times the operation's alpha."""

    sign: int

    def apply(self, call: Call, inputs: Sequence[Tensor], part: WeightPart) -> Tensor:
        first, second = inputs
        ours, theirs = self._weights(call, part)
        return torch.add(first if ours == 1 else ours * first, second, alpha=theirs)

    def has(self, call: Call, part: WeightPart) -> bool:
        return any(self._weights(call, part))

    def _weights(self, call: Call, part: WeightPart) -> list[float]:
        weights = torch.tensor([1.0, self.sign * float(call.kwargs.get("alpha", 1))], dtype=torch.float64, device="cpu")
        return weight_part(weights, part).tolist()


@dataclass(frozen=True)
class MaxPool(Layer):
    """Max pooling; ``window_sums`` adds up each of its windows: ``(call, x, output shape) -> sums``."""

    window_sums: Callable[[Call, Tensor, torch.Size], Tensor]
    needs_activations = True

    def redistribute(
        self, call: Call, relevances: Sequence[Tensor], rule: MaxPoolRule, bounds: Any
    ) -> list[tuple[Tensor, ...]]:
        """Share within the windows (`Proportional`) or route to the maxima (`WinnerTakesAll`)."""
        (x,) = call.signals
        shared: list[tuple[Tensor, ...]] = []
        with local_gradients():
            if isinstance(rule, WinnerTakesAll):
                leaf = x.detach().requires_grad_()
                maxima = call([leaf])
                return [adjoint([maxima], [leaf], [relevance]) for relevance in relevances]
            leaf = x.detach().clamp(min=0).requires_grad_()
            z = self.window_sums(call, leaf, relevances[0].shape)
            for relevance in relevances:
                (gradient,) = adjoint([z], [leaf], [divide(relevance, z.detach(), rule.stabilizer)])
                shared.append((leaf.detach() * gradient,))
        return shared


@dataclass(frozen=True)
class Elementwise(Layer):
    """Relevance passes: each output element depends on one element of the signal (which may be broadcast)."""

    affine: bool = False
    """Whether pixel bounds can be mapped through it."""

    def redistribute(
        self, call: Call, relevances: Sequence[Tensor], rule: Any, bounds: Any
    ) -> list[tuple[Tensor, ...]]:
        """Pass relevance on, summed where the signal was broadcast."""
        return [(relevance.sum_to_size(call.signals[0].shape),) for relevance in relevances]


@dataclass(frozen=True)
class Rearrangement(Layer):
    """Relevance follows the element: every output element is one input element, or a constant."""

    text = "follows"

    def redistribute(self, call: Call, relevances: Sequence[Any], rule: Any, bounds: Any) -> list[tuple[Tensor, ...]]:
        """Put relevance back where its elements came from; a split's is a dict from output number to relevance."""
        every: list[dict[int, Tensor]] = [one if isinstance(one, dict) else {0: one} for one in relevances]
        like = next(iter(every[0].values()))
        with local_gradients():
            leaves = [like.new_zeros(()).expand(signal.shape).requires_grad_() for signal in call.signals]
            outputs = call(leaves)
            outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
            return [adjoint([outputs[i] for i in given], leaves, list(given.values())) for given in every]


@dataclass(frozen=True)
class Overwriting(Rearrangement):
    """Values written over others: relevance follows what stays, also where several were written to one place."""

    def redistribute(
        self, call: Call, relevances: Sequence[Tensor], rule: Any, bounds: Any
    ) -> list[tuple[Tensor, ...]]:
        """Put relevance back where the elements came from, which numbers in place of them tell."""
        device, shapes = relevances[0].device, [signal.shape for signal in call.signals]
        ends = [0, *itertools.accumulate(shape.numel() for shape in shapes)]
        numbered = [
            torch.arange(start, end, dtype=torch.float64, device=device).view(shape)
            for (start, end), shape in zip(itertools.pairwise(ends), shapes, strict=True)
        ]
        others = {
            position: torch.full_like(value, ends[-1], dtype=torch.float64)
            for position, value in enumerate(call.arguments)
            if isinstance(value, Tensor) and value.is_floating_point() and position not in call.positions
        }
        origins = call(numbered, others).long().flatten()
        shared: list[tuple[Tensor, ...]] = []
        for relevance in relevances:
            sums = relevance.new_zeros(ends[-1] + 1).index_add_(0, origins, relevance.flatten())
            parts = [sums[start:end] for start, end in itertools.pairwise(ends)]
            shared.append(tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))
        return shared


@dataclass(frozen=True, kw_only=True)
class Gate(Elementwise):
    """``signal * gate``: all relevance to the signal, none to the gate (Arras et al. 2017, *Explaining recurrent networks*).

    So it is with ``signal / divisor`` where the divisor is found in the signal, and with the mean that was taken from it before:
    a norm written by hand.
    """

    text = "to the signal"

    signal: int = 0
    """Which argument is the signal."""

    def carriers(self, signals: Sequence[int]) -> tuple[int, ...]:
        return (self.signal,)


@dataclass(frozen=True)
class Attention(LinearMap):
    """A product of values with the output of a softmax, which are the weights: they get none of the relevance."""

    weights: int
    values: int
    """Which arguments they are."""

    def carriers(self, signals: Sequence[int]) -> tuple[int, ...]:
        return (self.values,)

    def apply(self, call: Call, inputs: Sequence[Tensor], part: WeightPart) -> Tensor:
        output = call(inputs, {self.weights: weight_part(call.arguments[self.weights], part)})
        assert isinstance(output, Tensor)
        return output


def _pool_sums(call: Call, x: Tensor, output: torch.Size) -> Tensor:
    """Sums over the windows of a max pooling, with its padding, dilation and ceil mode."""
    dims = int(operation_name(call.node)[-2])

    def each(value: Any) -> list[int]:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        return values * (dims if len(values) == 1 else 1)

    kernel = each(call.args[1])
    stride, padding, dilation = each(call.args[2]) or kernel, each(call.args[3]), each(call.args[4])
    wide_enough = all(n >= k for n, k in zip(x.shape[-dims:], kernel, strict=True))
    if set(dilation) == {1} and dims > 1 and wide_enough:
        pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
        return pool(x, kernel, stride, padding, ceil_mode=bool(call.args[5]), divisor_override=1)
    # No average pool is dilated, or takes an input narrower than its kernel: add up by a convolution with ones.
    sizes = zip(output[-dims:], stride, padding, dilation, kernel, x.shape[-dims:], strict=True)
    after = [max(0, (o - 1) * s + d * (k - 1) + 1 - p - n) for o, s, p, d, k, n in sizes]
    sides = [side for pair in reversed(list(zip(padding, after, strict=True))) for side in pair]
    planes = F.pad(x, sides).flatten(0, -dims - 1).unsqueeze(1)
    sums = (F.conv1d, F.conv2d, F.conv3d)[dims - 1](planes, x.new_ones(1, 1, *kernel), None, stride, 0, dilation)
    return sums.view(output)


def _average_sums(call: Call, x: Tensor, output: torch.Size) -> Tensor:
    """Averages over an adaptive pooling's windows: their sizes cancel in the shares."""
    average = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    return average[int(operation_name(call.node)[-2])](x, call.args[1])


def _reduction_sums(call: Call, x: Tensor, output: torch.Size) -> Tensor:
    return x.sum(dim=call.args[1], keepdim=bool(call.args[2:] and call.args[2]))


LayerFactory: TypeAlias = Callable[[fx.Node, Sequence[int]], Layer | None]
"""Makes the layer for a node whose arguments at these positions are signals; None: this use of it is not covered."""

_FACTORIES: dict[Any, LayerFactory] = {}


def covers(*targets: Any) -> Callable[[LayerFactory], LayerFactory]:
    """Register a factory as the layer of these operations, in the whole process and in place of a layer that they have.

    The factory is called with a node of the canonized graph, whose positional arguments are all there, and the positions of
    those of its flattened arguments that depend on what is explained; it returns a layer, of one of this module's kinds, or
    None: such a use is not covered.

    Args:
        *targets: ATen overloads, as ``torch.export`` names them.

    Example:
        >>> @covers(torch.ops.aten.diagonal.default)
        ... def diagonal(node, signals):
        ...     return Rearrangement()

    A `LinearMap` of one's own says in ``apply`` what the map makes of other inputs with a part of its weights, and in ``has``
    which parts there are.
    """

    def register(factory: LayerFactory) -> LayerFactory:
        _FACTORIES.update(dict.fromkeys(targets, factory))
        return factory

    return register


def layer_for(node: fx.Node, signals: Sequence[int]) -> Layer | None:
    """The layer that covers a node, or None."""
    factory = _FACTORIES.get(node.target)
    return factory(node, signals) if factory else None


def signal_positions(node: fx.Node, is_signal: Callable[[fx.Node], bool]) -> tuple[int, ...]:
    """Positions, among the node's flattened arguments, of those that are signals."""
    # Of what a tensor is expanded as, nothing but the shape is read.
    given = node.args[:1] if node.target in (aten.expand_as.default, aten.view_as.default) else node.args
    leaves = pytree.tree_leaves((given, dict(node.kwargs)))
    return tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node) and is_signal(leaf))


def _only_first(layer: Layer) -> LayerFactory:
    return lambda node, signals: layer if tuple(signals) == (0,) else None


@covers(*CONVOLUTIONS, aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _convolution(node: fx.Node, signals: Sequence[int]) -> Layer | None:
    return Weighted(weight=1, bias_position=2) if 0 in signals else None


covers(aten.linear.default)(_only_first(Weighted(weight=1, bias_position=2, channel_dim=-1)))
covers(*AVERAGE_POOLS, *ADAPTIVE_AVERAGES, *REDUCTIONS, aten.col2im.default)(_only_first(Average()))
covers(*MAX_POOLS)(_only_first(MaxPool(_pool_sums)))
covers(*ADAPTIVE_MAXIMA)(_only_first(MaxPool(_average_sums)))
covers(maximum_over)(_only_first(MaxPool(_reduction_sums)))

NON_NEGATIVE_ACTIVATIONS = frozenset(
    {aten.relu.default, aten.relu6.default, aten.sigmoid.default, aten.hardsigmoid.default, aten.softplus.default}
    | {aten.abs.default, aten.square.default}
)
SIGN_PRESERVING_ACTIVATIONS = frozenset(
    {aten.leaky_relu.default, aten.silu.default, aten.gelu.default, aten.elu.default, aten.celu.default}
    | {aten.hardswish.default, aten.tanh.default, aten.mish.default, aten.selu.default, aten.dropout.default}
    | {aten.sqrt.default, aten.log1p.default}
)
LINEAR_UPSAMPLING = frozenset({aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec})
ATTENTION = frozenset({attention, aten.softmax.int, aten._softmax.default})

covers(*NON_NEGATIVE_ACTIVATIONS, *SIGN_PRESERVING_ACTIVATIONS, *CLAMPS, aten.prelu.default, aten.threshold.default)(
    _only_first(Elementwise())
)
covers(*LINEAR_UPSAMPLING)(_only_first(Interpolation()))
covers(*NORMS)(_only_first(Elementwise()))
covers(*CASTS, batch_norm, aten.neg.default, aten.rsub.Scalar)(_only_first(Elementwise(affine=True)))


@covers(
    *(SHAPE_ONLY - {aten.dropout.default}),
    *(aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.expand.default, aten.repeat.default),
    *(aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int),
    *(aten.cat.default, aten.stack.default, aten.pad.default, aten.constant_pad_nd.default, aten.t.default),
    *(aten.index_select.default, aten.index.Tensor, aten.roll.default, aten.flip.default, aten.movedim.int),
    *(aten.unfold.default, aten.tile.default, aten.numpy_T.default, aten.unflatten.int, aten.expand_as.default),
    *(aten.view_as.default, aten.pixel_shuffle.default, aten.channel_shuffle.default),
    *(aten.slice_scatter.default, aten.select_scatter.default, aten.fill.Scalar, aten.fill.Tensor),
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf),
    *(aten.gather.default, aten.repeat_interleave.self_int, aten.pixel_unshuffle.default, aten.rot90.default),
    *(aten.take_along_dim.default, aten.im2col.default),
    *NEAREST,
)
def _rearrangement(node: fx.Node, signals: Sequence[int]) -> Layer | None:
    return Rearrangement()


@covers(aten.index_put.default, aten.index_copy.default, aten.scatter.src)
def _written_by_index(node: fx.Node, signals: Sequence[int]) -> Layer | None:
    adds = node.target is aten.index_put.default and node.args[3]
    return None if adds else Overwriting()


@covers(*ADDITIONS)
def _addition(node: fx.Node, signals: Sequence[int]) -> Layer | None:
    if len(signals) == 1:
        return Elementwise(affine=True)
    if is_centred_to_be_divided(node):
        return Gate(signal=0)
    return Sum(1 if node.target is aten.add.Tensor else -1)


@covers(aten.maximum.default, aten.minimum.default)
def _limit(node: fx.Node, signals: Sequence[int]) -> Layer | None:
    return Elementwise() if len(signals) == 1 else None


@covers(aten.mul.Tensor)
def _multiplication(node: fx.Node, signals: Sequence[int]) -> Layer | None:
    if len(signals) == 1:
        return Elementwise(affine=True)
    if (pair := divided(node)) is not None:
        return Gate(signal=node.args.index(pair[0]))
    # A tanh is a gate beside a plain signal, and a signal beside a sigmoid (as in gated convolutions). A part of what a sigmoid
    # made is a gate beside a plain signal, and a signal beside a whole one; a mean or the like is not told from a signal then.
    for kinds in (GATES, {aten.tanh.default, aten.erf.default}):
        for moved in (RESHAPED, PARTS, SUMMARIES):
            gates = [position for position in signals if comes_from(node.args[position], kinds, moved)]
            if not gates:
                continue
            other = node.args[1 - gates[0]]
            is_plain = comes_from(other, kinds, PARTS) or not comes_from(other, kinds, SUMMARIES)
            return Gate(signal=1 - gates[0]) if len(gates) == 1 and is_plain else None
    gate = gated_linear_unit(node)
    return None if gate is None else Gate(signal=1 - gate)


@covers(aten.div.Tensor)
def _division(node: fx.Node, signals: Sequence[int]) -> Layer | None:
    """By a constant, or by what is found in the signal itself or in its weights: that counts as constant, as statistics do."""
    if tuple(signals) == (0,):
        return Elementwise(affine=True)
    if tuple(signals) != (0, 1) or (divided(node) is None and not averages_by(GATES, *node.args)):
        return None
    return Gate(signal=0)


@covers(aten.pow.Tensor_Scalar)
def _power(node: fx.Node, signals: Sequence[int]) -> Layer | None:
    exponent = node.args[1]
    return Elementwise() if isinstance(exponent, (int, float)) and exponent > 0 else None


@covers(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.einsum.default, aten.tensordot.default)
def _product(node: fx.Node, signals: Sequence[int]) -> Layer | None:
    leaves = pytree.tree_leaves(node.args)
    factors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
    if len(factors) != 2:
        return None
    constant = set(factors).difference(signals)
    if constant:
        return Weighted(weight=constant.pop(), channel_dim=-1)
    weights = [i for i in factors if comes_from(leaves[i], ATTENTION, SUMMARIES)]
    if not weights and node.target in (aten.matmul.default, aten.bmm.default):
        weights = [i for i, dim in ((0, -1), (1, -2)) if are_weights(leaves[i], dim)]
    return Attention(weights[0], sum(factors) - weights[0]) if len(weights) == 1 else None


@covers(aten.addmm.default)
def _product_and_bias(node: fx.Node, signals: Sequence[int]) -> Layer | None:
    return Weighted(weight=2, bias_position=0, channel_dim=-1) if tuple(signals) == (1,) else None


_FILLS = {
    aten.fill.Scalar: 1,
    aten.where.ScalarSelf: 1,
    aten.where.ScalarOther: 2,
    aten.masked_fill.Scalar: 2,
}
"""Rearrangements that put a number in places, and where it stands among their arguments."""


def is_non_negative(node: fx.Node, layer: Layer, of: Callable[[fx.Node], bool]) -> bool:
    """Whether a node's output cannot be negative, known from the graph alone; then rules skip their negative parts."""
    if node.target in NON_NEGATIVE_ACTIVATIONS:
        return True
    if node.target in CLAMPS:
        low = node.args[1]
        return node.target is not aten.clamp_max.default and isinstance(low, (int, float)) and low >= 0
    inputs = [leaf for leaf in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(leaf, fx.Node)]
    if isinstance(layer, Rearrangement) and node.target in (aten.pad.default, aten.constant_pad_nd.default):
        values = [value for value in (*node.args[2:], *node.kwargs.values()) if isinstance(value, (int, float))]
        return of(inputs[0]) and all(value >= 0 for value in values)
    if isinstance(layer, Rearrangement):
        fill = node.args[_FILLS[node.target]] if node.target in _FILLS else 0.0
        is_filled_so = isinstance(fill, (int, float)) and fill >= 0
        return is_filled_so and all(of(source) for source in inputs if holds_numbers(source))
    if isinstance(layer, (Average, MaxPool)) or node.target in SIGN_PRESERVING_ACTIVATIONS | CASTS:
        return of(inputs[0])
    if isinstance(layer, Gate) and node.target in ADDITIONS:  # what is left of a signal without its mean
        return False
    if isinstance(layer, Gate) or (isinstance(layer, Sum) and layer.sign > 0):
        return all(of(source) for source in inputs) and float(node.kwargs.get("alpha", 1)) >= 0  # type: ignore[arg-type]
    return False
