"""Which workers the pool has: it hires, greets, listens for silence, gives up and gives back. Called under the pool's lock."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from raysys.config.parts import Deadlines, Rollout
from raysys.errors import DeadlineError, InfrastructureError
from raysys.rollout.dispatch import Dispatcher, Ticket
from raysys.rollout.members import Member
from raysys.rollout.spec import RolloutSpec
from raysys.runtime import no_place

log = logging.getLogger(__name__)

_PARTING_SECONDS = 3.0
_STOOD_STILL_SECONDS = 2.0


class Crew:
    """The workers of one pool.

    Args:
        worker: class of the actors.
        member: how one is placed and started.
        books: who has which sample.
        bury: told of each ticket that is dead because its worker was the last it could be given to.
    """

    def __init__(
        self,
        config: Rollout,
        spec: RolloutSpec,
        deadlines: Deadlines,
        worker: type,
        member: type[Member],
        books: Dispatcher,
        bury: Callable[[Ticket], None],
    ):
        self._config, self._spec, self._deadlines, self._worker, self._member = config, spec, deadlines, worker, member
        self._books, self._bury = books, bury
        self.members: list[Member] = []
        self._parting: list[tuple[Member, float]] = []
        self._ranks = self.lost = 0
        self._strikes: list[str] = []
        self._first: dict[str, Any] = {}
        """What the first worker said of itself, which all must share."""
        self._tended = time.monotonic()
        self._served = 0.0
        """When one was last seen up."""
        self.started = self.generating = False
        """`started`: the first ones are up, from now on a lost one is replaced. `generating`: weights are there."""

    @property
    def up(self) -> list[Member]:
        """Those that are up, with or without weights."""
        return [member for member in self.members if member.state in ("started", "ready")]

    @property
    def grief(self) -> str:
        """Who was lost first since the last sample, and why, in brackets; "" if nobody was."""
        return f" (the first it lost: {self._strikes[0]})" if self._strikes else ""

    @property
    def wanted(self) -> int:
        """More than the fewest only once the run generates: until then scorer and trainer may still be looking for room."""
        if not self.generating:
            return self._config.fewest
        if self._config.release_after is None or self._books.crowded:
            return self._config.most
        return max(self._config.fewest, len(self.members))

    def hire(self) -> None:
        """Asks the cluster for the workers that are missing."""
        for _ in range(self.wanted - len(self.members)):
            self.members.append(self._member(self._ranks, self._spec, self._worker, time.monotonic()))
            self._ranks += 1

    def greet(self, member: Member, facts: dict[str, Any], now: float) -> None:
        """A worker is up. One that runs something else than the first one did is refused, also when that one is gone."""
        self._first = self._first or facts
        for key, what in (("vllm", "vLLM"), ("revision", "a model of revision")):
            if facts.get(key) != self._first.get(key):
                cause = f"runs {what} {facts.get(key)}, the others {self._first.get(key)}"
                if not self.started:
                    raise InfrastructureError(f"{member.name} {cause}", "install the same on all nodes")
                self.lose(member, f"it {cause}")
                return
        member.facts = facts
        log.info("%s is up after %.1f s", member.name, now - member.since)
        member.enter("started", now)

    def welcome(self, member: Member, version: int, now: float) -> None:
        """It holds weights `version` and may be given work."""
        member.version = version
        if member.state == "started":
            member.enter("ready", now)
            member.idle_since = now  # not since it was asked for: a node may have taken minutes to come
            self._books.join(member.name, self._config.max_sequences, int(member.facts.get("kv_tokens") or 2**40))

    def sampled(self) -> None:
        """A sample was finished: what was lost before was not the fault of all."""
        self._strikes = []

    def lose(self, member: Member, cause: str) -> None:
        """Gives a worker up; what it had goes to others, and another takes its place.

        Raises:
            InfrastructureError: more than `rollout.restarts` that never gave a sample were lost with no sample in between.
        """
        if member not in self.members:
            return
        self.lost += 1
        if not member.finished:  # who worked until now was lost to something else, such as its node with all that were there
            self._strikes.append(f"{member.name}: {cause}")
        held = len(self._books.workers[member.name].held) if member.name in self._books.workers else 0
        log.warning("%s is lost: %s; %d samples go to others", member.name, cause, held)
        self._dismiss(member, cause, time.monotonic())
        if len(self._strikes) > self._config.restarts:
            raise InfrastructureError(
                f"{len(self._strikes)} rollout workers were lost with no sample in between, the first: {self._strikes[0]}",
                "see its log in the run's folder; rollout.restarts sets how many are tried",
            )
        self.hire()

    def tend(self, now: float) -> None:
        """What passes with time: room appears, starts take too long, workers fall silent or have nothing to do."""
        if now - self._tended > _STOOD_STILL_SECONDS:  # this process itself stood still: nobody could be heard
            for member in self.members:
                member.beat = min(now, member.beat + now - self._tended)
        self._tended = now
        if self.up:
            self._served = now
        self.hire()
        for member in list(self.members):
            if member.state == "placing":
                self._seat(member, now)
            elif member.state == "starting" and now - member.since > self._deadlines.start:
                late = DeadlineError(member.name, "start", self._deadlines.start, "deadlines.start")
                if not self.started:
                    raise late
                self.lose(member, late.message)
            elif member.state in ("started", "ready") and now - member.beat > self._deadlines.heartbeat:
                self.lose(member, f"not heard of for {self._deadlines.heartbeat:g} s (deadlines.heartbeat)")
            elif member.state == "ready" and self._spare(member, now):
                log.info("%s had nothing to do for %g s and is given back", member.name, self._config.release_after or 0)
                self._dismiss(member, "it was given back", now)
        for member, until in list(self._parting):
            if now > until:
                member.kill()
                self._parting.remove((member, until))

    def close(self) -> list[Any]:
        """Refs to wait for a moment before `kill`: everyone was asked to end."""
        return [ref for member in self.members if (ref := member.part()) is not None]

    def kill(self) -> None:
        for member in [*self.members, *(member for member, _ in self._parting)]:
            member.kill()
        self.members, self._parting = [], []

    def _seat(self, member: Member, now: float) -> None:
        if member.placed(now):
            member.launch(now)
        elif now - member.since > self._deadlines.placement:
            lacking = [other.bundle for other in self.members if other.state == "placing"]
            missing = no_place(lacking, "rollout", self._deadlines.placement, f"{len(self.members) - len(lacking)} workers have theirs")
            if not self.started or self._stranded(member, now):
                raise missing
            if not member.mourned:
                log.warning("still %s; %s. The run goes on without them", missing.message, missing.remedy)
            for other in self.members:  # one line for all that are missing, not one each
                other.mourned = other.mourned or other.state == "placing"

    def _stranded(self, member: Member, now: float) -> bool:
        """Whether there is neither a worker nor hope of one: a lost one's place is free only once it has parted."""
        coming = self._parting or any(other.state != "placing" for other in self.members)
        return not coming and now - max(member.since, self._served) > self._deadlines.placement

    def _spare(self, member: Member, now: float) -> bool:
        if self._books.workers[member.name].held:
            member.idle_since = now
        after = self._config.release_after
        return after is not None and len(self.up) > self._config.fewest and now - member.idle_since > after and not self._books.crowded

    def _dismiss(self, member: Member, cause: str, now: float) -> None:
        """Out of the pool; its engine gets a moment to end, then the process is killed."""
        self.members.remove(member)
        for ticket in self._books.leave(member.name, f"{member.name}: {cause}"):
            self._bury(ticket)
        member.part()
        self._parting.append((member, now + _PARTING_SECONDS))
