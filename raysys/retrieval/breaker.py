"""A circuit breaker that makes callers wait instead of fail: after several failures in a row, only a probe goes through."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


class Failed(Exception):
    """One request failed, and says why; another may not."""


class Breaker:
    """Belongs to one event loop. Nothing runs in the background: whoever waits probes, one at a time.

    Args:
        name: of the service, for the log.
        after: failures in a row that open it.
        pause: seconds until the first probe; doubles with each that fails.
        longest: seconds between probes at most.
        probe: asks the service something harmless; raises Failed.
        draw: jitter of the pauses.
    """

    def __init__(self, name: str, after: int, pause: float, longest: float, probe: Callable[[], Awaitable[None]], draw: random.Random):
        self._name, self._after, self._pause, self._longest, self._probe, self._draw = name, after, pause, longest, probe, draw
        self._turn = asyncio.Lock()
        self._probes = 0
        self._next = 0.0
        self.open = False
        self.failures = 0
        self.opened = 0
        self.cause = ""

    def failed(self, cause: str) -> None:
        """Notes that a request failed. Those sent before it opened and failing after it say nothing new."""
        if self.open:
            return
        self.failures, self.cause = self.failures + 1, cause
        if self.failures >= self._after:
            self._open()

    def succeeded(self) -> None:
        """Notes that the service has answered."""
        self.failures = 0
        if self.open:
            self.open = False
            log.warning("search service %s answers again", self._name)

    async def passes(self, until: float) -> bool:
        """Returns True when requests may go out, at once unless it is open; False if that is not before `until` (monotonic seconds)."""
        while self.open:
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    await self._wait_or_probe()
            except TimeoutError:
                return False
        return True

    async def ask(self) -> None:
        """Opens it unless a probe succeeds now."""
        try:
            await self._probe()
        except Failed as error:
            if not self.open:
                self.cause = str(error)
                self._open()
        else:
            self.succeeded()

    def _open(self) -> None:
        self.open, self._probes = True, 0
        self.opened += 1
        self._schedule()
        log.warning("search service %s fails: %s; requests wait until it answers", self._name, self.cause)

    def _schedule(self) -> None:
        pause = min(self._longest, self._pause * 2.0**self._probes)
        self._next = time.monotonic() + pause * self._draw.uniform(0.5, 1.0)
        self._probes = min(self._probes + 1, 30)

    async def _wait_or_probe(self) -> None:
        async with self._turn:
            if not self.open:
                return
            await asyncio.sleep(max(0.0, self._next - time.monotonic()))
            if not self.open:
                return
            try:
                await self._probe()
            except Failed as error:
                self.cause = str(error)
                self._schedule()
            else:
                self.succeeded()
