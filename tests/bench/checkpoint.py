"""What an asynchronous save costs a pretraining run: the real job, whose steps are timed with and without a save under way.

A save writes to the worker's disk, for which training waits, and is carried to the run's folder while training goes on. A step's record
is written before its save, so the wait is in the next step's time; the carrying may slow the steps behind it. All of a cycle of
`every` steps beyond `every` median steps that no save precedes within `settled` steps is what the save cost.
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

from raysys.data.local_text import train_tokenizer, write_local_text

ROOT = Path(__file__).parents[2]
DEFAULTS: dict[str, Any] = {
    "steps": 80,
    "every": 20,
    "settled": 10,
    "ranks": 1,
    "zero_stage": 1,
    "width": 128,
    "layers": 4,
    "experts": 16,
    "batch": 16,
    "sequence": 256,
}


def run(steps: int, every: int, settled: int, **size: Any) -> dict[str, Any]:
    """Figures of one run. Raises RuntimeError when the job fails, with the end of its log."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_local_text(folder / "text", megabytes=4.0, tasks_megabytes=0.2)
        files = sorted((folder / "text").glob("*.jsonl"))
        tokenizer = train_tokenizer(files, 2048, folder / "tokenizer")
        path = folder / "checkpoint.yaml"
        path.write_text(json.dumps(_config(files, tokenizer, folder, steps, every, size)))
        command = [sys.executable, str(ROOT / "jobs" / "pretrain_moe.py"), "--config", str(path), f"run_dir={folder / 'run'}"]
        env = os.environ | {"RAYSYS_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the job ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        saved = sum(path.stat().st_size for path in next((folder / "run" / "checkpoints").glob("step_*")).rglob("*") if path.is_file())
    return cost([line["seconds"]["total"] for line in lines], every, settled) | {"bytes": saved}


def cost(seconds: list[float], every: int, settled: int) -> dict[str, Any]:
    """What saves cost, from the seconds of each step. The first cycle, in which all warms up, and the last step's save are left out."""
    whole = seconds[every : len(seconds) - len(seconds) % every]
    cycles = [whole[at : at + every] for at in range(0, len(whole), every)]
    plain = statistics.median(one for cycle in cycles for one in cycle[settled:])
    lost = statistics.median(sum(cycle) - every * plain for cycle in cycles)
    return {
        "step_seconds": plain,
        "wait_seconds": statistics.median(cycle[0] for cycle in cycles) - plain,
        "lost_seconds": lost,
        "every": every,
        "lost_share": lost / (every * plain),
        "target": 0.05,
    }


def table(figures: dict[str, Any]) -> list[list[Any]]:
    names = ("bytes", "step_seconds", "every", "wait_seconds", "lost_seconds", "lost_share")
    return [["figure", "value", "target"], *([name, figures[name], figures["target"] if name == "lost_share" else ""] for name in names)]


def _config(files: list[Path], tokenizer: Path, folder: Path, steps: int, every: int, size: dict[str, Any]) -> dict[str, Any]:
    width = size["width"]
    model = {
        "width": width,
        "layers": size["layers"],
        "heads": 4,
        "kv_heads": 2,
        "experts": size["experts"],
        "top_k": 2,
        "expert_width": width,
    }
    data = {
        "sources": {path.stem: {"path": str(path)} for path in files},
        "tokenizer": str(tokenizer),
        "sequence": size["sequence"],
        "cache": str(folder / "tokens"),
    }
    return {
        "model": model,
        "data": data,
        "steps": steps,
        "batch": size["batch"],
        "trainer": {"ranks": size["ranks"], "zero_stage": size["zero_stage"], "threads": 1},
        "optimiser": {"warmup_steps": 1},
        "watch_every": steps,
        "checkpoint_every": every,
        "validation": None,
        "restarts": 0,
    }
