"""Peak memory of a process tree, by what its processes are: the proportional resident size, in which shared pages count once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROLES = {
    "ray::RolloutWorker": "rollout actor",
    "VLLM::": "engine core",
    "ray::ScorerWorker": "scorer",
    "ray::TrainerWorker": "trainer",
    "ray::": "other Ray workers and agents",
}
KINDS = {"Pss": "pss", "Pss_Anon": "own", "Pss_File": "files", "Pss_Shmem": "shared"}
LOOKING = 30
"""The kernel walks all pages of a process to tell its share of them: of one core's time, one part in so many may go into that."""


@contextlib.contextmanager
def peak_memory(pid: int, every: float = 0.25) -> Iterator[dict[str, Any]]:
    """Watches a process and its descendants; the dictionary then holds the largest sum and its parts, in MiB."""
    peak: dict[str, Any] = {"pss": 0.0, "by_process": {}}
    done = threading.Event()

    def watch() -> None:
        cost = 0.0
        while not done.wait(max(every, LOOKING * cost)):
            began = time.thread_time()
            found = memory(pid)
            cost = time.thread_time() - began
            total = sum(part["pss"] for part in found.values())
            if total > peak["pss"]:
                peak.update(pss=total, by_process=found)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def memory(pid: int) -> dict[str, dict[str, float]]:
    """MiB by what a process is: `pss`, and of it `own` (anonymous), `files` (mapped), `shared` memory; and the number of `processes`."""
    parts: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(("processes", *KINDS.values()), 0.0))
    for one in family(pid):
        try:
            role, text = _role(one.cmdline()), Path(f"/proc/{one.pid}/smaps_rollup").read_text()
        except (psutil.Error, OSError):
            continue
        parts[role]["processes"] += 1
        for line in text.splitlines()[1:]:
            key, _, size = line.partition(":")
            if key in KINDS:
                parts[role][KINDS[key]] += int(size.split()[0]) / 1024
    return dict(parts)


def own_memory(key: str, pid: int | str = "self") -> int:
    """Bytes of a line of a process' status: VmRSS now, VmHWM at the highest since it began, RssFile the part mapped from files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def family(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _role(command: list[str]) -> str:
    line = " ".join(command)
    for start, role in ROLES.items():
        if line.startswith(start):
            return role
    if "/jobs/" in line:
        return "driver and supervisor"
    if "trl_peer" in line:
        return "trainer"
    return "Ray's daemons" if "/ray/" in line else "other"


def end(process: subprocess.Popen[bytes], patience: float = 20.0) -> None:
    """Stops a side that still runs: first by asking, then all of it."""
    if process.poll() is not None:
        return
    members = family(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    for one in members:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil compares start times: a later process with this id is left alone
            one.kill()
    process.wait(patience)


class Failed(RuntimeError):
    """A side ended with an error; says its last line."""


def watched(side: str, command: list[str], environment: dict[str, str], log: Path, deadline: float) -> tuple[float, dict[str, Any]]:
    """Seconds that a command took, and its processes at their largest. Raises Failed."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    began = time.monotonic()
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=base | environment, cwd=log.parent, stdout=output, stderr=output)
    try:
        with peak_memory(process.pid) as peak:
            code = process.wait(deadline)
    except subprocess.TimeoutExpired:
        raise Failed(f"{side} did not end within {deadline:g} s (deadline); {last_line(log.read_text())}") from None
    finally:
        end(process)
    if code:
        raise Failed(f"{side} ended with {code}: {last_line(log.read_text())}")
    return time.monotonic() - began, peak


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
