"""How long a continuously batching engine takes, without an engine."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """A step, which gives each of n running sequences a token, takes `step + sequence * n` seconds: reading the weights, and what each
    sequence's cache and arithmetic add. Each prompt token of a newcomer takes `prefill` seconds, in which nobody decodes."""

    step: float
    sequence: float
    prefill: float

    def seconds(self, running: int) -> float:
        return self.step + self.sequence * running


class Decoder:
    """One engine's time. It takes whatever comes: how many run at once is its caller's affair.

    Its clock is the model's own and real time is waited for, so that a busy machine that wakes it late does not slow it down.
    """

    def __init__(self, pace: Pace):
        self._pace = pace
        self._ends: list[tuple[int, int, asyncio.Future[None]]] = []
        self._new: list[tuple[int, int, asyncio.Future[None]]] = []
        self._came = asyncio.Event()
        self._numbers = itertools.count()
        self._step, self._clock = 0, 0.0
        self._task: asyncio.Task[None] | None = None
        self.seat_seconds = 0.0

    async def decode(self, prompt: int, tokens: int) -> None:
        """Returns when so many tokens would be there. Newcomers enter when the step that is under way is over, as in vLLM."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._new.append((prompt, tokens, done))
        self._came.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        await done

    async def _run(self) -> None:
        self._clock = time.monotonic()
        while self._ends or self._new:
            await self._admit()
            running, step = len(self._ends), self._pace.seconds(len(self._ends))
            wanted = self._ends[0][0] - self._step
            await self._until(self._clock + wanted * step)
            steps = min(wanted, max(1, math.ceil((time.monotonic() - self._clock) / step)))
            self._step, self._clock = self._step + steps, self._clock + steps * step
            self.seat_seconds += running * steps * step
            await asyncio.sleep(max(0.0, self._clock - time.monotonic()))
            while self._ends and self._ends[0][0] <= self._step:
                done = heapq.heappop(self._ends)[2]
                if not done.cancelled():
                    done.set_result(None)
            await asyncio.sleep(0)  # whoever has a turn after this one at once comes now
        self._task = None

    async def _admit(self) -> None:
        new, self._new = self._new, []
        self._came.clear()
        for _, tokens, done in new:
            heapq.heappush(self._ends, (self._step + tokens, next(self._numbers), done))
        seconds = self._pace.prefill * sum(prompt for prompt, _, _ in new)
        self._clock += seconds
        self.seat_seconds += len(self._ends) * seconds
        await asyncio.sleep(max(0.0, self._clock - time.monotonic()))

    async def _until(self, moment: float) -> None:
        """Or until somebody comes."""
        try:
            await asyncio.wait_for(self._came.wait(), max(0.0, moment - time.monotonic()))
        except TimeoutError:
            return
