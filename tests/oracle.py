# ruff: noqa: N803, N806 - matrices and relevance are named as in the formulas
"""Deep Taylor decomposition from dense matrices, in float64, one example at a time: what the package must agree with.

A layer is any affine callable. Its matrix V (outputs x inputs, its Jacobian) is read off column by column by feeding it
unit vectors, its bias b by feeding it zeros; several inputs are laid end to end. A rule fills a matrix Z of the same
shape, how much input i gave to output o, and relevance is shared in proportion:

    R_in[i] = sum over o of  Z[o, i] / (sum over i of Z[o, i]) * R[o]

Nothing here is fast, and nothing here is imported from the package.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Fn = Callable[..., Tensor]


# ------------------------------------------------------------------------------------------------- rules


@dataclass
class Layer:
    """One affine layer at one point: inputs x (I,), matrix V (O, I), bias b (O,), bounds (I,), connections (O, I)."""

    x: Tensor
    V: Tensor
    b: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    mask: Tensor | None = None


Rule = Callable[[Layer, Tensor], Tensor]


def pos(a: Tensor) -> Tensor:
    return a.clamp(min=0)


def neg(a: Tensor) -> Tensor:
    return a.clamp(max=0)


def share(Z: Tensor, R: Tensor, bias: Tensor | float = 0.0, stabilizer: float = 0.0) -> Tensor:
    """Relevance of the inputs, in proportion to Z (O, I); an output whose denominator is zero passes nothing."""
    z = Z.sum(1) + bias
    z = torch.where(z < 0, z - stabilizer, z + stabilizer)
    alive = z.abs() >= torch.finfo(torch.float64).tiny
    return Z.T @ torch.where(alive, R / torch.where(alive, z, 1.0), 0.0)


def z_plus(a: Layer, R: Tensor, stabilizer: float = 0.0, bias: str = "ignored") -> Tensor:
    Z = pos(a.x) * pos(a.V) + neg(a.x) * neg(a.V)
    return share(Z, R, pos(a.b) if bias == "absorbed" else 0.0, stabilizer)


def z_beta(a: Layer, R: Tensor, stabilizer: float = 0.0) -> Tensor:
    return share(a.x * a.V - a.low * pos(a.V) - a.high * neg(a.V), R, 0.0, stabilizer)


def epsilon(a: Layer, R: Tensor, stabilizer: float = 1e-6, bias: str = "absorbed") -> Tensor:
    return share(a.x * a.V, R, a.b if bias == "absorbed" else 0.0, stabilizer)


def gamma(a: Layer, R: Tensor, gamma: float = 0.25, stabilizer: float = 1e-6, bias: str = "absorbed") -> Tensor:
    """What made an output positive counts more, or what made it negative."""
    absorbed = a.b if bias == "absorbed" else torch.zeros_like(a.b)
    is_negative = (a.x * a.V).sum(1) + absorbed < 0
    helping = pos(a.x) * (a.V + gamma * pos(a.V)) + neg(a.x) * (a.V + gamma * neg(a.V))
    hindering = pos(a.x) * (a.V + gamma * neg(a.V)) + neg(a.x) * (a.V + gamma * pos(a.V))
    of_positive = share(helping, torch.where(is_negative, 0.0, R), absorbed + gamma * pos(absorbed), stabilizer)
    return of_positive + share(
        hindering, torch.where(is_negative, R, 0.0), absorbed + gamma * neg(absorbed), stabilizer
    )


def alpha_beta(
    a: Layer, R: Tensor, alpha: float = 2.0, beta: float = 1.0, stabilizer: float = 0.0, bias: str = "ignored"
) -> Tensor:
    absorbed = 1.0 if bias == "absorbed" else 0.0
    helping = share(pos(a.x) * pos(a.V) + neg(a.x) * neg(a.V), R, absorbed * pos(a.b), stabilizer)
    hindering = share(pos(a.x) * neg(a.V) + neg(a.x) * pos(a.V), R, absorbed * neg(a.b), stabilizer)
    return alpha * helping - beta * hindering


def w_square(a: Layer, R: Tensor, stabilizer: float = 0.0) -> Tensor:
    return share(a.V**2, R, 0.0, stabilizer)


def flat(a: Layer, R: Tensor, stabilizer: float = 0.0) -> Tensor:
    return share(a.mask.double(), R, 0.0, stabilizer)


# ------------------------------------------------------------------------------------------------- layers


def matrix(fn: Fn, *shapes: torch.Size) -> tuple[Tensor, Tensor]:
    """(V, b) of an affine map of inputs of these shapes (1, ...): V (outputs, inputs), b (outputs,)."""
    sizes = [math.prod(shape) for shape in shapes]

    def parts(flat_inputs: Tensor) -> list[Tensor]:
        return [p.reshape(len(p), *s[1:]) for p, s in zip(flat_inputs.split(sizes, 1), shapes, strict=True)]

    b = fn(*parts(torch.zeros(1, sum(sizes), dtype=torch.float64))).flatten()
    columns = fn(*parts(torch.eye(sum(sizes), dtype=torch.float64))).flatten(1)
    return (columns - b).T.contiguous(), b


def with_ones(module: nn.Module) -> nn.Module:
    """The layer with every weight one and no bias: its matrix shows which inputs an output is connected to."""
    module = copy.deepcopy(module)
    for name, parameter in module.named_parameters():
        nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    return module


def max_pool(
    x: Tensor,
    R: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    winner: bool = False,
) -> Tensor:
    """Relevance of a max pool's input x (1, C, *S) from R (1, C, *O), window by window.

    Proportional: by the positive parts in the window. Winner takes all: to the largest, the first of equals.
    """
    R_in = torch.zeros_like(x)
    for c, out in itertools.product(range(x.shape[1]), itertools.product(*map(range, R.shape[2:]))):
        axes = [
            [i for i in (o * s - p + k * d for k in range(n)) if 0 <= i < size]
            for o, n, s, p, d, size in zip(out, kernel, stride, padding, dilation, x.shape[2:], strict=True)
        ]
        window = list(itertools.product(*axes))
        u = [x[(0, c, *w)].item() for w in window]
        if winner:
            first = u.index(max(u))
            shares = [float(i == first) for i in range(len(u))]
        else:
            total = sum(max(value, 0.0) for value in u)
            shares = [max(value, 0.0) / total if total > 0 else 0.0 for value in u]
        for w, portion in zip(window, shares, strict=True):
            R_in[(0, c, *w)] += portion * R[(0, c, *out)]
    return R_in


# --------------------------------------------------------------------------------------------- whole nets


@dataclass
class Node:
    """A value (1, ...) on the way, the relevance gathered for it, and, near the input, the bounds of its elements."""

    value: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    relevance: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.relevance = torch.zeros_like(self.value)


def tuples(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


@dataclass
class Walk:
    """A net as a list of steps, written down as it runs forward and walked backward by `back`.

    `conv`, `dense`, `add` (also averages, means and sums) and `pixel` are the rules of those layers; `winner` chooses
    winner-takes-all max pooling. The defaults are the composite `dtd`.
    """

    rules: dict[str, Rule] = field(default_factory=dict)
    winner: bool = False
    steps: list[Callable[[], None]] = field(default_factory=list)

    def linear(self, kind: str, fn: Fn, *inputs: Node, rule: Rule | None = None) -> Node:
        """An affine layer of one or more inputs, under the rule of its kind."""
        rule = rule or self.rules.get(kind) or (z_beta if kind == "pixel" else z_plus)
        shapes = [node.value.shape for node in inputs]
        out = Node(fn(*(node.value for node in inputs)))

        def step() -> None:
            V, b = matrix(fn, *shapes)
            mask = matrix(with_ones(fn), *shapes)[0] if isinstance(fn, nn.Module) else V
            layer = Layer(torch.cat([node.value.flatten() for node in inputs]), V, b, mask=mask != 0)
            if inputs[0].low is not None:
                layer.low, layer.high = inputs[0].low.flatten(), inputs[0].high.flatten()
            R_in = rule(layer, out.relevance.flatten())
            for node, R in zip(inputs, R_in.split([math.prod(s) for s in shapes]), strict=True):
                node.relevance += R.reshape(node.value.shape)

        self.steps.append(step)
        return out

    def pixel(self, fn: Fn, x: Node) -> Node:
        return self.linear("pixel", fn, x)

    def conv(self, fn: Fn, x: Node) -> Node:
        return self.linear("conv", fn, x)

    def dense(self, fn: Fn, x: Node) -> Node:
        return self.linear("dense", fn, x)

    def add(self, fn: Fn, *inputs: Node) -> Node:
        return self.linear("add", fn, *inputs)

    def move(self, fn: Fn, *inputs: Node) -> Node:
        """A rearrangement (reshape, cat, slice, pad ...): relevance goes where the element came from."""
        out = Node(fn(*(node.value for node in inputs)))
        if all(node.low is not None for node in inputs):
            out.low, out.high = fn(*(node.low for node in inputs)), fn(*(node.high for node in inputs))
        shapes = [node.value.shape for node in inputs]

        def step() -> None:
            R_in = matrix(fn, *shapes)[0].T @ out.relevance.flatten()
            for node, R in zip(inputs, R_in.split([math.prod(s) for s in shapes]), strict=True):
                node.relevance += R.reshape(node.value.shape)

        self.steps.append(step)
        return out

    def each(self, fn: Fn, x: Node) -> Node:
        """An elementwise step (activation, constant, unfolded batch norm, signal times gate): relevance passes."""
        out = Node(fn(x.value))

        def step() -> None:
            x.relevance += out.relevance

        self.steps.append(step)
        return out

    def affine(self, fn: Fn, x: Node) -> Node:
        """An elementwise affine step between the input and a pixel layer: relevance passes, the bounds are mapped."""
        out = self.each(fn, x)
        ends = fn(x.low), fn(x.high)
        out.low, out.high = torch.minimum(*ends), torch.maximum(*ends)
        return out

    def max_pool(self, pool: nn.Module, x: Node) -> Node:
        out = Node(pool(x.value))
        n = x.value.dim() - 2
        windows = [tuples(v, n) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]

        def step() -> None:
            x.relevance += max_pool(x.value, out.relevance, *windows, winner=self.winner)

        self.steps.append(step)
        return out

    def back(self, out: Node, target: int, seed: str) -> None:
        out.relevance[0, target] = 1.0 if seed == "one" else out.value[0, target]
        for step in reversed(self.steps):
            step()


def egb() -> Walk:
    """The composite `epsilon-gamma-box`."""
    return Walk({"conv": gamma, "dense": epsilon, "add": epsilon}, winner=True)


def bounded(bound: Any, x: Tensor) -> Tensor:
    """A bound as users give it (a number, one per channel, a tensor that broadcasts) laid out like x (N, C, ...)."""
    bound = torch.as_tensor(bound, dtype=torch.float64)
    if bound.dim() == 1:
        bound = bound.reshape(1, -1, *[1] * (x.dim() - 2))
    return bound.expand(x.shape)


def explain(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    low: Any,
    high: Any,
    target: int | Sequence[int],
    *,
    args: tuple[Any, ...] = (),
    walk: Callable[[], Walk] = Walk,
    seed: str = "logit",
) -> Any:
    """Relevance of the inputs of a model that has `steps(walk, *nodes, *args)`, its forward written with a `Walk`."""
    single = isinstance(inputs, Tensor)
    xs = tuple(x.detach().double() for x in ((inputs,) if single else inputs))
    lows, highs = ((low,), (high,)) if single else (low, high)
    model = copy.deepcopy(model).double()
    boxes = [(bounded(lo, x), bounded(hi, x)) for lo, hi, x in zip(lows, highs, xs, strict=True)]
    found: list[list[Tensor]] = [[] for _ in xs]
    with torch.no_grad():
        for n in range(len(xs[0])):
            one = slice(n, n + 1)
            nodes = [Node(x[one], lo[one], hi[one]) for x, (lo, hi) in zip(xs, boxes, strict=True)]
            extra = [a[one].double() if isinstance(a, Tensor) else a for a in args]
            steps = walk()
            out = model.steps(steps, *nodes, *extra)
            steps.back(out, target if isinstance(target, int) else target[n], seed)
            for each, node in zip(found, nodes, strict=True):
                each.append(node.relevance)
    relevances = tuple(torch.cat(each) for each in found)
    return relevances[0] if single else relevances


def assert_agrees(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """|actual - expected| <= tolerance * max |expected|, naming the worst index where not."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.detach().double() - expected.detach().double()).abs()
    worst = tuple(int(i) for i in torch.unravel_index(error.nan_to_num(math.inf).argmax(), error.shape))
    scale = expected.abs().max().item()
    assert scale > 0, "the expected relevance is all zero, so it shows nothing"
    assert error[worst].item() <= tolerance * scale, (
        f"worst at {worst}: {actual[worst].item():.12g}, expected {expected[worst].item():.12g}, "
        f"off by {error[worst].item() / scale:.3g} of the largest {scale:.6g}"
    )
