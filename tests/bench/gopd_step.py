"""Seconds of a distillation step by phase, and how much of it is neither generation nor scoring nor training.

Runs `jobs/gopd.py` with the quickstart's sizes (0.26 M parameters, 512 responses) on untrained models: what they answer does
not matter for the time, except that untrained models answer at full length.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS: dict[str, Any] = {"steps": 30, "skip": 5, "reward_scale": 1.25, "overrides": [], "model": {}}
WORK = ("generate", "score", "train")


def run(steps: int, skip: int, reward_scale: float, overrides: list[str], model: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of each phase after `skip` steps, and the overhead's share: everything but generate, score and train.

    Args:
        model: sizes of the models, keys of `raysys.config.runs.NewModel`.
    """
    with tempfile.TemporaryDirectory() as folder:
        models = [_model(Path(folder) / str(seed), seed, model) for seed in range(3)]
        keys = [f"student={models[0]}", f"teachers.add={models[1]}", f"teachers.rev={models[2]}", f"reference={models[0]}"]
        keys += [f"reward_scale={reward_scale}", f"steps={steps}", "evaluation=null", "evaluate_every=null", "name=bench", *overrides]
        config = ROOT / "jobs" / "configs" / "gopd" / "local.yaml"
        command = [sys.executable, str(ROOT / "jobs" / "gopd.py"), "--config", str(config), *keys]
        subprocess.run(command, env=os.environ | {"RAYSYS_RUNS_DIR": folder}, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "bench" / "metrics.jsonl").read_text().splitlines()
    laps = [json.loads(line)["seconds"] for line in lines][skip:]
    phases = {name: statistics.median(lap.get(name, 0.0) for lap in laps) for name in sorted({key for lap in laps for key in lap})}
    overhead = [1 - sum(lap.get(name, 0.0) for name in WORK) / lap["total"] for lap in laps]
    tokens = [json.loads(line)["tokens"] for line in lines][skip:]
    return {"seconds": phases, "overhead": statistics.median(overhead), "steps": len(laps), "tokens": statistics.median(tokens)}


def _model(folder: Path, seed: int, sizes: dict[str, Any]) -> Path:
    from raysys.config.runs import NewModel
    from raysys.models.scratch import new_causal

    new_causal(NewModel(**sizes), folder, seed)
    return folder


def table(figures: dict[str, Any]) -> list[list[Any]]:
    phases = sorted(figures["seconds"].items(), key=lambda one: -one[1])
    return [["phase", "median s"], *([name, seconds] for name, seconds in phases), ["overhead share", figures["overhead"]]]
