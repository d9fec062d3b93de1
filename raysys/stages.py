"""Runs a planned pipeline: one process a stage, its output prefixed, its folder kept, its report written."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raysys import pipeline
from raysys.files import write_atomically, write_json
from raysys.job import about, report
from raysys.pipeline import Plan, Planned

log = logging.getLogger("raysys")


class Stopped(BaseException):
    """A signal asked for the end. `signum` says which."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def execute(plan: Plan, jobs: Path, env: Mapping[str, str]) -> int:
    """Runs what is not done yet, in order; returns 0, or the exit code of the first stage that failed.

    Args:
        plan: from `pipeline.plan`.
        jobs: folder of the job scripts.
        env: environment of the stages; carries the Ray they join.

    Raises:
        Stopped: a signal came; the running stage is ended first.
    """
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(plan.run_dir / "config.yaml", plan.config.to_yaml())
    started = time.time()
    facts = about("pipeline", plan.config, started) | {"title": plan.config.title}
    before = {record["name"]: record for record in _earlier(plan.run_dir / "stages.json")}
    records: list[dict[str, Any]] = []
    code = 0
    _link(plan)
    for number, stage in enumerate(plan.stages, 1):
        record = _one(stage, f"stage {number}/{len(plan.stages)}", plan, jobs, env, before)
        records.append(record)
        _publish(plan, records, facts)
        if record["status"] == "failed":
            code = record.pop("code")
            break
    _publish(plan, records, facts | {"finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    _close(plan, code, time.time() - started)
    return code


def _one(
    stage: Planned, place: str, plan: Plan, jobs: Path, env: Mapping[str, str], before: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": stage.name,
        "job": stage.job,
        "run_dir": str(stage.run_dir),
        "seconds": 0.0,
        "status": "done",
        "note": "",
    }
    if stage.same_as is not None:
        log.info("%s %s: same as %s", place, stage.name, stage.same_as)
        return record | {"status": "same", "note": f"same as {stage.same_as}"}
    if stage.done:
        log.info("%s %s: done already (%s)", place, stage.name, stage.run_dir.name)
        return record | {"status": "skipped", "note": "done already", "seconds": before.get(stage.name, {}).get("seconds", 0.0)}
    log.info("%s %s: %s into %s", place, stage.name, stage.job, stage.run_dir)
    config = pipeline.write_config(stage, plan.run_dir / "stages")
    began = time.monotonic()
    code = _run([sys.executable, "-u", str(jobs / f"{stage.job}.py"), "--config", str(config)], stage.name, env)
    record["seconds"] = round(time.monotonic() - began, 2)
    if code == 0 and stage.done:
        log.info("%s %s: done in %.1f s", place, stage.name, record["seconds"])
        return record
    note = f"exit code {code}" if code else "left no ledger/finished.json"
    return record | {"status": "failed", "note": note, "code": code or 1}


def _run(command: list[str], name: str, env: Mapping[str, str]) -> int:
    # The stage stays in this process group, so whoever ends the group ends it too.
    stage = subprocess.Popen(
        command,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        bufsize=1,
    )
    assert stage.stdout is not None
    try:
        for line in stage.stdout:
            print(f"[{name}] {line}", end="", flush=True)
        return stage.wait()
    except Stopped as stopped:
        # A signal to the group has reached the stage already: give it time to leave by itself. `ray job stop` kills after 3 s.
        patience = (5.0, 10.0) if stopped.signum == signal.SIGINT else (0.8, 1.2)
        _end(stage, *patience)
        raise
    except BaseException:  # such as BrokenPipeError: whoever read our output has gone, and nobody would ever end the stage
        _end(stage, 0.0, 10.0)
        raise


def _end(stage: subprocess.Popen[str], before_term: float, before_kill: float) -> None:
    for seconds, act in ((before_term, stage.terminate), (before_kill, stage.kill)):
        try:
            stage.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            act()
    stage.wait()


def _link(plan: Plan) -> None:
    """`<pipeline>/<stage>` leads to the stage's folder, whatever its hash, so that people and configs can name it."""
    for stage in plan.stages:
        link = plan.run_dir / stage.name
        if link.is_symlink() or not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(stage.run_dir, plan.run_dir))


def _publish(plan: Plan, records: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    write_json(plan.run_dir / "about.json", facts)
    shown = [{key: value for key, value in record.items() if key != "code"} for record in records]
    write_atomically(plan.run_dir / "stages.json", _json(shown))
    reached = plan.stages[: len(records)]
    compared = pipeline.comparison(reached)
    if compared is not None:
        write_json(plan.run_dir / "comparison.json", compared)
    for stage in reached:
        samples = stage.run_dir / "samples.jsonl"
        if stage.job == "evaluate" and samples.is_file():
            shutil.copyfile(samples, plan.run_dir / "samples.jsonl")


def _close(plan: Plan, code: int, seconds: float) -> None:
    compared = pipeline.comparison(plan.stages)
    if compared is not None and code == 0:
        print(pipeline.table(compared), flush=True)
    report(plan.run_dir)
    if code == 0:
        log.info("pipeline %s: done in %.0f s", plan.name, seconds)
    else:
        log.error("pipeline %s: a stage failed; the same command goes on from it, finished stages are skipped", plan.name)


def _earlier(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []


def _json(value: Any) -> str:
    return json.dumps(value, indent=1)


def stop_on_signals() -> None:
    """SIGTERM, SIGINT and SIGHUP raise `Stopped` from now on."""

    def handler(signum: int, frame: object) -> None:
        for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(one, signal.SIG_IGN)  # leaving is under way; a second signal must not cut it short
        raise Stopped(signum)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, handler)


@contextmanager
def a_ray(home: Path, runs: int = 1) -> Iterator[dict[str, str]]:
    """The environment of the Ray that `RAY_ADDRESS` names, else of the head of `home`, which is started if need be.

    Args:
        runs: at once. A head that is started has logical CPUs for each: without, all wait for one that nobody gives back.
    """
    from raysys.borrow import borrowed

    if os.environ.get("RAY_ADDRESS"):
        yield dict(os.environ)
        return
    with borrowed(home, cpus=max(8 * runs, os.cpu_count() or 1)) as (mine, _):
        yield mine.environment()
