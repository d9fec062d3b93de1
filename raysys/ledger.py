"""What a resume needs, written atomically.

A run folder holds `config.yaml`, `metrics.jsonl`, `ledger/` and `checkpoints/`. A resume point is one folder
`checkpoints/step_00000010` with the trainer's shards, the data cursor and a manifest; it appears by one rename, so a
kill at any moment leaves either the whole of it or nothing that recovery would take for it. Recovery goes back to the
newest complete resume point, cuts every per-step file to it, and replays.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from raysys.config.base import Config
from raysys.errors import CheckpointError, ConfigError
from raysys.files import append_json, read_json_lines, sync, write_atomically, write_json, writing

if TYPE_CHECKING:
    from raysys.batch import Batch

log = logging.getLogger(__name__)

MANIFEST, BACKLOG, DEAD_LETTERS = "manifest.json", "backlog.arrow", "dead_letters.jsonl"
PER_STEP_FILES = ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl", "episodes.jsonl", "ledger/steps.jsonl", DEAD_LETTERS)


class Saves(Protocol):
    def save(self, folder: str) -> None: ...


class Resumes(Protocol):
    def state(self) -> dict[str, Any]: ...
    def backlog(self) -> Batch | None: ...


class Ledger:
    """One run's memory on disk. Opening it locks the folder, checks that it belongs to this run, and rolls back to the newest resume point.

    Args:
        run_dir: the run's folder; made if missing.
        config: the resolved config; its `identity()` must equal that of a run already there.
        keep: resume points that stay on disk.
        stored: steps at the newest resume point of a run that keeps them elsewhere (`storage`); null: they are in the run's folder.

    Raises:
        ConfigError: the folder belongs to a run with another identity (names the keys), or is open elsewhere (names pid and host).
    """

    def __init__(self, run_dir: Path, config: Config, keep: int = 2, stored: int | None = None):
        self.run_dir, self.keep = run_dir, keep
        self._config = config
        with writing(run_dir):
            for folder in ("ledger", "checkpoints", "export"):
                (run_dir / folder).mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire()
        self._check_identity()
        self.resume_point = newest_point(run_dir) if stored is None else None
        self.step = stored or (_manifest(self.resume_point)["step"] if self.resume_point else 0)
        self.committed = self.step
        """Steps that are recorded; those beyond the resume point are done again after a crash."""
        if not self.finished:
            self._roll_back()

    # -- reading

    @property
    def finished(self) -> bool:
        """True when the run has already reached the steps its config asks for (or stopped early on purpose)."""
        record = self.run_dir / "ledger" / "finished.json"
        if not record.is_file():
            return False
        return json.loads(record.read_text())["steps_asked"] >= getattr(self._config, "steps", 0)

    def cursor(self) -> dict[str, Any] | None:
        """The data source's state at the resume point, or None at the start."""
        if self.resume_point is None:
            return None
        return json.loads((self.resume_point / "source.json").read_text())

    def backlog(self) -> Batch | None:
        """Samples that the resume point's step had under way: drawn from the data, not trained."""
        file = self.resume_point / BACKLOG if self.resume_point is not None else None
        if file is None or not file.is_file():
            return None
        from raysys.batch import Batch  # here: a supervisor reads ledgers too, and needs no Arrow

        return Batch.load(file)

    @property
    def moved(self) -> bool:
        """Whether a step was committed since the ledger was opened."""
        return self.committed > self.step

    # -- writing

    def dead_letter(self, record: Mapping[str, Any]) -> None:
        """Keeps a prompt that could not be sampled, with the causes."""
        append_json(self.run_dir / DEAD_LETTERS, {"step": self.committed} | dict(record))

    def commit(self, step: int, ids: Sequence[str], version: int) -> None:
        """Records that `ids` were trained in `step` and that the weights now are `version`."""
        self.committed = step + 1
        append_json(self.run_dir / "ledger" / "steps.jsonl", {"step": step, "version": version, "ids": list(ids)})

    def checkpoint(self, step: int, trainer: Saves, source: Resumes) -> Path:
        """Publishes the resume point from which `step` is the next to run, then drops the oldest beyond `keep`."""
        final = self.run_dir / "checkpoints" / f"step_{step:08d}"
        if final.exists() and _complete(final):
            return final
        draft = final.with_name(f".draft_{final.name}")
        for stale in (draft, final):
            shutil.rmtree(stale, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            trainer.save(str(draft / "trainer"))
            return self._publish(step, draft, final, source)
        except OSError as error:
            raise CheckpointError(f"resume point {final} could not be written: {error}", "make room; the one before it is intact") from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # nothing, once it is published; else it would only help to keep a full disk full

    def _publish(self, step: int, draft: Path, final: Path, source: Resumes) -> Path:
        write_json(draft / "source.json", source.state())
        backlog = source.backlog()
        if backlog is not None:
            backlog.save(draft / BACKLOG)
        files = {str(path.relative_to(draft)): path.stat().st_size for path in sorted(draft.rglob("*")) if path.is_file()}
        for name in files:
            sync(draft / name)
        write_json(draft / MANIFEST, {"step": step, "version": step, "files": files})
        os.replace(draft, final)
        sync(final.parent)
        for old in _points(self.run_dir)[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def finish(self, step: int) -> None:
        """Marks the run as done; starting it again prints its report and leaves. Jobs without steps leave `metrics.jsonl` empty."""
        metrics = self.run_dir / "metrics.jsonl"
        with writing(metrics):
            metrics.touch()
        asked = getattr(self._config, "steps", step)
        write_json(self.run_dir / "ledger" / "finished.json", {"step": step, "steps_asked": asked})

    def close(self) -> None:
        self._lock.close()

    # -- inside

    def _acquire(self):
        file = open(self.run_dir / "ledger" / "lock", "a+", encoding="utf-8")  # noqa: SIM115  held for the run
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ConfigError(f"run folder {self.run_dir} is in use by {holder}", "wait for it, stop it, or choose another name=") from None
        with writing(self.run_dir / "ledger" / "lock"):
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}")
            file.flush()
        return file

    def _check_identity(self) -> None:
        path = self.run_dir / "config.yaml"
        now = _lasting(self._config)
        if path.is_file():
            before = _lasting(type(self._config).parse(yaml.safe_load(path.read_text(encoding="utf-8")), source=str(path)))
            changed = differing_keys(before, now)
            if changed:
                self.close()
                raise ConfigError(
                    f"run folder {self.run_dir} belongs to a run with another identity: {'; '.join(changed)}",
                    "choose another name=, or set these keys back",
                )
        write_atomically(path, self._config.to_yaml())

    def _roll_back(self) -> None:
        for draft in (self.run_dir / "checkpoints").glob(".draft_*"):
            shutil.rmtree(draft, ignore_errors=True)
        for point in _points(self.run_dir):
            if self.resume_point is None or point.name > self.resume_point.name:
                shutil.rmtree(point, ignore_errors=True)
        for name in PER_STEP_FILES:
            cut_lines(self.run_dir / name, self.step)
        if self.step:
            log.info("resuming %s at step %d", self.run_dir, self.step)


def _lasting(config: Config) -> dict[str, Any]:
    """What must stay as it is for a run to go on: what it learns, and where its resume points are."""
    return config.identity() | {"storage": getattr(config, "storage", None)}


def newest_point(run_dir: Path) -> Path | None:
    """The newest resume point of a run's folder that is whole."""
    for point in reversed(_points(run_dir)):
        if _complete(point):
            return point
        log.warning("checkpoint %s is incomplete; going back to the one before it", point)
    return None


def _points(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / "checkpoints").glob("step_*") if path.is_dir())


def _complete(point: Path) -> bool:
    try:
        files = _manifest(point)["files"]
    except (CheckpointError, KeyError):
        return False
    return all((point / name).is_file() and (point / name).stat().st_size == size for name, size in files.items())


def _manifest(point: Path) -> dict[str, Any]:
    try:
        return json.loads((point / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{point} has no readable manifest: {error}", "delete the folder; the one before it is used") from None


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each key whose value differs."""
    keys = sorted(before.keys() | now.keys())
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)]


def cut_lines(path: Path, step: int) -> None:
    """Keeps the JSON lines whose `step` is below `step` (for evaluations and samples: at most `step`); a torn last line goes too."""
    if path.is_file():
        limit = step + 1 if path.name in ("evaluation.jsonl", "samples.jsonl") else step
        write_atomically(path, "".join(line + "\n" for line, record in read_json_lines(path) if record["step"] < limit))
