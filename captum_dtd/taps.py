"""Convolutions along time, taken apart into their taps: each multiplies a class of equal times once, whoever reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from captum_dtd import fused
from captum_dtd.layers import Arguments, Call, Limits, Weighted, asks_for_signs
from captum_dtd.propagate import Network, Step, Values
from captum_dtd.room import empty_along
from captum_dtd.routes import Route, Slots
from captum_dtd.rules import OUTPUT, Group, Rule, ZBeta, ZPlus
from captum_dtd.times import InTime

Take: TypeAlias = Callable[[Tensor], Tensor]
"""Takes some times of a value."""


class TimeConvolution:
    """A convolution along time: what each of its taps reads, and how much there is to multiply."""

    def __init__(self, node: fx.Node, known: dict[fx.Node, InTime]) -> None:
        source, weight = node.args[:2]
        assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
        here, before = known[node], known[source]
        assert here.window is not None and here.times is not None and here.args is not None and before.times is not None
        self.node, self.source, self.weight = node, source, weight
        self.window, self.read, self.made = here.window, before.times, here.times
        x, v, bias, *geometry = here.args(here.times.distinct)
        self._with_bias, self._of_a_tap = (Arguments.of(node, (x, v, b, *geometry)) for b in (bias, None))
        self._reads = [self.window.reads(time, self.read.length) for time in self.made.first]

    @property
    def all_differ(self) -> bool:
        """Whether no two times are equal, of what is read nor of what is made."""
        return self.read.distinct == self.read.length and self.made.distinct == self.made.length

    @cached_property
    def products(self) -> int:
        """How many pairs there are of a class and a tap that reads it."""
        return sum(len(set(self.read.numbers(at)) - {-1}) for at in zip(*self._reads, strict=True))

    @cached_property
    def multiplications(self) -> int:
        """How many pairs there are of a time and a tap that reads it: padding is not counted."""
        every = (self.window.reads(time, self.read.length) for time in range(self.made.length))
        return sum(t >= 0 for reads in every for t in reads)

    def layer(self, values: Values, positions: tuple[int, ...]) -> Call:
        """The convolution over the times of its input that differ, with all of its taps, as an operation by tables reads it."""
        return Call(self.node, positions, values.__getitem__, self._with_bias)

    def call(self, tap: int, values: Values, take: Take, positions: tuple[int, ...]) -> Call:
        """The convolution with one of its taps, on some times of its input, without bias."""
        own = {
            self.source: take(values[self.source]),
            self.weight: values[self.weight][:, :, tap : tap + 1],
        }
        return Call(self.node, positions, lambda node: own[node] if node in own else values[node], self._of_a_tap)

    def sum_of_taps(self, one: Callable[[Take, int], Tensor]) -> Tensor:
        """The sums for every class of the output; ``one`` multiplies the classes that are taken by a tap, without bias."""
        sums: _Sums | None = None
        for tap, at in enumerate(zip(*self._reads, strict=True)):
            route = Route.of([self.read.numbers(at)], self.read.distinct)
            if not route.used:
                continue
            some = Route.of([route.used], self.read.distinct)
            product = one(lambda x, some=some: some.gather(x, 2), tap)  # type: ignore[misc]
            sums = sums or _Sums(empty_along(product, 2, self.made.distinct))
            sums.add(product, ((part, index) for index, part in enumerate(route.compact().rows[0]) if part >= 0))
        assert sums is not None
        return sums.total()


def convolve_by_taps(network: Network, along: TimeConvolution, values: Values) -> Tensor:
    """The convolution for every class of its output's times.

    Args:
        network: of the convolution.
        along: how the convolution goes along time.
        values: of the network, for classes of equal times.
    """
    node = along.node

    def one(take: Take, tap: int) -> Tensor:
        call = along.call(tap, values, take, (0,))
        kernel = network.forward_kernel(call)
        return _by_planes(call) if kernel == "reference" else fused.forward(call, kernel)

    sums = along.sum_of_taps(one)
    bias = values[node.args[2]] if isinstance(node.args[2:3] and node.args[2], fx.Node) else None  # type: ignore[index]
    sums = sums if bias is None else sums.add_(bias.view(-1, 1, 1, 1))
    return sums.relu_() if network.rectifies(node) else sums


def share_by_taps(
    network: Network,
    step: Step,
    values: Values,
    limits: Limits | None,
    arriving: list[Tensor],
    along: TimeConvolution,
    at: Slots,
    kept: Slots,
    taps: list[Route],
) -> list[Tensor]:
    """Relevance of the input's slots.

    Args:
        network: of the convolution.
        step: the convolution.
        values: of the network, for classes of equal times.
        limits: of the input's values, if they are pixels.
        arriving: for every target relevance of the output's slots.
        along: how the convolution goes along time.
        at: the output's slots.
        kept: the input's slots.
        taps: for every tap the slots of the input that outputs read by it.
    """
    layer, rule = step.layer, step.rule
    assert isinstance(layer, Weighted) and isinstance(rule, Rule)
    dtype = arriving[0].dtype
    with_bias = Call(step.node, step.positions, values.__getitem__).to(dtype)
    to_made = Route.of([along.made.numbers(row) for row in at.times], along.made.distinct)
    own = Route.of([along.read.numbers(row) for row in kept.times], along.read.distinct)
    shared = [_Sums(empty_along(values[along.source], 2, kept.count).to(dtype)) for _ in arriving]

    def tap_call(take: Take, tap: int) -> _TapCall:
        return _TapCall(network, step, along.call(tap, values, take, step.positions), limits, take, dtype)

    def denominator(group: Group) -> Tensor:
        z: Tensor = to_made.gather(along.sum_of_taps(lambda take, tap: tap_call(take, tap).denominator(group)), 2)
        return z

    output = denominator(OUTPUT) if asks_for_signs(rule) else None
    for group in network.reference_rule(step).groups:
        z = denominator(group)
        quotients = [layer.quotient(with_bias, one, z, group, rule.stabilizer, output) for one in arriving]
        for tap, route in enumerate(taps):
            if not route.used:
                continue
            some = Route.of([route.used], kept.count)

            def take(x: Tensor, some: Route = some) -> Tensor:
                return some.gather(own.gather(x, 2), 2)  # type: ignore[no-any-return]

            call, to_tap = tap_call(take, tap), route.compact()
            for one, s in zip(shared, quotients, strict=True):
                one.add(call.pull(group, to_tap.scatter(s, 2)), enumerate(route.used))
    return [one.total() for one in shared]


class _Sums:
    """Sums of what is added at times of a tensor, whose first values are nothing yet: memory is not written twice for that."""

    def __init__(self, room: Tensor) -> None:
        self._room = room
        self._begun: set[int] = set()

    def add(self, part: Tensor, places: Iterable[tuple[int, int]]) -> None:
        """Add a part's times at others of the sums: pairs of both."""
        for of_part, index in places:
            sums, more = self._room.select(2, index), part.select(2, of_part)
            if index in self._begun:
                sums.add_(more)
            else:
                sums.copy_(more)
                self._begun.add(index)

    def total(self) -> Tensor:
        """The sums; zeros where nothing was added."""
        for index in set(range(self._room.shape[2])) - self._begun:
            self._room.select(2, index).zero_()
        return self._room


