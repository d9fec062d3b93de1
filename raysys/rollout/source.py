"""Prompts turned into fresh samples: the loop's source in on-policy jobs."""

from __future__ import annotations

from typing import Any, Protocol

from raysys.batch import Batch
from raysys.rollout.pool import RolloutPool
from raysys.rollout.spec import Sampling


class Prompts(Protocol):
    """What the source needs of a prompt stream."""

    def take(self, n: int) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class OnPolicySource:
    """Takes prompts, samples each `samples` times with the weights that the engines hold, and gives whole groups.

    With `max_age=0` nothing is in flight between two takes, so the prompts' cursor is all the state there is.
    """

    def __init__(self, prompts: Prompts, pool: RolloutPool, samples: int, sampling: Sampling):
        self._prompts, self._pool, self._samples, self._sampling = prompts, pool, samples, sampling

    def take(self, batch: int, max_age: int) -> Batch:
        """Samples of the next `batch` prompts, a prompt's samples side by side."""
        if max_age != 0:
            raise ValueError(f"max_age must be 0, got {max_age}")
        return self._pool.generate(self._prompts.take(batch).repeat(self._samples), self._sampling)

    def state(self) -> dict[str, Any]:
        return self._prompts.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._prompts.restore(state)
