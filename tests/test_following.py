"""Following a submitted job while the dashboard comes and goes: a client that does what it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from raysys import following
from raysys.errors import ConfigError, InfrastructureError

LOST = ConnectionError("HTTPConnectionPool(host='10.0.0.1', port=8265): connection refused")


class Client:
    """`polls` are answers, `tails` the pieces of each connection; an exception is raised, and the last of either comes again and again."""

    def __init__(self, polls: list[Any], tails: list[list[Any]] | None = None):
        self.polls, self.tails = polls, tails or [[]]

    def get_job_info(self, job: str) -> Any:
        answer = self.polls.pop(0) if len(self.polls) > 1 else self.polls[0]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(status=answer, driver_exit_code=4, message="")

    def get_job_status(self, job: str) -> str:
        return self.get_job_info(job).status

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for piece in self.tails.pop(0) if len(self.tails) > 1 else self.tails[0]:
            if isinstance(piece, Exception):
                raise piece
            yield piece


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("PATIENCE", 0.3), ("ANSWER", 0.1), ("POLL", 0.01), ("PAUSE", 0.01)):
        monkeypatch.setattr(following, f"_{name}_SECONDS", seconds)


def test_polls_that_fail_for_a_moment_are_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_PATIENCE_SECONDS", 30.0)
    client = Client([LOST, "RUNNING", RuntimeError("Request failed with status code 500: x"), LOST, "FAILED"])
    assert following.follow(client, "j", "http://a:1") == 4


def test_a_dashboard_that_stays_away_is_one_line() -> None:
    with pytest.raises(InfrastructureError, match=r"job j cannot be followed and may run on: no Ray dashboard answers at http://a:1"):
        following.follow(Client(["RUNNING", LOST]), "j", "http://a:1")


def test_a_dashboard_that_hangs_is_the_same() -> None:
    hanging = Client(["RUNNING"])
    hanging.get_job_info = lambda job: time.sleep(5)  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises(InfrastructureError, match="no Ray dashboard answers at http://a:1"):
        following.follow(hanging, "j", "http://a:1")
    assert time.monotonic() - began < 3


def test_the_output_goes_on_however_often_the_connection_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"line {number}\n" for number in range(9)]
    broken = [[*lines[:number], LOST] for number in range(9)]
    client = Client(["RUNNING"], [*broken, [], [LOST], lines])  # one closes as if nothing were wrong, one gives nothing at all
    ended = threading.Event()
    printer = threading.Thread(target=following._print_logs, args=(client, "j", ended))
    printer.start()
    end = time.monotonic() + 30
    while len(client.tails) > 1 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)  # the last one, again and again
    assert printer.is_alive(), "the job has not ended"
    client.polls = ["SUCCEEDED"]
    printer.join(timeout=30)
    assert not printer.is_alive() and capsys.readouterr().out == "".join(lines)


def test_what_comes_at_the_end_is_shown_after_a_lost_connection(capsys: pytest.CaptureFixture[str]) -> None:
    ended = threading.Event()
    ended.set()
    following._print_logs(Client([LOST], [["the last words\n", LOST]]), "j", ended)
    assert capsys.readouterr().out == "the last words\n"


def test_stopping_a_job_takes_no_longer_than_it_may(capsys: pytest.CaptureFixture[str]) -> None:
    client = Client(["RUNNING"])
    client.stop_job = lambda job: time.sleep(5)  # type: ignore[attr-defined]
    began = time.monotonic()
    following.stop(client, "j", timeout=0.2)
    assert time.monotonic() - began < 3 and capsys.readouterr().err == "job j has not ended within 0.2 s\n"


@pytest.mark.parametrize(
    ("error", "kind", "part"),
    [
        (ConnectionError("Failed to connect to Ray at address: http://10.0.0.1:8403."), InfrastructureError, "no Ray dashboard answers"),
        (RuntimeError("Request failed with status code 500: node 10.0.40.1:8401 is gone"), InfrastructureError, "gives an error: Request"),
        (RuntimeError("Request failed with status code 403: no"), ConfigError, "refused the token"),
        (RuntimeError("401 Client Error: Unauthorized for url: http://10.0.0.1:8265/api"), ConfigError, "wants a token"),
        (type("AuthenticationError", (Exception,), {})("Authentication failed: the token is invalid"), ConfigError, "refused the token"),
    ],
)
def test_what_the_client_says_becomes_one_line(error: Exception, kind: type[Exception], part: str) -> None:
    said = following.plain(error, "http://10.0.0.1:8403")
    assert isinstance(said, kind) and part in str(said) and "\n" not in str(said)