@dataclass(frozen=True)
class _TapCall:
    """One tap of a convolution, as a layer of its own, by the kernel that serves it or by its definition."""

    network: Network
    step: Step
    call: Call
    limits: Limits | None
    take: Take
    dtype: torch.dtype  # of relevance

    @cached_property
    def _limits(self) -> Limits | None:
        if self.limits is None:
            return None
        low, high = ([self.take(bound) for bound in end] for end in self.limits)
        return low, high

    @cached_property
    def _kernel(self) -> str:
        kernel = self.network.kernel_of(self.step, self.call)
        return kernel if isinstance(self.step.rule, (ZPlus, ZBeta)) else "reference"

    def denominator(self, group: Group) -> Tensor:
        """This tap's part of a group's denominator."""
        rule, layer = self.step.rule, self.step.layer
        assert isinstance(rule, Rule) and isinstance(layer, Weighted)
        if self._kernel != "reference":
            return fused.denominator(
                self.call, rule, self._limits, self.network.is_non_negative(self.step), self._kernel
            )
        z = layer.denominator(self.call.to(self.dtype), group, self._limits)
        assert z is not None
        return z

    def pull(self, group: Group, s: Tensor) -> Tensor:
        """This tap's part of the relevance, given the quotients that reach it."""
        rule, layer = self.step.rule, self.step.layer
        assert isinstance(rule, Rule) and isinstance(layer, Weighted)
        if self._kernel != "reference":
            non_negative = self.network.is_non_negative(self.step)
            return fused.redistribute(self.call, s, rule, self._limits, non_negative, self._kernel, divided=True)[0]
        return layer.pull(self.call.to(s.dtype), s, group, self._limits)[0]


def _by_planes(call: Call) -> Tensor:
    """A convolution whose kernel has one time, by torch's 2D convolution: the 3D one is slow on few times."""
    x, weight, _, stride, padding, dilation, groups = call.args
    planes = x.movedim(2, 1).flatten(0, 1)
    sides = padding if isinstance(padding, str) else padding[1:]
    out = F.conv2d(planes, weight[:, :, 0], None, stride[1:], sides, dilation[1:], groups)
    return out.view(x.shape[0], x.shape[2], *out.shape[1:]).movedim(1, 2)
