"""A head that is slow to answer, and one that several work on: a process that sleeps, behind a dashboard that says what it is told to."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from raysys import borrow, job, stages, submit
from raysys import head as heads
from raysys.errors import InfrastructureError
from raysys.head import Head

RUNNING = {"type": "SUBMISSION", "submission_id": "raysubmit_1", "status": "RUNNING"}
BY_HAND = {"type": "DRIVER", "submission_id": None, "status": "RUNNING"}
"""As Ray lists who joined it by `python jobs/x.py`."""
ENDED = {"type": "DRIVER", "submission_id": None, "status": "SUCCEEDED"}


class Dashboard:
    """`lists` is what it answers; the first `hangs` requests get no answer."""

    def __init__(self) -> None:
        self.lists: list[dict[str, Any]] = []
        self.hangs, self.asked = 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                if outer.asked <= outer.hangs:
                    return  # the connection is closed without a word
                body = json.dumps(outer.lists).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    one = Dashboard()
    yield one
    one.server.shutdown()
    one.server.server_close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def head(home: Path, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    monkeypatch.setattr(heads, "PATIENCE_SECONDS", 0.6)
    monkeypatch.setattr(borrow, "_PARTING_SECONDS", 0.3)
    monkeypatch.setenv("RAYSYS_HOME", str(home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    token = heads.token_file(home)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = psutil.Process(process.pid).create_time()
    one = Head(process.pid, started, "127.0.0.1:1", f"http://127.0.0.1:{dashboard.server.server_port}", str(token), str(home))
    (home / "head.json").write_text(json.dumps(asdict(one)))
    yield one
    process.kill()
    process.wait()


def test_a_head_that_is_slow_to_answer_is_asked_again(
    home: Path, head: Head, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "PATIENCE_SECONDS", 30.0)
    dashboard.hangs = 1
    assert heads.running(home) == head and dashboard.asked == 2


def test_a_living_head_that_never_answers_is_one_line_and_stays(home: Path, head: Head, dashboard: Dashboard) -> None:
    dashboard.hangs = 10**6
    with pytest.raises(InfrastructureError, match=r"is alive, but http.* has not answered for 0.6 s \(.*--stop-head\)"):
        heads.running(home)
    with pytest.raises(InfrastructureError, match="is alive, but"):
        job.find_ray()
    with pytest.raises(InfrastructureError, match="is alive, but"), stages.a_ray(home):
        pass
    with pytest.raises(InfrastructureError, match=r"has a Ray head that is alive .*--stop-head"):
        heads.start(home)
    assert head.alive()
    assert submit.main(["--stop-head"]) == 0 and not head.alive(), "the remedy works on it"


def test_a_head_whose_token_was_removed_does_not_answer(home: Path, head: Head) -> None:
    Path(head.token_path).unlink()
    assert not head.answers()


def test_a_dead_head_is_none(home: Path, head: Head) -> None:
    head.stop()
    assert heads.running(home) is None


@pytest.mark.parametrize("other", [RUNNING, BY_HAND], ids=["submitted", "by hand"])
def test_whoever_leaves_stops_the_head_only_if_nobody_works_on_it(
    home: Path, head: Head, dashboard: Dashboard, other: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with stages.a_ray(home) as env:
        assert env["RAY_ADDRESS"] == head.gcs
        dashboard.lists = [ENDED, other]
    assert head.alive() and "the Ray head stays: 1 other job(s) run on it" in capsys.readouterr().out
    dashboard.lists = [ENDED]
    with stages.a_ray(home):
        pass
    assert not head.alive()


def test_whoever_started_the_head_leaves_it_to_those_who_came_later(
    home: Path, head: Head, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The later one has no job at the moment, as between two stages of a pipeline."""
    state = (home / "head.json").read_text()
    (home / "head.json").unlink()

    def start(home: Path, cpus: int | None = None) -> Head:
        (home / "head.json").write_text(state)
        return head

    monkeypatch.setattr(heads, "start", start)
    first, second = stages.a_ray(home), stages.a_ray(home)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert head.alive() and "the Ray head stays: somebody else uses it" in capsys.readouterr().out
    second.__exit__(None, None, None)
    assert not head.alive()


def test_a_head_that_does_not_say_who_works_on_it_stays(
    home: Path, head: Head, dashboard: Dashboard, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with borrow.borrowed(home) as (_, found):
        assert found
        dashboard.hangs = 10**6
    assert head.alive() and "--stop-head ends it" in capsys.readouterr().out and time.monotonic() - began < 20


def test_who_has_just_ended_may_be_listed_for_a_moment(
    home: Path, head: Head, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(borrow, "_PARTING_SECONDS", 30.0)
    with borrow.borrowed(home):
        dashboard.lists = [BY_HAND]
        threading.Timer(0.1, dashboard.lists.clear).start()
    assert not head.alive()


def test_a_head_that_is_to_be_kept_is_kept(home: Path, head: Head) -> None:
    with borrow.borrowed(home, keep=True):
        pass
    assert head.alive()
