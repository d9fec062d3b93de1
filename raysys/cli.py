"""`raysys plan CONFIG [key=value ...]`, `raysys doctor [--job ID]` and `raysys compare A B`."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from raysys.config.base import read_yaml
from raysys.config.jobs import CONFIGS
from raysys.config.pretraining import PretrainMoeConfig
from raysys.config.runs import Run
from raysys.errors import ConfigError, RaysysError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 fine, 1 something does not fit or is broken, 2 the input was wrong."""
    parser = argparse.ArgumentParser(prog="raysys")
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="parameters, memory by part, placement, and what does not fit; starts nothing")
    plan.add_argument(
        "config", help="YAML of a gopd, hpd, search_agent, pretrain_moe, quantize, sft, generate or evaluate job, or of a pipeline of these"
    )
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument(
        "--device", choices=("gpu", "cpu"), help="plan for it (default: the config's; auto: gpu, but cpu for models below 100 M)"
    )
    plan.add_argument("--gpu-gib", type=float, default=80.0, help="memory of one GPU (default 80)")
    plan.add_argument("--try", dest="trial", action="store_true", help="of pretrain_moe: also one real forward and backward step, here")
    plan.add_argument("--gpus", type=int, help="GPUs at hand, to check the placement against")
    doctor = commands.add_parser("doctor", help="is this machine fine? every finding with its remedy")
    doctor.add_argument("--job", metavar="ID", help="a run's folder, its name or its Ray job: what it does now, and who waits for whom")
    compare = commands.add_parser("compare", help="where two recordings (rollout.record) or two runs' metrics differ first")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument("--tolerance", type=float, default=0.0)
    options = parser.parse_args(argv)
    try:
        if options.command == "compare":
            return _compare(options)
        return _plan(options) if options.command == "plan" else _doctor(options.job)
    except RaysysError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _plan(options: argparse.Namespace) -> int:
    from raysys import plan

    code = 0
    for title, config in _configs(Path(options.config), options.overrides):
        if title:
            print(f"== {title}")
        if isinstance(config, PretrainMoeConfig):
            text, fits = _pretraining(config, options)
            print(text + "\n")
            code = max(code, int(not fits))
            if options.trial:
                from raysys.plan_trial import try_step

                print(try_step(config).line())
            continue
        if options.trial:
            raise ConfigError("--try is for configs of pretrain_moe", "leave it out")
        found = plan.estimate(config, plan.choose(config, options.device, options.gpu_gib, options.gpus))
        print(plan.render(found) + "\n")
        code = max(code, int(bool(found.problems)))
    return code


def _pretraining(config: PretrainMoeConfig, options: argparse.Namespace) -> tuple[str, bool]:
    from raysys import plan, plan_pretraining

    kind = options.device or ("gpu" if config.device == "auto" else config.device)
    device = plan.Device("gpu", options.gpu_gib * plan.GIB, options.gpus) if kind == "gpu" else plan.this_machine()
    return plan_pretraining.render(config, device, options.gpus)


def _configs(path: Path, overrides: Sequence[str]) -> list[tuple[str, Run]]:
    """The configs to plan: one, or each stage of a pipeline."""
    job = job_of(read_yaml(path), path.absolute())
    if job != "pipeline":
        return [("", CONFIGS[job].load(path, overrides))]
    from raysys import pipeline

    planned = pipeline.plan(path, overrides, Path("runs").absolute())
    return [
        (f"{stage.name} ({stage.job})", stage.config)
        for stage in planned.stages
        if stage.same_as is None and stage.job not in ("questions", "local_text")
    ]


def job_of(values: dict[str, object], path: Path = Path()) -> str:
    """Which job a config is for: by the keys that only this job has, or the folder of examples that it lies in. Raises ConfigError."""
    if path.parent.name in CONFIGS and "stages" not in values:
        return path.parent.name
    if "optimiser" in values or "router" in values:
        return "pretrain_moe"
    if "model" in values and {"allocation", "method", "calibration"} & values.keys():
        return "quantize"
    if "search" in values:
        return "search_agent"
    if "teachers" in values and {"loss", "use_student_sample", "use_reinforce"} & values.keys():
        return "hpd"
    for job, key in (("pipeline", "stages"), ("gopd", "teachers"), ("evaluate", "models"), ("sft", "data")):
        if key in values:
            # Who has teachers and nobody to teach wants their answers; a misspelt student is not nobody.
            return "generate" if key == "teachers" and not difflib.get_close_matches("student", list(values)) else job
    raise ConfigError(
        "this file is no config of gopd, hpd, search_agent, pretrain_moe, quantize, sft, generate, evaluate or pipeline",
        "it has none of the keys stages, teachers, models, data",
    )


def _compare(options: argparse.Namespace) -> int:
    from raysys.compare import differences

    found = list(differences(options.before, options.after, options.tolerance))
    print("\n".join(found[:10]) if found else "no difference")
    return int(bool(found))


def _doctor(job: str | None) -> int:
    if job is not None:
        from raysys import watching

        print("\n".join(watching.describe(watching.find_run(job, Path(os.environ.get("RAYSYS_RUNS_DIR", "runs"))))))
        return 0
    from raysys import doctor

    findings = doctor.examine()
    for finding in findings:
        print(finding.line())
    broken = sum(finding.state == "fail" for finding in findings)
    print(f"{len(findings)} checks, {broken} failed" if broken else f"{len(findings)} checks, this machine is fine")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
