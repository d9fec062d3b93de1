"""Who the pool has, over members that take no process and hours that take no time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from raysys.config.parts import Deadlines, Rollout
from raysys.errors import PlacementError
from raysys.rollout import crew as crews
from raysys.rollout.crew import Crew
from raysys.rollout.dispatch import Dispatcher
from raysys.rollout.spec import RolloutSpec

ROOM: list[str] = []
"""Names of the members that have a place; who parts from one frees it by `kill`."""


class Chair:
    """A member: it is placed when `ROOM` names it."""

    def __init__(self, rank: int, spec: RolloutSpec, worker: type, now: float):
        self.name, self.state, self.since, self.beat, self.idle_since = f"rollout worker {rank}", "placing", now, now, now
        self.bundle, self.facts, self.mourned, self.finished = {"CPU": 1.0}, {}, False, 1

    def placed(self, now: float) -> bool:
        return self.name in ROOM

    def launch(self, now: float) -> None:
        self.enter("starting", now)

    def enter(self, state: str, now: float) -> None:
        self.state, self.since, self.beat = state, now, now

    def part(self) -> None:
        self.state = "gone"

    def kill(self) -> None:
        ROOM.remove(self.name)


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Crew:
    """A range whose fewest, one worker, is up, and whose others have waited for longer than the deadline."""
    ROOM[:] = ["rollout worker 0"]
    monkeypatch.setattr(crews, "no_place", lambda *_: PlacementError("no place for rollout", "add nodes"))
    config = Rollout(workers="1..2")
    spec = RolloutSpec(model="m", device="cpu", dtype="float32", max_model_len=32, config=config)
    books = Dispatcher(2)
    one: Any = Crew(config, spec, Deadlines(placement=60.0, start=60.0, heartbeat=1000.0), object, Chair, books, lambda ticket: None)  # type: ignore[arg-type]
    now = time.monotonic() - 100
    one.hire()
    one.tend(now)
    one.greet(one.members[0], {}, now)
    one.started = one.generating = True
    for second in range(100):
        one.tend(now + second)
    assert [member.state for member in one.members] == ["started", "placing"]
    return one


def test_the_only_worker_dies_and_one_that_found_no_room_takes_its_place(crew: Crew) -> None:
    now = time.monotonic()
    crew.lose(crew.members[0], "its process ended")
    for second in range(5):
        crew.tend(now + second)
    assert not ROOM, "the dead one's place is free"
    crew.tend(now + 50)
    ROOM.append(crew.members[0].name)
    crew.tend(now + 55)
    assert [member.state for member in crew.members] == ["starting", "placing"]
    for second in range(56, 200):
        crew.members[0].since = now + second  # it is not late
        crew.tend(now + second)


def test_without_any_worker_and_without_room_the_run_ends_after_the_deadline(crew: Crew) -> None:
    now = time.monotonic()
    crew.lose(crew.members[0], "its process ended")
    for second in range(59):
        crew.tend(now + second)
    with pytest.raises(PlacementError, match="no place for rollout"):
        crew.tend(now + 62)


def test_who_follows_the_only_worker_must_run_what_that_one_did(crew: Crew) -> None:
    now = time.monotonic()
    crew.greet(crew.members[1], {"vllm": "0.32", "revision": "a-1"}, now)
    for member in list(crew.members):
        crew.lose(member, "its process ended")
    for facts, told in (({"vllm": "0.33", "revision": "a-1"}, "vLLM 0.33, the others 0.32"), ({"vllm": "0.32", "revision": "a-2"}, "a-2")):
        other = crew.members[0]
        other.finished = 0
        crew.greet(other, facts, now)
        assert other not in crew.members and told in crew._strikes[-1]
    crew.greet(right := crew.members[0], {"vllm": "0.32", "revision": "a-1"}, now)
    assert right.state == "started" and right in crew.members
