"""What the report says of a pretraining run: its summary, routers by layer, and two runs over each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raysys.files import append_json
from raysys.report import charts, progress
from raysys.report.html import render_report


def record(step: int, shift: float = 0.0) -> dict[str, Any]:
    found = {
        "step": step,
        "loss": 6.0 - step / 4 + shift,
        "balance_loss": 1.5,
        "max_violation": 0.8,
        "tokens_per_second": 900.0,
        "ranks": 2,
    }
    found["mfu"] = 0.4
    if step == 7:
        found |= {"alignment": 0.61, "validation_loss": 4.5 + shift, "row_cosine": 0.2}
    return found | {"seconds": {"train": 1.0, "data": 0.1, "watch": 0.2, "total": 1.3}}


def folder(path: Path, shift: float = 0.0) -> Path:
    path.mkdir(parents=True)
    for step in range(8):
        append_json(path / "metrics.jsonl", record(step, shift))
    for step in (3, 7):
        load = [[0.5, 1.5], [1.25, 0.75]]
        append_json(path / "routers.jsonl", {"step": step, "alignment": [0.5, 0.6], "row_cosine": [0.1, 0.2], "load": load})
    return path


def test_a_run_says_what_became_of_loss_and_routers(tmp_path: Path) -> None:
    page = render_report(folder(tmp_path / "one")).read_text()
    for text in (
        "loss 6.00 to 4.25 nats a token, held-out 4.500, lambda 0.61, MaxVio 0.80, 450 tokens/s a rank, MFU 40%, in 8 steps.",
        "Alignment by layer (lambda)",
        "Load of each expert",
        "Tokens a second",
        "Held-out loss, nats a token",
    ):
        assert text in page, text
    pictures = dict(charts.routers([json.loads(line) for line in (tmp_path / "one" / "routers.jsonl").read_text().splitlines()]))
    assert '"name":"layer 2"' in pictures["Alignment by layer (lambda)"] and charts.routers([]) == []


def test_two_runs_lie_over_each_other(tmp_path: Path) -> None:
    stages = []
    for name, shift in (("plain", 0.5), ("mpi", 0.0)):
        folder(tmp_path / name, shift)
        stages.append({"name": name, "job": "pretrain_moe", "run_dir": str(tmp_path / name), "seconds": 9.0, "status": "done", "note": ""})
    whole = tmp_path / "story"
    whole.mkdir()
    (whole / "stages.json").write_text(json.dumps(stages))
    page = render_report(whole).read_text()
    assert "plain: loss 6.50 to 4.75 nats a token, held-out 5.000" in page and "mpi: loss 6.00 to 4.25" in page
    assert '"name":"plain"' in page and '"name":"mpi"' in page


def test_a_line_of_progress() -> None:
    assert progress.line(record(7), 8) == "step 8/8  loss 4.250  held-out 4.500  MaxVio 0.80  tokens/s 900  1.30 s (train 1.00)"
