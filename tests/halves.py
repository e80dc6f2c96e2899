"""A task that may kill the process it runs in; a module of its own, since processes import what they run."""

from __future__ import annotations

import os
import signal


def half(number: int) -> int:
    """Half of an even number; an odd one kills the process."""
    if number % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number // 2
