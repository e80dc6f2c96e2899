"""The engine for one machine: decode in processes, explain here or in one process for each device, write in a thread."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch

from captum_dtd.dataset.clips import Clip
from captum_dtd.dataset.configuration import Configuration
from captum_dtd.dataset.processes import Processes, end_with_parent
from captum_dtd.dataset.progress import Stages
from captum_dtd.dataset.store import MOST_PARTS, Store
from captum_dtd.dataset.work import Decoded, Explained, Work, decode, explain, undecodable
from captum_dtd.recipe import Explainer

__all__ = ["Job", "Listener", "run_here", "run_on_devices"]

# A device's process that died so often without finishing a shard will not do better.
_MOST_DEATHS = 3


@dataclass(frozen=True)
class Job:
    """What a process needs to know beside its work.

    Attributes:
        source: folder that the clips' paths are relative to.
        out: the store's folder.
        configuration: of the store.
        clips: all of the store's.
        decoders: processes that decode, for each device; 0 decodes in the process that explains.
        threads: of each process that explains.
    """

    source: str
    out: Path
    configuration: Configuration
    clips: Sequence[Clip]
    decoders: int
    threads: int

    def store(self) -> Store:
        """The store, to write to."""
        return Store(self.out, self.configuration, self.clips)


class Listener(Protocol):
    """Whoever wants to know how far the work has come."""

    def explained(self, shard: int, clips: int, failed: int, seconds: dict[str, float]) -> None:
        """Some clips of a shard are explained, of which some failed; seconds by stage as `Stages` counts them."""

    def committed(self, shard: int) -> None:
        """A shard is on the disk."""

    def undone(self, shards: Collection[int]) -> None:
        """What was explained of these shards, and not committed, is lost and will be done again."""


def run_here(job: Job, works: Sequence[Work], explainer: Explainer, processes: Processes, listener: Listener) -> None:
    """Do the work in this process, on the explainer's device, shard by shard; the other processes decode.

    Raises:
        OSError: the disk is full, say. What is committed stays.
        ValueError, RuntimeError: as the model and the method raise.
    """
    _run(job, works, explainer, processes, listener, gather_at=MOST_PARTS)


def run_on_devices(job: Job, works: Sequence[Work], devices: Sequence[str], listener: Listener) -> None:
    """Do the work in one process for each device, each with its part of the shards; one that is killed is started again.

    Raises:
        RuntimeError: a process ended with an error, or died again and again. What is committed stays.
    """
    teams = [_Team(job, device, works[number :: len(devices)], listener) for number, device in enumerate(devices)]
    try:
        while busy := {team.connection(): team for team in teams if team.left}:
            for connection in wait(list(busy)):
                busy[connection].listen()  # type: ignore[index]
    finally:
        for team in teams:
            team.stop()


def _run(
    job: Job,
    works: Sequence[Work],
    explainer: Explainer,
    processes: Processes,
    listener: Listener,
    gather_at: int | None = None,
) -> None:
    store, stages, prepare = job.store(), Stages(), explainer.prepare

    def commit(shard: int, rows: list[Explained]) -> None:
        store.commit(shard, rows)
        listener.committed(shard)
        if gather_at is not None:
            store.gather(at_least=gather_at)

    with ThreadPoolExecutor(1) as writer:
        tasks = ((job.source, clips, prepare.frames, prepare.stride) for work in works for clips in work.decodings())
        decoded = stages.each("decode", processes.map(decode, tasks, _lost))
        writing: list[Future[None]] = []
        for work in works:
            rows: list[Explained] = []
            for batch in explain(explainer, job.configuration, work, decoded):
                rows += batch
                failed = sum(row.columns["status"] != "ok" for row in batch)
                listener.explained(work.shard, len(batch), failed, stages.seconds())
            # One shard is written while the next is explained, and no more wait in memory.
            with stages.waiting("write"):
                _finish(writing)
            writing.append(writer.submit(commit, work.shard, rows))
        _finish(writing)


def _finish(writing: list[Future[None]]) -> None:
    while writing:
        writing.pop().result()


def _lost(task: tuple[Any, ...]) -> list[Decoded]:
    return undecodable(task[1], "the process that decoded this video died, twice")


class _Team:
    """One device's process, and the shards that are left for it."""

    def __init__(self, job: Job, device: str, works: Sequence[Work], listener: Listener) -> None:
        self._job, self._device, self._listener = job, device, listener
        self.left = {work.shard: work for work in works}
        self._running: tuple[BaseProcess, Connection] | None = None
        self._deaths = 0

    def connection(self) -> Connection:
        """Where the process sends what it has done; it is started if it does not run."""
        if self._running is None:
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe(duplex=False)
            arguments = (self._job, self._device, tuple(self.left.values()), theirs)
            process = context.Process(target=_serve, args=arguments)
            process.start()
            theirs.close()
            self._running = process, ours
        return self._running[1]

    def listen(self) -> None:
        """Take one message of the process, or notice that it has ended."""
        try:
            name, arguments = self.connection().recv()
        except (EOFError, OSError):  # it ended, perhaps in the middle of a message
            self._ended()
            return
        if name == "error":
            raise RuntimeError(f"{self._device}: {arguments[0]}")
        if name == "committed":
            self.left.pop(arguments[0])
            self._deaths = 0
        getattr(self._listener, name)(*arguments)

    def _ended(self) -> None:
        assert self._running is not None
        process, _ = self._running
        process.join()
        self._running = None
        self._deaths += 1
        self._listener.undone(self.left)
        if self.left and self._deaths == _MOST_DEATHS:
            raise RuntimeError(
                f"the process for {self._device} died {_MOST_DEATHS} times in a row (exit code {process.exitcode}); "
                "what is committed stays, and the same command goes on"
            )

    def stop(self) -> None:
        if self._running is not None:
            self._running[0].terminate()
            self._running[0].join()


class _Messages:
    """A listener at the other end of a connection, told by the thread that explains and by the one that writes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def explained(self, shard: int, clips: int, failed: int, seconds: dict[str, float]) -> None:
        self._send("explained", shard, clips, failed, seconds)

    def committed(self, shard: int) -> None:
        self._send("committed", shard)

    def undone(self, shards: Collection[int]) -> None:
        self._send("undone", list(shards))

    def error(self, text: str) -> None:
        self._send("error", text)

    def _send(self, name: str, *arguments: Any) -> None:
        with self._lock:
            self._connection.send((name, arguments))


def _serve(job: Job, device: str, works: Sequence[Work], connection: Connection) -> None:
    """What a device's process does."""
    end_with_parent()
    messages = _Messages(connection)
    try:
        torch.set_num_threads(job.threads)
        with Processes(job.decoders) as processes:
            _run(job, works, job.configuration.recipe.load(device), processes, messages)
    except Exception as error:
        messages.error(f"{type(error).__name__}: {error}")
