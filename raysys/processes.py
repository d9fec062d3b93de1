"""Processes that must not outlive those that started them. Imports nothing but Python's own."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when the one that started it ends, however it ends. Linux only; elsewhere nothing happens.

    Args:
        parent: id of that process, if it is known: this one ends at once when it is gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
