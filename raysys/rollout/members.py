"""One rollout worker's life, seen from the driver: a place in the cluster, a process, weights, work, an end."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raysys.rollout.engine import environment
from raysys.rollout.spec import Harvest, RolloutSpec

CONCURRENCY = 1000


class Member:
    """State: `placing` (no room yet), `starting`, `started` (holds no weights of this run), `ready`, `gone`.

    Each has a placement group of its own, so that an autoscaler sees what is missing and a lost node takes only its own along.
    """

    def __init__(self, rank: int, spec: RolloutSpec, worker: type, now: float):
        self.rank, self.name = rank, f"rollout worker {rank}"
        self.state, self.since, self.beat = "placing", now, now
        self.version = -1
        self.facts: dict[str, Any] = {}
        self.harvest = Harvest()
        self.finished, self.idle_since = 0, now
        self.pending: Any = None
        self._looked = 0.0
        self.mourned = False
        self.handle: Any = None
        self._spec, self._worker = spec, worker
        self._gpus = spec.config.tensor_parallel if spec.device == "gpu" else 0
        self.bundle: dict[str, float] = {"CPU": 1.0} | ({"GPU": float(self._gpus)} if self._gpus else {})
        self._group = self._reserve()

    def _reserve(self) -> Any:
        return placement_group([self.bundle])

    def _place(self) -> tuple[int, float]:
        """Bundle of the group, and GPUs."""
        return 0, float(self._gpus)

    def _free(self) -> None:
        remove_placement_group(self._group)

    def enter(self, state: str, now: float) -> None:
        self.state, self.since, self.beat = state, now, now

    def placed(self, now: float) -> bool:
        """Whether there is room; asked of the cluster twice a second at most."""
        if now - self._looked < 0.5:
            return False
        self._looked = now
        # Not `wait`: it counts whole seconds, and a wait of 0 denies a group that is ready whenever the answer takes its time.
        return placement_group_table(self._group).get("state") == "CREATED"

    def launch(self, now: float) -> None:
        """Starts the process and its engine; `pending` is ready when it is up."""
        index, gpus = self._place()
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "scheduling_strategy": place, "max_concurrency": CONCURRENCY}
        actor = ray.remote(self._worker).options(runtime_env={"env_vars": environment(self._spec)}, **options)
        self.handle = actor.remote(self._spec, self.rank)
        self.pending = self.handle.start.remote()
        self.enter("starting", now)

    def poll(self, wait: float) -> None:
        """Asks for what is finished; there is always exactly one such question open."""
        self.pending = self.handle.collect.remote(wait)

    def part(self) -> Any:
        """Asks the process to end its engine. Returns the ref to wait for, None if there is no process."""
        self.state, self.pending = "gone", None
        return self.handle.close.remote() if self.handle is not None else None

    def kill(self) -> None:
        """Ends the process and frees its place."""
        if self.handle is not None:
            with contextlib.suppress(Exception):
                ray.kill(self.handle)
            self.handle = None
        with contextlib.suppress(Exception):
            self._free()
