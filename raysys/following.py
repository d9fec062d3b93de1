"""A submitted job, followed from here: its output as it comes, its exit code, its end on demand. The dashboard may be away for a while."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from raysys.errors import ConfigError, InfrastructureError, RaysysError
from raysys.head import ENDED

_PATIENCE_SECONDS = 60.0
"""For so long a dashboard may give no answer while a job is followed."""
_ANSWER_SECONDS = 20.0
_POLL_SECONDS = 0.3
_PAUSE_SECONDS = 1.0
"""Before a broken tail is taken up again; twice as long each time that nothing comes of it, half a minute at most."""
Answer = TypeVar("Answer")


def connected(address: str) -> Any:
    """A job client, or one clear line: refused, unreachable."""
    from ray.job_submission import JobSubmissionClient

    for chatty in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{chatty}").setLevel(logging.ERROR)  # each sets its own level when imported
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # Ray raises its own, requests' and plain RuntimeErrors here
        raise plain(error, address) from None


def plain(error: Exception, address: str) -> RaysysError:
    """What Ray's client says, as one line of ours."""
    text = str(error).strip()
    refused = type(error).__name__ == "AuthenticationError"
    if not refused and (isinstance(error, (ConnectionError, TimeoutError)) or "connect" in text.lower()):
        return InfrastructureError(f"no Ray dashboard answers at {address}", "check RAY_ADDRESS, the port and the network")
    status = re.search(r"status code (\d+)|^(\d+) Client Error", text)  # not any digits: addresses and ports have them too
    code = (status[1] or status[2]) if status else ""
    if refused or code in ("401", "403"):
        which = "refused the token" if code == "403" or "invalid" in text.lower() else "wants a token (401)"
        return ConfigError(f"the cluster at {address} {which}", "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the cluster's token file")
    return InfrastructureError(f"the cluster at {address} gives an error: {text.splitlines()[0] if text else type(error).__name__}")


def follow(client: Any, job: str, address: str) -> int:
    """Prints the job's output as it comes; returns its exit code.

    Raises:
        RaysysError: the dashboard gave no answer for a minute; the job may run on.
    """
    ended = threading.Event()
    printer = threading.Thread(target=_print_logs, args=(client, job, ended), daemon=True)
    printer.start()
    info = _at_its_end(client, job, address)
    ended.set()
    printer.join(timeout=5)
    if str(info.status) == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None or str(info.status) == "STOPPED":
        print(
            f"job {job}: {str(info.status).lower()}; {(info.message or '').strip().splitlines()[0][:300] if info.message else ''}",
            flush=True,
        )
    return info.driver_exit_code or 1


def _at_its_end(client: Any, job: str, address: str) -> Any:
    """What Ray says of the job once it has ended."""
    heard = time.monotonic()
    while True:
        try:
            info = _within(_ANSWER_SECONDS, lambda: client.get_job_info(job))
            if str(info.status) in ENDED:
                return info
            heard = time.monotonic()
        except Exception as error:  # requests' own, and Ray's plain RuntimeErrors
            if time.monotonic() - heard > _PATIENCE_SECONDS:
                cause = plain(error, address)
                raise type(cause)(f"job {job} cannot be followed and may run on: {cause.message}", cause.remedy) from None
        time.sleep(_POLL_SECONDS)


def _print_logs(client: Any, job: str, ended: threading.Event) -> None:
    """Ray's tail starts from the beginning after a lost connection: what is on the screen already is left out."""
    shown = 0

    async def tail() -> None:
        nonlocal shown
        seen = 0
        async for text in client.tail_job_logs(job):
            fresh = text[max(0, shown - seen) :]
            seen += len(text)
            if fresh:
                print(fresh, end="", flush=True)
                shown = seen

    pause = _PAUSE_SECONDS
    while True:
        last, before = ended.is_set(), shown
        try:
            asyncio.run(tail())
            if last or str(client.get_job_status(job)) in ENDED:
                return
        except BrokenPipeError:  # whoever read our output has gone
            return
        except Exception:  # aiohttp's and Ray's own; the status loop reports what matters
            if last:
                return
        pause = _PAUSE_SECONDS if shown > before else min(2 * pause, 30.0)
        ended.wait(pause)


def stop(client: Any, job: str, timeout: float = 20.0) -> None:
    """Asks the job to end and waits until it has; says so if it has not."""

    def asked() -> None:
        client.stop_job(job)
        while str(client.get_job_status(job)) not in ENDED:
            time.sleep(0.2)

    try:
        _within(timeout, asked)
    except TimeoutError:
        print(f"job {job} has not ended within {timeout:g} s", file=sys.stderr, flush=True)
    except Exception as error:
        print(f"could not stop job {job}: {error}", file=sys.stderr, flush=True)


def _within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """What `call` gives. Ray's client sets no timeout: a call that hangs is left behind. Raises TimeoutError."""
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(timeout=seconds)
