"""Worker processes that outlive their deaths: a task whose process was killed is done again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

__all__ = ["Processes", "end_with_parent", "without_interrupts"]

Result = TypeVar("Result")

# A task that was alone in its process and still took it down so often is the reason.
_MOST_DEATHS = 2


class Processes:
    """Processes that apply a function to tasks, ahead of whoever takes the results.

    Args:
        count: how many; 0 applies the function in this process, when a result is asked for.

    Use it as a context; at its end the processes end.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def map(
        self,
        function: Callable[..., Result],
        tasks: Iterable[tuple[Any, ...]],
        lost: Callable[[tuple[Any, ...]], Result],
    ) -> Iterator[Result]:
        """Yield ``function(*task)`` for each task, in order; at most two tasks for each process are ahead.

        Args:
            function: importable, as its arguments and results are picklable.
            tasks: taken as they are needed.
            lost: what a task gives that takes down every process it is alone in, such as a file that crashes the decoder.
        """
        if not self._count:
            for task in tasks:
                yield function(*task)
            return
        waiting = iter(tasks)
        ahead: deque[tuple[tuple[Any, ...], Future[Result]]] = deque()
        while True:
            try:
                for task in islice(waiting, 2 * self._count - len(ahead)):
                    ahead.append((task, Future()))  # so that it is not forgotten if its submission fails
                    ahead[-1] = task, self._submit(function, task)
                if not ahead:
                    return
                result = ahead[0][1].result()
            except BrokenProcessPool:
                # One of them is the reason, and which is not known: one at a time now.
                suspects = [task for task, _ in ahead]
                ahead.clear()
                self._close()
                for suspect in suspects:
                    yield self._alone(function, suspect, lost)
                continue
            ahead.popleft()
            yield result

    def _alone(
        self,
        function: Callable[..., Result],
        task: tuple[Any, ...],
        lost: Callable[[tuple[Any, ...]], Result],
    ) -> Result:
        for _ in range(_MOST_DEATHS):
            try:
                result: Result = self._submit(function, task).result()
                return result
            except BrokenProcessPool:
                self._close()
        try:
            self._submit(os.getpid, ()).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "worker processes end before they do anything: is memory short, or does the script that calls this lack "
                "its `if __name__ == '__main__':`?"
            ) from error
        return lost(task)

    def _submit(self, function: Callable[..., Any], task: tuple[Any, ...]) -> Future[Any]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, mp_context=context, initializer=end_with_parent)
        with without_interrupts():  # the first task starts the processes
            return self._pool.submit(function, *task)

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach, not even before they have begun: they would each print where they were."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Let this process end as soon as the one that started it has, also if that was killed; Ctrl-C is that one's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
