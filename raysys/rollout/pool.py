"""The pool of rollout workers, seen from the driver: it keeps them busy, replaces those that die and loses no sample.

One thread of it listens to the workers and hands out prompts; the driver's own thread asks for samples and waits. Imports
neither torch nor vLLM.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from raysys.batch import Batch
from raysys.config.parts import Deadlines, Rollout
from raysys.errors import DeadlineError, InfrastructureError, RaysysError
from raysys.rollout.crew import Crew
from raysys.rollout.dispatch import Dispatcher, Ticket
from raysys.rollout.members import Member
from raysys.rollout.results import Result, absurd, attach
from raysys.rollout.spec import Harvest, RolloutSpec, Sampling
from raysys.rollout.worker import RolloutWorker
from raysys.runtime import died, get, waiting

log = logging.getLogger(__name__)

_SENT = ("prompt_id", "sample", "prompt_ids")
_SENT_FOR_EPISODES = (*_SENT, "metadata")


@dataclass(frozen=True)
class _Asked:
    """What a ticket stands for and who waits for it."""

    prompts: Batch
    row: int
    domain: str
    sampling: Sampling
    inbox: deque[Result]


class RolloutPool:
    """One engine a worker; use as a context manager.

    What a row gets never depends on the number of workers, on who takes it or on how often it was lost: its seed is its own, and the
    engine's arithmetic does not depend on its neighbours (float32 on CPU; elsewhere up to rounding).

    `admit(version)` brings workers that came late up to the weights that the others have; None: no weights are pushed in this run.
    """

    def __init__(
        self, config: Rollout, spec: RolloutSpec, deadlines: Deadlines, worker: type = RolloutWorker, member: type[Member] = Member
    ):
        self._deadlines = deadlines
        self._fewest = config.fewest
        self._sent = _SENT if spec.episodes is None else _SENT_FOR_EPISODES
        self._books = Dispatcher(config.retries)
        self._asked: dict[int, _Asked] = {}
        self._lengths: dict[str, float] = {}
        self._crew = Crew(config, spec, deadlines, worker, member, self._books, self._bury)
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._fatal: RaysysError | None = None
        self._closing = False
        self._progress = time.monotonic()
        self.admit: Callable[[int], None] | None = None
        self.version = 0

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- what the driver calls

    def start(self) -> None:
        """Places and starts the fewest workers that the run may have.

        Raises:
            PlacementError: the cluster has no room for them, nor got it in `deadlines.placement`.
            ConfigError, InfrastructureError, DeadlineError: one of them did not start.
        """
        with self._changed:
            self._crew.hire()
        self._thread = threading.Thread(target=self._listen, name="rollout-pool", daemon=True)
        self._thread.start()
        try:
            self.wait(lambda: len(self.workers) == self._fewest, "start", limit=self._deadlines.start + self._deadlines.placement)
        finally:
            self._crew.started = True

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What each worker said of itself when it started."""
        return [member.facts for member in self._crew.members if member.facts]

    @property
    def workers(self) -> list[Member]:
        """Those that are up, with or without weights."""
        with self._changed:
            return self._crew.up

    @property
    def lost(self) -> int:
        """Workers that died or were given up so far."""
        return self._crew.lost

    def submit(self, prompts: Batch, sampling: Sampling, inbox: deque[Result], wave: int = 0) -> list[int]:
        """Asks for one response a row. Returns a ticket each; their results come into `inbox`, in any order. Low waves go first."""
        sizes = prompts.lengths("prompt_ids")
        domains = prompts.strings("domain") if "domain" in prompts else [""] * len(prompts)
        with self._changed:
            tickets = []
            for row, (size, domain) in enumerate(zip(sizes.tolist(), domains, strict=True)):
                expected = min(sampling.max_tokens, self._lengths.get(domain, sampling.max_tokens))
                number = self._books.add(int(size + expected), wave)
                self._asked[number] = _Asked(prompts, row, domain, sampling, inbox)
                tickets.append(number)
            self._deal()
        return tickets

    def cancel(self, tickets: Sequence[int]) -> None:
        """Nobody waits for these any more; what is known of them is forgotten."""
        with self._changed:
            for number in tickets:
                self._asked.pop(number, None)
                self._abort(self._books.drop(number), [number])

    def generate(self, prompts: Batch, sampling: Sampling) -> Batch:
        """One response a row, same row order, before anything that is under way.

        Raises:
            DataError: a row cannot be sampled.
            InfrastructureError: a row was lost too often; or workers died faster than they could be replaced.
            DeadlineError: nothing happened for `deadlines.generate`.
        """
        inbox: deque[Result] = deque()
        tickets = self.submit(prompts, sampling, inbox, wave=-1)
        self.wait(lambda: len(inbox) == len(tickets), "generate")
        found = {result.ticket: result for result in inbox}
        return attach(prompts, [found[ticket] for ticket in tickets])

    def wait(self, done: Callable[[], bool], operation: str, limit: float | None = None, admit: bool = True) -> None:
        """Blocks until `done()`, which is asked again whenever something happened. Workers that came late get their weights meanwhile.

        Raises:
            DeadlineError: nothing happened for `limit` (default `deadlines.generate`) seconds.
            RaysysError: whatever ended the pool.
        """
        knob = "deadlines.generate" if limit is None else "deadlines.start"
        limit = self._deadlines.generate if limit is None else limit
        self._progress = time.monotonic()
        with waiting("the rollout pool", operation, limit, knob):
            self._wait(done, operation, limit, knob, admit)

    def _wait(self, done: Callable[[], bool], operation: str, limit: float, knob: str, admit: bool) -> None:
        while True:
            with self._changed:
                if done():
                    return
                if self._fatal is not None:
                    raise self._fatal
                late = [member for member in self._crew.members if member.state == "started"] if admit and self._crew.started else []
                if not late:
                    self._changed.wait(0.25)
                    if time.monotonic() - self._progress > limit:
                        raise DeadlineError(f"the rollout pool{self._crew.grief}", operation, limit, knob)
                    continue
                if self.admit is None:
                    self.pushed(self.version, late)
                    continue
            self.admit(self.version)  # without the lock: it takes a while, and the others go on

    def await_worker(self) -> None:
        """Blocks until some worker is up. Raises what `start` raises."""
        self.wait(lambda: bool(self.workers), "start", limit=self._deadlines.start + self._deadlines.placement, admit=False)

    def pushed(self, version: int, members: Sequence[Member]) -> None:
        """These workers hold weights `version` now; nobody works with older ones from here on."""
        now = time.monotonic()
        with self._changed:
            self.version = version
            for member in members:
                if member.state in ("started", "ready"):
                    self._crew.welcome(member, version, now)
            for member in self.workers:
                if member.state == "ready" and member.version < version:
                    self._crew.lose(member, f"it holds weights {member.version}, the run has {version}")
            self._crew.generating = True
            self._deal()

    def lose(self, member: Member, cause: str) -> None:
        """Gives a worker up: its work goes to others and a new one takes its place."""
        with self._changed:
            self._crew.lose(member, cause)
            self._deal()

    def each(self, method: str) -> None:
        """Calls a method of every worker that is up and waits. One that does not answer is given up."""
        refs = {member: getattr(member.handle, method).remote() for member in self.workers}
        for member, ref in refs.items():
            try:
                get(ref, timeout=self._deadlines.push, actor=member.name, operation=method, knob="deadlines.push")
            except InfrastructureError as error:
                self.lose(member, error.message)

    def status(self) -> dict[str, Any]:
        """For people: who is how, and how much is waiting for whom."""
        with self._changed:
            now = time.monotonic()
            workers = [
                {"name": member.name, "state": member.state, "for_s": round(now - member.since, 1), "heard_s": round(now - member.beat, 1)}
                | {"version": member.version, "running": member.harvest.running, "tokens": member.harvest.tokens}
                | self._load(member.name)
                for member in self._crew.members
            ]
            counts = {"tickets": len(self._books.tickets), "waiting": self._books.waiting, "lost_workers": self.lost}
            return {"version": self.version, "workers": workers, "redispatched": self._books.redispatched} | counts

    def _load(self, name: str) -> dict[str, float]:
        load = self._books.workers.get(name)
        return {"held": len(load.held), "kv_share": round(load.share, 3)} if load is not None else {"held": 0}

    def counts(self) -> dict[str, int]:
        """What went wrong so far and was made good: samples given to another worker, late answers thrown away, workers lost."""
        return {"redispatched": self._books.redispatched, "duplicates": self._books.duplicates, "lost_workers": self.lost}

    def busy_seconds(self) -> float:
        """Seconds in which the workers that are up now had something to do, summed."""
        return sum(member.harvest.busy for member in self._crew.members)

    def close(self) -> None:
        """Ends workers and engines by handle; safe to call twice."""
        self._closing = True
        if self._thread is not None:
            self._thread.join(timeout=10)
            self._thread = None
        farewells = self._crew.close()
        if farewells:
            ray.wait(farewells, num_returns=len(farewells), timeout=5)
        self._crew.kill()

    # -- the thread that listens

    def _listen(self) -> None:
        while not self._closing:
            try:
                with self._changed:
                    pending = {member.pending: member for member in self._crew.members if member.pending is not None}
                ready: list[Any] = []
                if pending:
                    ready, rest = ray.wait(list(pending), num_returns=1, timeout=0.2)
                    if ready and rest:
                        ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
                else:
                    time.sleep(0.1)
                with self._changed:
                    for ref in ready:
                        if pending[ref].pending == ref:
                            self._hear(pending[ref], ref)
                    self._tend(time.monotonic())
                    self._deal()
                    self._changed.notify_all()
            except Exception as error:  # whoever waits must hear of it: a thread's own end is silent
                with self._changed:
                    cause = error if isinstance(error, RaysysError) else InfrastructureError(f"the rollout pool failed: {error!r}")
                    self._fatal = self._fatal or cause
                    self._changed.notify_all()
                return

    def _hear(self, member: Member, ref: Any) -> None:
        operation = "start" if member.state == "starting" else "generate"
        knob = "deadlines.start" if operation == "start" else "deadlines.heartbeat"
        try:
            said = get(ref, timeout=self._deadlines.heartbeat, actor=member.name, operation=operation, knob=knob)
        except RaysysError as error:
            if not self._crew.started and not died(error):  # what it says of itself others would say as well; a death is its own
                raise
            self._crew.lose(member, error.message)
            return
        now = time.monotonic()
        member.beat = self._progress = now
        if operation == "start":
            self._crew.greet(member, said, now)
        else:
            self._reap(member, said, now)
        if member.state != "gone":
            member.poll(self._deadlines.heartbeat / 4)

    def _reap(self, member: Member, harvest: Harvest, now: float) -> None:
        for failure in harvest.failures:
            ticket = self._books.tickets.get(failure.ticket)
            if self._books.fail(member.name, failure.ticket, failure.cause, failure.retry) and ticket is not None:
                self._bury(ticket)
        wrong = self._wrong(member, harvest)
        if harvest.rows is not None and not wrong:
            self._learn(harvest)
            for row, number in enumerate(harvest.tickets):
                if self._books.finish(member.name, number):
                    self._asked.pop(number).inbox.append(Result(number, harvest.rows, row))
                    self._crew.sampled()
        if member.name in self._books.workers and harvest.tickets:
            member.finished += len(harvest.tickets)
            member.idle_since = now  # work that came and went between two looks at the books is work, too
            self._books.pace(member.name, member.finished / max(1e-3, harvest.busy), harvest.away / member.finished)
        member.harvest = harvest
        if wrong or harvest.broken:
            self._crew.lose(member, wrong or harvest.broken)

    def _wrong(self, member: Member, harvest: Harvest) -> str:
        """What cannot be an answer to what was asked: such a worker is not believed again."""
        if harvest.rows is None:
            return ""
        strange = [number for number in harvest.tickets if not self._books.known(number)]
        if strange or len(set(harvest.tickets)) < len(harvest.tickets):
            return f"it answered what nobody asked (ticket {strange[0]})" if strange else "it answered one prompt twice"
        limits = [asked.sampling.max_tokens if (asked := self._asked.get(number)) else None for number in harvest.tickets]
        # In the middle of a push an engine may have finished samples with weights that the pool is not told of yet.
        return absurd(harvest.rows, limits, int(member.facts.get("vocabulary") or 2**31), self.version + 1)

    def _learn(self, harvest: Harvest) -> None:
        """Moves each domain's expected length towards what just came."""
        assert harvest.rows is not None
        for number, length in zip(harvest.tickets, harvest.rows.lengths("response_ids").tolist(), strict=True):
            asked = self._asked.get(number)
            if asked is not None:
                known = self._lengths.get(asked.domain, float(length))
                self._lengths[asked.domain] = known + 0.05 * (length - known)

    def _tend(self, now: float) -> None:
        lost = self._crew.lost
        self._crew.tend(now)
        for name, number in self._books.overdue(now, self._deadlines.generate):
            ticket = self._books.tickets[number]
            self._abort(name, [number])
            self._progress = now
            if self._books.fail(name, number, f"no answer from {name} in {self._deadlines.generate:g} s (deadlines.generate)"):
                self._bury(ticket)
        if self._crew.lost > lost:
            self._progress = now

    def _bury(self, ticket: Ticket) -> None:
        self._asked.pop(ticket.number).inbox.append(Result(ticket.number, None, 0, tuple(ticket.causes), ticket.own_fault))

    def _abort(self, name: str, tickets: list[int]) -> None:
        for member in self._crew.members:
            if member.name == name and member.handle is not None:
                member.handle.abort.remote(tickets)

    def _deal(self) -> None:
        for name, tickets in self._books.assign(time.monotonic()).items():
            member = next(member for member in self._crew.members if member.name == name)
            sets: dict[tuple[int, Sampling], list[int]] = {}
            for number in tickets:
                asked = self._asked[number]
                sets.setdefault((id(asked.prompts), asked.sampling), []).append(number)
            for (_, sampling), numbers in sets.items():
                first = self._asked[numbers[0]].prompts
                rows = Batch(first.table.select([name for name in self._sent if name in first])).take(
                    [self._asked[number].row for number in numbers]
                )
                member.handle.submit.remote(rows, numbers, sampling, self.version)
