"""One head for all who work on a machine: each borrows it, and the last one to leave stops it."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from raysys import head as heads
from raysys.head import Head

_USERS = "users"
_PARTING_SECONDS = 5.0
"""For so long Ray may list who has just ended as running."""


@contextlib.contextmanager
def borrowed(home: Path, cpus: int | None = None, keep: bool = False) -> Iterator[tuple[Head, bool]]:
    """The head of `home` for the time of the block, and whether it was there already. The last one to leave stops it.

    Args:
        cpus: of one that must be started, see `head.start`.
        keep: leave it running in any case.

    Raises:
        ConfigError, InfrastructureError: as `head.running` and `head.start`.
    """
    with contextlib.ExitStack() as stay:
        with heads.locked(home):
            found = heads.running(home)
            head = found or heads.start(home, cpus=cpus)
            # Held by all who are in such a block: between two stages they have no job that Ray could list.
            fcntl.flock(stay.enter_context(open(home / _USERS, "w")), fcntl.LOCK_SH)
        try:
            yield head, found is not None
        finally:
            with heads.locked(home):
                stay.close()
                if not keep and head.alive():
                    _leave(home, head)


def _leave(home: Path, head: Head) -> None:
    others = _others(home, head)
    if others:
        print(f"the Ray head stays: {others}", flush=True)
    else:
        head.stop()


def _others(home: Path, head: Head) -> str:
    """Who else works on the head, "" if nobody does."""
    with open(home / _USERS, "w") as users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "somebody else uses it"
    began, told = time.monotonic(), 0.0
    while True:
        jobs = head.jobs(heads.ANSWER_SECONDS)
        now = time.monotonic()
        if jobs is None:
            if now - began > heads.PATIENCE_SECONDS:
                return f"it does not say who works on it; {heads.STOP} ends it"
        else:
            busy, told = [job for job in jobs if job["status"] not in heads.ENDED], told or now
            if not busy:
                return ""
            if now - told > _PARTING_SECONDS:
                return f"{len(busy)} other job(s) run on it"
        time.sleep(0.2)
