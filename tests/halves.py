"""Tasks that may kill the process they run in; a module of their own, since processes import what they run."""

from __future__ import annotations

import os
import signal


def half(number: int) -> int:
    """Half of an even number; an odd one kills the process."""
    if number % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number // 2


def die_at_once(*_: object) -> None:
    """As a process that finds no memory when it starts."""
    os._exit(9)
