"""The engine for many machines: a run's batches as a Ray data set, decoded and explained by actors, written by this process.

Ray Data streams batches from one kind of actor to the next, holds back the faster kind so that memory stays bounded, starts
an actor again that was killed, and repeats what was lost with a machine. All of it is a pure function of clips and
configuration, so a batch that is repeated comes out the same; and this process alone writes the store.

Files have the same names on every machine: they lie on a disk that all share.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

try:
    import ray
    import ray.data
except ImportError as error:
    raise ImportError("the engine ray needs Ray: pip install 'captum_dtd[ray]'") from error

from captum_dtd.dataset.clips import Clip
from captum_dtd.dataset.engine_local import cores_each
from captum_dtd.dataset.job import Job, Listener, load, lost
from captum_dtd.dataset.processes import Processes
from captum_dtd.dataset.store import MOST_PARTS
from captum_dtd.dataset.work import Decoded, Explained, VideoMeans, Work, classify, decode, explain
from captum_dtd.recipe import Explainer, Recipe

__all__ = ["RayEngine", "ray_engine"]

Result = TypeVar("Result")

# What takes down its process so often is the reason.
_MOST_DECODER_DEATHS, _MOST_DEATHS = 2, 3
# Ray takes milliseconds for each piece before it begins with the first.
_MOST_PIECES = 10_000


@dataclass(frozen=True)
class _Cluster:
    """What a run uses of a Ray cluster.

    Attributes:
        device: "cuda" or "cpu".
        explainers: actors that explain: one for each GPU, or as many as a process on each machine's CPU would start.
        decoders: actors that decode.
        cores: of an actor that explains on a CPU.
        threads: of a process that explains there.
    """

    device: str
    explainers: int
    decoders: int
    cores: int
    threads: int

    @property
    def decoding(self) -> dict[str, float]:
        """What an actor that decodes asks Ray for; beside a model on the CPU it needs too little to count."""
        return {"num_cpus": 1 if self.device == "cuda" else 0}

    @property
    def explaining(self) -> dict[str, float]:
        """What an actor that explains asks Ray for."""
        return {"num_cpus": 0, "num_gpus": 1} if self.device == "cuda" else {"num_cpus": self.cores}

    def claim(self) -> None:
        """Let this process use what it got by :attr:`explaining`."""
        if self.device == "cpu":
            torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class RayEngine:
    """A Ray cluster; see `Engine`."""

    explainer: Explainer
    processes: Processes
    _cluster: _Cluster

    @property
    def device(self) -> str:
        """What the cluster explains on, "cpu" or "cuda", which this process may not have."""
        return self._cluster.device

    @property
    def explainers(self) -> int:
        """How many actors explain."""
        return self._cluster.explainers

    def call(self, function: Callable[[Explainer, Processes], Result]) -> Result:
        """Apply a function where clips are explained, to the model and to no other processes."""
        task = ray.remote(_call).options(**self._cluster.explaining)
        with _told():
            result: Result = ray.get(task.remote(self._cluster, self.explainer.recipe, function, os.getcwd()))
        return result

    def run(self, job: Job, works: Sequence[Work], listener: Listener) -> None:
        """Do the work on the cluster; a shard is written here as soon as all of it has come.

        Raises:
            RuntimeError: an actor raised, or a piece of the work took its actor down again and again. What is committed
                stays.
            OSError: the disk is full, say. What is committed stays.
        """
        if not works:
            return
        cluster, store = self._cluster, job.store()
        pieces = _pieces(works, _video_means(job, works, cluster))
        missing = {work.shard: sum(map(len, work.batches)) for work in works}
        rows: dict[int, list[Explained]] = {work.shard: [] for work in works}
        seconds = {"decode": 0.0, "explain": 0.0, "write": 0.0}
        with closing(_streamed(job, pieces, cluster, _Explaining)) as results:
            for shard, explained, decoding, explaining in results:
                rows[shard] += explained
                missing[shard] -= len(explained)
                seconds["decode"] += decoding / cluster.decoders
                seconds["explain"] += explaining / cluster.explainers
                failed = sum(row.columns["status"] != "ok" for row in explained)
                listener.explained(shard, len(explained), failed, seconds)
                if not missing[shard]:
                    begin = time.monotonic()
                    store.commit(shard, rows.pop(shard))
                    listener.committed(shard)
                    store.gather(at_least=MOST_PARTS)
                    seconds["write"] += time.monotonic() - begin


@contextmanager
def ray_engine(recipe: Recipe, devices: Sequence[str] | None, decoders: int | None) -> Iterator[RayEngine]:
    """A Ray cluster, ready to explain: the one that is connected, that RAY_ADDRESS names or that runs here, or a new one.

    Args:
        recipe: how.
        devices: "cpu" or "cuda"; by default the cluster's GPUs, if it has any.
        decoders: actors that decode, for each that explains.

    Raises:
        ValueError: the cluster has no such device, or one is named that is Ray's to choose.
        ValueError, TypeError, OSError, ImportError: as ``recipe.load``.
    """
    begun = not ray.is_initialized()
    if begun:
        ray.init(logging_level=logging.WARNING)
    # Ray Data tells how it runs, and that its progress bars are off, which they are for ours.
    loggers = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name, level in loggers.items():
        logging.getLogger(name).setLevel(level)
    try:
        cluster = _cluster(devices, decoders)
        with Processes(max(1, len(os.sched_getaffinity(0)) // 2)) as processes:
            yield RayEngine(recipe.load("cpu"), processes, cluster)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if begun:
            ray.shutdown()


def _cluster(devices: Sequence[str] | None, decoders: int | None) -> _Cluster:
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    machines = [machine for machine in machines if machine.get("CPU", 0) >= 1]
    cores = [int(machine["CPU"]) for machine in machines]
    device = " ".join(devices) if devices is not None else "cuda" if gpus else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"for the engine ray the device is cpu or cuda, not {device}: Ray hands out its GPUs itself")
    if not cores or (device == "cuda" and not gpus):
        raise ValueError(f"the Ray cluster has no {'GPU: the device must be cpu' if cores else 'CPU'}")
    if decoders is not None and decoders < 1:
        raise ValueError(f"for the engine ray there must be at least 1 decoder, not {decoders}")
    if device == "cuda":
        each = decoders or max(1, min(8, sum(cores) // (2 * gpus)))
        return _Cluster(device, gpus, min(gpus * each, sum(cores)), cores=1, threads=1)
    per_actor = max(cores_each(int(machine["CPU"]), int(machine.get("memory", 0))) for machine in machines)
    explainers = sum(count // per_actor for count in cores)
    # as here, for the same bits: a thread for each core, or for two of them that are one
    threads = max(1, torch.get_num_threads() * per_actor // len(os.sched_getaffinity(0)))
    return _Cluster(device, explainers, explainers * (decoders or max(1, per_actor // 8)), per_actor, threads)


def _video_means(job: Job, works: Iterable[Work], cluster: _Cluster) -> VideoMeans | None:
    """The means of the videos in some works, if targets follow from them."""
    batches = dict.fromkeys(batch for work in works for batch in work.classified)
    if not batches:
        return None
    means = VideoMeans()
    pieces = [(Work(0, (), (batch,)), None) for batch in batches]
    for outputs in _streamed(job, pieces, cluster, _Classifying, in_order=True):
        for path, output in outputs:
            means.add(path, output)
    return means


def _pieces(works: Sequence[Work], means: VideoMeans | None) -> list[tuple[Work, VideoMeans | None]]:
    """The works, a few batches each, with what is known about their videos."""
    size = -(-sum(len(work.batches) for work in works) // _MOST_PIECES)
    pieces: list[tuple[Work, VideoMeans | None]] = []
    for work in works:
        for start in range(0, len(work.batches), size):
            batches = work.batches[start : start + size]
            known = means and means.of({clip.path for batch in batches for clip in batch})
            pieces.append((Work(work.shard, batches), known))
    return pieces


def _streamed(
    job: Job,
    pieces: Sequence[tuple[Work, VideoMeans | None]],
    cluster: _Cluster,
    kind: type[_Classifying | _Explaining],
    *,
    in_order: bool = False,
) -> Generator[Any, None, None]:
    """What actors of a kind give for pieces of the work that others decode, as soon as it has come, or in order."""
    settings = ray.data.DataContext.get_current()
    before = settings.enable_progress_bars, settings.execution_options.preserve_order
    settings.enable_progress_bars, settings.execution_options.preserve_order = False, in_order
    try:
        with _told():
            arguments = replace(job, clips=()), cluster, _begin_counting(), os.getcwd()
            # a block for each piece: what is handed on, and repeated where it is lost, by itself
            data = ray.data.from_items([pickle.dumps(piece) for piece in pieces], override_num_blocks=len(pieces))
            for actor, count, asked in (
                (_Decoding, cluster.decoders, cluster.decoding),
                (kind, cluster.explainers, cluster.explaining),
            ):
                data = data.map(
                    actor,
                    fn_constructor_args=arguments,
                    compute=ray.data.ActorPoolStrategy(size=count),
                    **asked,
                )
            for row in data.iter_rows():
                result = pickle.loads(row["item"])
                if isinstance(result, _Failure):
                    raise RuntimeError(result.text)
                yield result
    finally:
        settings.enable_progress_bars, settings.execution_options.preserve_order = before


@dataclass(frozen=True)
class _Failure:
    """In place of a result: what an actor raised."""

    text: str


class _Actor(ABC):
    """A process of the cluster, and what it keeps from one piece of the work to the next."""

    def __init__(self, job: Job, cluster: _Cluster, attempts: Any, here: str) -> None:
        self._job, self._cluster, self._attempts = job, cluster, attempts
        _enter(here)

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        given = pickle.loads(row["item"])
        try:
            result = given if isinstance(given, _Failure) else self._apply(*given)
        except Exception as error:  # a value, since Ray would log the frames of each piece that is under way
            result = _Failure(f"{socket.gethostname()}: {type(error).__name__}: {error}")
        return {"item": pickle.dumps(result)}

    @abstractmethod
    def _apply(self, *given: Any) -> Any:
        """From what is handed to this actor to what it hands on."""

    @contextmanager
    def _attempt(self, *what: object) -> Iterator[int]:
        """Do something that may take this process down; gives how often it was begun and not ended, this time included."""
        attempt = ray.get(self._attempts.begin.remote(what))
        try:
            yield attempt
        finally:  # an error is no death
            self._attempts.end.remote(what)


class _Decoding(_Actor):
    """Decodes; a video that has taken this process down twice is not touched again, and is a row with an error."""

    def _apply(self, work: Work, known: VideoMeans | None) -> _Pixels:
        begin = time.monotonic()
        if not os.path.isdir(self._job.source):
            raise FileNotFoundError(f"there is no folder {self._job.source} on this machine of the cluster")
        decoded = []
        for task in self._job.decodings([work]):
            with self._attempt("decode", task[1][0].row) as attempt:
                decoded.append(lost(task) if attempt > _MOST_DECODER_DEATHS else decode(*task))
        return _Pixels(work, known, decoded, time.monotonic() - begin)


class _Pixels(NamedTuple):
    """A piece of the work, decoded, and the seconds that took."""

    work: Work
    known: VideoMeans | None
    decoded: list[list[Decoded]]
    seconds: float


class _Modelled(_Actor):
    """Has the model, which it loads for itself."""

    @cached_property
    def _explainer(self) -> Explainer:
        self._cluster.claim()
        return load(self._job, self._cluster.device)

    @contextmanager
    def _surviving(self, clip: Clip) -> Iterator[None]:
        """Do something for a clip and those that follow, unless it has taken this process down again and again."""
        with self._attempt("explain", clip.row) as attempt:
            if attempt > _MOST_DEATHS:
                raise RuntimeError(f"the process that explains {clip.id} and those after it died {_MOST_DEATHS} times")
            yield


class _Classifying(_Modelled):
    def _apply(
        self, work: Work, known: VideoMeans | None, decoded: list[list[Decoded]], seconds: float
    ) -> list[tuple[bytes, Tensor]]:
        with self._surviving(work.classified[0][0]):
            outputs = classify(self._explainer, work.classified, decoded)
            return [(clip.path, output.cpu()) for clip, output in outputs]


class _Explaining(_Modelled):
    def _apply(
        self, work: Work, known: VideoMeans | None, decoded: list[list[Decoded]], seconds: float
    ) -> tuple[int, list[Explained], float, float]:
        with self._surviving(work.batches[0][0]):
            explainer = self._explainer
            begin = time.monotonic()
            batches = explain(explainer, self._job.configuration, work, decoded, known)
            rows = [row for batch in batches for row in batch]
            return work.shard, rows, seconds, time.monotonic() - begin


def _begin_counting() -> Any:
    """An actor that counts what was begun and not ended, since the process that does it may die without a word."""

    class Attempts:  # here, so that its process gets it by value and imports nothing
        def __init__(self) -> None:
            self._begun: dict[tuple[object, ...], int] = {}

        def begin(self, what: tuple[object, ...]) -> int:
            self._begun[what] = self._begun.get(what, 0) + 1
            return self._begun[what]

        def end(self, what: tuple[object, ...]) -> None:
            self._begun.pop(what, None)

    return ray.remote(Attempts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


def _call(cluster: _Cluster, recipe: Recipe, function: Callable[[Explainer, Processes], Result], here: str) -> Result:
    _enter(here)
    cluster.claim()
    with Processes(0) as processes:
        return function(recipe.load(cluster.device), processes)


def _enter(folder: str) -> None:
    """Let relative names mean here what they mean where the run was started, if this machine has that folder."""
    with suppress(OSError):
        os.chdir(folder)


@contextmanager
def _told() -> Iterator[None]:
    """Raise what Ray raises as a RuntimeError with the reason alone."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise RuntimeError(f"{type(cause).__name__}: {cause}") from error
