"""New weights from the trainer to every engine, with proof that they arrived and that the engines compute with them.

A push is: announce names and shapes, send bounded buckets (a gather and a send are under way at the same time), compare
fingerprints, then a parity probe: log-probs of a fixed sequence by trainer and engine. Seen from the driver; imports
neither torch nor vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray

from raysys.config.parts import Deadlines, Weights
from raysys.errors import WeightSyncError
from raysys.runtime import gather
from raysys.weights.digest import fingerprint
from raysys.weights.nccl import NcclSender

Manifest = dict[str, tuple[tuple[int, ...], str]]

PROBE = 32
"""Tokens of the parity probe, where the engine's window has room for them."""
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


class Trains(Protocol):
    """What a push needs of a trainer."""

    def bucket_plan(self, max_bytes: int) -> tuple[Manifest, int]: ...
    def gather_bucket(self, index: int) -> Any: ...
    def probe_logprobs(self, ids: Sequence[int]) -> np.ndarray: ...

    # Only for `weights.backend=nccl`:
    def meeting_point(self) -> tuple[str, int]: ...
    def open_sender(self, sender: Any, address: str, port: int, world_size: int) -> Any: ...
    def bucket_header(self, index: int) -> Any: ...
    def send_bucket(self, index: int) -> list[Any]: ...


@dataclass(frozen=True)
class PushResult:
    """One push: `fingerprint` of all tensors, `parity_gap` the largest log-prob difference on the probe in nats, `seconds` by phase."""

    version: int
    fingerprint: str
    parity_gap: float
    seconds: dict[str, float]


class Pusher:
    """Pushes a trainer's weights to all workers.

    Args:
        trainer: see `Trains`.
        workers: handles of rollout actors.
        config: bucket size and parity tolerance.
        probe_ids: the fixed sequence; None makes one that fits the engine's vocabulary and window.
        engine_ranks: processes of one engine (its tensor parallel size); they all receive.
    """

    def __init__(
        self,
        trainer: Trains,
        workers: Sequence[Any],
        config: Weights,
        deadlines: Deadlines,
        probe_ids: Sequence[int] | None = None,
        engine_ranks: int = 1,
    ):
        self._trainer, self._workers, self._config, self._deadlines = trainer, list(workers), config, deadlines
        self._probe = list(probe_ids or ())
        self._engine_ranks, self._joined = engine_ranks, False
        self._manifest, self._count = trainer.bucket_plan(config.bucket_mib << 20)

    def push(self, version: int) -> PushResult:
        """Sends everything and proves it.

        Raises:
            WeightSyncError: a tensor does not fit, arrived differently, or the engine computes something else; names the first one.
            DeadlineError: `deadlines.push` ran out.
        """
        began = time.monotonic()
        self._probe = self._probe or probe_ids(**self._call("limits")[0])
        self._call("begin_update", self._manifest)
        left = self._broadcast() if self._config.backend == "nccl" else self._send()
        arrived = self._call("finish_update", version)
        marks = [fingerprint(left or digests) for digests in arrived]
        if len(set(marks)) > 1:
            raise WeightSyncError(f"workers hold different weights after push {version}: {marks}")
        sent = time.monotonic()
        gap = self._parity(version)
        return PushResult(version, marks[0], gap, {"transfer": sent - began, "probe": time.monotonic() - sent})

    def _broadcast(self) -> dict[str, str]:
        """All buckets from GPU to GPU; all ranks take part in one at a time. Returns digests of what left."""
        if not self._joined:
            address, port = self._trainer.meeting_point()
            world = 1 + self._engine_ranks * len(self._workers)
            opened = self._trainer.open_sender(NcclSender, address, port, world)
            firsts = range(1, world, self._engine_ranks)
            joins = [worker.join.remote(address, port, first, world) for worker, first in zip(self._workers, firsts, strict=True)]
            self._wait([opened, *joins], "join the trainer's group")
            self._joined = True
        left: dict[str, str] = {}
        for index in range(self._count):
            header = self._trainer.bucket_header(index)
            receiving = [worker.update.remote(header) for worker in self._workers]
            sending = self._trainer.send_bucket(index)
            left |= self._wait([*sending, *receiving], "update")[0]
        return left

    def _send(self) -> dict[str, str]:
        """All buckets to all workers, at most two under way. Returns nothing: receivers say what arrived."""
        flying: list[list[Any]] = []
        try:
            for index in range(self._count):
                bucket = self._trainer.gather_bucket(index)  # only asked for: the workers wait for it themselves
                flying.append([worker.update.remote(bucket) for worker in self._workers])
                if len(flying) == 2:
                    self._wait(flying[0], "update")
                    flying.pop(0)
            for refs in flying:
                self._wait(refs, "update")
            return {}
        except Exception:
            late = [ref for refs in flying for ref in refs]
            ray.wait(late, num_returns=len(late), timeout=5)  # what is still under way must not run into the next push
            raise

    def _parity(self, version: int) -> float:
        refs = [worker.probe.remote(self._probe) for worker in self._workers]
        mine = np.asarray(self._trainer.probe_logprobs(self._probe))
        theirs = self._wait(refs, "probe")
        gaps = [float(np.max(np.abs(np.asarray(one) - mine))) for one in theirs]
        worst = int(np.argmax(gaps)) if all(np.isfinite(gaps)) else int(np.argmin(np.isfinite(gaps)))
        allowed = self._config.parity_tolerance or self._default_tolerance()
        if not gaps[worst] <= allowed:
            gap = f"trainer and worker {worst} differ by {gaps[worst]:.3g} nats on the probe of push {version}, allowed: {allowed:g}"
            self._call("quarantine", gap)
            raise WeightSyncError(f"{gap}: {self._first_difference(worst)}", "set weights.parity_tolerance only if the gap is rounding")
        return gaps[worst]

    def _default_tolerance(self) -> float:
        return max(_TOLERANCE.get(dtype, 1e-3) for _, dtype in self._manifest.values())

    def _first_difference(self, worker: int) -> str:
        for index in range(self._count):
            found = self._wait([self._workers[worker].differing.remote(self._trainer.gather_bucket(index))], "differing")[0]
            if found:
                return f"the first tensor that differs in the engine is {found[0]}"
        return "all bytes arrived as they left, and every tensor that can be read back is equal: an older copy of one that cannot is in use"

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        return self._wait([getattr(worker, method).remote(*arguments) for worker in self._workers], method)

    def _wait(self, refs: list[Any], operation: str) -> list[Any]:
        return gather(refs, timeout=self._deadlines.push, actor="rollout worker", operation=operation, knob="deadlines.push")


def probe_ids(vocabulary: int, length: int) -> list[int]:
    """A fixed sequence of at most `PROBE` ids, spread over the vocabulary but for its lowest three, which are often special."""
    first = 3 if vocabulary > 3 else 0
    golden = 2654435769  # 2**32 over the golden ratio: steps of it spread evenly
    return [first + ((i * golden % 2**32) * (vocabulary - first) >> 32) for i in range(1, min(PROBE, length) + 1)]
