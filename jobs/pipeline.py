"""Strings jobs together: `python jobs/pipeline.py STAGES.yaml [--check] [key=value ...]`. See `raysys.pipeline`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raysys import pipeline, stages, submit
from raysys.errors import RaysysError

JOBS = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 the input was wrong, else the code of the stage that failed."""
    parser = argparse.ArgumentParser(prog="jobs/pipeline.py", description=__doc__)
    parser.add_argument("--config", help="the same as STAGES.yaml")
    parser.add_argument("--check", action="store_true", help="validate all stages and leave; starts nothing")
    parser.add_argument("arguments", nargs="*", metavar="STAGES.yaml | key=value")
    options = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        path, overrides = submit.split_config(options.config, options.arguments)
        if path is None:
            raise submit.ConfigError("which pipeline?", "give a file with stages, e.g. jobs/configs/gopd/quickstart.yaml")
        plan = pipeline.plan(Path(path), overrides, submit.runs_folder())
        if options.check:
            for stage in plan.stages:
                state = f"same as {stage.same_as}" if stage.same_as else "done" if stage.done else "to run"
                print(f"{stage.name}: {stage.job}, {state}, {stage.run_dir}")
            return 0
        stages.stop_on_signals()
        with stages.a_ray(submit.home_folder()) as env:
            return stages.execute(plan, JOBS, env)
    except RaysysError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, submit.ConfigError) else 1
    except stages.Stopped as stopped:
        print("stopped; the same command goes on where it was", file=sys.stderr, flush=True)
        return 128 + stopped.signum


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
