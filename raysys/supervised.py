"""The loop's parts in runs that learn from data: nothing is generated, scored or pushed."""

from __future__ import annotations

from typing import Any

from raysys.batch import Batch
from raysys.data.stream import PromptStream


class DataSource:
    """Supervised rows as the loop's source; nothing in them ages."""

    def __init__(self, stream: PromptStream):
        self._stream = stream

    def take(self, batch: int, max_age: int) -> Batch:
        return self._stream.take(batch)

    def state(self) -> dict[str, Any]:
        return self._stream.state()

    def backlog(self) -> None:
        return None

    def counts(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, Any], backlog: Batch | None, version: int) -> None:
        self._stream.restore(state)


class NoScorers:
    """Supervised runs have nothing to score."""

    def annotate(self, batch: Batch, queries: Any = None) -> Batch:
        return batch


class NoPush:
    """Supervised runs generate nothing, so no engine waits for weights."""

    def push(self, version: int) -> dict[str, Any]:
        return {}
