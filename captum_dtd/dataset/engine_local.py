"""The engine for one machine: decode in processes, explain here or in one process for each device, write in a thread."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

import torch

from captum_dtd.dataset.job import Job, Listener, load, lost
from captum_dtd.dataset.processes import Processes, end_with_parent, without_interrupts
from captum_dtd.dataset.progress import Stages
from captum_dtd.dataset.store import MOST_PARTS
from captum_dtd.dataset.work import Explained, Work, decode, explain
from captum_dtd.recipe import Explainer, Recipe, device_named

__all__ = ["LocalEngine", "cores_each", "local_engine"]

Result = TypeVar("Result")

# A device's process that died so often without finishing a shard will not do better.
_MOST_DEATHS = 3
_SECONDS_TO_END = 10
# What a process that explains on the CPU should find: a model, its weights laid out for kernels, a batch at work, a decoder.
_PROCESS_BYTES = 4 * 2**30


@dataclass(frozen=True)
class LocalEngine:
    """This machine; see `Engine`."""

    explainer: Explainer
    processes: Processes
    _devices: Sequence[str]
    _decoders: int | None

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return self.explainer.device.type

    @property
    def explainers(self) -> int:
        """How many processes explain at the same time."""
        return len(self._devices)

    def call(self, function: Callable[[Explainer, Processes], Result]) -> Result:
        """Apply a function to the model and to processes that decode, with the threads of one process among several."""
        threads = torch.get_num_threads()
        torch.set_num_threads(_share_of_cores(self.explainers, self.device, self._decoders).threads)
        try:
            return function(self.explainer, self.processes)
        finally:
            torch.set_num_threads(threads)

    def run(self, job: Job, works: Sequence[Work], listener: Listener) -> None:
        """Do the work: here if there is one device, otherwise in a process for each, and one that is killed starts again.

        There are no more processes than the store has shards, done or not, so that threads, and the last bits of results,
        are the same whenever a run goes on.

        Raises:
            OSError: the disk is full, say. What is committed stays.
            ValueError, RuntimeError: as the model and the method raise, or a process died again and again.
        """
        devices = self._devices[: max(1, -(-len(job.clips) // job.configuration.shard_clips))]
        if len(devices) == 1:
            _run(job, works, self.explainer, self.processes, listener, gather_at=MOST_PARTS)
        else:
            share = _share_of_cores(len(devices), self.device, self._decoders)
            _run_on_devices(job, works, devices, share, listener)


@contextmanager
def local_engine(recipe: Recipe, devices: Sequence[str] | None, decoders: int | None) -> Iterator[LocalEngine]:
    """This machine, ready to explain.

    Args:
        recipe: how.
        devices: by default every GPU, or the CPU as often as :func:`cores_each` says, or once if there are no decoders.
        decoders: processes that decode, for each device; 0 decodes in the process that explains.

    Raises:
        ValueError, TypeError, OSError, ImportError: as ``recipe.load``, or the devices are of different kinds.
    """
    if devices is None:
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"] * _cpu_processes(
            decoders
        )
    if not devices or len({device_named(name).type for name in devices}) > 1:
        raise ValueError(f"devices must be one or more of one kind, not {', '.join(devices) or 'none'}")
    explainer = recipe.load(devices[0])
    with Processes(_share_of_cores(1, explainer.device.type, decoders).decoders) as processes:
        yield LocalEngine(explainer, processes, devices, decoders)


def cores_each(cores: int, memory: int) -> int:
    """Cores for each process that explains on a CPU: one, since several wait for each other, unless memory is short.

    Args:
        cores: of the machine, that may be used.
        memory: of the machine, in bytes.

    Example:
        >>> cores_each(16, 128 * 2**30), cores_each(16, 16 * 2**30)
        (1, 4)
    """
    return -(-cores // max(1, min(cores, memory // _PROCESS_BYTES)))


def _cpu_processes(decoders: int | None) -> int:
    if decoders == 0:
        return 1
    cores = torch.get_num_threads()
    return cores // cores_each(cores, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


class _Share(NamedTuple):
    """What each of some processes that explain gets of the machine: processes that decode for it, and threads."""

    decoders: int
    threads: int


def _share_of_cores(explaining: int, device: str, decoders: int | None) -> _Share:
    if decoders is None:
        cores = len(os.sched_getaffinity(0))
        # A core decodes a thousand frames per second; a model on the CPU takes tens, so there nearly all cores are its.
        decoders = max(1, (cores // 8 if device == "cpu" else min(8, cores // 2)) // explaining)
    return _Share(decoders, max(1, torch.get_num_threads() // explaining))


def _run_on_devices(job: Job, works: Sequence[Work], devices: Sequence[str], share: _Share, listener: Listener) -> None:
    teams = [
        _Team(job, device, share, works[number :: len(devices)], listener) for number, device in enumerate(devices)
    ]
    try:
        while busy := {team.connection(): team for team in teams if team.left}:
            for connection in wait(list(busy)):
                busy[connection].listen()  # type: ignore[index]
        for team in teams:
            team.finish()
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
    store, stages = job.store(), Stages()

    def commit(shard: int, rows: list[Explained]) -> None:
        store.commit(shard, rows)
        listener.committed(shard)
        if gather_at is not None:
            store.gather(at_least=gather_at)

    with ThreadPoolExecutor(1) as writer:
        decoded = stages.each("decode", processes.map(decode, job.decodings(works), lost))
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


class _Team:
    """One device's process, and the shards that are left for it."""

    def __init__(self, job: Job, device: str, share: _Share, works: Sequence[Work], listener: Listener) -> None:
        self._job, self._device, self._share, self._listener = job, device, share, listener
        self.left = {work.shard: work for work in works}
        self._running: tuple[BaseProcess, Connection] | None = None
        self._deaths = 0

    def connection(self) -> Connection:
        """Where the process sends what it has done; it is started if it does not run."""
        if self._running is None:
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self._device, theirs))
            with without_interrupts():
                process.start()
            theirs.close()
            self._running = process, ours
            # The work comes after: a list of all clips would wait for ever in the way to a process that dies while it starts.
            work = self._job, self._share, tuple(self.left.values())
            threading.Thread(target=_hand_over, args=(ours, work), daemon=True).start()
        return self._running[1]

    def listen(self) -> None:
        """Take one message of the process, or notice that it has ended."""
        try:
            name, arguments = self.connection().recv()
        except (EOFError, OSError):  # it ended, perhaps in the middle of a message
            self._ended()
            return
        if name == "error":
            raise arguments[0]
        if name == "warning":
            warnings.warn(arguments[0], UserWarning, stacklevel=2)
            return
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

    def finish(self) -> None:
        """Let the process, which has nothing left to do, end by itself, so that it cleans up."""
        if self._running is not None:
            self._running[0].join(_SECONDS_TO_END)

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

    def warning(self, text: str) -> None:
        self._send("warning", text)

    def error(self, error: Exception) -> None:
        """Tell of an error, as one of a built-in class: others may not survive the way."""
        kinds = (ValueError, TypeError, ImportError)
        if isinstance(error, OSError) and error.errno is not None:
            told: Exception = OSError(error.errno, error.strerror, error.filename)
        else:
            kind = next((kind for kind in kinds if isinstance(error, kind)), None)
            told = kind(str(error)) if kind else RuntimeError(f"{type(error).__name__}: {error}")
        self._send("error", told)

    def _send(self, name: str, *arguments: Any) -> None:
        with self._lock:
            self._connection.send((name, arguments))


def _hand_over(connection: Connection, work: tuple[Job, _Share, Sequence[Work]]) -> None:
    with suppress(OSError):  # the process has died, which whoever listens to it finds
        connection.send(work)


def _serve(device: str, connection: Connection) -> None:
    """What a device's process does."""
    end_with_parent()
    messages = _Messages(connection)
    try:
        job, share, works = connection.recv()
        torch.set_num_threads(share.threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # who started this has loaded the recipe too, and told
            explainer = load(job, device)
        with warnings.catch_warnings(), Processes(share.decoders) as processes:
            warnings.showwarning = lambda message, *_, **__: messages.warning(str(message))
            _run(job, works, explainer, processes, messages)
    except Exception as error:
        messages.error(error)
