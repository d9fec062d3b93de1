"""What a run is doing now: a file for people and `raysys doctor --job`, gauges for Prometheus. One thread of the driver, no process."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FILE = "status.json"
EVERY_SECONDS = 2.0


class Live:
    """Writes `ledger/status.json` and sets gauges every two seconds; use as a context manager.

    Args:
        run_dir: the run's folder.
        job: its job, a tag of the gauges with the folder's name.
        status: plain values; see `gauges` for what of it Prometheus gets.
    """

    def __init__(self, run_dir: Path, job: str, status: Callable[[], dict[str, Any]]):
        self._path, self._status = run_dir / "ledger" / FILE, status
        self._tags = {"job": job, "run": run_dir.name}
        self._gauges: dict[str, Any] = {}
        self._before: dict[tuple[str, ...], tuple[float, float]] = {}
        self._known: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-status", daemon=True)

    def shows(self, status: Callable[[], dict[str, Any]]) -> None:
        """From now on this: a run that starts has less to tell than one that trains."""
        self._status = status

    def __enter__(self) -> Live:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self.show()

    def show(self) -> None:
        """Once. What cannot be written is left out: watching must never end a run."""
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        draft = self._path.with_name(f".{FILE}.draft")
        try:
            status = self._status()
            draft.write_text(json.dumps(facts | status, indent=1))
            os.replace(draft, self._path)
        except (OSError, RuntimeError):  # a full disk; or a dictionary that grew while it was counted
            return
        self._set(gauges(status, self._rate))

    def _rate(self, key: tuple[str, ...], total: float) -> float:
        """How fast a total grows, a second."""
        now = time.monotonic()
        before, then = self._before.get(key, (total, now))
        self._before[key] = (total, now)
        return max(0.0, total - before) / (now - then) if now > then else 0.0

    def _set(self, values: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]) -> None:
        import ray

        if not ray.is_initialized():
            return
        gone = self._known - values.keys()  # a worker that left must not go on showing its last value
        self._known = set(values)
        for (name, labels), value in [*values.items(), *((key, 0.0) for key in gone)]:
            self._gauge(name, tuple(label for label, _ in labels)).set(value, tags=self._tags | dict(labels))

    def _gauge(self, name: str, labels: tuple[str, ...]) -> Any:
        if name not in self._gauges:
            from ray.util.metrics import Gauge

            self._gauges[name] = Gauge(name, description=GAUGES[name], tag_keys=("job", "run", *labels))
        return self._gauges[name]


GAUGES = {
    "raysys_actor_phase": "1 for what the actor does now: generating, scoring, training, pushing, starting, idle",
    "raysys_actor_weight_version": "version of the weights that a rollout worker holds",
    "raysys_actor_tokens_per_second": "response tokens a second of a rollout worker",
    "raysys_actor_kv_share": "part of a rollout worker's KV cache that is spoken for",
    "raysys_groups": "prompts under way, by state: generating, complete",
    "raysys_queue_bytes": "finished responses that wait for the trainer",
    "raysys_samples_waiting": "samples that no worker has yet",
    "raysys_redispatched_total": "samples that were given to another worker",
    "raysys_lost_workers_total": "rollout workers that died or fell silent",
}
PHASES = ("generating", "scoring", "training", "pushing", "starting", "idle")


def gauges(
    status: Mapping[str, Any], rate: Callable[[tuple[str, ...], float], float]
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Values by (gauge, labels) of a status with `phase`, `actors`, `pool` and `source`; parts that are missing are left out."""
    values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for actor, now in actor_phases(status).items():
        for phase in PHASES:
            values["raysys_actor_phase", (("actor", actor), ("phase", phase))] = float(phase == now)
    pool, source = status.get("pool") or {}, status.get("source") or {}
    for worker in pool.get("workers", ()):
        label = (("actor", worker["name"]),)
        values["raysys_actor_weight_version", label] = float(worker["version"])
        values["raysys_actor_tokens_per_second", label] = rate(("tokens", worker["name"]), float(worker["tokens"]))
        values["raysys_actor_kv_share", label] = float(worker.get("kv_share", 0.0))
    if pool:
        values["raysys_samples_waiting", ()] = float(pool["waiting"])
        values["raysys_redispatched_total", ()] = float(pool["redispatched"])
        values["raysys_lost_workers_total", ()] = float(pool["lost_workers"])
    if source:
        values["raysys_groups", (("state", "generating"),)] = float(source["groups"] - source["complete"])
        values["raysys_groups", (("state", "complete"),)] = float(source["complete"])
        values["raysys_queue_bytes", ()] = float(source["bytes"])
    return values


def actor_phases(status: Mapping[str, Any]) -> dict[str, str]:
    """What each actor does now. The driver asks trainer and scorers one thing at a time, so its own phase tells theirs."""
    phase = status.get("phase", "")
    doing = {"train": "training", "checkpoint": "training", "push": "pushing", "start": "starting"}.get(phase, "idle")
    found = dict.fromkeys(status.get("trainers", ()), doing)
    found |= dict.fromkeys(status.get("scorers", ()), {"score": "scoring", "start": "starting"}.get(phase, "idle"))
    for worker in (status.get("pool") or {}).get("workers", ()):
        starting = worker["state"] in ("placing", "starting")
        found[worker["name"]] = (
            "starting" if starting else "pushing" if phase == "push" else "generating" if worker["running"] or worker["held"] else "idle"
        )
    return found
