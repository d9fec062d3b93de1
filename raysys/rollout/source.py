"""Prompts turned into samples: the loop's source in on-policy jobs.

Generation may run ahead of training by `max_age` versions. At each step the source has at most `(max_age + 1) * batch` prompts
under way or waiting, so no prompt is started that would have to be trained on with older weights; the trainer waits for a
straggler rather than train around it until it is too old. Synchronous training is `max_age=0` of the same lines.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from raysys.batch import Batch
from raysys.errors import ConfigError, DataError, InfrastructureError
from raysys.rollout.pool import RolloutPool
from raysys.rollout.results import Result, attach, attach_known
from raysys.rollout.spec import Sampling, response_columns


class Prompts(Protocol):
    """What the source needs of a prompt stream."""

    def take(self, n: int) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class Letters(Protocol):
    """Where prompts go that cannot be sampled."""

    def __call__(self, record: dict[str, Any]) -> None: ...


@dataclass(eq=False)
class Group:
    """A prompt's samples. `version` is a lower bound of the weights that they are drawn with: those held when they were asked for."""

    seq: int
    prompts: Batch
    version: int
    results: dict[int, Result] = field(default_factory=dict)
    tickets: dict[int, int] = field(default_factory=dict)
    """Ticket to row, of samples under way."""
    ready: int = 0
    """Place in the order of completion; 0: not complete."""


