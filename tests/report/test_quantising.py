"""The report of a quantised model: the strip of bits, what it rests on, errors by layer, and measures without accuracy."""

from __future__ import annotations

import json
from pathlib import Path

from raysys.report import quantising
from raysys.report.html import render_report

MAP = {"bits": [4, 2, 2, 4], "allocation": "nsds", "scores": [3.0, 1.0, 0.5, 9.0], "series": {"up/nv": [0.1, 1.0, 100.0, 3.0]}}
LINE = {
    "step": 0,
    "layer_bits": 4,
    "loss": 0.1,
    "error_before": 0.0,
    "error_after": 0.1,
    "weight_error/q_proj": 0.2,
    "seconds": {"quantise": 1.0, "total": 1.0},
}


def test_pictures_of_a_run() -> None:
    records = [LINE | {"step": step} for step in range(4)]
    titles = [title for title, _ in quantising.pictures(MAP, records)]
    assert titles[0] == "Bits by layer (nsds, 3 on average)" and len(titles) == 3, "no picture without numbers"
    strip = quantising.pictures(MAP, records)[0][1]
    assert "up\\u002fnv" in strip and "score" in strip and "bits" in strip
    assert quantising.pictures(None, records) == []
    assert len(quantising.pictures({"bits": [2, 2], "allocation": "uniform", "scores": None, "series": None}, [])) == 1


def test_components_are_coloured_by_their_order() -> None:
    assert quantising._ranks([0.1, 1.0, 100.0, 3.0]) == [0.0, 1 / 3, 1.0, 2 / 3]


def test_the_page(tmp_path: Path) -> None:
    (tmp_path / "layer_map.json").write_text(json.dumps(MAP))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(LINE | {"step": step}) + "\n" for step in range(4)))
    evaluations = [
        {"step": 0, "label": label, "mean": 0.0, "domains": {}, "measures": {"perplexity": value, "bits_per_weight": bits}}
        for label, value, bits in (("full precision", 3.5, 32.0), ("quantised", 4.25, 3.2))
    ]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(one) + "\n" for one in evaluations))
    page = render_report(tmp_path).read_text()
    assert "4 layers: 2 of 2 bits, 2 of 4 bits; perplexity 3.5000 (full precision); perplexity 4.2500 (quantised)." in page
    assert "<h2>Measures" in page and "<h2>Layers" in page and "<h2>Accuracy" not in page and "bits per weight" in page
    assert "<h2>Curves" not in page, "the errors are drawn by layer already"


def test_a_pipeline_s_page_shows_where_each_model_has_its_bits(tmp_path: Path) -> None:
    stages = []
    for name, bits in (("nsds", MAP["bits"]), ("first_half", [4, 4, 2, 2])):
        run = tmp_path / f"{name}-1"
        run.mkdir()
        (run / "layer_map.json").write_text(json.dumps(MAP | {"bits": bits} if name == "nsds" else {"bits": bits, "allocation": name}))
        (run / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
        stages.append({"name": name, "job": "quantize", "run_dir": str(run), "seconds": 1.0, "status": "done", "note": ""})
    page = tmp_path / "story"
    page.mkdir()
    (page / "stages.json").write_text(json.dumps(stages))
    text = render_report(page).read_text()
    assert "Bits by layer" in text and "What they rest on (nsds)" in text and "<h2>Where a step" not in text
    assert [title for title, _ in quantising.side_by_side({"uniform": {"bits": [3, 3], "allocation": "uniform", "scores": None}})] == []


def test_a_pipeline_that_spends_bits_shows_what_they_buy() -> None:
    rows = [
        {"label": label, "measures": {"bits_per_weight": bits, "perplexity": perplexity}}
        for label, bits, perplexity in (("full", 32.0, 1.0), ("rtn_nsds", 3.25, 1.3), ("rtn_random", 3.25, 1.4), ("gptq_nsds", 3.25, 1.2))
    ]
    page = quantising.pareto([*rows, {"label": "unmeasured", "measures": {"perplexity": 1.0}}])
    assert all(f'"{name}"' in page for name in ("rtn", "gptq", "rtn_random")) and '"unmeasured"' not in page
    assert '"text":"full"' in page and "[32.0" not in page, "the model in full is a line, not a point"
    assert quantising.pareto(rows[:3]) == "" == quantising.pareto([{"label": "one", "measures": {"f1": 0.5}}] * 5)
