"""A planned study as one Ray Tune experiment: a trial a run, so many at once; the table is written anew whenever one ends."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from ray import tune

from raysys.errors import ConfigError
from raysys.files import write_atomically, write_json, write_shared_json
from raysys.job import about
from raysys.studies.ablation import OUTCOME, Plan, Planned
from raysys.studies.summary import publish, table
from raysys.studies.trial import Launch, play

log = logging.getLogger("raysys")

LOST = 3
"""Times that a trial may be lost with its node."""
SYNC_SECONDS = 30
"""Between copies of Tune's results and TensorBoard files from its temporary folder to the study's."""
DRIVER_BYTES = 256 << 20
"""What a trial asks the cluster for: the driver of its run needs memory, its actors ask for themselves. Tune takes no empty request."""


def execute(plan: Plan, script: Path, concurrent: int) -> int:
    """Runs what is left; returns 0, or 1 if a run failed. Ray is joined already.

    Raises:
        ConfigError: somebody else runs this study.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _owned(plan.folder):
        facts = about(plan.job, plan.config, time.time()) | {"title": plan.study.title, "seeds": {"seeds": ", ".join(map(str, plan.seeds))}}
        write_json(plan.folder / "about.json", facts)
        write_atomically(plan.folder / "config.yaml", plan.config.to_yaml())
        left = plan.left
        log.info("study %s in %s: %d of %d runs to do, %d at once", plan.name, plan.folder, len(left), len(plan.runs), concurrent)
        if left:
            _tuner(plan, left, Launch.here(script), concurrent).fit()
        summary = publish(plan)
    print(table(summary), flush=True)
    log.info("report: %s", plan.folder / "report.html")
    if plan.left:
        log.error("study %s: %d runs are not done; the same command goes on with them", plan.name, len(plan.left))
    return int(bool(plan.left))


def _tuner(plan: Plan, left: list[Planned], launch: Launch, concurrent: int) -> tune.Tuner:
    """The newest experiment, restored, if what is left is what it has still before it; else one of its own for that."""
    Told.plan = plan
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would wait for the step under way; the caller's handler ends at once
    trainable = tune.with_resources(tune.with_parameters(play, launch=launch), {"cpu": 0, "memory": DRIVER_BYTES})
    storage = plan.folder / "tune"
    number = sum(path.is_dir() for path in storage.glob("start-*"))
    asked = {"concurrent": concurrent, "runs": {one.name: one.digest for one in left}}
    restored = _restored(storage / f"start-{number}", trainable, asked, {one.name for one in plan.runs if one.settled})
    if restored is not None:
        log.info("study %s: Tune's experiment start-%d is restored", plan.name, number)
        return restored
    name = f"start-{number + 1}"
    write_shared_json(storage / f"{name}.json", asked)
    return tune.Tuner(
        trainable,
        param_space={"run": tune.grid_search([_parameters(one, plan.folder / "configs") for one in left])},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrent, trial_name_creator=_name, trial_dirname_creator=_name),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(storage),
            callbacks=[Told()],
            sync_config=tune.SyncConfig(sync_period=SYNC_SECONDS),
            failure_config=tune.FailureConfig(max_failures=LOST),
            verbose=0,
        ),
    )


def _restored(folder: Path, trainable: Any, asked: Mapping[str, Any], settled: set[str]) -> tune.Tuner | None:
    """The experiment in `folder`; None unless it would go on with just the runs that are asked for.

    What an experiment has and how much of it runs at once is fixed, and nothing that has ended starts again in it, be it by a failure
    of the job. So seeds that are added, keys that change, a cluster that grows and another try for a failed run take a new one.
    """
    try:
        had = json.loads(folder.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    runs, names = asked["runs"], had["runs"].keys()
    same = had["concurrent"] == asked["concurrent"] and runs.items() <= had["runs"].items() and names - runs.keys() <= settled
    if not same or not tune.Tuner.can_restore(str(folder)):
        return None
    try:
        tuner = tune.Tuner.restore(str(folder), trainable, resume_unfinished=True, restart_errored=True)
        last = [result.metrics or {} for result in tuner.get_results()]
    except Exception as error:  # pickles of another version, or a study that was killed before Tune had written any
        log.warning("%s cannot be restored, its runs go on in a new experiment: %s: %s", folder, type(error).__name__, error)
        return None
    ended = {result["config"]["run"]["name"] for result in last if result.get("status", "running") != "running"}
    return None if ended & runs.keys() else tuner


def _parameters(one: Planned, configs: Path) -> dict[str, Any]:
    configs.mkdir(exist_ok=True)
    path = configs / f"{one.name}.yaml"
    write_atomically(path, one.config.to_yaml())
    return {"name": one.name, "cell": one.cell, "seed": one.seed, "folder": str(one.folder), "config": str(path), "digest": one.digest}


def _name(trial: Any) -> str:
    return trial.config["run"]["name"]


class Told(tune.Callback):
    """Says what happens, and keeps the study's files up to date. `plan` is this process's: Tune keeps its callbacks as pickles."""

    plan: ClassVar[Plan]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        log.info("%s: started in %s", _name(trial), self._run(trial).folder)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        if result.get("status") == "running":
            told = "  ".join(f"{name} {result[name]:.4g}" for name in self.plan.study.told if name in result)
            steps = self._run(trial).steps
            log.info("%s: step %d%s  %s", _name(trial), result["step"] + 1, f"/{steps}" if steps else "", told)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(self._run(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        one = self._run(trial)
        reason = f"its trial was lost {LOST + 1} times, see {trial.error_file or trial.local_path}"
        one.folder.mkdir(parents=True, exist_ok=True)
        write_json(one.folder / OUTCOME, {"status": "failed", "reason": reason, "exit_code": None, "config": one.digest})
        self._ended(one)

    def _run(self, trial: Any) -> Planned:
        return next(one for one in self.plan.runs if one.name == _name(trial))

    def _ended(self, one: Planned) -> None:
        status, reason = one.state()
        told = f", {reason}" if reason else ""
        log.info("%s: %s%s (%d of %d)", one.name, status, told, self.plan.settled, len(self.plan.runs))
        print(table(publish(self.plan), seeds=False), flush=True)


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Raises ConfigError when another process runs the study."""
    with open(folder / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"study folder {folder} is in use by another process", "wait for it, stop it, or choose another name="
            ) from None
        yield
