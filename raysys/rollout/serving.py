"""How a rollout worker takes prompts and gives samples back, whatever the engine: everything but the engine itself."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysys.batch import Batch, Ragged
from raysys.errors import InfrastructureError, RaysysError
from raysys.rollout.spec import Failure, Harvest, Sampling


@dataclass(frozen=True)
class Response:
    """One sample as the engine gave it. `spans` are flat pairs (first token, weight version)."""

    ids: list[int]
    logprobs: list[float]
    spans: list[int]
    reason: str
    runs: list[int] | None = None
    """Of an episode: see `raysys.rollout.episodes`."""
    record: str = ""
    """Of an episode, what happened: JSON."""


@dataclass(frozen=True)
class Asked:
    """A prompt as a worker gets it. `metadata` is the row's, for environments."""

    ids: np.ndarray
    prompt_id: str
    metadata: str = ""


class Seat:
    """A place in the engine, taken while this is entered but for the times that its holder is `away`."""

    def __init__(self, seats: asyncio.Semaphore, count: Callable[[int], None]):
        self._seats, self._count, self._taken = seats, count, False
        self.away_seconds = 0.0

    async def __aenter__(self) -> Seat:
        await self._take()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._give()

    @contextlib.asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        """Others may have it meanwhile; on the way back it is waited for."""
        self._give()
        began = time.monotonic()
        yield
        self.away_seconds += time.monotonic() - began
        await self._take()

    async def _take(self) -> None:
        await self._seats.acquire()
        self._taken = True
        self._count(1)

    def _give(self) -> None:
        if self._taken:
            self._taken = False
            self._count(-1)
            self._seats.release()


class Serving:
    """An inbox and a long poll over `respond`, which a subclass gives.

    Args:
        seats: samples that run at once; the others wait here, not in the engine.
    """

    def __init__(self, seats: int):
        self._seats = asyncio.Semaphore(seats)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._done: list[tuple[int, Response]] = []
        self._failed: list[Failure] = []
        self._news, self._empty = asyncio.Event(), asyncio.Event()
        self._running, self._tokens = 0, 0
        self._busy, self._since, self._away = 0.0, 0.0, 0.0
        self._version = 0
        self._broken = ""

    async def respond(self, ids: np.ndarray, sampling: Sampling, seed: int) -> Response:
        """One sample. Raises InfrastructureError (another worker may succeed) or another RaysysError (the row's own fault)."""
        raise NotImplementedError

    async def play(self, asked: Asked, sampling: Sampling, seed: int, seat: Seat) -> Response:
        """One sample, of one turn where a subclass knows no others. `seat` may be given up while the engine has nothing to do for it."""
        return await self.respond(asked.ids, sampling, seed)

    async def alive(self) -> None:
        """Returns if the engine answers."""

    def refusal(self, version: int) -> str:
        """Why no prompts for weights of `version` are taken now; "" if they are."""
        return f"it holds weights {self._version}, asked for {version}" if self._version < version else ""

    # -- what the pool calls

    async def submit(self, rows: Batch, tickets: list[int], sampling: Sampling, version: int) -> None:
        """Takes prompts (`prompt_id`, `sample`, `prompt_ids`, for episodes `metadata`) to sample with weights of `version` or newer.

        Results come by `collect`.
        """
        refusal = self.refusal(version)
        if refusal:
            self._failed += [Failure(ticket, refusal, retry=True) for ticket in tickets]
            self._news.set()
            return
        facts = rows.strings("metadata") if "metadata" in rows else [""] * len(rows)
        prompts = zip(tickets, rows.ragged("prompt_ids").rows(), rows.strings("prompt_id"), rows.numbers("sample"), facts, strict=True)
        self._empty.clear()
        for ticket, ids, prompt, sample, metadata in prompts:
            asked, seed = Asked(ids, prompt, metadata), sampling.seed_of(prompt, int(sample))
            task = asyncio.create_task(self._serve(ticket, asked, sampling, seed))
            self._tasks[ticket] = task
            task.add_done_callback(functools.partial(self._ended, ticket))

    async def collect(self, wait: float, linger: float = 0.05) -> Harvest:
        """What is finished: at once when all is, else what comes in the `linger` seconds after the first, else nothing after `wait`."""
        await _within(self._news, wait)
        if self._tasks and self._news.is_set():
            await _within(self._empty, linger)
        if not self._news.is_set() and self._running:
            await self._listen(wait)
        done, failed = self._done, self._failed
        rows = _columns([response for _, response in done]) if done else None
        self._done, self._failed = [], []  # only now: what could not be put together is not lost
        self._news.clear()
        busy = self._busy + (time.monotonic() - self._since if self._running else 0.0)
        return Harvest(
            tickets=tuple(ticket for ticket, _ in done),
            rows=rows,
            failures=tuple(failed),
            version=self._version,
            running=self._running,
            tokens=self._tokens,
            busy=busy,
            away=self._away,
            broken=self._broken,
        )

    async def abort(self, tickets: list[int]) -> None:
        """Stops work that nobody waits for."""
        for ticket in tickets:
            task = self._tasks.get(ticket)
            if task is not None:
                task.cancel()

    # -- inside

    async def _listen(self, wait: float) -> None:
        """An engine can stop without any sign but silence."""
        try:
            await asyncio.wait_for(self.alive(), wait)
        except TimeoutError:
            self._broken = self._broken or f"its engine has not answered for {wait:g} s (a quarter of deadlines.heartbeat)"
        except RaysysError as error:
            self._broken = self._broken or error.message

    async def _serve(self, ticket: int, asked: Asked, sampling: Sampling, seed: int) -> None:
        try:
            async with Seat(self._seats, self._count) as seat:
                response = await self.play(asked, sampling, seed, seat)
            self._tokens += len(response.ids)
            self._away += seat.away_seconds
            self._done.append((ticket, response))
        except RaysysError as error:
            self._failed.append(Failure(ticket, error.message, retry=isinstance(error, InfrastructureError)))
        except Exception as error:  # not foreseen: another worker may do better, and the pool counts how often
            self._failed.append(Failure(ticket, f"{type(error).__name__}: {error}"[:300], retry=True))

    def _ended(self, ticket: int, task: asyncio.Task[None]) -> None:
        """Also of a task that was cancelled before it began; and the ticket may have come again while an aborted one was ending."""
        if self._tasks.get(ticket) is task:
            del self._tasks[ticket]
        if not self._tasks:
            self._empty.set()
        self._news.set()

    def _count(self, change: int) -> None:
        now = time.monotonic()
        if self._running:
            self._busy += now - self._since
        self._since = now
        self._running += change


def _columns(responses: list[Response]) -> Batch:
    episodes: dict[str, Any] = {}
    if responses[0].runs is not None:
        runs = [one.runs if one.runs is not None else [0] * len(one.ids) for one in responses]
        episodes = {"runs": Ragged.of(runs, np.int32), "episode": [one.record for one in responses]}
    return Batch.from_columns(
        response_ids=Ragged.of([one.ids for one in responses], np.int32),
        rollout_logprobs=Ragged.of([one.logprobs for one in responses], np.float32),
        version_spans=Ragged.of([one.spans for one in responses], np.int32),
        stop_reason=[one.reason for one in responses],
        **episodes,
    )


async def _within(event: asyncio.Event, seconds: float) -> Any:
    try:
        return await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return None
