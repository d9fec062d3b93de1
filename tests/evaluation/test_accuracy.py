"""Accuracy and its intervals, against closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from raysys.batch import Batch, Ragged
from raysys.evaluation.accuracy import Z, run_evaluation, summarize, wilson
from raysys.evaluation.during import Evaluator


@pytest.mark.parametrize(("right", "n"), [(0, 20), (5, 20), (20, 20), (81, 263)])
def test_wilson_bounds_solve_their_equation(right: int, n: int) -> None:
    """Wilson's bounds are the shares p at which the observed one lies exactly Z standard errors of p away."""
    share = right / n
    for bound in wilson(share, n):
        assert math.isclose((share - bound) ** 2, Z**2 * bound * (1 - bound) / n, rel_tol=1e-9, abs_tol=1e-12)


def test_average_at_k_counts_each_prompt_once() -> None:
    scores = [1, 1, 1, 0, 0, 0, 0.5, 1]
    found = summarize(scores, ["a"] * 4 + ["b"] * 4, samples=2)
    assert (found["a"].mean, found["a"].n, found["b"].mean, found["b"].score) == (0.75, 2, 0.25, 0.375)
    assert found["a"].low <= 0.75 <= found["a"].high
    with pytest.raises(ValueError, match="not whole prompts"):
        summarize(scores[:3], ["a"] * 3, samples=2)


def prompts() -> Batch:
    return Batch.from_columns(
        prompt_id=[f"p{i}" for i in range(6)],
        sample=[0] * 6,
        domain=["x", "y"] * 3,
        prompt_ids=Ragged.of([[i] for i in range(6)], np.int32),
        answer=[str(i % 3) for i in range(6)],
        verifier=["exact"] * 6,
        metadata=[""] * 6,
    )


def answers(batch: Batch) -> Batch:
    """Every prompt is answered with its own number: right for the first three."""
    return batch.with_columns(response_ids=batch.ragged("prompt_ids"), stop_reason=["stop"] * 5 + ["length"])


def decode(rows: list) -> list[str]:
    return ["".join(str(int(token)) for token in row) for row in rows]


def exact(verifier: str, text: str, answer: str, metadata: str) -> float:
    return float(text == answer)


def test_run_evaluation_sums_up_and_keeps_examples_of_each_domain() -> None:
    result = run_evaluation(answers, prompts(), decode, exact, examples=3)
    assert {name: domain.mean for name, domain in result.domains.items()} == {"x": pytest.approx(2 / 3), "y": pytest.approx(1 / 3)}
    assert result.truncated == pytest.approx(1 / 6) and result.response_tokens == 1.0
    assert [(example.domain, example.prompt, example.score) for example in result.examples] == [
        ("x", "0", 1.0),
        ("y", "1", 1.0),
        ("x", "2", 1.0),
    ]


def test_evaluator_records_once_keeps_the_best_and_stops(tmp_path: Path) -> None:
    exported: list[str] = []
    pushed: list[int] = []

    def export(folder: str) -> None:
        exported.append(folder)
        Path(folder).mkdir(parents=True, exist_ok=True)

    def evaluator(bar: float) -> Evaluator:
        return Evaluator(
            generate=answers, prompts=prompts(), decode=decode, score=exact, folder=tmp_path, steps=10, every=4,
            stop_at={"x": bar}, export=export, before=pushed.append,
        )  # fmt: skip

    one = evaluator(0.6)
    assert [step for step in range(11) if one.due(step)] == [0, 4, 8, 10]
    assert not one.run(0), "the start never stops a run"
    assert one.run(4) and not evaluator(0.9).run(4)
    assert pushed == [0, 4], "what is on record is not measured again"
    assert exported == [str(tmp_path / "checkpoints/best")]
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["label"], line["mean"]) for line in lines] == [(0, "before", 0.5), (4, "step 4", 0.5)]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 10
