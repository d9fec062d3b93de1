"""Processes that start fast, and do not outlive those that started them. Imports nothing but Python's own."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when the one that started it ends, however it ends. Linux only; elsewhere nothing happens.

    Args:
        parent: id of that process, if it is known: this one ends at once when it is gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def imports() -> Iterator[None]:
    """Large imports within: they make very many objects that stay, and collections in between take their time and find nothing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # no later collection looks at these objects either
        if collects:
            gc.enable()


def bound(command: Sequence[str]) -> list[str]:
    """The same command as a process that does not outlive the thread that starts it. Its first word is a path."""
    return [sys.executable, "-m", "raysys.processes", str(os.getpid()), *command]


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # the kernel keeps its promise to the program that takes over
