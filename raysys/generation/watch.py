"""The engines' signs of life, as files that they write: `ledger/engines/<actor>.json`. Who is silent, slow or dead too often is told."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from raysys.config.runs import GenerateConfig
from raysys.errors import DeadlineError, InfrastructureError
from raysys.job import Session
from raysys.runtime import no_place, waits

log = logging.getLogger("raysys")

_QUIET_SECONDS = 30.0
_MOVES = ("pid", "state", "running", "finished", "lost")
"""Facts of which one changes when an engine gets on."""


class Watch:
    """Looks after the engines between two shards.

    Args:
        config: its deadlines, and how many may die.
        folder: the run's.
    """

    def __init__(self, config: GenerateConfig, folder: Path):
        self._config, self._root = config, folder / "ledger" / "engines"
        self.died = self._turn = 0
        """Actors that Ray Data had to start again."""
        shutil.rmtree(self._root, ignore_errors=True)
        self.begin("", {})

    def begin(self, teacher: str, bundle: dict[str, float]) -> Path:
        """Another teacher's turn. Returns where its engines are to write; the last one's may be about to end.

        Args:
            bundle: what each engine asks of the cluster.
        """
        self._teacher, self._bundle, self._turn = teacher, bundle, self._turn + 1
        self._folder = self._root / str(self._turn)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._told = self._heard = self._moved = time.monotonic()
        self._doing: dict[str, tuple[Any, ...]] = {}
        self._beats: dict[str, tuple[int, float]] = {}
        self._pids: dict[str, int] = {}
        self._strikes = 0
        return self._folder

    def shard(self) -> None:
        """One was finished: what died before was not the fault of all."""
        self._strikes, self._moved = 0, time.monotonic()

    @property
    def patience(self) -> float:
        """Seconds in which something must happen: an answer has its deadline, and an actor that died needs a place again first."""
        return self._config.deadlines.generate + self._config.deadlines.placement

    def check(self) -> None:
        """Raises PlacementError, DeadlineError or InfrastructureError: nobody came or is left, starts, moves any more, or too many died."""
        now, limits = time.monotonic(), self._config.deadlines
        engines = self.engines()
        for name, facts in engines.items():
            self._count(name, facts["pid"])
            beats, since = self._beats.get(name, (-1, now))
            silent, what = now - since, f"the engine of {self._teacher} (pid {facts['pid']})"
            if facts["beats"] != beats:
                self._beats[name], self._heard = (facts["beats"], now), now
            elif facts["state"] == "starting" and silent > limits.start:
                raise DeadlineError(what, "start", limits.start, "deadlines.start")
            elif facts["state"] != "starting" and facts["running"] and silent > limits.heartbeat:
                raise InfrastructureError(
                    f"{what} has shown no sign of life for {limits.heartbeat:g} s", "raise deadlines.heartbeat if this is normal"
                )
        self._check_all(now, engines)
        if now - self._told > _QUIET_SECONDS:
            self._told = now
            log.info("engines: %s", "; ".join(_doing(facts) for facts in engines.values()) or "none has come yet")

    def _check_all(self, now: float, engines: dict[str, dict[str, Any]]) -> None:
        """An engine without answers may be silent, for Ray Data ends those that it has no shards for; but not all of them at once."""
        placement = self._config.deadlines.placement
        doing = {name: tuple(facts[key] for key in _MOVES) for name, facts in engines.items()}
        # A start has a deadline of its own, and may keep its engine silent.
        starting = any(facts["state"] == "starting" for facts in engines.values())
        if starting:
            self._heard = now
        if starting or doing != self._doing:
            self._doing, self._moved = doing, now
        if now - self._heard > placement:
            raise no_place([self._bundle] * self._config.rollout.fewest, "rollout", placement, "an actor each")
        if now - self._moved > self.patience:
            raise DeadlineError(f"the engines of {self._teacher}", "generate", self.patience, "deadlines.generate")

    def _count(self, name: str, pid: int) -> None:
        """Ray Data starts an actor again as often as it dies; someone has to tell when it is enough."""
        before = self._pids.setdefault(name, pid)
        if pid == before:
            return
        self._pids[name] = pid
        self._strikes, self.died = self._strikes + 1, self.died + 1
        log.warning("the engine of %s (pid %d) died; pid %d takes its shards", self._teacher, before, pid)
        if self._strikes > self._config.rollout.restarts:
            raise InfrastructureError(
                f"{self._strikes} engines of {self._teacher} died with no shard finished in between",
                "see rollout-<pid>.log in the run's folder; rollout.restarts sets how many are tried",
            )

    def engines(self) -> dict[str, dict[str, Any]]:
        """What each actor last said of itself, and how many seconds ago."""
        found = {}
        for path in sorted(self._folder.glob("[!.]*.json")):
            with contextlib.suppress(OSError, ValueError):  # a disk that is full, or not this node's own
                found[path.stem] = json.loads(path.read_text()) | {"heard_s": round(max(0.0, time.time() - path.stat().st_mtime), 1)}
        return found

    def status(self, session: Session) -> dict[str, Any]:
        """What `raysys doctor --job` shows and Prometheus gets."""
        engines = list(self.engines().values())
        workers = [facts | {"name": f"engine {facts['pid']}", "version": 0, "held": facts["running"]} for facts in engines]
        lost = sum(facts["lost"] for facts in engines) + self.died
        return {
            "run": session.folder.name,
            "submission_id": session.submission_id,
            "step": session.ledger.committed,
            "phase": "generate",
            "waits": waits(),
            "pool": {"workers": workers, "waiting": 0, "redispatched": 0, "lost_workers": lost},
        }


def _doing(facts: dict[str, Any]) -> str:
    lost = f", {facts['lost']} lost" if facts["lost"] else ""
    return f"{facts['state']}, {facts['running']} answers under way, {facts['finished']} finished ({facts['tokens']:,} tokens){lost}"
