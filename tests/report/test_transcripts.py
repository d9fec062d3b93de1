"""Episodes on the page: what a model wrote is text, and the numbers beside it are those on record."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

from raysys.report.html import render_report
from raysys.report.transcripts import signed, strength, told

EVIL = "\n<script>alert('x')</script></div>{{ 7 * 7 }} <search> a </search>"


def part(run: int, text: str, **more: Any) -> dict[str, Any]:
    facts = {"action": "search", "shown": True, "advantage": -0.25, "grpo": -0.75, "score": 2 / 3, "perplexity": 61.5}
    return {"run": run, "tokens": 3, "text": text} | (facts | more if run >= 0 else {})


def record(step: int) -> dict[str, Any]:
    segments = [
        part(-1, "<think>"),
        part(0, EVIL),
        part(-1, f"\n\n<information>{EVIL}</information>\n\n<think>"),
        part(1, "b<|im_end|>", action="answer", shown=False, advantage=-0.75, score=None, perplexity=1.5),
    ]
    sample = {"sample": 0, "reward": 0.4, "exact_match": False, "valid": True, "searches": 1, "stop": "stop", "segments": segments}
    best = sample | {"sample": 1, "reward": 1.0, "exact_match": True, "segments": [part(0, "c", advantage=1.5, grpo=1.5)]}
    group = {"prompt_id": "q@0", "question": f"who?{EVIL}", "prompt": EVIL, "golds": [EVIL, "Paris"], "of": 5, "samples": [best, sample]}
    return {"step": step, "groups": [group]}


def page(folder: Path, *records: dict[str, Any]) -> str:
    (folder / "episodes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return render_report(folder).read_text().partition("<body>")[2]


def test_what_a_model_writes_stays_text(tmp_path: Path) -> None:
    shown = page(tmp_path, record(0))
    assert "<script>alert" not in shown and "{{ 7 * 7 }}" in shown and "49" not in shown.partition("Run it again")[0]
    said = [unescape(text) for text in re.findall(r'<div class="said">(.*?)</div>', shown, re.DOTALL)]
    assert "".join(said[-4:]) == "".join(one["text"] for one in record(0)["groups"][0]["samples"][1]["segments"]), "to the letter"


def test_the_numbers_beside_it(tmp_path: Path) -> None:
    shown = page(tmp_path, record(0), record(7))
    for text in (
        "Step 1<", "Step 8<", "F1 0.40", "no exact match", "valid format", "1 search<", "2 of 5 samples",
        '<b class="value">−0.25</b>', "GRPO <b>−0.75</b>", "score <b>0.67</b>", "perplexity <b>61.50</b>", "search 1 <b>+1.50</b>",
    ):  # fmt: skip
        assert text in shown, text
    labels = re.findall(r'<p class="label">(.*?)</p>', shown)
    assert sum("GRPO" in label for label in labels) == 2, "only where it differs"


def test_the_newest_step_and_the_calibrated_episode_are_open() -> None:
    first, last = told([record(0), record(7)])
    assert (first["open"], last["open"]) == (False, True)
    assert [sample["open"] for sample in last["groups"][0]["samples"]] == [False, True]
    parts = last["groups"][0]["samples"][1]["segments"]
    assert [one["name"] for one in parts] == ["opener", "search 1", "environment", "answer"]
    assert [one.get("side") for one in parts] == [None, "bad", None, "bad"] and parts[1]["strength"] < parts[3]["strength"]


def test_a_run_without_has_no_such_part(tmp_path: Path) -> None:
    shown = render_report(tmp_path).read_text()
    assert "Transcripts" not in shown.partition("<body>")[2]


def test_signs() -> None:
    assert [signed(value) for value in (1.0, -0.256, 0.0, -0.0004, 0.004)] == ["+1.00", "−0.26", "0", "−4e-04", "+4e-03"]
    assert strength(0.0) == 0 < strength(-0.001) < strength(1.0) < strength(-9.0) == 50
