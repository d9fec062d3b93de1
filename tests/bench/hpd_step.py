"""Time of a step of HPD and of each baseline on data, as a ratio to SFT's, with a teacher of the student's own size (and a larger one).

Runs `jobs/hpd.py` on untrained models and rows of the same lengths; SFT asks no teacher and starts no scorer. The paper reports 2.0 to 2.5
with a teacher 4.7 times larger (arXiv 2604.20244, Table 6).
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

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
STUDENT = {
    "hidden_size": 256,
    "layers": 6,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 64,
    "ffn_size": 768,
    "context": 512,
    "initializer_range": 0.06,
}
LARGER = {
    "hidden_size": 512,
    "layers": 7,
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 64,
    "ffn_size": 1536,
    "context": 512,
    "initializer_range": 0.045,
}
DEFAULTS: dict[str, Any] = {
    "student": STUDENT,
    "teachers": {"own size": STUDENT, "larger": LARGER},
    "kinds": ["sft", "seqkd", "hpd"],
    "vocabulary": 49152,
    "batch": 16,
    "steps": 8,
    "skip": 2,
    "median": 120,
    "threads": 2,
}
PHASES = ("score", "train", "total")


def run(teachers: dict[str, dict[str, Any]], kinds: list[str], student: dict[str, Any], **work: Any) -> dict[str, Any]:
    """Median seconds by phase of each kind, and the ratio of its step to SFT's.

    Args:
        teachers: name to sizes, keys of `raysys.config.runs.NewModel`.
        kinds: values of `loss`; sft is always run, first.
        student: sizes.
        work: the other keys of `DEFAULTS`. `median`: response tokens of the middle row; lengths are log-normal with p99/p50 = 3.
    """
    from tests.bench.vs_trl import lengthy_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data(folder / "data.jsonl", work["batch"] * work["steps"], work["median"], student["context"])
        own = lengthy_model(folder / "student", 0, student, 96, work["vocabulary"])
        figures = {"sft": {"": _one(folder, own, own, "sft", work)}}
        for label, sizes in teachers.items():
            teacher = lengthy_model(folder / label, 1, sizes, 96, work["vocabulary"])
            for kind in (kind for kind in kinds if kind != "sft"):
                figures.setdefault(kind, {})[label] = _one(folder, own, teacher, kind, work)
    base = figures["sft"][""]["total"]
    return {kind: {label: one | {"ratio": one["total"] / base} for label, one in found.items()} for kind, found in figures.items()}


def data(path: Path, rows: int, median: int, context: int) -> None:
    """Rows of random characters whose lengths are log-normal."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(median), np.log(3) / 2.326, rows)), 4, context - 24).astype(int)
    texts = ("".join(map(chr, rng.integers(97, 123, length))) for length in lengths)
    path.write_text(
        "".join(json.dumps({"id": f"{row}", "prompt": f"{row:015d}=", "answer": text}) + "\n" for row, text in enumerate(texts))
    )


def config(folder: Path, name: str, student: Path, teacher: Path, kind: str, work: dict[str, Any]) -> Path:
    """The run's config file."""
    threads = {"threads": work["threads"]}
    values = {
        "name": name,
        "loss": kind,
        "student": str(student),
        "teachers": {"default": str(teacher)},
        "data": {"path": str(folder / "data.jsonl"), "shuffle": False},
        "steps": work["steps"],
        "batch": work["batch"],
        "max_prompt_tokens": 16,
        "max_response_tokens": 496,
        "learning_rate": 1e-5,
        "scoring": {**threads, "micro_batch_tokens": work.get("micro_batch_tokens", 4096)},
        "trainer": {**threads, "micro_batch_tokens": work.get("micro_batch_tokens", 4096)},
        "checkpoint_every": 10**6,
        "device": "cpu",
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _one(folder: Path, student: Path, teacher: Path, kind: str, work: dict[str, Any]) -> dict[str, float]:
    name = f"{kind}-{teacher.name.replace(' ', '-')}"
    command = [sys.executable, str(ROOT / "jobs" / "hpd.py"), "--config", str(config(folder, name, student, teacher, kind, work))]
    env = os.environ | {"RAYSYS_RUNS_DIR": str(folder), "RAYSYS_HOME": str(folder / "home")}
    subprocess.run(command, env=env, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    laps = [json.loads(line)["seconds"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()][work["skip"] :]
    return {phase: statistics.median(lap.get(phase, 0.0) for lap in laps) for phase in PHASES}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = [["loss", "teacher", "draw and score s", "train s", "step s", "of SFT's"]]
    for kind, found in figures.items():
        rows += [[kind, label, *(one[phase] for phase in PHASES), one["ratio"]] for label, one in found.items()]
    return rows
