"""How far a run has come, and which of its stages keeps the others waiting."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

__all__ = ["Progress", "Stages"]

Item = TypeVar("Item")


class Stages:
    """Where the explaining process spends its time: waiting for clips, explaining, or waiting for the disk."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._waited = {"decode": 0.0, "write": 0.0}

    @contextmanager
    def waiting(self, stage: str) -> Iterator[None]:
        """Count the time that passes as waiting for a stage, "decode" or "write"."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._waited[stage] += time.monotonic() - begin

    def each(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """Items, the time that each takes to come counted as waiting."""
        iterator = iter(items)
        while True:
            with self.waiting(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[str, float]:
        """Seconds by stage since the beginning: "decode", "explain", "write"."""
        spent = time.monotonic() - self._begin
        return {
            "decode": self._waited["decode"],
            "explain": spent - sum(self._waited.values()),
            "write": self._waited["write"],
        }


class Progress:
    """A progress bar over a store's clips: clips per second, the time that is left, and the stage that takes most of it.

    Args:
        total: clips of the store.
        done: clips that are there already.
        show: whether to show it.
    """

    def __init__(self, total: int, done: int, show: bool) -> None:
        self._bar = tqdm(total=total, initial=done, desc="explaining", unit="clip", disable=not show, smoothing=0.05)
        self._failed = 0
        self._open: dict[int, int] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def explained(self, shard: int, clips: int, failed: int, seconds: dict[str, float]) -> None:
        """Some clips of a shard are explained, of which some failed; seconds by stage as `Stages` counts them."""
        self._open[shard] = self._open.get(shard, 0) + clips
        self._failed += failed
        slowest = max(seconds, key=lambda stage: seconds[stage])
        share = seconds[slowest] / max(sum(seconds.values()), 1e-9)
        failures = f", {self._failed} failed" if self._failed else ""
        self._bar.set_postfix_str(f"bottleneck: {slowest} {share:.0%}{failures}", refresh=False)
        self._bar.update(clips)

    def committed(self, shard: int) -> None:
        """A shard is on the disk."""
        self._open.pop(shard, None)

    def undone(self, shards: Collection[int]) -> None:
        """What was explained of these shards, and not committed, is lost and will be done again."""
        self._bar.update(-sum(self._open.pop(shard, 0) for shard in shards))
