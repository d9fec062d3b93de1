"""The part of a job's command line that runs a study: `--study NAME [--seeds 0,1,2] [--cells a,b] [--concurrent N]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from raysys import job as jobs
from raysys import stages, submit
from raysys.config.runs import Run
from raysys.errors import ConfigError
from raysys.studies import ablation
from raysys.studies.ablation import Plan, Study
from raysys.studies.room import Room, at_once

SEEDS = "0,1,2"
Kind = TypeVar("Kind", bound=Run)


def add_to(parser: argparse.ArgumentParser) -> None:
    """The options that jobs with studies have."""
    parser.add_argument("--study", metavar="NAME", help="run a study instead: cells times seeds, each a run of its own")
    parser.add_argument("--seeds", help=f"of a study, default {SEEDS}")
    parser.add_argument("--cells", help="of a study, those whose runs are started, default all")
    parser.add_argument("--concurrent", type=int, help="runs of a study at once, default as many as the cluster has room for")


def run(job: str, kind: type[Kind], options: argparse.Namespace, studies: Mapping[str, Study]) -> int:
    """Checks and runs a study, or with `--check` says what there is to run. Returns the exit code.

    Raises:
        RaysysError: as `jobs.main` reports it.
    """
    if options.concurrent is not None and options.concurrent < 1:
        raise ConfigError(f"--concurrent={options.concurrent} must be at least 1")
    path = Path(options.config or jobs.default_config(job))
    seeds = SEEDS if options.seeds is None else options.seeds
    plan = ablation.plan(job, options.study, studies, kind, path, options.overrides, seeds, submit.runs_folder(), options.cells)
    if options.check:
        jobs.find_ray()
        _check(plan)
        for one in plan.runs:
            status, reason = one.state()
            print(f"{one.name}: {status}{f' ({reason})' if reason else ''}, {one.folder}")
        together = f"{options.concurrent} at once" if options.concurrent else "as many at once as fit"
        print(f"study {plan.name}: {len(plan.left)} of {len(plan.runs)} runs to do, {together}")
        return 0
    stages.stop_on_signals()
    try:
        with stages.a_ray(submit.home_folder(), options.concurrent or at_once(plan, Room.of_machine())) as env:
            return _execute(plan, env, options.concurrent)
    except stages.Stopped as stopped:
        print("stopped; the same command goes on where it was", file=sys.stderr, flush=True)
        return 128 + stopped.signum


def _execute(plan: Plan, env: Mapping[str, str], concurrent: int | None) -> int:
    if "RAY_AUTH_TOKEN" not in env:
        os.environ.pop("RAY_AUTH_TOKEN", None)  # it would win over the file
    os.environ.update(env)
    jobs.find_ray()  # before Ray is imported, which reads the token's whereabouts once
    _check(plan)
    import ray

    from raysys.studies import tuning

    jobs.connect()
    stages.stop_on_signals()  # Ray has set its own
    try:
        return tuning.execute(plan, jobs.ROOT / "jobs" / f"{plan.job}.py", concurrent or at_once(plan, Room.of_cluster()))
    finally:
        ray.shutdown()


def _check(plan: Plan) -> None:
    """What a job checks of its models and data, once a cell: seeds change neither."""
    from raysys import wiring

    for one in {one.cell: one for one in plan.left}.values():
        try:
            getattr(wiring, f"check_{plan.job}")(one.config)
        except ConfigError as error:
            raise ConfigError(f"{one.name}: {error.message}", error.remedy) from None
