"""The client of a search service: one connection pool, batches across callers, retries, and patience while the service is away.

Callers never learn of an outage that ends before their deadline: their search takes longer, and that is all. What they get
otherwise is an error, never an empty list.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count

import aiohttp
from yarl import URL

from raysys.errors import ConfigError, SearchError, SearchRefused
from raysys.retrieval.breaker import Breaker, Failed
from raysys.retrieval.coalesce import Coalescer
from raysys.retrieval.documents import Document, utf8
from raysys.retrieval.wire import BadAnswer, read_answer, write_request

_LATER = frozenset({408, 425, 429})
"""Codes below 500 that ask for another try."""
_PARTLY = frozenset({400, 413, 422})
"""Codes that may be one query's fault in a batch of many."""


class _Again(Exception):
    """The request's time ran out for somebody who asked earlier; who gets this has some left."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How to search; the fields are the keys below `search.` of a run's config. Raises ConfigError for values that cannot work."""

    url: str
    """Of the service: `http://host:port`, or with the path if that is not `/retrieve`."""
    topk: int = 3
    candidates: int = 20
    """Documents that a service with a reranker orders."""
    timeout: float = 10.0
    """Seconds of one HTTP request."""
    retries: int = 5
    """Further attempts of a request that fails while the service is otherwise well."""
    deadline: float = 600.0
    """Seconds that a search may take in all, an outage included."""
    backoff: float = 0.2
    longest_backoff: float = 5.0
    breaker_after: int = 3
    """Failures in a row after which all requests wait for a probe to succeed."""
    gather: float = 0.003
    """Seconds that a query waits for others to share a request."""
    batch: int = 256
    """Queries of one request."""
    parallel: int = 8
    """Requests under way at a time."""
    query_chars: int = 2000
    """Longer queries are cut: a model that repeats itself writes them."""
    seed: int = 0
    """Of the jitter between attempts."""

    def __post_init__(self) -> None:
        wrong = [name for name in ("topk", "candidates", "breaker_after", "batch", "parallel", "query_chars") if getattr(self, name) < 1]
        wrong += [name for name in ("timeout", "deadline", "backoff", "longest_backoff") if not getattr(self, name) > 0]
        wrong += [name for name in ("retries", "gather") if not getattr(self, name) >= 0]
        if wrong:
            raise ConfigError("; ".join(f"search.{name}={getattr(self, name)} is too small" for name in wrong))
        self.address()

    def address(self) -> str:
        """Where requests go. Raises ConfigError."""
        try:
            url = URL(self.url)
        except ValueError as error:
            raise ConfigError(f"search.url={self.url} is no address: {error}", "write e.g. http://127.0.0.1:8001") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"search.url={self.url} is no HTTP address", "write e.g. http://127.0.0.1:8001")
        return str(url.with_path("/retrieve") if url.path in ("", "/") else url)