class OnPolicySource:
    """Keeps the pool supplied with prompts and gives whole groups, a prompt's samples side by side.

    Args:
        prompts: the stream; its cursor is saved together with what was drawn from it and is not trained yet.
        samples: responses a prompt.
        order: "first_ready": groups in the order in which they are complete, as far as no other gets too old by it; "in_order": as drawn.
        buffer_bytes: finished responses that may wait; beyond, no prompt is started that the next step does not need.
        dead_letter: told of each prompt that could not be sampled. None: the run ends with it.
        max_dead_letters: the run ends with one more than these.
    """

    def __init__(
        self,
        prompts: Prompts,
        pool: RolloutPool,
        samples: int,
        sampling: Sampling,
        order: Literal["first_ready", "in_order"] = "first_ready",
        buffer_bytes: int = 1 << 30,
        dead_letter: Letters | None = None,
        max_dead_letters: int = 0,
    ):
        self._prompts, self._pool, self._samples, self._sampling = prompts, pool, samples, sampling
        self._order, self._buffer_bytes = order, buffer_bytes
        self._dead_letter, self._max_dead = dead_letter, max_dead_letters if dead_letter else 0
        self._groups: dict[int, Group] = {}
        self._of_ticket: dict[int, Group] = {}
        self._inbox: deque[Result] = deque()
        self._next, self._completed = 0, 0
        self.stale = self.dead = 0

    def take(self, batch: int, max_age: int) -> Batch:
        """Samples of `batch` prompts, none older than `max_age` versions of the weights.

        Raises:
            DataError: too many prompts could not be sampled.
            InfrastructureError, DeadlineError: see `RolloutPool.wait`.
        """
        version = self._pool.version
        chosen: list[Group] = []

        def settled() -> bool:
            """The step's groups are there, or a prompt died and another has to take its place."""
            if self._sort_mail():
                return True
            if not self._refuse_stale(version - max_age):
                chosen[:] = self._choose(batch, version - max_age, max_age)
            return len(chosen) == batch

        while not chosen:
            self._ask(version, self._missing(batch, max_age))
            self._pool.wait(settled, "generate")
        for group in chosen:
            del self._groups[group.seq]
        results = [group.results[row] for group in chosen for row in range(len(group.prompts))]
        return attach(Batch.concat([group.prompts for group in chosen]), results)

    # -- what a resume needs

    def state(self) -> dict[str, Any]:
        return {"prompts": self._prompts.state(), "stale": self.stale, "dead": self.dead}

    def backlog(self) -> Batch | None:
        """What was drawn from the prompts and is not trained: finished samples whole, the others without their response columns' values."""
        self._sort_mail(bury=False)
        groups = [group for _, group in sorted(self._groups.items())]
        if not groups:
            return None
        results = [group.results.get(row) for group in groups for row in range(len(group.prompts))]
        return attach_known(Batch.concat([group.prompts for group in groups]), results)

    def restore(self, state: dict[str, Any], backlog: Batch | None = None, version: int = 0) -> None:
        """Goes on with weights `version`: finished samples of the backlog are kept, the others drawn again, by the same seeds.

        Raises:
            ConfigError: the resume point is of a run that took recorded samples.
        """
        if "prompts" not in state:
            raise ConfigError(
                "the resume point is of a run on recorded samples and has no place in the prompts",
                "set rollout.replay again, or choose another name=",
            )
        self._pool.cancel(list(self._of_ticket))
        self._groups, self._of_ticket = {}, {}
        self._inbox.clear()
        self._prompts.restore(state["prompts"])
        self.stale, self.dead = state["stale"], state["dead"]
        if backlog is None:
            return
        ids = np.array(backlog.strings("prompt_id"))
        starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
        names = list(response_columns(backlog))
        prompts = Batch(backlog.table.drop_columns(names))
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            group = self._admit(prompts.slice(int(start), int(end - start)), version)
            rows = Batch(backlog.table.slice(int(start), int(end - start)).select(names))
            for row, reason in enumerate(rows.table.column("stop_reason").to_pylist()):
                if reason is not None:
                    group.results[row] = Result(-1, rows, row)
                    group.version = min(group.version, first_version(group.results[row]))
            self._submit(group, [row for row in range(len(group.prompts)) if row not in group.results])
            self._settle(group)

    def counts(self) -> dict[str, int]:
        """What was thrown away so far: samples too old, prompts that could not be sampled; and what the pool made good."""
        return {"stale": self.stale, "dead_letters": self.dead} | self._pool.counts()

    def status(self) -> dict[str, int]:
        """Groups under way and complete, and the bytes of what is finished."""
        complete = sum(group.ready > 0 for group in list(self._groups.values()))
        return {"groups": len(self._groups), "complete": complete, "bytes": self._bytes()}

    # -- inside

    def _missing(self, batch: int, max_age: int) -> int:
        """How many prompts may be started now. Beyond the buffer's bytes only what this step itself needs."""
        wanted = batch if self._bytes() > self._buffer_bytes else (max_age + 1) * batch
        return wanted - len(self._groups)

    def _ask(self, version: int, count: int) -> None:
        if count <= 0:
            return
        drawn = self._prompts.take(count)
        rows = drawn.repeat(self._samples)
        tickets = self._pool.submit(rows, self._sampling, self._inbox, wave=self._next)
        for place in range(count):
            group = self._admit(rows.slice(place * self._samples, self._samples), version)
            for row in range(self._samples):
                self._expect(group, row, tickets[place * self._samples + row])

    def _admit(self, prompts: Batch, version: int) -> Group:
        group = Group(self._next, prompts, version)
        self._groups[group.seq] = group
        self._next += 1
        return group

    def _submit(self, group: Group, rows: list[int]) -> None:
        if rows:
            for row, ticket in zip(
                rows, self._pool.submit(group.prompts.take(rows), self._sampling, self._inbox, wave=group.seq), strict=True
            ):
                self._expect(group, row, ticket)

    def _expect(self, group: Group, row: int, ticket: int) -> None:
        group.tickets[ticket] = row
        self._of_ticket[ticket] = group

    def _sort_mail(self, bury: bool = True) -> bool:
        """Results to their groups; True if a group died and another prompt is to take its place.

        Without `bury` the dead stay in the inbox: a resume point that is being written already counts their prompts as drawn, so they
        must be in its backlog.
        """
        died, later = False, []
        while self._inbox:
            result = self._inbox.popleft()
            if result.rows is None and not bury:
                later.append(result)
                continue
            group = self._of_ticket.pop(result.ticket, None)
            if group is None or group.seq not in self._groups:
                continue
            row = group.tickets.pop(result.ticket)
            if result.rows is None:
                self._bury(group, row, result)
                died = True
            else:
                group.results[row] = result
                self._settle(group)
        self._inbox.extend(later)
        return died

    def _settle(self, group: Group) -> None:
        if not group.tickets and len(group.results) == len(group.prompts):
            self._completed += 1
            group.ready = self._completed
            group.version = min(first_version(result) for result in group.results.values())

    def _bury(self, group: Group, row: int, result: Result) -> None:
        prompt, sample = group.prompts.strings("prompt_id")[row], int(group.prompts.numbers("sample")[row])
        self.dead += 1
        if self.dead > self._max_dead:
            kind = DataError if result.own_fault else InfrastructureError
            cause = "; then ".join(result.causes)
            raise kind(f"{self.dead} prompts could not be sampled, the last is {prompt}: {cause}", "rollout.max_dead_letters allows more")
        if self._dead_letter is not None:
            fault = "data" if result.own_fault else "infrastructure"
            self._dead_letter({"prompt_id": prompt, "sample": sample, "fault": fault, "causes": list(result.causes)})
        for ticket in group.tickets:
            self._of_ticket.pop(ticket, None)
        self._pool.cancel(list(group.tickets))
        del self._groups[group.seq]

    def _refuse_stale(self, oldest: int) -> bool:
        """Draws samples again whose first token is of weights older than `oldest`. True if there were any."""
        found = False
        for group in list(self._groups.values()):
            if group.ready and group.version < oldest:
                old = [row for row, result in group.results.items() if first_version(result) < oldest]
                self.stale += len(old)
                for row in old:
                    del group.results[row]
                group.ready, group.version, found = 0, self._pool.version, True
                self._submit(group, old)
        return found

    def _choose(self, batch: int, oldest: int, max_age: int) -> list[Group]:
        """The step's groups, as drawn; [] while those that it needs are not there.

        With `first_ready`: of the groups with weights up to `oldest + j` all but `j * batch` must be trained now, or some would be
        older than `max_age` when their turn comes.
        """
        groups = sorted(self._groups.values(), key=lambda group: group.seq)
        ready = sorted((group for group in groups if group.ready), key=lambda group: group.ready)
        if len(ready) < batch:
            return []
        if self._order == "in_order":
            return groups[:batch] if all(group.ready for group in groups[:batch]) else []
        chosen: dict[int, Group] = {}
        for slack in range(max_age + 1):
            due = sum(group.version <= oldest + slack for group in groups) - slack * batch
            due = min(due - sum(group.version <= oldest + slack for group in chosen.values()), batch - len(chosen))
            able = [group for group in ready if group.version <= oldest + slack and group.seq not in chosen]
            if due > len(able):
                return []
            chosen |= {group.seq: group for group in able[: max(0, due)]}
        rest = [group for group in ready if group.seq not in chosen]
        chosen |= {group.seq: group for group in rest[: batch - len(chosen)]}
        return [group for _, group in sorted(chosen.items())]

    def _bytes(self) -> int:
        sizes = {
            id(result.rows): result.rows.table.nbytes
            for group in list(self._groups.values())  # copies: another thread counts too, for people
            for result in list(group.results.values())
            if result.rows
        }
        return sum(sizes.values())


def first_version(result: Result) -> int:
    """Weights of a sample's first token."""
    assert result.rows is not None
    return int(result.rows.ragged("version_spans")[result.row][1])
