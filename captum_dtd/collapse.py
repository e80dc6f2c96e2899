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

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from captum_dtd import fused, room
from captum_dtd.graph import operation_name
from captum_dtd.layers import Arguments, Call, Limits, Weighted, asks_for_signs
from captum_dtd.modes import exact_modes
from captum_dtd.operations import aten, maximum_over
from captum_dtd.ops import Table
from captum_dtd.propagate import Activations, Box, Network, Step, ValueOf, Values, elements
from captum_dtd.rules import OUTPUT, Group, Rule, WinnerTakesAll, ZBeta, ZPlus
from captum_dtd.times import InTime, Times, in_time, time_axis

Wanted: TypeAlias = Literal["all", "classes"] | Sequence[tuple[int, ...]]
"""At which times of the input relevance is wanted: at all; summed over all (every value keeps a sum per class of equal
times); or at some, which for every frozen clip are others."""

Take: TypeAlias = Callable[[Tensor], Tensor]
"""Takes some times of a value."""

# Where stretches of times are copied one by one, as cheap as memory allows. Elsewhere each would be a launch of its own.
_MOVED_IN_RUNS = {"cpu", "meta"}

# A product that is left out has to save more than this share of the multiplications to be worth its additions.
_WORTH_IT = 0.9


@dataclass(frozen=True)
class Slots:
    """The times at which a value's relevance is kept, in one row for all clips or in a row for each.

    Attributes:
        times: of every slot; of a class's slot the first time of the class. A row may end in -1: slots that stay empty.
        of_time: the slot of every time; -1 for a time that is not kept.
    """

    times: tuple[tuple[int, ...], ...]
    of_time: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """How many slots there are."""
        return len(self.times[0])

    @cached_property
    def is_single(self) -> bool:
        """Whether no slot stands for more than one time."""
        return all(len(set(row) - {-1}) == sum(slot >= 0 for slot in row) for row in self.of_time)

    @property
    def is_every_time(self) -> bool:
        """Whether every time has the slot of its own number."""
        return Route.of(self.of_time, self.count).is_identity

    def route(self, times: Sequence[Sequence[int]]) -> Route:
        """For times that were read, in one row or a row for each clip, the slots where they are kept."""
        rows = max(len(times), len(self.of_time))
        return Route.of(
            (
                [of_time[t] if t >= 0 else -1 for t in row]
                for row, of_time in zip(_repeated(times, rows), _repeated(self.of_time, rows), strict=True)
            ),
            self.count,
        )