class SearchClient:
    """A `Searcher` over HTTP. Belongs to the event loop of its first search.

    Attributes:
        counts: queries, requests, failures (attempts that failed), refused.
    """

    def __init__(self, settings: SearchSettings):
        self.settings, self.url = settings, settings.address()
        self.counts: Counter[str] = Counter()
        self.paused = 0.0
        """Seconds that requests have waited for the service to come back, summed over requests."""
        self._draw = random.Random(settings.seed)
        self._breaker = Breaker(
            self.url, settings.breaker_after, settings.backoff, settings.longest_backoff, self._probe, random.Random(settings.seed + 1)
        )
        self._gather: Coalescer[tuple[str, float], list[Document]] = Coalescer(
            self._batch, most=settings.batch, wait=settings.gather, parallel=settings.parallel
        )
        self._session: aiohttp.ClientSession | None = None

    async def search(self, queries: Sequence[str], topk: int | None = None) -> list[list[Document]]:
        """Documents of each query, best first; none for a blank one, which is not sent.

        Raises:
            SearchError: no usable answer within `search.deadline`, or in all attempts while other requests succeeded.
            SearchRefused: the service says that the request is wrong.
        """
        until = time.monotonic() + self.settings.deadline
        asked = {place: _sent(query, self.settings.query_chars) for place, query in enumerate(queries) if query.strip()}
        self.counts["queries"] += len(asked)
        found: list[list[Document]] = [[] for _ in queries]
        size = self.settings.batch
        items = [(query, until) for query in asked.values()]
        parts = await asyncio.gather(
            *(self._asked(topk or self.settings.topk, items[first : first + size]) for first in range(0, len(items), size))
        )
        for place, documents in zip(asked, (each for part in parts for each in part), strict=True):
            found[place] = documents
        return found

    async def wait_healthy(self, deadline: float | None = None) -> None:
        """Returns when the service answers a search. `deadline`: seconds (default `search.deadline`). Raises SearchError, SearchRefused."""
        began = time.monotonic()
        until = began + (self.settings.deadline if deadline is None else deadline)
        await self._breaker.ask()
        if not await self._breaker.passes(until):
            raise SearchError(self.url, 0, time.monotonic() - began, self._breaker.cause)

    def state(self) -> dict[str, float]:
        """For gauges: the counts, outages so far, seconds paused, and whether requests wait now."""
        return {
            **{name: self.counts[name] for name in ("queries", "requests", "failures", "refused")},
            "outages": self._breaker.opened,
            "paused_s": round(self.paused, 3),
            "paused_now": int(self._breaker.open),
        }

    async def close(self) -> None:
        """Ends requests under way and the connections."""
        await self._gather.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> SearchClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _asked(self, topk: int, items: list[tuple[str, float]]) -> list[list[Document]]:
        while True:
            try:
                return await self._gather(topk, items)
            except _Again:
                continue

    async def _batch(self, key: Hashable, items: list[tuple[str, float]]) -> Sequence[list[Document] | BaseException]:
        assert isinstance(key, int)
        return await self._settled(items, key, min(until for _, until in items))

    async def _settled(self, items: list[tuple[str, float]], topk: int, soonest: float) -> list[list[Document] | BaseException]:
        """A result for each (query, until). A refusal that may be due to one of them is asked again in halves."""
        try:
            return list(await self._persistent([query for query, _ in items], topk, soonest))
        except SearchError as error:
            if self._spent(error.attempts):
                return [error] * len(items)
            return [error if until == soonest else _Again() for _, until in items]
        except SearchRefused as error:
            if len(items) == 1 or error.status not in _PARTLY:
                return [error] * len(items)
        half = len(items) // 2
        return await self._settled(items[:half], topk, soonest) + await self._settled(items[half:], topk, soonest)

    async def _persistent(self, queries: list[str], topk: int, until: float) -> list[list[Document]]:
        """Attempts until one succeeds; waiting for a service that is away is none."""
        began, cause = time.monotonic(), ""
        for attempt in count():
            if not await self._passes(until):
                raise SearchError(self.url, attempt, time.monotonic() - began, self._breaker.cause)
            try:
                found = await self._post(queries, topk)
            except Failed as error:
                cause = str(error)
                self._breaker.failed(cause)
            else:
                self._breaker.succeeded()
                return found
            pause = min(self.settings.longest_backoff, self.settings.backoff * 2.0 ** min(attempt, 30)) * self._draw.uniform(0.5, 1.0)
            if self._spent(attempt + 1) or time.monotonic() + pause > until:
                raise SearchError(self.url, attempt + 1, time.monotonic() - began, cause)
            await asyncio.sleep(pause)
        raise AssertionError  # count() has no end

    def _spent(self, attempts: int) -> bool:
        return attempts > self.settings.retries and not self._breaker.open  # an outage is nobody's last attempt

    async def _passes(self, until: float) -> bool:
        began = time.monotonic()
        try:
            return await self._breaker.passes(until)
        finally:
            self.paused += time.monotonic() - began

    async def _probe(self) -> None:
        await self._post(["test"], 1)

    async def _post(self, queries: list[str], topk: int) -> list[list[Document]]:
        """One request. Raises Failed, SearchRefused."""
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=self.settings.parallel + 1))
        self.counts["requests"] += 1
        try:
            async with self._session.post(
                self.url,
                data=write_request(queries, topk, self.settings.candidates),
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=self.settings.timeout),
                allow_redirects=False,
            ) as response:
                status, body = response.status, await response.read()
            if status == 200:
                return read_answer(body, len(queries))
            said = f"HTTP {status}: {' '.join(body[:300].decode('utf-8', 'replace').split())[:200]}"
            if status < 500 and status not in _LATER:
                self.counts["refused"] += 1
                self._breaker.succeeded()
                raise SearchRefused(self.url, status, said.partition(": ")[2])
        except TimeoutError:
            said = f"no answer within search.timeout={self.settings.timeout:g} s"
        except (aiohttp.ClientError, OSError) as error:
            said = f"{type(error).__name__}: {str(error)[:200]}"
        except BadAnswer as error:
            said = str(error)
        self.counts["failures"] += 1
        raise Failed(said)


def _sent(query: str, most: int) -> str:
    """What of a query is sent: no more than `most` characters, and only what UTF-8 can carry."""
    return utf8(query[:most])
