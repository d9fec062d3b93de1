"""Seconds of a study of 16 quantisations with two runs at once, against one at a time: trials of Ray Tune, each a process with its actor.

Both take the same runs on one thread each, of a model with random weights, in folders of their own; a run that fails ends the bench.
Starting Ray is not counted, starting the runs' processes is: on a small model that is most of their time.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from raysys.config.quantising import QuantizeConfig
from raysys.config.runs import NewModel
from raysys.models.scratch import new_causal
from raysys.studies import ablation
from raysys.studies.ablation import Study
from raysys.studies.quantize import METHODS, SENSITIVITY

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS: dict[str, Any] = {"at_once": [1, 2], "seeds": "0,1", "layers": 16, "width": 256, "samples": 128, "length": 128}


def run(at_once: list[int], seeds: str, **size: Any) -> dict[str, Any]:
    """Seconds by how many runs go at once, and the speed-up of the last over the first."""
    from tests.bench.private_ray import private_ray

    seconds: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder, private_ray(cpus=2 * max(at_once)):
        path = _config(Path(folder), **size)
        os.environ["RAYSYS_RUNS_DIR"] = folder
        for number in at_once:
            seconds[number] = _study(path, Path(folder) / str(number), seeds, number)
    first, *_, last = seconds.values()
    trials = len(_cells().cells) * len(ablation.read_seeds(seeds))
    return {"trials": trials, "seconds": seconds, "speed_up": first / last, "target": 1.8}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    first = next(iter(figures["seconds"].values()))
    rows = [[number, figures["trials"], seconds, first / seconds] for number, seconds in figures["seconds"].items()]
    return [["runs at once", "runs", "s", "speed-up"], *rows]


def _cells() -> Study:
    """Each method at 2 and 3 bits everywhere."""
    wanted = {f"{method}-{bits}" for method in METHODS for bits in (2, 3)}
    return Study(title="", cells={name: keys for name, keys in SENSITIVITY.cells.items() if name in wanted}, columns=SENSITIVITY.columns)


def _config(folder: Path, layers: int, width: int, samples: int, length: int) -> Path:
    spec = NewModel(
        hidden_size=width, layers=layers, heads=width // 32, kv_heads=width // 32, head_dim=32, ffn_size=3 * width, context=length
    )
    text = folder / "text.txt"
    text.write_text(" ".join(str(number * number) for number in range(100_000)))
    path = folder / "study.yaml"
    windows = {"path": str(text), "samples": samples, "length": length}
    model = str(new_causal(spec, folder / "model", seed=0))
    path.write_text(yaml.safe_dump({"model": model, "calibration": windows, "evaluation": windows, "threads": 1, "device": "cpu"}))
    return path


def _study(path: Path, folder: Path, seeds: str, at_once: int) -> float:
    from raysys.studies import tuning

    plan = ablation.plan("quantize", "bench", {"bench": _cells()}, QuantizeConfig, path, [f"run_dir={folder}"], seeds, folder)
    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):  # its table, after each run
        failed = tuning.execute(plan, ROOT / "jobs" / "quantize.py", at_once)
    if failed:
        raise SystemExit(f"studies: a run failed: {next(one.state()[1] for one in plan.left)}")
    return time.monotonic() - began
