"""A run that goes on by itself: the job runs in a child process, which is started again when it was killed or the cluster failed it.

Everything a restart needs is in the run's folder, so this process knows nothing but the command line. It ends for good when the
job is done, when the input was wrong, or when several attempts in a row got no further than the last resume point.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("raysys")

ATTEMPT = "RAYSYS_ATTEMPT"
SUPERVISOR = "RAYSYS_SUPERVISOR"
TRY_AGAIN = 75
"""Exit code of an attempt that another one may better (EX_TEMPFAIL)."""
_PAUSE_SECONDS = 1.0


def attempt() -> int | None:
    """Which attempt this process is, from 0; None: it is not supervised."""
    number = os.environ.get(ATTEMPT)
    return int(number) if number is not None else None


def supervisor() -> int | None:
    """Id of the process that started this attempt. It is told once: what this process starts has another parent."""
    pid = os.environ.pop(SUPERVISOR, None)
    return int(pid) if pid is not None else None


def supervise(
    command: Sequence[str],
    restarts: int,
    progress: Callable[[], object],
    pulse: Callable[[], Path],
    silence: float,
    begin: float = 60.0,
) -> int:
    """Runs `command` until it ends for good; returns its exit code.

    Args:
        command: of one attempt.
        restarts: attempts after the first that may follow one another without progress.
        progress: anything that differs once a new resume point is there.
        pulse: file that an attempt touches while it is alive (`beating`).
        silence: seconds without that after which an attempt is killed.
        begin: seconds until its first one: an attempt imports, reads its data and joins the cluster before it.
    """
    number, left, known = 0, restarts, progress()
    while True:
        child = subprocess.Popen(command, env=os.environ | {ATTEMPT: str(number), SUPERVISOR: str(os.getpid())})
        code = _wait(child, pulse, silence, max(silence, begin))
        if code not in (TRY_AGAIN, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT):
            return 128 - code if code < 0 else code
        now = progress()
        left, known = (restarts if now != known else left), now
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "lost a part of the cluster"
        if not left:
            log.error("the run %s; %d restarts in a row got no further, so it ends here", how, restarts)
            return 1
        number, left = number + 1, left - 1
        log.warning("the run %s; it goes on from its newest resume point (%d more restarts without progress)", how, left)
        time.sleep(_PAUSE_SECONDS)


@contextmanager
def beating(pulse: Path) -> Iterator[None]:
    """Touches a file every second from a thread of this process, for as long as the block lasts."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(1.0):
            with contextlib.suppress(OSError):
                pulse.touch()

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _wait(child: subprocess.Popen[bytes], pulse: Callable[[], Path], silence: float, limit: float) -> int:
    """The child's exit code. Signals to stop are its to answer. `limit` is the first beat's, `silence` that of each later one."""

    def pass_on(signum: int, frame: object) -> None:
        if child.poll() is None:
            child.send_signal(signum)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    known, heard = _touched(pulse()), time.monotonic()
    try:
        while True:
            try:
                return child.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                now = _touched(pulse())
            if now != known:
                known, heard, limit = now, time.monotonic(), silence
            elif time.monotonic() - heard > limit:
                knob = "deadlines.heartbeat" if limit == silence else "deadlines.start"
                log.error("the run's driver has shown no sign of life for %g s (%s) and is killed", limit, knob)
                child.kill()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _touched(pulse: Path) -> int:
    try:
        return pulse.stat().st_mtime_ns
    except OSError:
        return 0
