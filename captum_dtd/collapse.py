"""Frozen clips, explained at distinct times only.

A frozen clip enters as the one frame that it repeats. Forward, every value is computed once for each class of equal times
(`captum_dtd.times`). Backward, relevance is kept in *slots*: of every value, the times at which relevance is wanted and
reaches the input, or one slot for the sum over a class of equal times. Both are exact: what is left out is either equal to
what is computed, or reaches nothing that is asked for.

A convolution is taken apart into its taps along time. Tap j multiplies a class of equal times once, however many outputs
read it, forward as backward::

    z[out]     = sum over j of  A_j(u[class that out reads by tap j])
    R_in[slot] = u[slot] * sum over j of  adjoint(A_j)(sum of R / z over the outputs that read the slot by tap j)

One operation does it where there is a kernel (`captum_dtd.ops.frozen_z_plus_conv3d`), also for convolutions of each time by
itself, of which z is then taken once for slots of equal times and nothing has to be moved. For any other rule or device each tap
is one. Where no two times are equal, or by taps next to nothing would be saved, the convolution runs as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx

from captum_dtd import fused
from captum_dtd.layers import Call, Limits, Weighted
from captum_dtd.modes import exact_modes
from captum_dtd.operations import aten
from captum_dtd.ops import Table
from captum_dtd.propagate import Activations, Box, Network, Step, ValueOf, Values
from captum_dtd.room import empty_along
from captum_dtd.routes import Route, Slots, repeated
from captum_dtd.rules import Rule, ZBeta, ZPlus
from captum_dtd.taps import TimeConvolution, convolve_by_taps, share_by_taps
from captum_dtd.times import InTime, Times, in_time

Wanted: TypeAlias = Literal["all", "classes"] | Sequence[tuple[int, ...]]
"""At which times of the input relevance is wanted: at all; summed over all (every value keeps a sum per class of equal
times); or at some, which for every frozen clip are others."""

# A product that is left out has to save more than this share of the multiplications to be worth its additions.
_WORTH_IT = 0.9

# Sets of wanted times whose plans are remembered: megabytes each, where many clips want different times.
_MOST_PLANS = 32


class _Plan:
    """What is wanted, worked out once: the slots of every value, and between them the routes of every operation."""

    def __init__(self, in_time: dict[fx.Node, InTime], slots: dict[fx.Node, Slots]) -> None:
        self.slots = slots
        self._in_time = in_time
        self._routes: dict[tuple[fx.Node, fx.Node], tuple[Route, Route]] = {}
        self._tables: dict[fx.Node, tuple[Table, Table]] = {}
        self._taps: dict[fx.Node, list[Route]] = {}
        self._stays: dict[tuple[fx.Node, fx.Node], bool] = {}

    def at(self, node: fx.Node) -> tuple[tuple[int, ...], ...]:
        """The times of a node's slots; one row of none where it has no time."""
        return self.slots[node].times if node in self.slots else ((),)

    def routes(self, node: fx.Node, source: fx.Node) -> tuple[Route, Route]:
        """From the classes of a source to what an operation reads at its slots, and from there to the source's slots."""
        if (node, source) not in self._routes:
            here, times = self._in_time[node], self._in_time[source].times
            assert times is not None
            read = [here.reads(row, times.length) for row in self.at(node)]
            from_classes = Route.of([times.numbers(row) for row in read], times.distinct)
            self._routes[node, source] = from_classes, self.slots[source].route(read)
        return self._routes[node, source]

    def stays(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether what an operation gives to a source's slots lies there already.

        Every slot has been read from the one of its own number, or is empty: then its relevance is zero.
        """
        if (node, source) not in self._stays:
            _, route = self.routes(node, source)
            at = repeated(self.at(node), len(route.rows))
            self._stays[node, source] = route.size == len(at[0]) == route.count and all(
                index == place or (index, time) == (-1, -1)
                for row, times in zip(repeated(route.rows, len(at)), at, strict=True)
                for place, (index, time) in enumerate(zip(row, times, strict=True))
            )
        return self._stays[node, source]

    def tables(self, node: fx.Node, source: fx.Node) -> tuple[Table, Table]:
        """The same by slot and tap, for operations that read and give by tables."""
        if node not in self._tables:
            from_classes, to_slots = self.routes(node, source)
            taps = self._taps_along_time(node)
            self._tables[node] = from_classes.table(taps), to_slots.table(taps)
        return self._tables[node]

    def taps(self, node: fx.Node, source: fx.Node) -> list[Route]:
        """For every tap where a convolution's slots give to."""
        if node not in self._taps:
            _, to_slots = self.routes(node, source)
            count = self._taps_along_time(node)
            rows = ([row[tap::count] for row in to_slots.rows] for tap in range(count))
            self._taps[node] = [Route.of(each, to_slots.size) for each in rows]
        return self._taps[node]

    def _taps_along_time(self, node: fx.Node) -> int:
        window = self._in_time[node].window
        return 1 if window is None else window.taps


class FrozenNetwork:
    """A network on frozen clips of a number of frames.

    Args:
        network: traced on clips of that many frames; every explained input has time as its dimension 2.
        frames: the number of frames.

    Example:
        >>> import torch
        >>> from captum_dtd.composites import DTD
        >>> from captum_dtd.graph import trace
        >>> from captum_dtd.models import c3d_mini
        >>> model = c3d_mini().eval()
        >>> network = Network(model, trace(model, (torch.rand(2, 3, 16, 32, 32),), 2), 1, DTD)
        >>> FrozenNetwork(network, 16).summary(network.steps[0])
        '1 -> 3 of 16'
    """

    def __init__(self, network: Network, frames: int) -> None:
        self.network = network
        self.frames = frames
        self.in_time: dict[fx.Node, InTime] = {}
        rules = {step.node: step.rule for step in network.steps}
        for node in network.nodes:
            if node in network.inputs:
                self.in_time[node] = InTime("pointwise", Times(2, (0,) * frames))
                continue
            here = in_time(node, self._times) if node is not network.output else InTime("whole", None)
            self.in_time[node] = InTime("whole", None) if self._counts_padding(node, here, rules.get(node)) else here
        self._convolutions = {
            node: TimeConvolution(node, self.in_time)
            for node, here in self.in_time.items()
            if here.way == "convolution"
        }
        self._read: dict[tuple[fx.Node, fx.Node], Route] = {}
        self._remembered = lru_cache(maxsize=_MOST_PLANS)(self._make_plan)

    def _counts_padding(self, node: fx.Node, here: InTime, rule: Any) -> bool:
        """Whether a rule takes each input for 1, also what only stands where a window reaches beyond the clip."""
        if here.way != "windows" or here.times is None or not isinstance(rule, Rule):
            return False
        if all(term.input != "1" for group in rule.groups for term in group.terms):
            return False
        (source,) = node.all_input_nodes
        times = self._times(source)
        assert times is not None
        return -1 in here.reads(range(here.times.length), times.length)

    def _times(self, node: fx.Node) -> Times | None:
        found = self.in_time.get(node)
        return found.times if found else None

    def summary(self, step: Step) -> str:
        """How many of an operation's times differ, of what it reads and of what it makes: ``"1 -> 3 of 16"``."""
        made = self._times(step.node)
        read = [times.distinct for source in step.node.all_input_nodes if (times := self._times(source)) is not None]
        if made is None:
            return "every time" if read else ""
        return f"{max(read)} -> {made.distinct} of {made.length}"

    # ------------------------------------------------------------------------------------------------------- forward

    def forward(self, weights: Values, arguments: Sequence[Any]) -> Activations:
        """Run the network on frames (N, C, 1, H, W) in place of explained clips, each as the clip that it is repeated to."""
        return self.network.forward(weights, arguments, self._compute)

    def _compute(self, node: fx.Node, values: Values) -> Any:
        here = self.in_time[node]
        if here.way == "convolution":
            return self._convolve(node, values)
        if here.way == "windows" and node.target is aten.max_pool3d.default:
            return self._max_pool(node, values)
        args = here.args(here.times.distinct) if here.args is not None and here.times is not None else None
        return self.network.compute(node, self._read_distinct(node, values), args)

    def _read_distinct(self, node: fx.Node, values: Values) -> ValueOf:
        """What an operation reads, for every class of its output's times."""
        here = self.in_time[node]

        def value_of(source: fx.Node) -> Any:
            times = self._times(source)
            if times is None:
                return values[source]
            return self._route(node, source).gather(values[source], times.dim, here.fill)

        return value_of

    def _route(self, node: fx.Node, source: fx.Node) -> Route:
        """From the classes of a source to what an operation reads for those of its output."""
        if (node, source) not in self._read:
            here, times = self.in_time[node], self._times(source)
            assert times is not None
            read = here.reads(here.times.first if here.times is not None else (), times.length)
            self._read[node, source] = Route.of([times.numbers(read)], times.distinct)
        return self._read[node, source]

    def _max_pool(self, node: fx.Node, values: Values) -> Tensor:
        """A max pooling along time: by a table, or over H and W of every class once and then over those that a window reads."""
        here, source = self.in_time[node], node.all_input_nodes[0]
        assert here.window is not None and here.args is not None and here.times is not None
        call = Call(node, (0,), values.__getitem__)
        kernel = self.network.forward_kernel(call)
        if fused.serves_frozen(kernel, node, values[source]):
            return fused.forward(call, kernel, self._route(node, source).table(here.window.taps))
        x, size, stride, *others = here.args(here.times.distinct)
        pooled = self.network.compute(node, values.__getitem__, (x, [1, *size[1:]], [1, *stride[1:]], *others))
        (read,), taps = self._route(node, source).rows, here.window.taps
        found = empty_along(pooled, 2, here.times.distinct)
        for index in range(here.times.distinct):
            chosen = [pooled.select(2, t) for t in dict.fromkeys(read[index * taps :][:taps]) if t >= 0]
            largest = found.select(2, index)
            if not chosen:  # the padding alone
                largest.fill_(here.fill)
            elif len(chosen) == 1:
                largest.copy_(chosen[0])
            for other in chosen[1:]:
                torch.maximum(chosen[0], other, out=largest)
                chosen[0] = largest
        return found

    def _convolve(self, node: fx.Node, values: Values) -> Tensor:
        """A convolution at the first time of every class: of equal times once where that is less, else at all times."""
        along = self._convolutions[node]
        if along.all_differ:
            return self.network.compute(node, values.__getitem__)  # type: ignore[no-any-return]
        whole_layer = along.layer(values, (0,))
        kernel, relu = self.network.forward_kernel(whole_layer), self.network.rectifies(node)
        if fused.serves_frozen(kernel, node, values[along.source]):
            return fused.forward(whole_layer, kernel, self._route(node, along.source).table(along.window.taps), relu)
        if along.products >= _WORTH_IT * along.multiplications:
            whole = Route.of([along.read.classes], along.read.distinct).gather(values[along.source], 2)
            output = self.network.compute(node, lambda n: whole if n is along.source else values[n])
            return Route.of([along.made.first], along.made.length).gather(output, 2)  # type: ignore[no-any-return]

        return convolve_by_taps(self.network, along, values)

    # ------------------------------------------------------------------------------------------------------ backward

    def backward(
        self,
        activations: Activations,
        seeds: Sequence[Tensor],
        bounds: Sequence[tuple[Tensor, Tensor]],
        wanted: Wanted,
    ) -> list[tuple[Tensor, ...]]:
        """Walk relevance from the output to the explained inputs, for several targets at once.

        Args:
            activations: of the same frames; consumed.
            seeds: for every target relevance of the output.
            bounds: (low, high) of every explained input, the same at all times, that broadcast to (N, C, 1, H, W).
            wanted: at which times relevance is wanted.

        Returns:
            For every target and explained input (N, C, slots, H, W): relevance at the wanted times in their order (a row of
            less than the most ends in zeros); of "all" at every time; of "classes" its sum over all times, in one slot.
        """
        plan = self._plan_for(wanted)

        def share(step: Step, values: Values, box: Box, arriving: list[Any]) -> Sequence[Sequence[Tensor]]:
            if self.in_time[step.node].way == "convolution":
                return [(one,) for one in self._share_convolution(step, values, box, arriving, plan)]
            shared = self._share_where_read(step, values, box, arriving, plan)
            return shared if shared is not None else self._share(step, values, box, arriving, plan)

        values, seed = activations.values, seeds[0]
        with exact_modes():
            box = self.network.box(values, seed, bounds, self._compute)
            relevances = self.network.walk(values, seeds, box, share)

        def zeros(node: fx.Node) -> Tensor:
            n, c, _, *size = values[node].shape
            return seed.new_zeros((n, c, plan.slots[node].count, *size))

        inputs = self.network.inputs
        return [tuple(found[node] if node in found else zeros(node) for node in inputs) for found in relevances]

    def _plan_for(self, wanted: Wanted) -> _Plan:
        return self._remembered(wanted if isinstance(wanted, str) else tuple(wanted))

    def _make_plan(self, wanted: Wanted) -> _Plan:
        return _Plan(self.in_time, self._find_slots(wanted))

    def _find_slots(self, wanted: Wanted) -> dict[fx.Node, Slots]:
        timed = {node: here.times for node, here in self.in_time.items() if here.times is not None}
        if wanted == "all":
            every = {n: tuple(range(times.length)) for n, times in timed.items()}
            return {n: Slots((numbers,), (numbers,)) for n, numbers in every.items()}
        if wanted == "classes":
            return {n: Slots((times.first,), (times.classes,)) for n, times in timed.items()}
        rows = list(wanted) if len(set(wanted)) > 1 else [wanted[0]]
        known = {row: self._reached(row) for row in set(rows)}
        slots: dict[fx.Node, Slots] = {}
        for node, times in timed.items():
            reached = [known[row][node] for row in rows]
            most = max(1, *map(len, reached))
            slots[node] = Slots(
                tuple(tuple(row) + (-1,) * (most - len(row)) for row in reached),
                tuple(tuple(row.index(t) if t in row else -1 for t in range(times.length)) for row in reached),
            )
        return slots

    def _reached(self, wanted: tuple[int, ...]) -> dict[fx.Node, list[int]]:
        """Of every value, the times at which it depends on the input at the wanted times."""
        crossed = {step.node for step in self.network.steps}
        reached: dict[fx.Node, list[int]] = {}
        for node, here in self.in_time.items():
            if node in self.network.inputs:
                reached[node] = sorted(set(wanted))
            elif here.times is not None:
                found: set[int] = set()
                for source in node.all_input_nodes:
                    times = self._times(source)
                    if times is None and source in crossed:  # a mean over time, say: it depends on every time
                        found = set(range(here.times.length))
                    elif times is not None:
                        own = set(reached[source])
                        found |= (
                            own
                            if here.window is None
                            else {t for t in range(here.times.length) if own & set(here.reads((t,), times.length))}
                        )
                reached[node] = sorted(found)
        return reached

    def _share(
        self, step: Step, values: Values, box: Box, arriving: list[Any], plan: _Plan
    ) -> Sequence[Sequence[Tensor]]:
        """Any operation but a convolution along time: what it reads is gathered at its output's slots."""
        here = self.in_time[step.node]

        def take(those: Values, source: fx.Node) -> Any:
            times = self._times(source)
            if times is None:
                return those[source]
            return plan.routes(step.node, source)[0].gather(those[source], times.dim, here.fill)

        args = here.args(len(plan.at(step.node)[0])) if here.args is not None else None
        limits = box.around(step, take)

        def to_slots(source: fx.Node, part: Tensor) -> Tensor:
            times = self._times(source)
            if times is None or plan.stays(step.node, source):
                return part
            return plan.routes(step.node, source)[1].scatter(part, times.dim)  # type: ignore[no-any-return]

        leaving = self.network.share(step, lambda source: take(values, source), limits, arriving, args)
        return [[to_slots(source, part) for source, part in zip(step.sources, one, strict=True)] for one in leaving]

    def _share_where_read(
        self, step: Step, values: Values, box: Box, arriving: list[Any], plan: _Plan
    ) -> Sequence[Sequence[Tensor]] | None:
        """A pooling, or a convolution of each time by itself, in one operation that reads and gives to times by tables.

        None where times are read as they lie, or no kernel serves it: then what is read is gathered.
        """
        kind = fused.kind_of(step.node)
        by_windows = kind in ("max pool", "average pool")
        if self.in_time[step.node].way == "whole" or not (by_windows or kind == "convolution"):
            return None
        (source,) = step.sources
        if all(route.is_identity for route in plan.routes(step.node, source)):
            return None
        call = Call(step.node, step.positions, values.__getitem__)
        (x,) = call.signals
        kernel = self.network.kernel_of(step, call)
        if not fused.serves_frozen(kernel, step.node, x):
            return None
        tables = *plan.tables(step.node, source), plan.slots[source].count
        if not by_windows:
            limits = box.around(step, dict.__getitem__)
            return [(one,) for one in self._share_by_table(step, call, limits, arriving, tables, kernel)]
        assert step.rule is not None
        return [(fused.redistribute_frozen_pool(call, one, step.rule, kernel, tables),) for one in arriving]

    def _share_convolution(
        self, step: Step, values: Values, box: Box, arriving: list[Tensor], plan: _Plan
    ) -> list[Tensor]:
        """Relevance of a convolution's input, in its slots: of equal times once where that is less, else at all times."""
        along = self._convolutions[step.node]
        at, kept, taps = plan.slots[step.node], plan.slots[along.source], plan.taps(step.node, along.source)
        pulled = sum(len(tap.used) for tap in taps)
        if not pulled:  # strides step over the wanted times
            return [empty_along(values[along.source], 2, kept.count).to(one.dtype).zero_() for one in arriving]
        if along.all_differ and at.is_every_time and kept.is_every_time:
            return self._share_at_all_times(step, values, box, arriving, plan)
        limits = box.around(step, dict.__getitem__)
        kernel = self.network.kernel_of(step, along.layer(values, step.positions))
        if isinstance(step.rule, (ZPlus, ZBeta)) and fused.serves_frozen(kernel, step.node, values[along.source]):
            tables = *plan.tables(step.node, along.source), kept.count
            return self._share_by_table(step, along.layer(values, step.positions), limits, arriving, tables, kernel)
        if at.is_single and pulled + along.products >= _WORTH_IT * 2 * along.multiplications:
            return self._share_at_all_times(step, values, box, arriving, plan)
        return share_by_taps(self.network, step, values, limits, arriving, along, at, kept, taps)

    def _share_by_table(
        self,
        step: Step,
        call: Call,
        limits: Limits | None,
        arriving: list[Tensor],
        tables: tuple[Table, Table, int],
        kernel: str,
    ) -> list[Tensor]:
        """All taps in one operation; of several targets z is computed once."""
        layer, rule = step.layer, step.rule
        assert isinstance(layer, Weighted) and isinstance(rule, (ZPlus, ZBeta))
        non_negative = self.network.is_non_negative(step)
        rest = (rule, limits, non_negative, kernel, tables)
        if len(arriving) == 1:
            return [fused.redistribute_frozen(call, arriving[0], *rest)]
        (group,) = self.network.reference_rule(step).groups
        z = fused.denominator(call, rule, limits, non_negative, kernel, tables[0])
        with_bias = call.to(z.dtype)
        quotients = [layer.quotient(with_bias, one, z, group, rule.stabilizer) for one in arriving]
        return [fused.redistribute_frozen(call, s, *rest, divided=True) for s in quotients]

    def _share_at_all_times(
        self, step: Step, values: Values, box: Box, arriving: list[Tensor], plan: _Plan
    ) -> list[Tensor]:
        """Relevance of a convolution's input, by the convolution as it is."""
        along = self._convolutions[step.node]
        at, kept = plan.slots[step.node], plan.slots[along.source]
        everywhere = [Route.of(at.of_time, at.count).gather(one, 2) for one in arriving]
        whole = Route.of([along.read.classes], along.read.distinct)

        def take(those: Values, node: fx.Node) -> Any:
            return whole.gather(those[node], 2) if node is along.source else those[node]

        limits = box.around(step, take)
        shared = self.network.share(step, lambda node: take(values, node), limits, everywhere)
        to_kept = kept.route([range(along.read.length)])
        return [to_kept.scatter(one, 2) for (one,) in shared]
