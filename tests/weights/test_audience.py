"""Who is told what in a push when workers leave in the middle of it. No Ray, no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raysys.errors import InfrastructureError, WeightSyncError
from raysys.runtime import waits
from raysys.weights import push
from raysys.weights.push import Audience


class Handle:
    """An actor's handle that answers with what it was asked."""

    _actor_id = SimpleNamespace(hex=lambda: "a1")

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: (method, arguments))


def member(name: str) -> Any:
    return type("Member", (), {"name": name, "state": "ready", "handle": Handle()})()


def test_a_worker_that_the_pool_gave_up_is_still_asked_and_its_errors_mean_nothing() -> None:
    lost: list[str] = []
    first, second = member("rollout worker 0"), member("rollout worker 1")
    audience = Audience([first, second], lambda one, cause: lost.append(f"{one.name}: {cause}"), 1.0)
    second.handle, second.state = None, "gone"  # the pool's thread kills it while the push waits for somebody else
    assert audience.call("probe", [1]) == {first: ("probe", ([1],)), second: ("probe", ([1],))}
    assert audience._its_own(second, WeightSyncError("could not load: 'NoneType' has no attribute 'update_weights'"))
    assert not audience._its_own(first, WeightSyncError("tensor w does not fit"))
    assert audience._its_own(first, InfrastructureError("its engine process died"))
    audience._give_up(second, "it was given back")
    audience._give_up(second, "it was given back")
    assert lost == ["rollout worker 1: it was given back (in a weight push)"] and audience.members == [first]


def test_a_push_tells_who_has_not_answered_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []

    def wait(refs: list[str], **_: Any) -> tuple[list[str], list[str]]:
        told.append(sorted(one["for"] for one in waits()))
        return refs[:1], refs[1:]

    monkeypatch.setattr(push.ray, "wait", wait)
    audience = Audience([], lambda one, cause: None, 5.0)
    audience._await({"x": "rollout worker 0", "y": "the trainer", "z": "the trainer"}, "update")
    assert told == [["rollout worker 0", "the trainer"], ["the trainer"], ["the trainer"]] and waits() == []
    audience._await({}, "update")
