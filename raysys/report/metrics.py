"""A step's record to `metrics.jsonl`, to TensorBoard and to Ray's metrics (and so to Prometheus and the dashboard)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHOWN_NOWHERE = ("step", "seconds", "fingerprint")


class MetricsWriter:
    """Writes one JSON object a step; use as a context manager.

    Args:
        run_dir: the run's folder. Lines of steps that are run again after a resume were cut by the ledger already.
        job, run: tags of the gauges `raysys_<metric>`.
    """

    def __init__(self, run_dir: Path, job: str, run: str):
        self._path, self._tags = run_dir / "metrics.jsonl", {"job": job, "run": run}
        self._board_dir = run_dir / "tensorboard"
        self._board: Any = None
        self._gauges: dict[str, Any] = {}

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends the record; floats keep every bit, non-finite ones become null."""
        clean = {key: _finite(value) for key, value in record.items()}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
        numbers = {key: float(value) for key, value in clean.items() if _is_number(value) and key not in SHOWN_NOWHERE}
        numbers |= {f"seconds/{phase}": value for phase, value in (clean.get("seconds") or {}).items()}
        self._to_board(numbers, int(clean["step"]))
        self._to_ray(numbers | {"step": clean["step"]})

    def _to_board(self, numbers: Mapping[str, float], step: int) -> None:
        if self._board is None:
            from tensorboardX import SummaryWriter

            # What a killed run wrote beyond its resume point is hidden by the purge.
            self._board = SummaryWriter(str(self._board_dir), purge_step=step, flush_secs=5)
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def _to_ray(self, numbers: Mapping[str, float]) -> None:
        import ray

        if not ray.is_initialized():
            return
        from ray.util.metrics import Gauge

        for name, value in numbers.items():
            metric = "raysys_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
            if metric not in self._gauges:
                self._gauges[metric] = Gauge(metric, description=f"{name} of the newest step", tag_keys=("job", "run"))
            self._gauges[metric].set(value, tags=self._tags)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
