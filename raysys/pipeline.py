"""Stages in order, each a job; content-addressed, skipped when done, restartable at any stage.

A stage's folder is `runs/<stage>-<hash>`. The hash covers its job, its resolved identity, its steps and the hashes of the stages it
reads from, so a changed key re-runs that stage and those after it, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raysys.config.base import parent_of, read_yaml, set_key
from raysys.config.jobs import CONFIGS
from raysys.config.runs import PipelineConfig, Run, Stage
from raysys.errors import ConfigError
from raysys.files import read_json_lines

OWN_KEYS = ("name", "run_dir", "seed", "device", "title")
"""Overrides with these keys are the pipeline's; all others go to its main stages."""

_EVALUATING = ("evaluate", "search_agent")
"""Jobs whose evaluations are a pipeline's table."""

_REFERENCE = re.compile(r"\$\{([A-Za-z0-9_.-]+)(:run)?\}")


@dataclass(frozen=True)
class Planned:
    """One stage, ready to run."""

    name: str
    job: str
    config: Run
    """Resolved and validated; `run_dir` is set."""
    digest: str
    run_dir: Path
    same_as: str | None = None
    """The earlier stage with the same content, if there is one."""

    @property
    def done(self) -> bool:
        return (self.run_dir / "ledger" / "finished.json").is_file()


@dataclass(frozen=True)
class Plan:
    """A pipeline with every stage resolved."""

    config: PipelineConfig
    name: str
    run_dir: Path
    stages: list[Planned] = field(default_factory=list)


def plan(path: Path, overrides: Sequence[str], runs: Path) -> Plan:
    """Resolves and validates all stages; touches no file.

    Args:
        path: the pipeline's YAML file.
        overrides: `key=value`; see `OWN_KEYS` for where each goes.
        runs: the folder that holds all runs, absolute.

    Raises:
        ConfigError: anything wrong in the pipeline or in one of its stages; names the stage.
    """
    own = [override for override in overrides if override.partition("=")[0] in OWN_KEYS]
    others = [override for override in overrides if override not in own]
    config = PipelineConfig.load(path, own)
    if others and not any(stage.main for stage in config.stages.values()):
        raise ConfigError(f"{path} has no stage marked main, so {others[0]} belongs nowhere", f"here only {', '.join(OWN_KEYS)} can be set")
    if config.run_dir is not None:
        runs = Path(config.run_dir).absolute().parent
    stages: list[Planned] = []
    for name, stage in config.stages.items():
        stages.append(_plan_stage(name, stage, config, others if stage.main else (), path, runs, stages))
    run_name = _name(config, path, overrides, stages)
    return Plan(config, run_name, Path(config.run_dir).absolute() if config.run_dir else runs / run_name, stages)


def _plan_stage(
    name: str, stage: Stage, pipeline: PipelineConfig, overrides: Sequence[str], path: Path, runs: Path, earlier: list[Planned]
) -> Planned:
    kind = CONFIGS.get(stage.job)
    if kind is None or stage.job == "pipeline":
        raise ConfigError(f"stage {name}: unknown job '{stage.job}'", f"jobs: {', '.join(job for job in CONFIGS if job != 'pipeline')}")
    values = read_yaml(path.parent / stage.config) if stage.config else {}
    values |= {key: getattr(pipeline, key) for key in ("seed", "device") if key in pipeline.model_fields_set}
    for key, value in stage.set.items():
        _put(values, key, value)
    for override in overrides:
        set_key(values, override)
    upstream = {planned.name: planned for planned in earlier}
    source = f"stage {name} of {path.name}"
    symbolic = kind.parse(
        _substitute(values, name, {key: (f"export:{one.digest}", f"run:{one.digest}") for key, one in upstream.items()}), source
    )
    digest = _digest(stage.job, symbolic)
    twin = next((planned.name for planned in earlier if planned.digest == digest), None)
    run_dir = upstream[twin].run_dir if twin else runs / f"{name}-{digest}"
    real = _substitute(values, name, {key: (str(one.run_dir / "export"), str(one.run_dir)) for key, one in upstream.items()})
    config = kind.parse(real | {"name": run_dir.name, "run_dir": str(run_dir)}, source)
    return Planned(name, stage.job, config, digest, run_dir, twin)


