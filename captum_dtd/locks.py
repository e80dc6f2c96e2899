"""Locks that a forked process has anew, and that know whose they are.

A fork copies locks as they are, but of the threads that may hold them only the one that forks: others' locks would stay locked.
"""

from __future__ import annotations

import os
import threading
from weakref import WeakSet

__all__ = ["Lock"]


class Lock:
    """A lock for ``with``.

    Example:
        >>> lock = Lock()
        >>> with lock:
        ...     lock.held_here
        True
    """

    def __init__(self) -> None:
        self._renew()
        _LOCKS.add(self)

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = None
        self._lock.release()

    @property
    def held_here(self) -> bool:
        """Whether this thread holds it, and would wait for itself."""
        return self._owner == threading.get_ident()


_LOCKS: WeakSet[Lock] = WeakSet()


def _renew_all() -> None:
    for lock in _LOCKS:
        lock._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
