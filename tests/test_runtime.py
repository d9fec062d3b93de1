"""Waits across actors: whatever Ray raises becomes one of ours, and tells a death from an answer."""

from __future__ import annotations

from typing import Any

import pytest
import ray
import ray.exceptions

from raysys.errors import DataError, DeadlineError, InfrastructureError
from raysys.runtime import died, get, waits


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
