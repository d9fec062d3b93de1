"""The loop's parts in runs that learn from data: nothing is generated, scored or pushed."""

from __future__ import annotations

import logging
from typing import Any

from raysys.batch import Batch
from raysys.data.stream import PromptStream

log = logging.getLogger("raysys")


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


DOUBTFUL = 1e-2
"""Share of data tokens that a teacher may all but rule out before that is told."""


class Doubts:
    """Metrics as they are, and one warning when the teacher does not believe the data: then the loss is mostly unlikelihood."""

    def __init__(self, metrics: Any):
        self._metrics, self._told = metrics, False

    def write(self, record: dict[str, Any]) -> None:
        self._metrics.write(record)
        share = record.get("teacher_doubts", 0.0)
        if share > DOUBTFUL and not self._told:
            self._told = True
            log.warning(
                "step %d: min(k) is %.2f, and k is below -1 at %.2g %% of the data's tokens, which the teacher all but rules out: "
                "were these responses written by the models under teachers, or were those trained on them?",
                record["step"] + 1,
                record["k_min"],
                100 * share,
            )


class NoPush:
    """Supervised runs generate nothing, so no engine waits for weights."""

    def push(self, version: int) -> dict[str, Any]:
        return {}
