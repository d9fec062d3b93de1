"""Seconds from the kill of each kind of process to the next good step, with a real engine and real models.

One `jobs/gopd.py` run on a head of its own; the parts are hit one after another. Replayed steps count: the next good step is the first one
beyond those that were done when the kill came.
"""

from __future__ import annotations

import random
import re
import signal
import statistics
from typing import Any

DEFAULTS: dict[str, Any] = {"rounds": 2, "steps": 400}


def run(rounds: int, steps: int) -> dict[str, Any]:
    """Seconds by kind of process and signal, and how long engines took to start in this run."""
    from tests.chaos.storm import REAL_VICTIMS, Storm, a_head, real_command

    with a_head() as (head, home):
        folder = home / "recover"
        folder.mkdir()
        storm = Storm(head, real_command(folder, "run", steps), folder / "run", REAL_VICTIMS, random.Random(0), patience=240.0)
        try:
            with storm:
                for _ in range(rounds):
                    for kind in REAL_VICTIMS:
                        storm.hit(kind, signal.SIGKILL)
                raise _Enough
        except _Enough:
            pass
        starts = [float(found) for found in re.findall(r"rollout worker \d+ is up after ([\d.]+) s", (folder / "run.log").read_text())]
    seconds: dict[str, list[float]] = {}
    for kill in storm.kills:
        seconds.setdefault(kill.what, []).append(kill.seconds)
    return {"seconds": seconds, "engine_start": starts}


class _Enough(Exception):
    """The run need not go on to its end."""


def table(figures: dict[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = [["killed", "times", "median s to the next good step", "longest s"]]
    for kind, seconds in figures["seconds"].items():
        rows.append([kind, len(seconds), statistics.median(seconds), max(seconds)])
    return [
        *rows,
        ["(an engine's start)", len(figures["engine_start"]), statistics.median(figures["engine_start"]), max(figures["engine_start"])],
    ]