def _digest(job: str, config: Run) -> str:
    # `steps` may grow on a resume and so is no part of the identity, but another number of steps is another model.
    # Keys that are unset are left out, so that a later version with more of them does not run everything again.
    identity = {key: value for key, value in config.identity().items() if value not in (None, [], {}, "")}
    content = {"job": job, "identity": identity, "steps": getattr(config, "steps", None)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _name(config: PipelineConfig, path: Path, overrides: Sequence[str], stages: Sequence[Planned]) -> str:
    """As the command line says; else after the file, with a hash of the stages when overrides made it another pipeline."""
    given = {override.partition("=")[0] for override in overrides}
    base = config.name or f"{path.resolve().parent.name}-{path.stem}"
    if "name" in given or not given - {"run_dir", "title", "device"}:
        return base
    return f"{base}-{hashlib.sha256(' '.join(stage.digest for stage in stages).encode()).hexdigest()[:6]}"


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    inner, last = parent_of(values, key)
    inner[last] = {**inner[last], **value} if isinstance(value, Mapping) and isinstance(inner.get(last), Mapping) else value


def _substitute(value: Any, stage: str, known: Mapping[str, tuple[str, str]]) -> Any:
    """`${stage}` and `${stage:run}` in all texts of `value`; `known` has (export, run) by stage."""
    if isinstance(value, Mapping):
        return {key: _substitute(entry, stage, known) for key, entry in value.items()}
    if isinstance(value, list):
        return [_substitute(entry, stage, known) for entry in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise ConfigError(f"stage {stage}: ${{{match[1]}}} names no earlier stage", f"earlier stages: {', '.join(known) or 'none'}")
        return known[match[1]][1 if match[2] else 0]

    return _REFERENCE.sub(replace, value)


def write_config(stage: Planned, folder: Path) -> Path:
    """The stage's resolved config as a file that its job can be given by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage.name}.yaml"
    path.write_text(yaml.safe_dump(stage.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


# -- the table at the end


def comparison(stages: Sequence[Planned]) -> dict[str, Any] | None:
    """Accuracy by label and domain, and other measures, from the stages that evaluate; None if nothing is evaluated yet.

    Stages that measure on another split than the last one stay out: numbers from different tasks do not belong in one table.
    """
    evaluated = [
        (stage, records) for stage in stages if stage.job in _EVALUATING and (records := _records(stage.run_dir / "evaluation.jsonl"))
    ]
    rows = _quantised(stages)
    if not evaluated and not rows:
        return None
    split = _split(evaluated[-1][0]) if evaluated else None
    for stage, records in evaluated:
        if _split(stage) == split:
            for one in records:
                known = rows.get(one["label"], {}).get("measures", {})
                rows[one["label"]] = {"label": one["label"], "domains": one["domains"], "measures": known | one.get("measures", {})}
    columns = sorted({domain for row in rows.values() for domain in row["domains"]})
    return {"split": split, "columns": columns, "rows": list(rows.values())}


def _quantised(stages: Sequence[Planned]) -> dict[str, dict[str, Any]]:
    """Rows of what stages that quantise have measured. A quantised model is called by its stage, as an evaluation should call it too."""
    rows: dict[str, dict[str, Any]] = {}
    for stage in stages:
        for one in _records(stage.run_dir / "evaluation.jsonl") if stage.job == "quantize" else ():
            label = one["label"].replace("quantised", stage.name)
            rows[label] = {"label": label, "domains": {}, "measures": one["measures"]}
    return rows


def _split(stage: Planned) -> str:
    facts = stage.config.model_dump()
    if facts.get("harness"):
        return "lm-eval"
    data = facts["evaluation"]["data"]
    return data["source"]["split"] if data.get("source") else data["path"]


def _records(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_json_lines(path)]


def table(facts: Mapping[str, Any]) -> str:
    """A comparison as text: one row a model, mean and 95 % interval a domain, and other measures where there are any."""
    measures = list(dict.fromkeys(name for row in facts["rows"] for name in row.get("measures", {})))
    head = ["", *facts["columns"], *measures]
    body = [
        [
            row["label"],
            *(_cell(row["domains"].get(column)) for column in facts["columns"]),
            *(f"{row['measures'][name]:.4f}" if name in row.get("measures", {}) else "-" for name in measures),
        ]
        for row in facts["rows"]
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in [head, *body]]
    told = [f"accuracy on split '{facts['split']}', mean [95 % interval]"] if facts["split"] else []
    return "\n".join([*told, *lines])


def _cell(domain: Mapping[str, Any] | None) -> str:
    return "-" if domain is None else f"{domain['mean']:.3f} [{domain['low']:.3f}, {domain['high']:.3f}]"
