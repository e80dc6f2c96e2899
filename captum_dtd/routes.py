"""Moving values along time: from the classes where they are kept to what reads them, and relevance back to its slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from captum_dtd.ops import Table
from captum_dtd.room import empty_along

# Where stretches of times are copied one by one, as cheap as memory allows. Elsewhere each would be a launch of its own.
_MOVED_IN_RUNS = {"cpu", "meta"}


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
                for row, of_time in zip(repeated(times, rows), repeated(self.of_time, rows), strict=True)
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
        moved = empty_along(x, dim, self.count)
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
            rows = torch.tensor(self.rows, device="cpu")
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
        moved = empty_along(x, dim, self.size)
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


def repeated(rows: Sequence[_Row], count: int) -> Sequence[_Row]:
    return rows if len(rows) == count else list(rows) * count
