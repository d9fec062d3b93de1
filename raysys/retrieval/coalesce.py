"""Many small requests as few large ones: what comes within a moment, or while all hands are busy, goes together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Coalescer(Generic[Item, Result]):
    """Hands the items of several callers to one call. Belongs to one event loop.

    Args:
        run: (key, items) to one result or exception an item, in their order. What it raises, all of them get.
        most: items of one call, unless a single caller brings more.
        wait: seconds that a call is held back for others to join; 0 sends at once what has piled up.
        parallel: calls under way at a time.
    """

    def __init__(
        self, run: Callable[[Hashable, list[Item]], Awaitable[Sequence[Result | BaseException]]], *, most: int, wait: float, parallel: int
    ):
        self._run, self._most, self._wait, self._parallel = run, most, wait, parallel
        self._pending: deque[tuple[Hashable, list[Item], asyncio.Future[list[Result]]]] = deque()
        self._calls: set[asyncio.Task[None]] = set()
        self._due: asyncio.Handle | None = None

    async def __call__(self, key: Hashable, items: Sequence[Item]) -> list[Result]:
        """Results of the items, which go into one call with others of the same key. Raises the first exception among them."""
        if not items:
            return []
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Result]] = loop.create_future()
        self._pending.append((key, list(items), answer))
        if self._due is None:
            self._due = loop.call_later(self._wait, self._start) if self._wait else loop.call_soon(self._start)
        return await answer

    async def close(self) -> None:
        """Ends calls under way; whoever waits is cancelled."""
        if self._due is not None:
            self._due.cancel()
        for task in self._calls:
            task.cancel()
        for _, _, answer in self._pending:
            answer.cancel()
        self._pending.clear()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _start(self) -> None:
        self._due = None
        while self._pending and len(self._calls) < self._parallel:
            task = asyncio.get_running_loop().create_task(self._call(self._take()))
            self._calls.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if not task.cancelled() and self._due is None:
            self._start()

    def _take(self) -> list[tuple[Hashable, list[Item], asyncio.Future[list[Result]]]]:
        """The oldest request and those of its key that still fit."""
        taken, left, room = [], [], self._most
        key = self._pending[0][0]
        while self._pending and (room > 0 or not taken):
            entry = self._pending.popleft()
            if entry[2].done():
                continue
            if entry[0] == key and (not taken or len(entry[1]) <= room):
                taken.append(entry)
                room -= len(entry[1])
            else:
                left.append(entry)
        self._pending.extendleft(reversed(left))
        return taken

    async def _call(self, entries: list[tuple[Hashable, list[Item], asyncio.Future[list[Result]]]]) -> None:
        if not entries:
            return
        items = [item for entry in entries for item in entry[1]]
        try:
            results = await self._run(entries[0][0], items)
        except asyncio.CancelledError:
            for entry in entries:
                entry[2].cancel()
            raise
        except Exception as error:
            results = [error] * len(items)
        first = 0
        for _, own, answer in entries:
            part = results[first : first + len(own)]
            first += len(own)
            if answer.done():
                continue
            failed = next((each for each in part if isinstance(each, BaseException)), None)
            if failed is not None:
                answer.set_exception(failed)
            else:
                answer.set_result([each for each in part if not isinstance(each, BaseException)])
