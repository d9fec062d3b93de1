"""What a run is doing, what it costs, and who waits for whom: read from all rooms, shown by `raysys doctor --job`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from raysys.config.agents import SearchAgentConfig
from raysys.config.runs import GopdConfig, HpdConfig, SftConfig
from raysys.errors import ConfigError
from raysys.job import Session
from raysys.loop import Parts
from raysys.report.live import FILE, actor_phases
from raysys.rollout.pool import RolloutPool
from raysys.rollout.recorded import Recorder
from raysys.rollout.source import OnPolicySource
from raysys.runtime import waits

_STALE_SECONDS = 15.0

Trains = GopdConfig | SftConfig | HpdConfig | SearchAgentConfig


def scorer_ranks(config: Trains) -> int:
    """Scorers that the run has: none where no teacher is asked."""
    if isinstance(config, HpdConfig):
        return config.scoring.ranks if config.loss != "sft" else 0
    return config.scoring.ranks if isinstance(config, GopdConfig) else 0


def status(config: Trains, session: Session, parts: Parts | None, pool: RolloutPool | None, source: Any) -> dict[str, Any]:
    """What `raysys doctor --job` shows and Prometheus gets. Without `parts` the run is still starting."""
    return {
        "run": session.folder.name,
        "submission_id": session.submission_id,
        "step": session.ledger.committed,
        "phase": parts.watch.phase if parts is not None else "start",
        "waits": waits(),
        "trainers": [f"trainer rank {rank}" for rank in range(config.trainer.ranks)],
        "scorers": [f"scorer {rank}" for rank in range(scorer_ranks(config))],
        "pool": pool.status() if pool is not None else {},
        "source": source.status() if isinstance(source, (OnPolicySource, Recorder)) else {},
    }


def shares_its_gpus(config: Trains) -> bool:
    """Whether somebody lives beside each trainer rank: an engine, or a scorer."""
    if isinstance(config, HpdConfig):
        return scorer_ranks(config) > 0 and config.scoring.placement == "colocated"
    return isinstance(config, GopdConfig) and config.colocate


class Usage:
    """Device-seconds by what they went into. A device is a GPU, or on CPU what an actor stands for: an engine, a scorer, a trainer rank.
    Who lives on the trainer's devices takes none of its own."""

    def __init__(self, pool: RolloutPool | None, config: Trains):
        self._scorers = scorer_ranks(config)
        self._lodgers = "" if not shares_its_gpus(config) else "scorers" if isinstance(config, HpdConfig) else "engines"
        self._pool, self._config, self._busy = pool, config, 0.0
        self.total: dict[str, float] = {}

    def lap(self, seconds: dict[str, float]) -> dict[str, float]:
        """Of one step, from its phases: `device/generating`, scoring, training, pushing, idle."""
        config, pool = self._config, self._pool
        engines = max(1, len(pool.workers)) * config.rollout.tensor_parallel if pool is not None and self._lodgers != "engines" else 0
        busy = pool.busy_seconds() if pool is not None else 0.0
        spent = {
            "generating": max(0.0, busy - self._busy) * config.rollout.tensor_parallel,
            "scoring": seconds.get("score", 0.0) * self._scorers,
            "training": seconds.get("train", 0.0) * config.trainer.ranks,
            "pushing": seconds.get("push", 0.0) * (config.trainer.ranks + engines),
        }
        self._busy = busy
        devices = engines + (self._scorers if self._lodgers != "scorers" else 0) + config.trainer.ranks
        spent["idle"] = max(0.0, seconds["total"] * devices - sum(spent.values()))
        for name, value in spent.items():
            self.total[name] = self.total.get(name, 0.0) + value
        return {f"device/{name}": value for name, value in spent.items()}

    def summary(self) -> str:
        """One line: shares, and the cost where a price is known."""
        whole = sum(self.total.values()) or 1.0
        shares = ", ".join(f"{name} {value / whole:.0%}" for name, value in self.total.items())
        price = self._config.price_per_device_hour
        cost = f"; cost {whole / 3600 * price:.2f} at {price:g} an hour" if price else ""
        return f"device time: {whole:.0f} s ({shares}){cost}"


def find_run(name: str, runs: Path) -> Path:
    """A run's folder by its path, its name, or the Ray job that it is. Raises ConfigError."""
    for folder in (Path(name), runs / name):
        if (folder / "ledger").is_dir():
            return folder
    for file in sorted(runs.glob(f"*/ledger/{FILE}"), key=lambda path: -path.stat().st_mtime):
        if _read(file).get("submission_id") == name:
            return file.parent.parent
    raise ConfigError(f"no run '{name}' in {runs}", "give a run's folder, its name, or the id of its Ray job")


def describe(folder: Path) -> list[str]:
    """Lines for people: what the run does, each actor, and who waits for whom, the longest wait first."""
    file = folder / "ledger" / FILE
    if not file.is_file():
        return [f"{folder.name}: no status; it is not a run that trains, or it ended before it began to start"]
    status = _read(file)
    age = time.time() - file.stat().st_mtime
    where = f"pid {status.get('pid')} on {status.get('host')}"
    heading = f"{folder.name}: step {status.get('step')}, {status.get('phase') or 'between phases'}; {where}"
    if (folder / "ledger" / "finished.json").is_file():
        heading += "; finished"
    elif age > _STALE_SECONDS:
        heading += f"; SILENT for {age:.0f} s: the driver hangs or is gone"
    lines = [heading, "who waits for whom:"]
    lines += [
        f"  the driver waits for {one['for']}: {one['operation']}, {one['waited_s']:g} of {one['limit_s']:g} s ({one['knob']})"
        for one in status.get("waits", ())
    ] or ["  nobody"]
    lines.append("actors:")
    workers = {one["name"]: one for one in (status.get("pool") or {}).get("workers", ())}
    for actor, phase in actor_phases(status).items():
        worker = workers.get(actor)
        more = (
            ""
            if worker is None
            else f"; {worker['state']}, weights {worker['version']}, has {worker['held']}, heard {worker['heard_s']:g} s ago"
        )
        lines.append(f"  {actor}: {phase}{more}")
    pool, source = status.get("pool") or {}, status.get("source") or {}
    lines.append(
        f"queue: {source.get('groups', 0)} prompts under way, {source.get('complete', 0)} complete ({source.get('bytes', 0)} bytes); "
        f"{pool.get('waiting', 0)} samples free, {pool.get('redispatched', 0)} given again; {pool.get('lost_workers', 0)} workers lost"
    )
    return lines


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