_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Route:
    """Which source index every index along time is read from.

    Attributes:
        rows: source indices, in one row for all clips or in a row for each; -1: none.
        size: how many source indices there are.
    """

    rows: tuple[tuple[int, ...], ...]
    size: int

    @staticmethod
    def of(rows: Iterable[Iterable[int]], size: int) -> Route:
        """The route with these rows, one where all are equal; what it needs to move tensors is worked out once."""
        found = tuple(map(tuple, rows))
        return _route(found[:1] if len(set(found)) == 1 else found, size)

    @property
    def count(self) -> int:
        """How many indices read."""
        return len(self.rows[0])

    def table(self, taps: int) -> Table:
        """For windows of so many taps that are laid end to end: in every row, for every window, what each tap reads."""
        return [[row[at : at + taps] for at in range(0, len(row), taps)] for row in self.rows]

    @cached_property
    def used(self) -> list[int]:
        """The source indices that are read, in order."""
        return sorted({index for row in self.rows for index in row} - {-1})

    def compact(self) -> Route:
        """The same where the source has nothing but what is used."""
        place = {index: number for number, index in enumerate(self.used)} | {-1: -1}
        return Route.of(([place[index] for index in row] for row in self.rows), len(self.used))

    @cached_property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return all(row == tuple(range(self.size)) for row in self.rows)

    @cached_property
    def _fills(self) -> bool:
        """Whether some index reads nothing."""
        return any(index < 0 for row in self.rows for index in row)

    @cached_property
    def _runs(self) -> list[tuple[slice, int, int, int]]:
        """(clips, index, source index, length): stretches that move together; source index -1: filled."""
        runs: list[tuple[slice, int, int, int]] = []
        for number, row in enumerate(self.rows):
            clips = slice(None) if len(self.rows) == 1 else slice(number, number + 1)
            start = 0
            for end in range(1, len(row) + 1):
                follows = end < len(row) and row[end] == (row[end - 1] + 1 if row[start] >= 0 else -1)
                if not follows:
                    runs.append((clips, start, row[start], end - start))
                    start = end
        return runs

    def gather(self, value: Any, dim: int, fill: float = 0.0) -> Any:
        """The value (a tensor or several) at the indices that are read, along ``dim``."""
        return value if self.is_identity else pytree.tree_map_only(Tensor, lambda x: self._gather(x, dim, fill), value)

    def _gather(self, x: Tensor, dim: int, fill: float) -> Tensor:
        shape = list(x.shape)
        shape[dim] = self.count
        if x.stride(dim) == 0 and x.shape[dim] > 0 and not self._fills:
            return x.narrow(dim, 0, 1).expand(shape)
        if len(self.rows) == 1 and not self._fills:
            if len(self._runs) == 1:
                return x.narrow(dim, self.rows[0][0], self.count)
            if len(self.used) == 1:
                return x.narrow(dim, self.used[0], 1).expand(shape)
        moved = _empty_like(x, dim, self.count)
        if x.is_meta:
            return moved
        if x.device.type not in _MOVED_IN_RUNS:
            return self._take(x, dim, fill, moved)
        for clips, index, source, length in self._runs:
            to = moved[clips].narrow(dim, index, length)
            if source < 0:
                to.fill_(fill)
            else:
                to.copy_(x[clips].narrow(dim, source, length))
        return moved

    def _take(self, x: Tensor, dim: int, fill: float, moved: Tensor) -> Tensor:
        """What is read, by one operation however many stretches it has."""
        indices = self._indices.get(x.device)
        if indices is None:
            rows = torch.tensor(self.rows)
            # Waited for, this once: other streams read them later.
            indices = self._indices[x.device] = tuple(each.to(x.device) for each in (rows.clamp(min=0), rows < 0))
        index, missing = (
            each.view(len(self.rows), *[1] * (dim - 1), self.count, *[1] * (x.ndim - dim - 1)) for each in indices
        )
        torch.gather(x, dim, index.expand(moved.shape), out=moved)
        return moved.masked_fill_(missing, fill) if self._fills else moved

    @cached_property
    def _indices(self) -> dict[torch.device, tuple[Tensor, ...]]:
        """By device the source indices, and which are none."""
        return {}

    @cached_property
    def _back(self) -> list[Route]:
        """Routes from the indices back to the source's: the first that reads each of them, the second, and so on."""
        readers: list[list[list[int]]] = [[[] for _ in range(self.size)] for _ in self.rows]
        for row, own in zip(self.rows, readers, strict=True):
            for index, source in enumerate(row):
                if source >= 0:
                    own[source].append(index)
        most = max(1, *(len(indices) for own in readers for indices in own))
        return [
            Route.of(([(indices[turn : turn + 1] or [-1])[0] for indices in own] for own in readers), self.count)
            for turn in range(most)
        ]

    def scatter(self, relevance: Any, dim: int) -> Any:
        """The adjoint of `gather`: adds what stands at every index to where it was read from.

        What stands at an index that reads nothing goes nowhere: on the way to slots that is relevance of times nobody asked for.
        """
        if self.is_identity:
            return relevance
        return pytree.tree_map_only(Tensor, lambda x: self._scatter(x, dim), relevance)

    def _scatter(self, x: Tensor, dim: int) -> Tensor:
        moved = _empty_like(x, dim, self.size)
        if x.device.type not in _MOVED_IN_RUNS:
            first, *others = self._back
            first._take(x, dim, 0.0, moved)
            for other in others:
                moved.add_(other._take(x, dim, 0.0, torch.empty_like(moved)))
            return moved
        written = [[False] * self.size for _ in self.rows]
        for clips, index, source, length in self._runs:
            if source < 0:
                continue
            row = written[clips.start or 0]
            for step in range(length):
                to, part = moved[clips].select(dim, source + step), x[clips].select(dim, index + step)
                if row[source + step]:
                    to.add_(part)
                else:
                    to.copy_(part)
                row[source + step] = True
        for number, row in enumerate(written):
            clips = slice(None) if len(self.rows) == 1 else slice(number, number + 1)
            for index, is_written in enumerate(row):
                if not is_written:
                    moved[clips].select(dim, index).zero_()
        return moved


_route = lru_cache(maxsize=2**11)(Route)


def _repeated(rows: Sequence[_Row], count: int) -> Sequence[_Row]:
    return rows if len(rows) == count else list(rows) * count


