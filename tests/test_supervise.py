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

from raysys import supervise

CHILD = """
import os, signal, sys, time
from pathlib import Path
from raysys import supervise
from raysys.processes import die_with_parent
die_with_parent()
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
        time.sleep(1.5)
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
    assert 3.0 < time.monotonic() - began < 30.0


def test_a_signal_to_stop_reaches_the_driver_and_a_killed_supervisor_takes_it_along(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from raysys import supervise; f = Path(sys.argv[1]); "
    code += "sys.exit(supervise.supervise(sys.argv[2:], 3, lambda: 0, lambda: f / 'pulse', 60.0))"
    for how in (signal.SIGTERM, signal.SIGKILL):
        folder = tmp_path / how.name
        folder.mkdir()
        supervisor = subprocess.Popen([sys.executable, "-c", code, str(folder), *command(folder, "sleep")])
        end = time.monotonic() + 30
        while not (folder / "pulse").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        (driver,) = psutil.Process(supervisor.pid).children()
        os.kill(supervisor.pid, how)
        assert supervisor.wait(timeout=15) == (130 if how == signal.SIGTERM else -signal.SIGKILL)
        driver.wait(timeout=10)
        assert (folder / "cleaned").exists() == (how == signal.SIGTERM)
