"""Runs that go on by themselves: real child processes that die, hang, fail for good, and get somewhere or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from raysys import job, supervise
from raysys.config.pretraining import LocalTextConfig
from raysys.config.runs import SftConfig
from raysys.errors import InfrastructureError
from raysys.ledger import Ledger

CHILD = """
import os, signal, sys, time
from pathlib import Path
from raysys import supervise
from raysys.processes import die_with_parent
die_with_parent(supervise.supervisor())
folder, number = Path(sys.argv[1]), supervise.attempt()
with open(folder / "attempts", "a") as file:
    file.write(f"{number}\\n")
with supervise.beating(folder / "pulse"):
    how = sys.argv[2 + min(number, len(sys.argv) - 3)]
    if how.startswith("point+"):
        (folder / f"step_{number}").touch()
        how = how.removeprefix("point+")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        while not (folder / "pulse").exists():  # before its first beat it would have the minute that a start may take
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "sleep":
        try:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
            time.sleep(60)
        finally:
            (folder / "cleaned").touch()
    sys.exit(int(how))
"""


def command(folder: Path, *story: str) -> list[str]:
    script = folder / "child.py"
    script.write_text(textwrap.dedent(CHILD))
    return [sys.executable, str(script), str(folder), *story]


def run(folder: Path, *story: str, restarts: int = 2, silence: float = 60.0) -> tuple[int, int]:
    """Exit code and number of attempts."""
    code = supervise.supervise(
        command(folder, *story), restarts, lambda: sorted(path.name for path in folder.glob("step_*")), lambda: folder / "pulse", silence
    )
    return code, len((folder / "attempts").read_text().split())


def test_what_is_killed_or_loses_a_part_starts_again_and_what_is_wrong_does_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(supervise, "_PAUSE_SECONDS", 0.0)
    for story, want in (
        (("kill", "75", "0"), (0, 3)),
        (("2",), (2, 1)),
        (("1",), (1, 1)),
        (("kill", "2"), (2, 2)),
        (("kill", "kill", "kill", "0"), (1, 3)),
    ):
        folder = tmp_path / "-".join(story)
        folder.mkdir()
        assert run(folder, *story) == want, story


def test_restarts_are_counted_from_the_last_resume_point(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(supervise, "_PAUSE_SECONDS", 0.0)
    assert run(tmp_path, "point+kill", "point+kill", "point+kill", "point+75", "point+kill", "0", restarts=1) == (0, 6)


def test_a_driver_that_stands_still_is_killed_and_started_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(supervise, "_PAUSE_SECONDS", 0.0)
    began = time.monotonic()
    assert run(tmp_path, "stop", "0", silence=3.0) == (0, 2)
    assert 3.0 < time.monotonic() - began < 50.0


SUPERVISE = "import sys; from pathlib import Path; from raysys import supervise; f = Path(sys.argv[1]); "
SUPERVISE += "sys.exit(supervise.supervise(sys.argv[2:], 3, lambda: 0, lambda: f / 'pulse', 60.0))"


def test_a_signal_to_stop_reaches_the_driver_and_a_killed_supervisor_takes_it_along(tmp_path: Path) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        folder = tmp_path / how.name
        folder.mkdir()
        supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISE, str(folder), *command(folder, "sleep")])
        end = time.monotonic() + 60
        while not (folder / "pulse").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        (driver,) = psutil.Process(supervisor.pid).children()
        os.kill(supervisor.pid, how)
        assert supervisor.wait(timeout=30) == (130 if how == signal.SIGTERM else -signal.SIGKILL)
        driver.wait(timeout=30)
        assert (folder / "cleaned").exists() == (how == signal.SIGTERM)


SLOW = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "here").touch()
while not (folder / "go").exists():
    time.sleep(0.02)
from raysys import supervise
from raysys.processes import die_with_parent
die_with_parent(supervise.supervisor())
(folder / "orphan").touch()
"""


def awaited(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


def test_a_supervisor_that_is_killed_before_the_driver_looks_takes_it_along(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    driven = [sys.executable, str(tmp_path / "slow.py"), str(tmp_path)]
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISE, str(tmp_path), *driven])
    awaited(tmp_path / "here")
    (driver,) = psutil.Process(supervisor.pid).children()
    supervisor.kill()
    supervisor.wait()
    (tmp_path / "go").touch()
    driver.wait(timeout=30)
    assert not (tmp_path / "orphan").exists()


def test_a_job_whose_supervisor_is_gone_ends_and_its_children_do_not_take_theirs_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).resolve().parent.parent / "jobs" / "sft.py"
    env = os.environ | {supervise.ATTEMPT: "0", supervise.SUPERVISOR: str(os.getppid())}
    assert subprocess.run([sys.executable, str(script), "--check"], env=env).returncode == -signal.SIGKILL
    monkeypatch.setenv(supervise.SUPERVISOR, "7")
    assert (supervise.supervisor(), supervise.supervisor()) == (7, None)


@pytest.mark.parametrize(("attempt", "code"), [("0", 1), ("1", supervise.TRY_AGAIN)])
def test_a_ray_that_does_not_answer_a_later_attempt_is_tried_again(attempt: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent() -> None:
        raise InfrastructureError("the Ray head is alive but has not answered")

    monkeypatch.setattr(job, "find_ray", silent)
    monkeypatch.setattr(job, "die_with_parent", lambda parent: None)
    monkeypatch.setattr(job.logging, "basicConfig", lambda **how: None)
    monkeypatch.setenv(supervise.ATTEMPT, attempt)
    assert job.main("sft", SftConfig, ["--check"]) == code


def test_a_run_that_was_killed_before_its_page_gets_it_when_it_is_started_again(tmp_path: Path) -> None:
    config = LocalTextConfig.parse({"run_dir": str(tmp_path / "run")})
    ledger = Ledger(tmp_path / "run", config)
    ledger.finish(0)
    ledger.close()
    for _ in range(2):
        assert job._run("local_text", config, lambda *_: pytest.fail("it is done")) == 0
        assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "", "also of a job without steps"
