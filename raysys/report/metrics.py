"""A step's record to `metrics.jsonl`, to TensorBoard and to Ray's metrics (and so to Prometheus and the dashboard)."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysys.files import append_json

log = logging.getLogger(__name__)

SHOWN_NOWHERE = ("step", "seconds", "fingerprint")
PARTS = ("age/", "seconds/")
"""Of a whole: one that a step does not have is 0 in it. Other measures that are not taken at every step keep their last value."""


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
        self._no_board = False
        self._gauges: dict[str, Any] = {}

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends the record; floats keep every bit, non-finite ones become null. Raises CheckpointError where it cannot be written."""
        clean = {key: _finite(value) for key, value in record.items()}
        append_json(self._path, clean)
        numbers = {key: float(value) for key, value in clean.items() if _is_number(value) and key not in SHOWN_NOWHERE}
        numbers |= {f"seconds/{phase}": value for phase, value in (clean.get("seconds") or {}).items()}
        self._to_board(numbers, int(clean["step"]))
        self._to_ray(numbers | {"step": clean["step"]})

    def _to_board(self, numbers: Mapping[str, float], step: int) -> None:
        """Written and flushed here: tensorboardX's own way is a thread and a queue, and a full disk ends the one and blocks the other."""
        from tensorboardX.event_file_writer import EventsWriter, event_pb2
        from tensorboardX.summary import scalar

        if self._no_board:
            return
        protocol: Any = event_pb2
        try:
            if self._board is None:
                self._board_dir.mkdir(exist_ok=True)
                self._board = EventsWriter(str(self._board_dir / "events"))
                # What a killed run wrote beyond its resume point is hidden by this.
                begun = protocol.SessionLog(status=protocol.SessionLog.START)
                self._board.write_event(protocol.Event(step=step, wall_time=time.time(), session_log=begun))
            for name, value in numbers.items():
                self._board.write_event(protocol.Event(step=step, wall_time=time.time(), summary=scalar(name, value)))
            self._board.flush()
        except OSError as error:
            self._board, self._no_board = None, True
            log.warning("TensorBoard's file in %s could not be written: %s; metrics.jsonl goes on", self._board_dir, error)

    def _to_ray(self, numbers: Mapping[str, float]) -> None:
        import ray

        if not ray.is_initialized():
            return
        from ray.util.metrics import Gauge

        gone = dict.fromkeys((name for name in self._gauges.keys() - numbers.keys() if name.startswith(PARTS)), 0.0)
        for name, value in (gone | dict(numbers)).items():
            if name not in self._gauges:
                metric = "raysys_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
                self._gauges[name] = Gauge(metric, description=f"{name} of the newest step that has it", tag_keys=("job", "run"))
            self._gauges[name].set(value, tags=self._tags)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
