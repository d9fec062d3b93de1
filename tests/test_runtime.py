"""Waits across actors: whatever Ray raises becomes one of ours, and tells a death from an answer."""

from __future__ import annotations

from typing import Any

import pytest
import ray
import ray.exceptions

from raysys.config.parts import Deadlines, Trainer
from raysys.errors import DataError, DeadlineError, InfrastructureError
from raysys.runtime import died, get, waiting_for, waits
from raysys.training.group import TrainerGroup
from raysys.training.objectives import SftObjective


def raising(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(refs: Any, timeout: float) -> None:
        assert [one["knob"] for one in waits()] == ["deadlines.score"]
        raise error

    monkeypatch.setattr(ray, "get", fail)


def ask() -> Any:
    return get(None, timeout=1.0, actor="scorer 0", operation="score", knob="deadlines.score")


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.ActorDiedError(),
        ray.exceptions.OutOfMemoryError("the node ran low on memory"),
        ray.exceptions.NodeDiedError("the node was marked dead"),
        ray.exceptions.RuntimeEnvSetupError("no such file"),
        ray.exceptions.WorkerCrashedError(),
        ray.exceptions.ObjectLostError("ab" * 14, None, ""),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_ends_an_actor_is_a_death(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    raising(monkeypatch, error)
    with pytest.raises(InfrastructureError, match=r"^scorer 0 died during 'score': ") as caught:
        ask()
    assert died(caught.value) and not waits()


def test_an_answer_is_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ray.exceptions.RayTaskError("score", "trace", DataError("row 3 is no good", "mend it")))
    with pytest.raises(DataError, match="row 3 is no good") as caught:
        ask()
    assert not died(caught.value)
    raising(monkeypatch, ray.exceptions.GetTimeoutError())
    with pytest.raises(DeadlineError, match=r"scorer 0 did not finish 'score' within 1 s \(raise deadlines.score") as late:
        ask()
    assert not died(late.value)


def test_of_several_that_are_waited_for_those_are_told_that_have_not_answered() -> None:
    with waiting_for(["a", "b", "c"], "push", 5.0, "deadlines.push") as answered:
        assert [one["for"] for one in waits()] == ["a", "b", "c"]
        answered("b")
        answered("b")
        assert [(one["for"], one["operation"], one["knob"]) for one in waits()] == [(name, "push", "deadlines.push") for name in "ac"]
    assert waits() == []


def test_a_wait_for_the_trainer_is_told_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []

    def wait(refs: list[int], **_: Any) -> tuple[list[int], list[int]]:
        told.append([one["for"] for one in waits()])
        return refs[:1], refs[1:]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda ref, timeout: 10 * ref)
    trainer = TrainerGroup(Trainer(), "m", SftObjective(), 1e-3, 1, 0, 1.0, "cpu", "float32", Deadlines())
    refs: Any = [1, 2]
    assert trainer._wait(refs, 3.0, "train a step", "deadlines.train") == [10, 20]
    assert told == [["trainer rank 0", "trainer rank 1"], ["trainer rank 1"]] and waits() == []
