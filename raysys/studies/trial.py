"""One run of a study inside a Ray Tune trial: the job as a process of its own, its steps told to Tune as they come."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysys.errors import InfrastructureError
from raysys.files import read_json_lines, write_json
from raysys.job import COLLAPSED, ROOT
from raysys.processes import bound
from raysys.studies.ablation import OUTCOME
from raysys.studies.measures import number

LOG = "output.log"
_LOOK_SECONDS = 0.5
_RELEASE_SECONDS = 60.0
_END_SECONDS = 10.0
_TAIL = 1 << 16


@dataclass(frozen=True)
class Launch:
    """How a study's runs are started: `script` (in the sources, or absolute), folder, and what is put into their environment."""

    script: str
    folder: str
    environment: Mapping[str, str]

    @classmethod
    def here(cls, script: Path) -> Launch:
        """As from this process. Only what a run needs is passed on: the rest is the node's, and Tune writes to disk what it is given."""
        passed = {"PYTHONPATH", "OMP_NUM_THREADS", "RAY_JOB_CONFIG_JSON_ENV_VAR"} | {
            name for name in os.environ if name.startswith("RAYSYS_")
        }
        environment = {name: os.environ[name] for name in passed - {"RAYSYS_COMMAND"} if name in os.environ}
        inside = script.is_relative_to(ROOT)  # another node may have its copy of the sources elsewhere
        return cls(str(script.relative_to(ROOT) if inside else script), os.getcwd(), environment)


def play(config: Mapping[str, Any], launch: Launch) -> None:
    """A Tune trainable. Returns whatever becomes of the run: how it ended is in `outcome.json` and in the last result."""
    from ray import tune

    run = config["run"]
    folder = Path(run["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if (before := _settled(folder, run["digest"])) is not None:
        return tune.report(before)
    (folder / OUTCOME).unlink(missing_ok=True)
    _await_release(folder)
    records, last, began = _Records(folder / "metrics.jsonl"), {}, time.monotonic()
    with open(folder / LOG, "ab") as log:
        start = log.tell()
        process = _start(run, launch, log)
        try:
            while True:
                ended = process.poll() is not None  # looked at first: what is written until then is told
                for last in records.new():
                    tune.report({**last, "status": "running"})
                if ended:
                    break
                time.sleep(_LOOK_SECONDS)
        finally:
            _end(process)  # Tune stops a trial by a SystemExit out of `report`
    outcome = judge(process.returncode, folder, start) | {"seconds": round(time.monotonic() - began, 1), "config": run["digest"]}
    write_json(folder / OUTCOME, outcome)
    tune.report({**last, **_result(outcome)})


def _settled(folder: Path, digest: str) -> dict[str, Any] | None:
    """The result of a run that ended after Tune's last note of it, as a study that was killed leaves it."""
    try:
        outcome = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    there = outcome["status"] == "collapsed" or (outcome["status"] == "done" and (folder / "ledger" / "finished.json").is_file())
    return _result(outcome) if there and outcome["config"] == digest else None


def _result(outcome: Mapping[str, Any]) -> dict[str, Any]:
    return {name: outcome[name] for name in ("status", "reason", "exit_code")}


def _start(run: Mapping[str, Any], launch: Launch, log: Any) -> subprocess.Popen[bytes]:
    import ray

    # Of Ray's own variables a worker's are not a driver's; the token is this node's.
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name.startswith("RAY_AUTH_")}
    mine.pop("OMP_NUM_THREADS", None)  # Ray's, for an actor without CPUs
    address = ray.get_runtime_context().gcs_address
    return subprocess.Popen(
        bound([sys.executable, "-u", str(ROOT / launch.script), "--config", run["config"]]),
        env=mine | dict(launch.environment) | {"RAY_ADDRESS": address},
        cwd=launch.folder if os.path.isdir(launch.folder) else ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def judge(code: int, folder: Path, start: int = 0) -> dict[str, Any]:
    """How a run ended: `status`, `reason` ("" if it is done) and `exit_code`.

    Args:
        code: negative for a signal.
        folder: of the run.
        start: where in its output this attempt begins.
    """
    if code == 0 and (folder / "ledger" / "finished.json").is_file():
        return {"status": "done", "reason": "", "exit_code": 0}
    status = "collapsed" if code == COLLAPSED else "failed"
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
    else:
        reason = _error(folder / LOG, start) or (f"exit code {code}" if code else "left no ledger/finished.json") + f", see {folder / LOG}"
    return {"status": status, "reason": reason, "exit_code": code}


def _error(path: Path, start: int) -> str:
    """The last error that a job's output names."""
    with open(path, "rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - _TAIL))
        lines = file.read().decode("utf-8", "replace").splitlines()
    found = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return found[-1].removeprefix("NumericsError: ") if found else ""


class _Records:
    """A run's steps as they are written, each once: after a restart the run does some of them again."""

    def __init__(self, path: Path):
        self._path, self._size, self._told = path, -1, -1

    def new(self) -> Iterator[dict[str, float]]:
        size = self._path.stat().st_size if self._path.is_file() else -1
        if size == self._size:
            return
        self._size = size
        for _, record in read_json_lines(self._path):
            if record["step"] > self._told:
                self._told = record["step"]
                yield {name: value for name, value in record.items() if number(value) is not None}


def _await_release(folder: Path) -> None:
    """Waits until nobody has the run open: after a kill of the study its runs may take a moment to end.

    Raises:
        InfrastructureError: somebody still has.
    """
    lock = folder / "ledger" / "lock"
    until = time.monotonic() + _RELEASE_SECONDS
    while lock.is_file():
        with open(lock, "a+") as file:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # closing it lets go
            except OSError:
                if time.monotonic() > until:
                    file.seek(0)
                    raise InfrastructureError(f"{folder} is in use by {file.read().strip()}", "wait for it or stop it") from None
        time.sleep(_LOOK_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
