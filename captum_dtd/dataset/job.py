"""What an engine is, and what it is given: a job, and whom to tell how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from captum_dtd.dataset.clips import Clip
from captum_dtd.dataset.configuration import Configuration, weights_digest
from captum_dtd.dataset.processes import Processes
from captum_dtd.dataset.store import Store
from captum_dtd.dataset.work import Decoded, Work, undecodable
from captum_dtd.recipe import Explainer, Recipe
from captum_dtd.version import __version__

__all__ = ["Engine", "Job", "Listener", "load", "lost"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """What is explained, and where it goes.

    Attributes:
        source: folder that the clips' paths are relative to.
        out: the store's folder.
        configuration: of the store.
        clips: all of the store's.
        recipe: the configuration's, but that its weights may lie elsewhere now.
    """

    source: str
    out: Path
    configuration: Configuration
    clips: Sequence[Clip]
    recipe: Recipe

    def store(self) -> Store:
        """The store, to write to."""
        return Store(self.out, self.configuration, self.clips)

    def decodings(self, works: Iterable[Work]) -> Iterator[tuple[str, tuple[Clip, ...], int, int]]:
        """The arguments of `decode` for all that works need, in their order."""
        preprocessing = self.configuration.preprocessing
        for work in works:
            for clips in work.decodings():
                yield self.source, clips, preprocessing["frames"], preprocessing["stride"]


class Listener(Protocol):
    """Whoever wants to know how far the work has come."""

    def explained(self, shard: int, clips: int, failed: int, seconds: dict[str, float]) -> None:
        """Some clips of a shard are explained, of which some failed; seconds by stage as `Stages` counts them."""

    def committed(self, shard: int) -> None:
        """A shard is on the disk."""

    def undone(self, shards: Collection[int]) -> None:
        """What was explained of these shards, and not committed, is lost and will be done again."""


class Engine(Protocol):
    """Where clips are explained.

    Attributes:
        explainer: the model, in this process.
        processes: of this machine, to look into videos.
        device: "cpu" or "cuda": what explains.
        explainers: how many processes explain at the same time.
    """

    @property
    def explainer(self) -> Explainer: ...

    @property
    def processes(self) -> Processes: ...

    @property
    def device(self) -> str: ...

    @property
    def explainers(self) -> int: ...

    def call(self, function: Callable[[Explainer, Processes], Result]) -> Result:
        """Apply a function, to measure something, where clips are explained: to the model and processes that decode."""

    def run(self, job: Job, works: Sequence[Work], listener: Listener) -> None:
        """Explain the clips of shards and commit each shard to the job's store.

        Raises:
            OSError, ValueError, RuntimeError: the run cannot go on. What is committed stays.
        """


def load(job: Job, device: str) -> Explainer:
    """The job's recipe, loaded by another process than the one that began the run.

    Raises:
        ValueError: captum_dtd or the weights are not those with which the run was begun.
        TypeError, OSError, ImportError: as ``recipe.load``.
    """
    if job.configuration.version != __version__:
        raise ValueError(f"captum_dtd is {__version__} here, and {job.configuration.version} where the run was started")
    explainer = job.recipe.load(device)
    if weights_digest(explainer.model) != job.configuration.weights_digest:
        raise ValueError(f"the weights here, {explainer.weights}, are not those where the run was started")
    return explainer


def lost(task: tuple[Any, ...]) -> list[Decoded]:
    """What stands for the result of `decode` where these arguments took its process down twice."""
    return undecodable(task[1], "the process that decoded this video died, twice")
