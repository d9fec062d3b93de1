"""A real run on several nodes: one joins and generates, is killed with samples in it, another joins; the result is an undisturbed run's."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from raysys import head as heads
from raysys.compare import differences
from tests.chaos.storm import ROOT, real_command
from tests.processes import below

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(600)]

STEPS = 24
_STATUS_SECONDS = 2.5
"""A run's status is written every two seconds."""
ENGINE, TRAINER = "ray::RolloutWorker", "ray::TrainerWorker"


class Node:
    """A second machine, as Ray sees it: a raylet of its own with room for one engine."""

    def __init__(self, head: heads.Head, log: Path):
        env = {key: value for key, value in head.env.items() if key != "RAY_ADDRESS"} | heads.small_machine()
        options = ["--block", "--num-cpus=1", f"--object-store-memory={80 << 20}", "--min-worker-port=0", "--max-worker-port=0"]
        ports = [f"--{name}={heads.free_port()}" for name in ("dashboard-agent-listen-port", "metrics-export-port")]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={head.gcs}", "--disable-usage-stats", *options, *ports]
        with open(log, "ab") as file:
            child = subprocess.Popen(command, env=env, cwd="/", stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
        self._child, self.process = child, psutil.Process(child.pid)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL to all of it, the raylet first: as if the machine were gone."""
        with suppress(psutil.NoSuchProcess):
            for one in [*below(self.process, "raylet"), *self.process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        self._child.kill()
        self._child.wait()

    def engine(self) -> psutil.Process:
        (found,) = below(self.process, ENGINE)
        return found


class Run:
    """`jobs/gopd.py` on two untrained small models."""

    def __init__(self, env: Mapping[str, str], folder: Path, name: str, *keys: str):
        self.folder, self._log = folder / name, folder / f"{name}.log"
        # Long deadlines again: what is stopped here is to be killed by nobody else.
        keys = ("trainer.threads=1", "restarts=0", "deadlines={heartbeat: 120, train: 300, score: 300, push: 300}", *keys)
        command = [*real_command(folder, name, STEPS), *keys]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(command, env=dict(env), cwd=ROOT, stdout=log, stderr=log)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()

    def lines(self) -> int:
        path = self.folder / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.is_file() else 0

    def log(self) -> str:
        return self._log.read_text()

    def worker(self, number: int) -> dict[str, Any]:
        """What the newest status says of a rollout worker; {} if it is not in the pool."""
        try:
            status = json.loads((self.folder / "ledger" / "status.json").read_text())
        except OSError:
            return {}
        return next((one for one in status["pool"].get("workers", ()) if one["name"] == f"rollout worker {number}"), {})

    def until(self, done: Callable[[], bool], what: str, pause: float = 0.1) -> None:
        end = time.monotonic() + 200
        while not done():
            assert self._process.poll() is None, f"the run ended with {self._process.returncode} before {what}:\n{self.log()[-3000:]}"
            assert time.monotonic() < end, f"not in time: {what}\n{self.log()[-3000:]}"
            time.sleep(pause)

    def finish(self) -> None:
        assert self._process.wait(timeout=200) == 0, self.log()[-3000:]


@contextmanager
def paused(head: heads.Head) -> Iterator[None]:
    """The trainer stands still: the run gets no further while an engine starts, and leaves it the machine."""
    (trainer,) = below(psutil.Process(head.pid), TRAINER)
    trainer.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        trainer.send_signal(signal.SIGCONT)


@pytest.fixture
def cpus() -> int:
    """Of the small head: room for scorer, trainer and one engine."""
    return 3


@pytest.fixture
def small_head(monkeypatch: pytest.MonkeyPatch, cpus: int) -> Iterator[heads.Head]:
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")  # a killed node is found out after 5 s, not 15
    with tempfile.TemporaryDirectory(prefix="raysys-two-") as folder:
        try:
            with heads.locked(Path(folder)):
                head = heads.start(Path(folder), cpus=cpus)
            yield head
        finally:
            heads.remove_traces(Path(folder))


def takes_part(run: Run, head: heads.Head, worker: int) -> None:
    """Returns when this worker has drawn samples; the run gets only a few steps further meanwhile."""
    with paused(head):
        run.until(lambda: run.worker(worker).get("state") == "started", f"rollout worker {worker}")
    while not run.worker(worker).get("tokens"):
        line = run.lines()
        run.until(lambda: run.lines() > line + 1, "two more steps")  # noqa: B023  called at once
        with paused(head):
            time.sleep(_STATUS_SECONDS)


def hold(run: Run, node: Node, worker: int) -> int:
    """Stops the node's engine at a moment when it has samples to draw. Returns how many."""
    engine = node.engine()
    for _ in range(5):
        line = run.lines()
        run.until(lambda: run.lines() > line, "another step", pause=0.01)  # noqa: B023  after it samples are asked for
        engine.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
        line = run.lines()
        time.sleep(_STATUS_SECONDS)
        held = run.worker(worker).get("held", 0)
        if held and run.lines() == line:
            return held
        engine.send_signal(signal.SIGCONT)  # it was hit too late, in a push
    raise AssertionError(f"the engine was never hit with samples in it: {run.worker(worker)}")


def test_a_node_joins_and_is_killed_and_another_joins(ray_head: heads.Head, small_head: heads.Head, tmp_path: Path) -> None:
    real_command(tmp_path, "calm", STEPS)  # makes the models
    log = tmp_path / "nodes.log"
    with Run(ray_head.env, tmp_path, "calm") as calm:
        calm.finish()
    with Run(small_head.env, tmp_path, "run", "rollout.workers=1..2") as run:
        run.until(lambda: run.lines() > 0, "a first step")  # before it a node would only make the start slower
        with Node(small_head, log) as second:
            takes_part(run, small_head, 1)
            held = hold(run, second, 1)
            second.kill()
        with Node(small_head, log):
            takes_part(run, small_head, 2)
            run.finish()
    assert f"; {held} samples go to others" in run.log() and run.log().count("is lost: rollout worker 1 died during 'generate'") == 1
    assert run.lines() == STEPS and not list(differences(calm.folder, run.folder))
    exported = sorted((calm.folder / "export").glob("*.safetensors"))
    assert exported
    for file in exported:
        assert file.read_bytes() == (run.folder / "export" / file.name).read_bytes(), f"{file.name} differs"