def _empty_like(x: Tensor, dim: int, size: int) -> Tensor:
    """Room for a tensor like ``x``, in its layout, with another size along one dimension."""
    shape = list(x.shape)
    shape[dim] = size
    return room.empty_like(x, shape)


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
            at = _repeated(self.at(node), len(route.rows))
            self._stays[node, source] = route.size == len(at[0]) == route.count and all(
                index == place or (index, time) == (-1, -1)
                for row, times in zip(_repeated(route.rows, len(at)), at, strict=True)
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
            node: _Convolution(node, self.in_time) for node, here in self.in_time.items() if here.way == "convolution"
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
        found = _empty_like(pooled, 2, here.times.distinct)
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

        def one(take: Take, tap: int) -> Tensor:
            call = along.call(tap, values, take, (0,))
            kernel = self.network.forward_kernel(call)
            return _by_planes(call) if kernel == "reference" else fused.forward(call, kernel)

        sums = along.sum_of_taps(one)
        bias = values[node.args[2]] if isinstance(node.args[2:3] and node.args[2], fx.Node) else None  # type: ignore[index]
        sums = sums if bias is None else sums.add_(bias.view(-1, 1, 1, 1))
        return sums.relu_() if relu else sums

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
            return [_empty_like(values[along.source], 2, kept.count).to(one.dtype).zero_() for one in arriving]
        if along.all_differ and at.is_every_time and kept.is_every_time:
            return self._share_at_all_times(step, values, box, arriving, plan)
        limits = box.around(step, dict.__getitem__)
        kernel = self.network.kernel_of(step, along.layer(values, step.positions))
        if isinstance(step.rule, (ZPlus, ZBeta)) and fused.serves_frozen(kernel, step.node, values[along.source]):
            tables = *plan.tables(step.node, along.source), kept.count
            return self._share_by_table(step, along.layer(values, step.positions), limits, arriving, tables, kernel)
        if at.is_single and pulled + along.products >= _WORTH_IT * 2 * along.multiplications:
            return self._share_at_all_times(step, values, box, arriving, plan)
        return self._share_by_taps(step, values, limits, arriving, along, at, kept, taps)

    def _share_by_taps(
        self,
        step: Step,
        values: Values,
        limits: Limits | None,
        arriving: list[Tensor],
        along: _Convolution,
        at: Slots,
        kept: Slots,
        taps: list[Route],
    ) -> list[Tensor]:
        """Each tap as a layer of its own; ``taps`` are the slots of the input that outputs read by them."""
        layer, rule = step.layer, step.rule
        assert isinstance(layer, Weighted) and isinstance(rule, Rule)
        dtype = arriving[0].dtype
        with_bias = Call(step.node, step.positions, values.__getitem__).to(dtype)
        to_made = Route.of([along.made.numbers(row) for row in at.times], along.made.distinct)
        own = Route.of([along.read.numbers(row) for row in kept.times], along.read.distinct)
        shared = [_SumsInTime(_empty_like(values[along.source], 2, kept.count).to(dtype)) for _ in arriving]

        def tap_call(take: Take, tap: int) -> _TapCall:
            return _TapCall(self.network, step, along.call(tap, values, take, step.positions), limits, take, dtype)

        def denominator(group: Group) -> Tensor:
            z: Tensor = to_made.gather(along.sum_of_taps(lambda take, tap: tap_call(take, tap).denominator(group)), 2)
            return z

        output = denominator(OUTPUT) if asks_for_signs(rule) else None
        for group in self.network.reference_rule(step).groups:
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


def check_order(network: Network, sizes: tuple[int, ...]) -> str | None:
    """What a user should know about a model that moves the dimension which is repeated as time; None if it does not.

    What takes the frames of clips of one channel for its channels, as 2D networks may, is not looked at.

    Args:
        network: traced.
        sizes: of clips (N, C, T, H, W), the last four.

    Raises:
        ValueError: the first convolution takes another dimension than 1 for channels, as a model of clips (N, T, C, H, W)
            does: to repeat what lies at an index of dimension 2 would repeat a colour, or a row.
    """
    clips = network.inputs[0].meta["val"]
    for step in network.steps:
        seen = step.sources[0].meta["val"]
        if not step.is_pixel_layer or fused.kind_of(step.node) != "convolution" or elements(seen) != elements(clips):
            continue
        found = [_follow(network, step.sources[0], dim, size) for dim, size in enumerate(sizes, 1)]
        if clips.shape[1] == 1 or found == [1, 2, 3, 4] or 1 not in found:
            continue
        channels = found.index(1) + 1
        # of what the model takes, in the names of N, C, T, H, W; where frames are examples, time has none of its own
        order = _ORDERS.get(channels) if None in found else (0, *(dim for dim in found if dim is not None))
        if order is None:
            continue
        names, back = "".join(f", {'NCTHW'[dim]}" for dim in order[1:]), tuple(order.index(dim) for dim in range(5))
        where, shape = f"{step.path} ({operation_name(step.node)})", ", ".join(map(str, clips.shape[1:]))
        how = f"explain a module that calls model(x.permute{order}), on inputs.permute{back}"
        if channels != 1:
            raise ValueError(
                f"inputs must be clips (N, C, T, H, W), but of clips (N, {shape}) the model takes dimension {channels} for "
                f"channels, as of (N{names}): {where} does; {how}"
            )
        return (
            f"dimension 2 of the inputs is repeated as time, and the model moves it to dimension {order[2]} for {where}: if its "
            f"clips are (N{names}), {how}"
        )
    return None


def check_winners(network: Network, frames: int) -> str | None:
    """What a user should know where one of several times of a frozen clip, which are all alike, gets all relevance.

    Args:
        network: traced on clips of so many frames.
        frames: their number.
    """
    if frames == 1:
        return None
    times = _followed(network, network.nodes, 2, frames)
    # Frames that become examples, as in networks of pictures, are times again where a dimension is as long as the clip.
    are_examples = any(
        times.get(node.args[0]) is not None and times.get(node) is None
        for node in network.nodes
        if node.target is aten.reshape.default and node.meta["val"].shape[0] != node.args[0].meta["val"].shape[0]
    )
    for step in network.steps:
        if not isinstance(step.rule, WinnerTakesAll):
            continue
        (source,) = step.sources
        before, shape = times.get(source), source.meta["val"].shape
        over: Any = step.node.args[1]
        if step.node.target is maximum_over:
            reduced = {dim % len(shape) for dim in over}
            again = are_examples and shape[0] == network.inputs[0].meta["val"].shape[0]
            competes = (
                again and any(shape[dim] == frames for dim in reduced) if before is None else before.dim in reduced
            )
        elif before is None:
            competes = False
        elif step.node.target in _POOLED:
            sizes = over if isinstance(over, (list, tuple)) else [over]
            axis = before.dim - len(shape) + _POOLED[step.node.target]
            competes = axis >= 0 and sizes[axis % len(sizes)] > 1
        else:
            competes = step.node.meta["val"].shape[before.dim] != shape[before.dim]
        if competes:
            return (
                f"{step.path} ({operation_name(step.node)}) gives everything to the largest of several times: in a frozen clip "
                "they are alike, so that the first one wins, and what the others look like counts as temporal. Proportional() "
                "pooling shares between them, and so does an average in place of a maximum over logits"
            )
    return None


_POOLED = {aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3}
"""Over how many of the last dimensions a max pooling's windows reach."""

_ORDERS = {2: (0, 2, 1, 3, 4), 4: (0, 2, 3, 4, 1)}
"""By the dimension of channels: (N, T, C, H, W) and (N, T, H, W, C)."""


def _follow(network: Network, to: fx.Node, dim: int, size: int) -> int | None:
    """Which dimension of a value a dimension of the inputs is, None if that cannot be told."""
    found = _followed(network, network.pixels, dim, size).get(to)
    return None if found is None else found.dim


def _followed(network: Network, nodes: Collection[fx.Node], dim: int, size: int) -> dict[fx.Node, Times | None]:
    """Where a dimension of the inputs is in some values, also where it is a part of another; None if that cannot be told."""
    times: dict[fx.Node, Times | None] = dict.fromkeys(network.inputs, Times(dim, (0,) * size))
    for node in network.nodes:
        if node in nodes and node not in times:
            times[node] = time_axis(node, times.get)
    return times


class _Convolution:
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
        sums: _SumsInTime | None = None
        for tap, at in enumerate(zip(*self._reads, strict=True)):
            route = Route.of([self.read.numbers(at)], self.read.distinct)
            if not route.used:
                continue
            some = Route.of([route.used], self.read.distinct)
            product = one(lambda x, some=some: some.gather(x, 2), tap)  # type: ignore[misc]
            sums = sums or _SumsInTime(_empty_like(product, 2, self.made.distinct))
            sums.add(product, ((part, index) for index, part in enumerate(route.compact().rows[0]) if part >= 0))
        assert sums is not None
        return sums.total()


class _SumsInTime:
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
