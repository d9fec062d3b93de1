"""The study of bits: its cells are valid configs, its table has each model's own measures, and the picture joins what nothing beats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from raysys.config.quantising import QuantizeConfig
from raysys.report.quantising import maps
from raysys.report.study import pareto
from raysys.studies import ablation
from raysys.studies.quantize import ALLOCATIONS, METHODS, STUDIES
from raysys.studies.summary import publish, table

ONE_TASK = {"domains": {"rev": {"task": "spell_backward"}}}


@pytest.fixture
def plan(tmp_path: Path) -> ablation.Plan:
    path = tmp_path / "bits.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "calibration": {"source": ONE_TASK}, "name": "mine"}))
    return ablation.plan("quantize", "sensitivity", STUDIES, QuantizeConfig, path, [], "0,1", tmp_path / "runs")


def leave(one: ablation.Planned, bits: float, perplexities: dict[str, float]) -> None:
    (one.folder / "ledger").mkdir(parents=True)
    (one.folder / "config.yaml").write_text(one.config.to_yaml())
    (one.folder / "metrics.jsonl").write_text(
        json.dumps({"step": 0, "error_after": 0.5}) + "\n" + json.dumps({"step": 1, "error_after": 0.25})
    )
    lines = [
        {"step": 0, "label": label, "measures": {"perplexity": found, "accuracy": 1 / found, "bits_per_weight": bits}}
        for label, found in perplexities.items()
    ]
    (one.folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (one.folder / "ledger" / "finished.json").write_text(json.dumps({"step": 2, "steps_asked": 0}))


def test_cells_are_methods_times_bits_times_places(plan: ablation.Plan) -> None:
    found: dict[str, Any] = {one.cell: one.config for one in plan.runs if one.seed == 0}
    assert len(found) == len(METHODS) * (2 + len(ALLOCATIONS)) + 4 and len(plan.runs) == 2 * len(found)
    assert (found["gptq-2"].bits, found["gptq-2"].allocation, found["gptq-2"].widest) == (2, "uniform", 2)
    assert (found["rtn-3-nsds"].bits, found["rtn-3-nsds"].allocation) == (3, "nsds")
    assert not found["d2quant-2-no-dsq"].d2quant.dual_scale and found["d2quant-2-dac"].d2quant.correction
    assert len({json.dumps(one.identity(), default=str) for one in found.values()}) == len(found)


def test_runs_share_what_they_know_of_the_model_in_full(tmp_path: Path, plan: ablation.Plan) -> None:
    assert {one.config.shared for one in plan.runs} == {str(plan.folder / "shared")}  # type: ignore[attr-defined]
    path = tmp_path / "bits.yaml"
    elsewhere = ablation.plan("quantize", "sensitivity", STUDIES, QuantizeConfig, path, ["shared=mine"], "0", tmp_path / "runs")
    assert {one.config.shared for one in elsewhere.runs} == {"mine"}  # type: ignore[attr-defined]


def test_the_table_and_the_file_have_each_models_own_measures(plan: ablation.Plan) -> None:
    first = plan.runs[0]
    leave(first, 2.25, {"full precision": 5.0, "quantised": 9.0, "quantised, with its correction": 8.0})
    summary = publish(plan)
    (run,) = (run for run in summary["cells"][0]["runs"] if run["seed"] == 0)
    assert run["status"] == "done" and run["values"]["perplexity in full"] == 5.0 and run["values"]["perplexity"] == 8.0
    assert (run["values"]["accuracy"], run["values"]["accuracy in full"]) == (1 / 8, 1 / 5)
    assert run["values"]["error of states"] == 0.25 and run["values"]["bits per weight"] == 2.25
    rows = pq.read_table(plan.folder / "study.parquet").to_pylist()
    assert len(rows) == len(plan.runs) and rows[0]["cell"] == first.cell and rows[0]["perplexity"] == 8.0 and rows[1]["perplexity"] is None
    assert "8.0000" in table(summary) and "2/0" not in table(summary)


def test_the_page_has_means_spreads_runs_and_the_map(plan: ablation.Plan) -> None:
    several = [one for one in plan.runs if one.cell in ("gptq-3-nsds", "rtn-3-random")]
    for number, one in enumerate(several):
        leave(one, 3.25, {"full precision": 5.0, "quantised": 6.0 + number})
        (one.folder / "layer_map.json").write_text(json.dumps({"bits": [2, 4, 4] if one.cell == "gptq-3-nsds" else [4, 4, 2]}))
    publish(plan)
    page = (plan.folder / "report.html").read_text()
    assert "7.0000 – 9.0000" in page and "6.0000 – 8.0000" in page, "the cells' smallest and largest"
    assert "gptq-3-nsds, seed 1" in page and "Bits by layer" in page and "4 done" in page and '<th class="number">steps' not in page
    shown = maps({"a": [2, 4], "b": [2, 4], "c": [4, 2], "uniform": [3, 3]})
    assert "a, b" in shown and "uniform" not in shown and not maps({"a": [2, 4], "b": [2, 4]})


def test_the_picture_joins_what_nothing_beats_in_both() -> None:
    means = {"gptq-2": (2.0, 9.0), "gptq-3": (3.0, 6.0), "rtn-3": (3.5, 7.0), "d2quant-4": (4.0, 5.0), "none yet": (None, None)}
    cells = [{"cell": name, "mean": {"x": x, "y": y}} for name, (x, y) in means.items()]
    drawn = pareto({"pareto": ["x", "y"], "cells": cells})
    data = json.JSONDecoder().raw_decode(drawn[drawn.index("[{") :])[0]
    assert data[0]["x"] == [2.0, 3.0, 4.0] and data[0]["y"] == [9.0, 6.0, 5.0]
    assert [(one["name"], one["text"]) for one in data[1:]] == [
        ("gptq", ["gptq-2", "gptq-3"]),
        ("rtn", ["rtn-3"]),
        ("d2quant", ["d2quant-4"]),
    ]
    assert not pareto({"pareto": ["x", "y"], "cells": cells[:1]}) and not pareto({"cells": cells})
