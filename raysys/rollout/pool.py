"""The pool of rollout workers, seen from the driver. Imports neither torch nor vLLM."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raysys.batch import Batch
from raysys.config.parts import Deadlines, Rollout
from raysys.errors import InfrastructureError
from raysys.rollout.spec import RolloutSpec, Sampling
from raysys.rollout.worker import RolloutWorker, environment
from raysys.runtime import gather, reserve

CONCURRENCY = 1000


class RolloutPool:
    """N workers with one engine each; use as a context manager.

    What a row gets never depends on the number of workers or on who takes it: its seed is its own, and the engine's
    arithmetic does not depend on its neighbours (float32 on CPU; elsewhere up to rounding).
    """

    def __init__(self, config: Rollout, spec: RolloutSpec, deadlines: Deadlines, worker: type = RolloutWorker):
        self._config, self._spec, self._deadlines, self._worker = config, spec, deadlines, worker
        self._group: PlacementGroup | None = None
        self.workers: list[Any] = []
        self.facts: list[dict[str, Any]] = []

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self) -> None:
        """Places and starts all workers. Raises PlacementError, InfrastructureError or DeadlineError."""
        gpus = self._config.tensor_parallel if self._spec.device == "gpu" else 0
        bundle: dict[str, float] = {"CPU": 1.0, "GPU": float(gpus)} if gpus else {"CPU": 1.0}
        self._group = reserve([bundle] * self._config.workers, what="rollout", timeout=self._deadlines.placement)
        actor = ray.remote(self._worker)
        for rank in range(self._config.workers):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            options = {"num_cpus": 1, "num_gpus": gpus, "scheduling_strategy": place, "max_concurrency": CONCURRENCY}
            self.workers.append(actor.options(**options, runtime_env={"env_vars": environment(self._spec)}).remote(self._spec, rank))
        self.facts = self._gather([worker.start.remote() for worker in self.workers], "start", self._deadlines.start, "deadlines.start")
        if len({fact["vllm"] for fact in self.facts}) > 1:
            raise InfrastructureError(f"rollout workers run different vLLM versions: {sorted({fact['vllm'] for fact in self.facts})}")

    def generate(self, prompts: Batch, sampling: Sampling) -> Batch:
        """One response a row, same row order.

        Raises:
            InfrastructureError: a worker or its engine died; at once, with the cause.
            DeadlineError: `deadlines.generate` ran out, as with an engine that hangs.
        """
        shares = deal(prompts.lengths("prompt_ids"), len(self.workers))
        calls = [(worker, rows) for worker, rows in zip(self.workers, shares, strict=True) if len(rows)] or [(self.workers[0], shares[0])]
        refs = [worker.generate.remote(prompts.take(rows), sampling) for worker, rows in calls]
        parts = self._gather(refs, "generate", self._deadlines.generate, "deadlines.generate")
        order = np.argsort(np.concatenate([rows for _, rows in calls]), kind="stable")
        return Batch.concat(parts).take(order)

    def close(self) -> None:
        """Ends workers and engines by handle; safe to call twice."""
        if self.workers:
            with contextlib.suppress(Exception):
                ray.wait([worker.close.remote() for worker in self.workers], num_returns=len(self.workers), timeout=5)
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _gather(self, refs: list[Any], operation: str, timeout: float, knob: str) -> list[Any]:
        return gather(refs, timeout=timeout, actor="rollout worker", operation=operation, knob=knob)


def deal(lengths: np.ndarray, workers: int) -> list[np.ndarray]:
    """Row numbers of each worker: longest prompts first, each to the worker with the fewest tokens; ascending in each."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    loads = np.zeros(workers)
    for row in np.argsort(-lengths, kind="stable"):
        at = int(np.argmin(loads))
        shares[at].append(int(row))
        loads[at] += lengths[row] + 1
    return [np.sort(np.array(share, dtype=np.int64)) for share in shares]
