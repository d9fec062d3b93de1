"""Models in folders give their weights as a trainer does, so that engines which run take up one after another.

`StoredModels` is what the driver has (it imports neither torch nor an engine), `StoredWorker` the actor that reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raysys import memory
from raysys.buckets import Packed, Placed, Plan
from raysys.config.parts import Deadlines
from raysys.runtime import compute_environment, get, reserve


class StoredModels:
    """One model at a time, for `raysys.weights.push.Pusher`. A context manager that closes itself.

    Args:
        dtype: of the engines, e.g. "float32".
    """

    def __init__(self, dtype: str, deadlines: Deadlines):
        self._dtype, self._deadlines = dtype, deadlines
        self._placement: PlacementGroup | None = None
        self._worker: Any = None

    def __enter__(self) -> StoredModels:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self) -> None:
        """Places the actor. Raises PlacementError: no room in the cluster."""
        self._placement = reserve([{"CPU": 1.0}], what="stored models", timeout=self._deadlines.placement)
        place = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=0)
        options: dict[str, Any] = {"num_cpus": 1, "scheduling_strategy": place, "runtime_env": {"env_vars": compute_environment(1)}}
        self._worker = ray.remote(StoredWorker).options(**options).remote(self._dtype)

    def read(self, model: str) -> None:
        """The model that everything is of from now on: a folder or an id. Raises ConfigError when nothing loadable is there."""
        self._ask("read", model, seconds=self._deadlines.start, knob="deadlines.start")

    def bucket_plan(self, max_bytes: int) -> Plan:
        return self._ask("bucket_plan", max_bytes)

    def memory(self) -> str:
        return self._ask("memory")

    def gather_bucket(self, index: int, in_place: bool = False) -> Any:
        return self._worker.gather_bucket.remote(index, in_place)

    def tensor_digests(self, index: int) -> list[str]:
        return self._ask("tensor_digests", index)

    def probe_logprobs(self, ids: Sequence[int]) -> np.ndarray:
        return self._ask("probe_logprobs", list(ids))

    def close(self) -> None:
        """Ends the actor. Safe to call twice, and before `start`."""
        if self._worker is not None:
            ray.wait([self._worker.withdraw.remote()], timeout=1.0)
            ray.kill(self._worker)
            self._worker = None
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    def _ask(self, method: str, *arguments: Any, seconds: float | None = None, knob: str = "deadlines.push") -> Any:
        ref = getattr(self._worker, method).remote(*arguments)
        return get(ref, timeout=seconds or self._deadlines.push, actor="stored models", operation=method, knob=knob)


class StoredWorker:
    """Holds one model on the CPU; the methods are those of a trainer's rank."""

    def __init__(self, dtype: str):
        self._dtype = dtype
        self._model: Any = None
        self._packer: Any = None

    def read(self, model: str) -> None:
        from raysys.models.causal import load_causal

        self.withdraw()
        self._packer = self._model = None  # before the next one takes its place in memory
        self._model = load_causal(model, self._dtype)

    def bucket_plan(self, max_bytes: int) -> Plan:
        from raysys.training.weights import Packer, Whole

        self.withdraw()
        self._packer = Packer(Whole(self._model), max_bytes)
        return self._packer.plan

    def gather_bucket(self, index: int, in_place: bool = False) -> Packed | Placed:
        return self._packer.gather(index, in_place)

    def tensor_digests(self, index: int) -> list[str]:
        return self._packer.digests(index)

    def memory(self) -> str:
        return memory.whose()

    def probe_logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """Log-probs of ids[1:] given what precedes each, float32, temperature 1."""
        import torch

        from raysys.models.causal import response_logprobs

        with torch.no_grad():
            found = response_logprobs(self._model, torch.tensor(ids), torch.tensor([1]), torch.tensor([len(ids) - 1]))
        return found.float().numpy()

    def withdraw(self) -> None:
        """Removes what was placed in shared memory."""
        if self._packer is not None:
            self._packer.close()
