"""New weights from the trainer to every engine, with proof that they arrived and that the engines compute with them.

A push is: announce the plan (names and shapes), send bounded buckets (a gather and a send are under way at the same time), compare
fingerprints, then a parity probe: log-probs of a fixed sequence by trainer and engine. Seen from the driver; imports
neither torch nor vLLM.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import ray

from raysys.buckets import UNDER_WAY, Bucket, Plan, fingerprint
from raysys.config.parts import Deadlines, Weights
from raysys.errors import BucketError, DeadlineError, InfrastructureError, WeightSyncError
from raysys.runtime import dead_actor, died, get, waiting_for
from raysys.weights.ipc import IpcSender
from raysys.weights.nccl import NcclSender

_LOOK_SECONDS = 1.0
"""So often it is looked who in a push has answered."""
PROBE = 32
"""Tokens of the parity probe, where the engine's window has room for them."""
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Of the largest gap in float32, of the mean in bfloat16: there two correct engines differ far on single unlikely tokens, while what is in
the wrong place, or of long ago, moves them all."""


class Gives(Protocol):
    """What a push through the host's memory needs of whoever has the weights."""

    def bucket_plan(self, max_bytes: int) -> Plan: ...
    def memory(self) -> str: ...
    def gather_bucket(self, index: int, in_place: bool = False) -> Any: ...
    def tensor_digests(self, index: int) -> list[str]: ...
    def probe_logprobs(self, ids: Sequence[int]) -> np.ndarray: ...


class Trains(Gives, Protocol):
    """What a push from GPU to GPU needs of a trainer."""

    # Only for `weights.backend=nccl`:
    def meeting_point(self) -> tuple[str, int]: ...
    def open_sender(self, sender: Any, address: str, port: int, world_size: int) -> Any: ...
    def send_bucket(self, index: int) -> list[Any]: ...

    # Only for `weights.backend=ipc`:
    def offer_bucket(self, index: int, sender: Any, readers: Collection[int]) -> list[Any]: ...
    def withdraw_buckets(self) -> None: ...


@dataclass(frozen=True)
class PushResult:
    """One push: `fingerprint` of all weights, `parity_gap` the largest log-prob difference on the probe in nats, `seconds` by phase."""

    version: int
    fingerprint: str
    parity_gap: float
    seconds: dict[str, float]


class Engine(Protocol):
    """What a push needs of a rollout worker: a name for people and a handle of its actor.

    With `weights.backend=ipc` also `place`, the trainer rank on whose GPU it lives.
    """

    name: str
    handle: Any


class Engines(Protocol):
    """What a push needs of the pool: who is there, and whom to tell what became of them."""

    @property
    def workers(self) -> Sequence[Any]: ...
    def await_worker(self) -> None: ...
    def pushed(self, version: int, members: Sequence[Any]) -> None: ...
    def lose(self, member: Any, cause: str) -> None: ...


