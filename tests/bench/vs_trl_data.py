"""Learning from data through raysys and through TRL (Apache-2.0): response tokens a second and peak memory, same models, rows and order.

`sft`: `jobs/hpd.py` with loss=sft against `SFTTrainer`. `distil`: loss=hpd against TRL's nearest, `GKDTrainer` on data alone (lmbda 0,
reverse KL over the whole vocabulary; HPD asks about two tokens a position). Float32, CPU, the same threads, rows of a micro-batch and
log-normal lengths. TRL lives in `.venv-trl` (see `vs_trl.py`). Memory is that of whole process trees, shared pages once.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.hpd_step import STUDENT, config, data
from tests.bench.peak import Failed, watched
from tests.bench.vs_trl import lengthy_model, peer

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS: dict[str, Any] = {
    "student": STUDENT,
    "vocabulary": 49152,
    "batch": 16,
    "micro_rows": 8,
    "median": 120,
    "steps": 8,
    "skip": 2,
    "threads": 2,
    "packing": False,
    "deadline": 900.0,
}
METHODS = {"sft": ("sft", "sft"), "distil": ("hpd", "gkd")}


def run(student: dict[str, Any], **work: Any) -> dict[str, Any]:
    """Figures by method and side, and the ratios raysys / TRL. `packing`: TRL's own, of its SFT."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        length = student["context"]
        work |= {"micro_batch_tokens": work["micro_rows"] * length, "length": length}
        data(folder / "data.jsonl", work["batch"] * work["steps"], work["median"], length)
        models = [lengthy_model(folder / which, seed, student, 96, work["vocabulary"]) for seed, which in enumerate(("student", "teacher"))]
        tokens = _tokens(folder / "data.jsonl", work)
        for method, (ours, theirs) in METHODS.items():
            try:
                sides = {"raysys": _raysys(folder, *models, ours, work), "trl": _trl(folder, *models, theirs, work)}
            except Failed as error:
                raise SystemExit(f"vs-trl-data: {error}") from None
            for side in sides.values():
                steps = side.pop("steps")[work["skip"] :]
                side |= {"tokens_per_s": tokens / sum(steps), "step_s": statistics.median(steps)}
            ratios = {f"{key}_ratio": sides["raysys"][key] / sides["trl"][key] for key in ("tokens_per_s", "peak_mib")}
            figures[method] = sides | ratios
    return figures


def _tokens(path: Path, work: dict[str, Any]) -> int:
    """Response tokens of the steps that count; the end token is one."""
    answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    return sum(len(answer) + 1 for answer in answers[work["skip"] * work["batch"] :])


def _raysys(folder: Path, student: Path, teacher: Path, kind: str, work: dict[str, Any]) -> dict[str, Any]:
    path = config(folder, kind, student, teacher, kind, work)
    env = {"RAYSYS_RUNS_DIR": str(folder), "RAYSYS_HOME": str(folder / "home"), "RAY_worker_niceness": "0"}
    command = [sys.executable, str(ROOT / "jobs" / "hpd.py"), "--config", str(path)]
    wall, peak = watched("raysys", command, env, folder / f"{kind}.log", work["deadline"])
    records = [json.loads(line) for line in (folder / kind / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps": [record["seconds"]["total"] for record in records],
        "loss": [record["loss"] for record in records],
        **_side(wall, peak),
    }


def _trl(folder: Path, student: Path, teacher: Path, method: str, work: dict[str, Any]) -> dict[str, Any]:
    asked, out = folder / f"{method}.json", folder / f"{method}-figures.json"
    named = {
        "method": method,
        "student": str(student),
        "teacher": str(teacher),
        "data": str(folder / "data.jsonl"),
        "folder": str(folder / method),
    }
    keys = ("batch", "micro_rows", "steps", "length", "threads", "packing")
    asked.write_text(json.dumps(named | {key: work[key] for key in keys} | {"learning_rate": 1e-5, "weight_decay": 0.01}))
    command = [str(peer()), str(Path(__file__).with_name("trl_peer.py")), str(asked), str(out)]
    wall, peak = watched("TRL", command, {"OMP_NUM_THREADS": str(work["threads"])}, folder / f"{method}.log", work["deadline"])
    found = json.loads(out.read_text())
    return {"steps": found["step_s"], "loss": found["loss"], "version": found["version"], **_side(wall, peak)}


def _side(wall: float, peak: dict[str, Any]) -> dict[str, Any]:
    return {"peak_mib": peak["pss"], "peak_by_process": peak["by_process"], "wall_s": wall}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = [["method", "side", "tokens/s", "step s", "peak MiB", "loss first", "last"]]
    for method, found in figures.items():
        for side in ("raysys", "trl"):
            one = found[side]
            rows.append([method, side, one["tokens_per_s"], one["step_s"], one["peak_mib"], one["loss"][0], one["loss"][-1]])
        rows.append([method, "ratio", found["tokens_per_s_ratio"], "", found["peak_mib_ratio"], "", ""])
    return rows
