"""A pipeline's story with several seeds: accuracy of all its models on tasks that no run saw, and the first and last steps of its runs.

Each seed is the whole pipeline, such as `jobs/configs/gopd/quickstart.yaml` or `jobs/configs/hpd/study.yaml`; stages that are done are
not run again, so a bench that was cut off goes on where it was.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
TOLD = ("reverse_kl", "nll", "entropy", "forward_kl_data", "reverse_kl_draws")
DEFAULTS: dict[str, Any] = {"pipeline": "gopd/quickstart", "seeds": [0, 1, 2], "runs": str(ROOT / "runs" / "story")}


def run(pipeline: str, seeds: list[int], runs: str) -> dict[str, Any]:
    """Per seed: accuracy by model and domain, means of `TOLD` over each run's first and last five steps, seconds, peak GiB.

    Args:
        pipeline: a file of jobs/configs, without its ending.
        runs: folder of the runs; those of the same seeds are gone on with.
    """
    return {"seeds": {str(seed): _story(pipeline, seed, Path(runs).absolute()) for seed in seeds}}


def _story(pipeline: str, seed: int, runs: Path) -> dict[str, Any]:
    config, name = ROOT / "jobs" / "configs" / f"{pipeline}.yaml", f"{Path(pipeline).parent.name}-story-{seed}"
    command = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "--config", str(config), f"seed={seed}", f"name={name}"]
    runs.mkdir(parents=True, exist_ok=True)
    began, peak = time.monotonic(), 0
    with open(runs / f"{name}.log", "ab") as log:
        process = subprocess.Popen(command, env=os.environ | {"RAYSYS_RUNS_DIR": str(runs)}, stdout=log, stderr=log, cwd=ROOT)
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(1)
    if process.returncode:
        raise SystemExit(f"seed {seed} ended with {process.returncode}; see {runs}/{name}.log")
    folder = runs / name
    compared = json.loads((folder / "comparison.json").read_text())
    stages = json.loads((folder / "stages.json").read_text())
    return {
        "accuracy": {row["label"]: {name: domain["mean"] for name, domain in row["domains"].items()} for row in compared["rows"]},
        "rows": {name: domain["n"] for name, domain in compared["rows"][0]["domains"].items()},
        "first_and_last": {stage["name"]: _ends(Path(stage["run_dir"])) for stage in stages if stage["job"] in ("gopd", "hpd")},
        "seconds": round(time.monotonic() - began, 1),
        "stage_seconds": {stage["name"]: stage["seconds"] for stage in stages},
        "peak_gib": round(peak / 2**30, 2),
    }


def _resident(pid: int) -> int:
    """Proportional resident bytes of a process and all that descend from it; shared pages count once."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for one in family:
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def _ends(folder: Path) -> dict[str, list[float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [name for name in TOLD if name in records[0]]
    return {name: [statistics.fmean(record[name] for record in part) for part in (records[:5], records[-5:])] for name in told}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    """Mean over seeds and their smallest and largest, by model and domain."""
    seeds = list(figures["seeds"].values())
    domains = sorted(next(iter(seeds[0]["accuracy"].values())))
    rows: list[list[Any]] = [["model", *domains, "mean of domains"]]
    for label in seeds[0]["accuracy"]:
        found = {name: [seed["accuracy"][label][name] for seed in seeds] for name in domains}
        means = [statistics.fmean(seed["accuracy"][label].values()) for seed in seeds]
        rows.append([label, *(_spread(found[name]) for name in domains), _spread(means)])
    return rows


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
