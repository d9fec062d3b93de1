"""Trainer and engines on the same GPUs, in turns: the engines sleep while the trainer works, and wake for its new weights.

For small clusters and `max_age=0`, where half of the GPUs would wait for the other half anyway. On CPU nothing sleeps and the turns
cost nothing. What the trainer keeps on the GPU while the engines work stays there: `rollout.gpu_memory_utilization` must leave room.
"""

from __future__ import annotations

from typing import Any

from raysys.batch import Batch
from raysys.rollout.members import Member
from raysys.rollout.pool import RolloutPool
from raysys.training.group import TrainerGroup
from raysys.weights.push import Pusher, PushResult

SHARE = 0.5
"""Of a GPU, as Ray counts, for each of the two that live on it."""


def lodger(trainer: TrainerGroup) -> type[Member]:
    """A pool member that lives in the trainer's placement group: engine i where rank i is."""

    class Lodger(Member):
        def _reserve(self) -> Any:
            return trainer.placement

        def _place(self) -> tuple[int, float]:
            return self.rank % trainer.config.ranks, SHARE if self._gpus else 0.0

        def _free(self) -> None:
            """The place is the trainer's."""

    return Lodger


class TurningTrainer:
    """The trainer as the loop sees it: it has the GPUs to itself while a step is trained."""

    def __init__(self, trainer: TrainerGroup, pool: RolloutPool):
        self._trainer, self._pool = trainer, pool

    def step(self, batch: Batch) -> dict[str, float]:
        self._pool.each("sleep")
        return self._trainer.step(batch)

    def save(self, folder: str) -> None:
        self._trainer.save(folder)


class TurningPusher:
    """The pusher of colocated engines: they wake up for it. Its first push finds them awake, which is no harm."""

    def __init__(self, pusher: Pusher, pool: RolloutPool):
        self._pusher, self._pool = pusher, pool

    def push(self, version: int) -> PushResult:
        self._pool.each("wake")
        return self._pusher.push(version)
