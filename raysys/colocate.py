"""Trainer and engines on the same GPUs, in turns: the engines sleep while the trainer works, and wake for its new weights.

For small clusters and `max_age=0`, where half of the GPUs would wait for the other half anyway. On CPU nothing sleeps and the turns
cost nothing. What the trainer keeps on the GPU while the engines work stays there (weights and optimiser, not activations):
`rollout.gpu_memory_utilization` must leave room.
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
    """A pool member that lives in the trainer's placement group, beside a rank of its own: `place` says which."""
    taken: set[int] = set()

    class Lodger(Member):
        place = -1

        def _reserve(self) -> Any:
            return trainer.placement

        def placed(self, now: float) -> bool:
            """Whether there is a rank without an engine; whoever follows a lost one waits until that is gone."""
            free = [rank for rank in range(trainer.config.ranks) if rank not in taken]
            if free:
                self.place = free[0]
                taken.add(self.place)
            return bool(free)

        def _place(self) -> tuple[int, float]:
            return self.place, SHARE if self._gpus else 0.0

        def _free(self) -> None:
            """The room is the trainer's; the place beside its rank can be had again."""
            taken.discard(self.place)

    return Lodger


class TurningTrainer:
    """The trainer as the loop sees it: it has the GPUs to itself while a step is trained."""

    def __init__(self, trainer: TrainerGroup, pool: RolloutPool):
        self._trainer, self._pool = trainer, pool

    def step(self, batch: Batch) -> dict[str, float]:
        self._pool.each("sleep")
        metrics = self._trainer.step(batch)
        self._trainer.release_cache()
        return metrics

    def save(self, folder: str) -> None:
        self._trainer.save(folder)


class TurningPusher:
    """The pusher of colocated engines: they wake up for it. Its first push finds them awake, which is no harm."""

    def __init__(self, pusher: Pusher, pool: RolloutPool):
        self._pusher, self._pool = pusher, pool

    def push(self, version: int) -> PushResult:
        self._pool.each("wake")
        return self._pusher.push(version)
