"""Who has which sample: the pool's books. No Ray, no clock, no thread, so that tests can try any order of events.

A sample is a ticket from the moment it is asked for until its result is handed over. A ticket is with nobody (waiting) or
with one worker. A result counts only if it comes from the worker that has the ticket: whoever was given up on and answers
late, or answers twice, is not heard. So each ticket ends once, finished or dead, whatever dies in whatever order.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field


@dataclass
class Ticket:
    """One sample to be drawn. `cost` is in tokens, prompt and expected response; low `wave` goes first, in it high `cost`."""

    number: int
    cost: int
    wave: int
    worker: str = ""
    since: float = 0.0
    causes: list[str] = field(default_factory=list)
    own_fault: bool = False
    """The row cannot be sampled anywhere."""

    @property
    def rank(self) -> tuple[int, int, int]:
        """Within a wave the longest first: started last, they would keep everyone waiting."""
        return (self.wave, -self.cost, self.number)


@dataclass
class Load:
    """What a worker can take and what it has. `seats` decode at once; `ahead` more wait there so that no seat stays empty, and as many
    again as are usually `away` with their tools: they have no seat. Where samples go away, as many as the KV cache has room for may begin:
    what they said so far stays cached there, and none begins late, to end long after all others."""

    seats: int
    tokens: int
    held: set[int] = field(default_factory=set)
    load: int = 0
    ahead: int = 0
    away: int = 0
    alone: bool = False
    """What it has runs by itself: nothing else is given to it."""

    @property
    def share(self) -> float:
        """Part of its KV budget that is spoken for."""
        return self.load / self.tokens

    def takes(self, cost: int) -> bool:
        """An empty worker takes anything: what does not fit then never will, and the engine says so."""
        if not self.held or self.alone:
            return not self.held
        if self.away and self.load + cost <= self.tokens:
            return True
        more = self.ahead + self.away
        return len(self.held) < self.seats + more and self.load + cost <= self.tokens * (1 + more / self.seats)


class Dispatcher:
    """Gives tickets to workers by their free KV budget.

    A ticket on its last try gets a worker to itself, so that a prompt that kills engines takes no other prompt along.

    Args:
        retries: how often a ticket may fail for a reason that is not its own before it is dead.
    """

    def __init__(self, retries: int):
        self.retries = retries
        self.workers: dict[str, Load] = {}
        self.tickets: dict[int, Ticket] = {}
        self._waiting: list[tuple[tuple[int, int, int], int]] = []
        self._alone: list[int] = []
        self._issued = 0
        self.redispatched = self.duplicates = 0

    # -- tickets

    def add(self, cost: int, wave: int) -> int:
        """A new ticket, waiting. Returns its number, never used again."""
        ticket = Ticket(self._issued, max(1, cost), wave)
        self._issued += 1
        self.tickets[ticket.number] = ticket
        heapq.heappush(self._waiting, (ticket.rank, ticket.number))
        return ticket.number

    def known(self, number: int) -> bool:
        """Whether there ever was such a ticket."""
        return 0 <= number < self._issued

    def drop(self, number: int) -> str:
        """Forgets a ticket; returns the worker that has it, "" if nobody."""
        ticket = self.tickets.pop(number, None)
        return self._release(ticket) if ticket is not None else ""

    def finish(self, worker: str, number: int) -> bool:
        """The result is here. False: not from the worker that has it; to be thrown away."""
        ticket = self.tickets.get(number)
        if ticket is None or ticket.worker != worker or worker not in self.workers:
            self.duplicates += 1
            return False
        self.drop(number)
        return True

    def fail(self, worker: str, number: int, cause: str, retry: bool = True) -> bool:
        """It failed at a worker. True: it is dead (`retry` false, or too often); the caller has its `causes`. False: it waits again."""
        ticket = self.tickets.get(number)
        if ticket is None or ticket.worker != worker:
            return False
        self._release(ticket)
        ticket.causes.append(cause)
        ticket.own_fault = not retry
        if not retry or len(ticket.causes) > self.retries:
            del self.tickets[number]
            return True
        self.redispatched += 1
        if len(ticket.causes) == self.retries:
            self._alone.append(number)
        else:
            heapq.heappush(self._waiting, (ticket.rank, number))
        return False

    def overdue(self, now: float, limit: float) -> list[tuple[str, int]]:
        """(worker, ticket) of those that a worker has had longer than `limit` seconds."""
        return [(one.worker, one.number) for one in self.tickets.values() if one.worker and now - one.since > limit]

    @property
    def waiting(self) -> int:
        return sum(not ticket.worker for ticket in self.tickets.values())

    @property
    def crowded(self) -> bool:
        """Whether another worker would have something to do."""
        return any(len(load.held) > load.seats + load.away for load in self.workers.values()) or self.waiting > 0

    # -- workers

    def join(self, worker: str, seats: int, tokens: int) -> None:
        """A worker that takes tickets from now on. Until its pace is known, as many wait with it as it has seats."""
        self.workers[worker] = Load(seats, tokens, ahead=seats)

    def pace(self, worker: str, per_second: float, away: float = 0.0, round_trip: float = 0.25) -> None:
        """Lets as many tickets wait with a worker as it finishes in a message's round trip; more would only be unevenly spread.

        `away`: seconds that each spends with its tools. So many are there at any time (Little's law), and others take their seats.
        """
        load = self.workers[worker]
        load.away = math.ceil(per_second * away)
        load.ahead = min(load.seats, max(1, int(per_second * round_trip)))

    def leave(self, worker: str, cause: str) -> list[Ticket]:
        """The worker is gone: what it had waits again. Returns those that are dead with this."""
        load = self.workers.pop(worker, None)
        held = sorted(load.held) if load is not None else []
        tickets = [self.tickets[number] for number in held]
        return [ticket for ticket in tickets if self.fail(worker, ticket.number, cause)]

    def assign(self, now: float) -> dict[str, list[int]]:
        """Hands out waiting tickets, each to the worker with the largest free share of its KV budget. Returns tickets by worker."""
        given: dict[str, list[int]] = {}
        emptied = self._assign_alone(now, given)
        free = [(load.share, name) for name, load in self.workers.items() if name != emptied]
        heapq.heapify(free)
        while free and self._waiting:
            number = self._waiting[0][1]
            ticket = self.tickets.get(number)
            if ticket is None or ticket.worker:
                heapq.heappop(self._waiting)  # dropped while it waited
                continue
            _, name = free[0]
            if not self.workers[name].takes(ticket.cost):
                heapq.heappop(free)
                continue
            heapq.heappop(self._waiting)
            self._give(ticket, name, now, given)
            heapq.heapreplace(free, (self.workers[name].share, name))
        return given

    def _assign_alone(self, now: float, given: dict[str, list[int]]) -> str:
        """Tickets on their last try to empty workers. Returns the worker that is to run empty for the next one, "" if none has to."""
        self._alone = [number for number in self._alone if number in self.tickets]
        for name, load in self.workers.items():
            if not load.held:
                load.alone = bool(self._alone)
                if self._alone:
                    self._give(self.tickets[self._alone.pop(0)], name, now, given)
        if not self._alone or any(load.alone for load in self.workers.values()):
            return ""
        return min(self.workers, key=lambda name: len(self.workers[name].held), default="")

    def _give(self, ticket: Ticket, worker: str, now: float, given: dict[str, list[int]]) -> None:
        ticket.worker, ticket.since = worker, now
        load = self.workers[worker]
        load.held.add(ticket.number)
        load.load += ticket.cost
        given.setdefault(worker, []).append(ticket.number)

    def _release(self, ticket: Ticket) -> str:
        worker, ticket.worker = ticket.worker, ""
        load = self.workers.get(worker)
        if load is not None and ticket.number in load.held:
            load.held.discard(ticket.number)
            load.load -= ticket.cost
        return worker
