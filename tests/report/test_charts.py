"""Curves: which pictures a run of episodes has, and which others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysys.agent_watch import facts
from raysys.files import append_json
from raysys.report import charts
from raysys.report.html import render_report
from raysys.training.calibrated import CalibAdvObjective
from tests.test_agent_watch import step


def records() -> list[dict[str, Any]]:
    told = facts(CalibAdvObjective(), step())
    return [{"step": number, "reward": 0.2 + number / 20, "loss": 0.1, "truncated": 0.0} | told for number in range(8)]


def test_what_episodes_tell_is_drawn_together() -> None:
    made = charts.episodes(records())
    titles = [title for title, _ in made]
    assert titles[:2] == ["Answers", "Searches and turns, mean of an episode"] and len(titles) <= 9
    mass = next(html for title, html in made if title.startswith("Negative over positive"))
    for label in ("before", "after", "answers before", "answers after"):
        assert f'"name":"{label}"' in mass
    assert '"dash":"dot"' in mass and "silver" in " ".join(titles).lower()
    assert [title for title, _ in charts.curves(records())] == ["Loss"], "nothing twice"


def test_parts_of_f1_keep_their_picture() -> None:
    assert [title for title, _ in charts.curves([one | {"reward/nq": 0.5} for one in records()])] == ["F1", "Loss"]


def test_runs_beside_one_another_show_each_metric_by_itself() -> None:
    titles = [title for title, _ in charts.overlay({"grpo": records(), "calibadv": records()})]
    assert {"F1", "Share of exact matches", "Mean score of search steps"} <= set(titles)


def test_other_runs_have_none() -> None:
    plain = [{"step": 0, "reward": 0.5, "truncated": 0.0}]
    assert charts.episodes(plain) == [] and [title for title, _ in charts.curves(plain)] == [
        "Reward",
        "Share of responses cut at the limit",
    ]


@pytest.mark.parametrize(
    ("count", "text"), [(8, "F1 0.23 to 0.53, exact match 50% to 50%, searches 0.8 to 0.8, in 8 steps."), (0, "0 steps.")]
)
def test_the_summary(tmp_path: Path, count: int, text: str) -> None:
    for one in records()[:count]:
        append_json(tmp_path / "metrics.jsonl", one)
    page = render_report(tmp_path).read_text().partition("<body>")[2]
    assert text in page and ("<h2>Episodes" in page) == bool(count)
