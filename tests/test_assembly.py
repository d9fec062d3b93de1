"""How rooms start side by side."""

from __future__ import annotations

import threading
import time

import pytest

from raysys.assembly import start_all
from raysys.errors import InfrastructureError


def test_the_first_failure_is_told_at_once_whatever_the_others_do() -> None:
    hold = threading.Event()

    def late() -> None:
        hold.wait(30)
        raise RuntimeError("an echo")

    def fails() -> None:
        time.sleep(0.05)
        raise InfrastructureError("scorer 0 died")

    began = time.monotonic()
    with pytest.raises(InfrastructureError, match="scorer 0 died"):
        start_all(trainer=late, scorer=fails)
    assert time.monotonic() - began < 10
    hold.set()


def test_all_have_started_when_it_returns() -> None:
    started: list[str] = []
    start_all(a=lambda: started.append("a"), b=lambda: (time.sleep(0.05), started.append("b")))
    assert sorted(started) == ["a", "b"]
