"""Many fake engines in one process behind the real pool: what is measured is the pool, not Python processes starting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from raysys.config.parts import Deadlines, Rollout
from raysys.rollout.environment import EpisodeSpec
from raysys.rollout.members import Member
from raysys.rollout.pool import RolloutPool
from raysys.rollout.serving import Response, Serving
from raysys.rollout.spec import RolloutSpec, Sampling
from tests.bench.workload import lengths

DEADLINES = Deadlines(placement=60, start=120, generate=600, push=60, heartbeat=60)


class FleetEngine(Serving):
    """Takes a fixed time a token, whoever else is running; a sample's length is in its prompt."""

    def __init__(self, seats: int, seconds_per_token: float):
        super().__init__(seats)
        self._token, self.seat_seconds = seconds_per_token, 0.0
        self.running: dict[int, float] = {}
        self._lengths = lengths()

    async def start(self) -> dict[str, Any]:
        return {"vllm": "fleet", "revision": "0", "pid": 0, "vocabulary": 2**20}

    async def respond(self, ids: np.ndarray, sampling: Sampling, seed: int) -> Response:
        tokens = int(self._lengths[int(ids[0]) % len(self._lengths)])
        version, began = self._version, time.monotonic()
        self.running[id(ids)] = began
        await asyncio.sleep(tokens * self._token)
        del self.running[id(ids)]
        self.seat_seconds += time.monotonic() - began
        return Response([1] * tokens, [0.0] * tokens, [0, version], "stop")

    async def hold(self, version: int) -> None:
        self._version = version

    async def close(self) -> None:
        return None


class Host:
    """The process that has them all; `make` makes one."""

    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self._engines: dict[int, Any] = {}

    async def call(self, rank: int, method: str, *arguments: Any) -> Any:
        if rank not in self._engines:
            self._engines[rank] = self._make()
        return await getattr(self._engines[rank], method)(*arguments)

    async def hold(self, version: int) -> None:
        for engine in self._engines.values():
            await engine.hold(version)

    async def apply(self, work: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """`work` of the list of engines, in their process."""
        return await work(list(self._engines.values()), *arguments)

    async def occupied(self) -> float:
        """Seat-seconds so far in which a sample ran, unfinished ones included."""
        now = time.monotonic()
        running = sum(now - began for engine in self._engines.values() for began in engine.running.values())
        return running + sum(engine.seat_seconds for engine in self._engines.values())


class _Remote:
    def __init__(self, host: Any, rank: int, method: str):
        self._host, self._rank, self._method = host, rank, method

    def remote(self, *arguments: Any) -> Any:
        return self._host.call.remote(self._rank, self._method, *arguments)


class _Handle:
    """Looks like an actor handle of one engine."""

    def __init__(self, host: Any, rank: int):
        self._host, self._rank = host, rank

    def __getattr__(self, method: str) -> _Remote:
        return _Remote(self._host, self._rank, method)


@contextmanager
def fleet(workers: int, seats: int, make: Callable[[], Any], episodes: EpisodeSpec | None = None) -> Iterator[tuple[RolloutPool, Any]]:
    """A started pool of so many fake engines and the handle of their host. Ray must be initialised."""
    import ray

    host: Any = ray.remote(Host).options(num_cpus=0, max_concurrency=10_000).remote(make)

    class Guest(Member):
        def placed(self, now: float) -> bool:
            return True

        def launch(self, now: float) -> None:
            self.handle = _Handle(host, self.rank)
            self.pending = self.handle.start.remote()
            self.enter("starting", now)

        def kill(self) -> None:
            return None

        def _reserve(self) -> Any:
            return None

    config = Rollout(workers=workers, max_sequences=seats)
    pool = RolloutPool(config, RolloutSpec("fleet", "cpu", "float32", 10**6, config, episodes=episodes), DEADLINES, member=Guest)
    try:
        with pool:
            pool.start()
            yield pool, host
    finally:
        ray.kill(host)
