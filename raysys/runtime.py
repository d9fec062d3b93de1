"""What every actor needs: deadlines, placement groups, the device, threads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from raysys.errors import DeadlineError, InfrastructureError, PlacementError, RaysysError


def compute_environment(threads: int) -> dict[str, str]:
    """Environment of an actor that runs torch on CPU threads; set before its process starts.

    glibc keeps large blocks (else they go back to the system and are faulted in again at the next micro-batch), and
    threads that wait sleep (else they hold the cores that the other actors' work needs).
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**31),
        "MALLOC_TOP_PAD_": str(2**26),
    }


def get(refs: Any, *, timeout: float, actor: str, operation: str, knob: str) -> Any:
    """`ray.get` with a deadline and a readable error.

    Args:
        refs: one object ref or a list of them.
        timeout: seconds.
        actor, operation, knob: what the error names: who was waited for, what it was doing, which config key sets `timeout`.

    Raises:
        DeadlineError: nothing came in time.
        RaysysError: whatever the actor raised on purpose, as itself and not wrapped in Ray's task error.
        InfrastructureError: the actor or its node died, or it failed in a way nobody foresaw; the first cause is in the text.
    """
    try:
        with waiting(actor, operation, timeout, knob):
            return ray.get(refs, timeout=timeout)
    except ray.exceptions.GetTimeoutError:
        raise DeadlineError(actor, operation, timeout, knob) from None
    except ray.exceptions.RayTaskError as error:
        raise first_cause(error, actor, operation) from error
    except ray.exceptions.RayError as error:  # the actor, its node, or what it gave is gone; also by Ray's own memory monitor
        raise InfrastructureError(f"{actor} died during '{operation}': {_first_line(error)}") from error


def ray_data() -> Any:
    """The module `ray.data`. What it tells of its executions stays in its own log file: an error that ends one is raised as well."""
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":
            handler.setLevel(logging.CRITICAL)
    return ray.data


_waits: dict[int, dict[str, Any]] = {}
_wait_numbers = count()


@contextmanager
def waiting(actor: str, operation: str, seconds: float, knob: str) -> Iterator[None]:
    """Notes for `waits` that this thread waits for an actor, for as long as the block lasts."""
    with waiting_for([actor], operation, seconds, knob):
        yield


@contextmanager
def waiting_for(actors: Sequence[str], operation: str, seconds: float, knob: str) -> Iterator[Callable[[str], None]]:
    """As `waiting`, for several actors at once. The block calls what it is given with each that has answered."""
    since, numbers = time.monotonic(), {actor: next(_wait_numbers) for actor in actors}
    for actor, number in numbers.items():
        _waits[number] = {"for": actor, "operation": operation, "limit_s": seconds, "knob": knob, "since": since}

    def answered(actor: str) -> None:
        _waits.pop(numbers[actor], None)

    try:
        yield answered
    finally:
        for actor in numbers:
            answered(actor)


def waits() -> list[dict[str, Any]]:
    """Whom this process waits for now: actor, operation, seconds so far, limit and its knob; the longest first."""
    now = time.monotonic()
    found = [
        {key: value for key, value in one.items() if key != "since"} | {"waited_s": round(now - one["since"], 1)}
        for one in list(_waits.values())
    ]
    return sorted(found, key=lambda one: -one["waited_s"])


def dead_actor(error: BaseException | None) -> str:
    """Id of the actor whose death is behind an error of `get`; "" if none died."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # Ray's wrapper and what it wraps name each other as cause
        if isinstance(error, ray.exceptions.RayActorError):
            return error.actor_id or ""
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__
    return ""


def died(error: BaseException) -> bool:
    """Whether an error of `get` says that a process or a node is gone, not that it answered with an error."""
    cause = error.__cause__
    gone = isinstance(cause, ray.exceptions.RayError) and not isinstance(cause, ray.exceptions.RayTaskError)
    return gone or bool(dead_actor(error))


def first_cause(error: BaseException, actor: str, operation: str) -> RaysysError:
    """The error that started it: ours if an actor raised one of ours, else one line naming the actor."""
    cause: BaseException | None = error
    while cause is not None:
        # Ray's wrapper is a subclass of what it wraps: look inside it first.
        if isinstance(cause, RaysysError) and not isinstance(cause, ray.exceptions.RayTaskError):
            return cause
        inner = getattr(cause, "cause", None) or cause.__cause__
        if inner is None or inner is cause:
            break
        cause = inner
    if isinstance(cause, ray.exceptions.RayActorError):
        return InfrastructureError(f"{actor} died during '{operation}': {_first_line(cause)}")
    return InfrastructureError(f"{actor} failed in '{operation}': {type(cause).__name__}: {_first_line(cause)}")


def _first_line(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:500] if lines else type(error).__name__


def reserve(bundles: Sequence[dict[str, float]], *, what: str, timeout: float, strategy: str = "PACK") -> PlacementGroup:
    """A placement group that is ready to use.

    Args:
        bundles: resources of each actor, e.g. `[{"CPU": 1}, {"CPU": 1}]`.
        what: who asks; appears in the error ("trainer", "rollout", "scorer").
        timeout: seconds, from `deadlines.placement`.

    Raises:
        PlacementError: the cluster cannot give it; says what was asked and what the cluster has in all and free.
    """
    group = placement_group(list(bundles), strategy=strategy)
    with waiting("the cluster", f"give the {what} a place", timeout, "deadlines.placement"):
        if group.wait(timeout):
            return group
    state = placement_group_table(group)["stats"]["scheduling_state"]
    remove_placement_group(group)
    raise no_place(bundles, what, timeout, f"{strategy}, state {state}")


def no_place(bundles: Sequence[dict[str, float]], what: str, timeout: float, how: str) -> PlacementError:
    """The error of a cluster that has not the room: what was asked for, what there is in all, what of it is free."""
    return PlacementError(
        f"no place for {what}: asked for {_sum(bundles)} as {len(bundles)} bundles ({how}), waited {timeout:g} s, "
        f"cluster has {_plain(ray.cluster_resources())}, free {_plain(ray.available_resources())}",
        f"ask for less ({what}.workers, {what}.ranks), add nodes, or raise deadlines.placement",
    )


def may_grow() -> bool:
    """Whether something can add nodes to this cluster: Ray's cluster launcher and KubeRay, which both name the type of each node."""
    return any("ray.io/node-group" in node["Labels"] for node in ray.nodes())


def _sum(bundles: Sequence[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0) + amount
    return total


def _plain(resources: Mapping[str, float]) -> dict[str, float]:
    """What people count in, without Ray's own names, of which each placement group brings several."""
    own = ("node:", "memory", "object", "accelerator_type:")
    return {name: amount for name, amount in sorted(resources.items()) if not name.startswith(own) and "_group_" not in name}


class Stopwatch:
    """Seconds by phase: `with watch("generate"): ...`; `lap()` hands them out and starts over.

    `phase` is the one that runs now; `other` is what no phase claimed since the last lap, so the parts sum to `total`.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._phase = self.phase = ""
        self._since = 0.0
        self._lap = time.monotonic()

    def __call__(self, phase: str) -> Stopwatch:
        self._phase = phase
        return self

    def __enter__(self) -> Stopwatch:
        self._since, self.phase = time.monotonic(), self._phase
        return self

    def __exit__(self, *exc: object) -> None:
        self.phase = ""
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + time.monotonic() - self._since

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap, with `other` and `total`."""
        now = time.monotonic()
        total = now - self._lap
        lap = self._seconds | {"other": max(0.0, total - sum(self._seconds.values())), "total": total}
        self._seconds, self._lap = {}, now
        return lap