class Pusher:
    """Pushes a trainer's weights to the pool's workers.

    A worker that dies or falls silent in the middle is given up and the push goes on for the others. Anything else that goes wrong
    would go wrong again, and stops the run with the first tensor's name.

    Args:
        trainer: see `Gives`; with `weights.backend` nccl or ipc see `Trains`.
        engines: the pool.
        config: bucket size and parity tolerance.
        probe_ids: the fixed sequence; None makes one that fits the engine's vocabulary and window.
        engine_ranks: processes of one engine (its tensor parallel size); they all receive.
    """

    def __init__(
        self,
        trainer: Gives,
        engines: Engines,
        config: Weights,
        deadlines: Deadlines,
        probe_ids: Sequence[int] | None = None,
        engine_ranks: int = 1,
    ):
        self._trainer, self._engines, self._config, self._deadlines = trainer, engines, config, deadlines
        self._probe = list(probe_ids or ())
        self._engine_ranks = engine_ranks
        self._joined: list[str] = []
        self._memory: str | None = None
        self._plan = trainer.bucket_plan(config.bucket_mib << 20)
        self._layouts = self._plan.layouts()

    def push(self, version: int) -> PushResult:
        """Sends everything to everyone and proves it.

        Raises:
            WeightSyncError: a tensor does not fit, arrived differently, or the engine computes something else; names the first one.
            InfrastructureError: the trainer died, or no worker is left and none comes.
            DeadlineError: `deadlines.push` ran out for the trainer.
        """
        while True:
            result = self._push(version, list(self._engines.workers))
            if result is not None:
                return result
            self._engines.await_worker()

    def catch_up(self, version: int) -> None:
        """The trainer's weights, which are `version`, to the workers that have none yet."""
        self._push(version, [member for member in self._engines.workers if member.state == "started"])

    def _push(self, version: int, members: list[Any]) -> PushResult | None:
        """None: nobody is left to push to."""
        began = time.monotonic()
        audience = Audience(members, self._engines.lose, self._deadlines.push)
        if not self._probe:
            found = audience.ask("limits")
            self._probe = probe_ids(**next(iter(found.values()))) if found else []
        audience.ask("begin_update", ray.put(self._plan))
        left = {"nccl": self._broadcast, "ipc": self._hand_over}.get(self._config.backend, self._send)(audience)
        arrived = audience.ask("finish_update", version)
        if not arrived:
            return None
        marks = {member.name: fingerprint(self._plan.mark, left or digests) for member, digests in arrived.items()}
        if len(set(marks.values())) > 1:
            raise WeightSyncError(f"workers hold different weights after push {version}: {marks}")
        sent = time.monotonic()
        gap = self._parity(audience, version)
        if not audience.members:
            return None
        self._engines.pushed(version, audience.members)
        return PushResult(version, next(iter(marks.values())), gap, {"transfer": sent - began, "probe": time.monotonic() - sent})

    def _broadcast(self, audience: Audience) -> list[str]:
        """All buckets from GPU to GPU; all ranks take part in one at a time. Returns digests of what left."""
        trainer = cast("Trains", self._trainer)
        names = [member.name for member in audience.members]
        if names != self._joined:
            address, port = trainer.meeting_point()
            world = 1 + self._engine_ranks * len(names)
            opened = trainer.open_sender(NcclSender, address, port, world)
            firsts = dict(zip(names, range(1, world, self._engine_ranks), strict=True))
            joins = {member: handle.join.remote(address, port, firsts[member.name], world) for member, handle in audience.present()}
            audience.settle(joins, "join the trainer's group", [opened])
            self._joined = names
        left: list[str] = []
        for index in range(len(self._layouts)):
            receiving = audience.call("update", Bucket(self._plan.mark, index, ""))
            left.append(audience.settle(receiving, "update", trainer.send_bucket(index))[0])
            if len(audience.members) < len(names):
                self._joined = []
                raise InfrastructureError(
                    "a rollout worker left the trainer's NCCL group in the middle of a push", "the run resumes by itself"
                )
        return left

    def _hand_over(self, audience: Audience) -> list[str]:
        """All buckets to each worker from the rank on its GPU. Returns digests of what left."""
        trainer = cast("Trains", self._trainer)

        def start(index: int) -> tuple[dict[Any, Any], Any]:
            offers = trainer.offer_bucket(index, IpcSender, {member.place for member in audience.members})
            return {member: handle.update.remote(offers[member.place]) for member, handle in audience.present()}, offers

        try:
            return [bucket.digest for bucket in self._under_way(audience, start)]
        finally:
            trainer.withdraw_buckets()

    def _send(self, audience: Audience) -> list[str]:
        """All buckets to all workers through the host's memory. Returns nothing: receivers say what arrived.

        On one node they read them where the trainer packed them, else through Ray's object store.
        """
        if self._memory is None:
            self._memory = self._trainer.memory()
        in_place = bool(self._memory) and all(member.facts.get("memory") == self._memory for member in audience.members)

        def start(index: int) -> tuple[dict[Any, Any], Any]:
            bucket = self._trainer.gather_bucket(index, in_place)  # only asked for: the workers wait for it themselves
            return audience.call("update", bucket), bucket

        try:
            for _ in self._under_way(audience, start):
                pass
        except BucketError as error:
            raise WeightSyncError(self._first_wrong(error), error.remedy) from error
        return []

    def _first_wrong(self, error: BucketError) -> str:
        pairs = zip(self._trainer.tensor_digests(error.index), error.arrived, strict=True)
        for name, (left, arrived) in zip(self._layouts[error.index].names, pairs, strict=True):
            if left != arrived:
                return f"tensor {name} arrived with other bytes than it left with"
        return f"{error.message}, and each of its tensors as it is: their digest is wrong, or what lies between them"

    def _under_way(self, audience: Audience, start: Callable[[int], tuple[dict[Any, Any], Any]]) -> Iterator[Any]:
        """Starts each bucket as soon as fewer than `UNDER_WAY` are; `start` gives the workers' answers and the trainer's part as refs.

        Yields what the trainer's first rank says of each bucket that everyone has answered, where its part is a list.
        """
        flying: deque[tuple[dict[Any, Any], Any]] = deque()
        try:
            for index in range(len(self._layouts)):
                flying.append(start(index))
                if len(flying) == UNDER_WAY:
                    refs, needed = flying.popleft()
                    yield audience.settle(refs, "update", wait_for=needed).get(0)
            while flying:
                refs, needed = flying.popleft()
                yield audience.settle(refs, "update", wait_for=needed).get(0)
        except Exception:
            late = [ref for refs, _ in flying for ref in refs.values()]
            if late:  # what is still under way must not run into the next push
                ray.wait(late, num_returns=len(late), timeout=5)
            raise

    def _parity(self, audience: Audience, version: int) -> float:
        refs = audience.call("probe", self._probe)
        mine = np.asarray(self._trainer.probe_logprobs(self._probe))
        found = {member: np.abs(np.asarray(theirs) - mine) for member, theirs in audience.settle(refs, "probe").items()}
        if not found:
            return float("nan")
        rounded = any(dtype == "bfloat16" for layout in self._layouts for dtype in layout.dtypes)
        judged = {member: float(np.mean(gaps) if rounded else np.max(gaps)) for member, gaps in found.items()}
        worst = max(judged, key=lambda member: judged[member] if np.isfinite(judged[member]) else float("inf"))
        allowed = self._config.parity_tolerance or _TOLERANCE["bfloat16" if rounded else "float32"]
        if not judged[worst] <= allowed:
            size = f"{judged[worst]:.3g} nats{' in the mean' if rounded else ''}"
            gap = f"trainer and {worst.name} differ by {size} on the probe of push {version}, allowed: {allowed:g}"
            audience.ask("quarantine", gap)
            raise WeightSyncError(
                f"{gap}: {self._first_difference(audience, worst)}", "set weights.parity_tolerance only if the gap is rounding"
            )
        return max(float(np.max(gaps)) for gaps in found.values())

    def _first_difference(self, audience: Audience, member: Any) -> str:
        for index in range(len(self._layouts)):
            bucket = self._trainer.gather_bucket(index)
            asked = {one: handle.differing.remote(bucket) for one, handle in audience.present() if one is member}
            found = audience.settle(asked, "differing")
            for name in found.get(member, []):
                return f"the first tensor that differs in the engine is {name}"
        return "all bytes arrived as they left, and every tensor that can be read back is equal: an older copy of one that cannot is in use"


class Audience:
    """The workers of one push, fewer when some die in it.

    Args:
        members: who is there at its start.
        lose: told of each that is given up, and why.
        timeout: seconds of each wait, `deadlines.push`.
    """

    def __init__(self, members: Sequence[Any], lose: Callable[[Any, str], None], timeout: float):
        self.members, self._lose, self._timeout = list(members), lose, timeout
        self._handles = {member: member.handle for member in members}  # a member that the pool gives up meanwhile loses its own

    def ask(self, method: str, *arguments: Any) -> dict[Any, Any]:
        """Calls a method on everyone; answers by worker."""
        return self.settle(self.call(method, *arguments), method)

    def call(self, method: str, *arguments: Any) -> dict[Any, Any]:
        return {member: getattr(handle, method).remote(*arguments) for member, handle in self.present()}

    def present(self) -> list[tuple[Any, Any]]:
        """Those that are still there, with the handles of their actors."""
        return [(member, self._handles[member]) for member in self.members]

    def settle(self, refs: dict[Any, Any], operation: str, wait_for: Any = None) -> dict[Any, Any]:
        """Answers by worker of those that are still there; with a list in `wait_for`, under 0 what its first ref holds.

        Raises:
            WeightSyncError: a worker says that something does not fit.
            DeadlineError, InfrastructureError: `wait_for`, refs of the trainer that the workers' answers depend on, did not come.
        """
        needed = wait_for if isinstance(wait_for, list) else [wait_for] if wait_for is not None else []
        names = {ref: member.name for member, ref in refs.items()} | dict.fromkeys(needed, "the trainer")
        self._await(names, operation)
        late = [ref for ref in needed if not ray.wait([ref], timeout=0, fetch_local=False)[0]]
        if late:
            self._raise_failure(refs)  # whoever died is why the trainer waits
            raise DeadlineError("the trainer", f"give its part of '{operation}'", self._timeout, "deadlines.push")
        answers: dict[Any, Any] = {}
        if isinstance(wait_for, list):
            parts = [self._get(ref, "the trainer", operation) for ref in needed]  # each rank may say what went wrong
            answers[0] = parts[0]
        for member, ref in refs.items():
            if not ray.wait([ref], timeout=0, fetch_local=False)[0]:
                self._give_up(member, f"no answer to '{operation}' in {self._timeout:g} s (deadlines.push)")
                continue
            try:
                answers[member] = self._get(ref, member.name, operation)
            except InfrastructureError as error:
                if not self._its_own(member, error):
                    raise
                if needed and died(error) and not dead_actor(error):
                    self._get(needed[0], "the trainer", operation)  # raises, if the end that has no name was the trainer's
                self._give_up(member, error.message)
        return answers

    def _await(self, names: dict[Any, str], operation: str) -> None:
        """Returns when all of these refs are there, or time is up. Those that are not are told, for people, as long as they are not."""
        end, rest = time.monotonic() + self._timeout, list(names)
        with waiting_for([*dict.fromkeys(names.values())], operation, self._timeout, "deadlines.push") as answered:
            while rest and (left := end - time.monotonic()) > 0:
                _, rest = ray.wait(rest, num_returns=len(rest), timeout=min(_LOOK_SECONDS, left), fetch_local=False)
                for name in set(names.values()) - {names[ref] for ref in rest}:
                    answered(name)

    def _raise_failure(self, refs: dict[Any, Any]) -> None:
        for member, ref in refs.items():
            if ray.wait([ref], timeout=0, fetch_local=False)[0]:
                self._get(ref, member.name, "update")

    def _its_own(self, member: Any, error: InfrastructureError) -> bool:
        """Whether an error is the end of this worker, not of the trainer whose echo it may be, and no word about the weights."""
        if member.state == "gone":
            return True  # the pool gave it up meanwhile, and what it says since means nothing
        return not isinstance(error, WeightSyncError) and dead_actor(error) in ("", self._handles[member]._actor_id.hex())

    def _get(self, ref: Any, actor: str, operation: str) -> Any:
        return get(ref, timeout=self._timeout, actor=actor, operation=operation, knob="deadlines.push")

    def _give_up(self, member: Any, cause: str) -> None:
        if member in self.members:
            self.members.remove(member)
            self._lose(member, f"{cause} (in a weight push)")


def probe_ids(vocabulary: int, length: int) -> list[int]:
    """A fixed sequence of at most `PROBE` ids, spread over the vocabulary but for its lowest three, which are often special."""
    first = 3 if vocabulary > 3 else 0
    golden = 2654435769  # 2**32 over the golden ratio: steps of it spread evenly
    return [first + ((i * golden % 2**32) * (vocabulary - first) >> 32) for i in range(1, min(PROBE, length) + 1)]
