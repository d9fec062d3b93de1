"""Episodes on record for people: whole texts, the advantages that were trained on, a step once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysys.agent_transcripts import FILE, GROUPS, MOMENTS, SAMPLES, Transcripts, chosen, question
from raysys.agent_watch import Watched
from raysys.batch import Batch
from raysys.ledger import PER_STEP_FILES
from raysys.methods.calibadv import calibrate
from raysys.report.html import render_report
from raysys.rollout.serving import Response
from raysys.search_agent import judged
from raysys.training.calibrated import CalibAdvObjective
from tests.rollout.test_episodes import EOS, Letters
from tests.test_search_agent import RIGHT, play

WRONG = (RIGHT[0], "so.</think> <answer> Rome, a long while ago </answer>")
LOST = ("I do not know <script>alert('x')</script>",)
PROMPT = "Question: an example?\nQuestion: what is the capital?\n"


class Decoder(Letters):
    def texts(self, rows: Sequence[Any]) -> list[str]:
        return [self.decode(row) for row in rows]

    def pieces(self, ids: Sequence[int], ends: Sequence[int]) -> list[str]:
        return ["".join("<eos>" if one == EOS else chr(one) for one in ids[a:b]) for a, b in zip([0, *ends], [*ends, len(ids)])]


def step(**groups: Sequence[Sequence[str]]) -> Batch:
    """Judged episodes, by the name of their question."""
    made: list[tuple[str, int, Response]] = [(name, place, play(*turns)) for name, own in groups.items() for place, turns in enumerate(own)]
    return judged(
        Batch.from_columns(
            prompt_id=[name for name, _, _ in made],
            sample=[place for _, place, _ in made],
            prompt_ids=[Letters().encode(PROMPT)] * len(made),
            answer=['["Paris", "Lutetia"]'] * len(made),
            response_ids=[one.ids for _, _, one in made],
            runs=[one.runs for _, _, one in made],
            rollout_logprobs=[one.logprobs for _, _, one in made],
            episode=[one.record for _, _, one in made],
            stop_reason=[one.reason for _, _, one in made],
        )
    )


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_whole_texts_and_what_they_were_trained_by(tmp_path: Path) -> None:
    objective = CalibAdvObjective()
    batch = step(q=[RIGHT, RIGHT, WRONG, LOST])
    Transcripts(tmp_path, Decoder(), objective, steps=3).write(0, objective.advantages(batch))
    (record,) = written(tmp_path)
    (group,) = record["groups"]
    assert (group["question"], group["golds"], group["prompt"]) == ("what is the capital?", ["Paris", "Lutetia"], PROMPT)
    told = [(one["reward"], one["exact_match"], one["valid"], one["searches"], one["stop"]) for one in group["samples"]]
    assert told == [(1.0, True, True, 1, "stop")] * 2 + [(0.0, False, True, 1, "stop"), (0.0, False, False, 0, "stop")]
    given = objective.given(batch)
    calibrated, plain = calibrate(**given), calibrate(**given, rebalance=None, soft_penalty=False)
    for row, sample in enumerate(group["samples"]):
        ids, runs = batch.ragged("response_ids")[row], batch.ragged("runs")[row]
        assert "".join(part["text"] for part in sample["segments"]) == Decoder().pieces(ids.tolist(), [])[0]
        start = 0
        for part in sample["segments"]:
            assert set(runs[start : start + part["tokens"]]) == {part["run"]}
            if part["run"] >= 0:
                assert (part["advantage"], part["grpo"]) == (float(calibrated[row, start]), float(plain[row, start]))
                assert part["perplexity"] == pytest.approx(np.exp(0.5))
            start += part["tokens"]
        assert start == len(ids)
    search, answer = (part for part in group["samples"][2]["segments"] if part["run"] >= 0)
    assert search["score"] == 1.0 and search["advantage"] == 0.0 and search["grpo"] < 0, "blamed by GRPO, spared by calibration"
    assert answer["score"] is None and answer["advantage"] == answer["grpo"] < 0
    assert group["samples"][3]["segments"][1]["action"] == "invalid"


def test_a_resume_writes_nothing_twice(tmp_path: Path) -> None:
    objective = CalibAdvObjective()
    batch = objective.advantages(step(q=[RIGHT, LOST]))
    for _ in range(2):
        kept = Transcripts(tmp_path, Decoder(), objective, steps=3)
        for number in range(3):
            kept.write(number, batch)
            kept.write(number, batch, always=True)
    assert [record["step"] for record in written(tmp_path)] == [0, 1, 2]
    assert FILE in PER_STEP_FILES, "steps that a resume does again are cut before"


def test_the_first_step_the_last_and_some_between(tmp_path: Path) -> None:
    kept = Transcripts(tmp_path, Decoder(), CalibAdvObjective(), steps=205)
    due = [number for number in range(205) if kept.due(number)]
    assert due[0] == 0 and due[-1] == 204 and len(due) <= MOMENTS + 1


def test_groups_that_tell_something_come_first(tmp_path: Path) -> None:
    objective = CalibAdvObjective()
    half = (RIGHT[0], "so.</think> <answer> Paris or Rome or Athens </answer>")
    batch = objective.advantages(step(alike=[WRONG, WRONG], weak=[half, WRONG], good=[RIGHT, WRONG]))
    assert [rows.tolist() for rows in chosen(batch, threshold=0.7)] == [[4, 5], [2, 3]]
    assert [rows.tolist() for rows in chosen(batch.take([0, 1]), threshold=0.7)] == [[0, 1]]
    many = objective.advantages(step(**{f"q{number}": [RIGHT, *[WRONG] * SAMPLES] for number in range(GROUPS + 1)}))
    Transcripts(tmp_path, Decoder(), objective, steps=1).write(0, many)
    groups = written(tmp_path)[0]["groups"]
    assert [(one["prompt_id"], len(one["samples"]), one["of"]) for one in groups] == [
        (f"q{number}", SAMPLES, SAMPLES + 1) for number in range(GROUPS)
    ]


class Metrics:
    def write(self, record: dict[str, Any]) -> None: ...


def test_the_loop_leaves_them_and_the_report_shows_them(tmp_path: Path) -> None:
    objective = CalibAdvObjective()
    watched = Watched(objective, Metrics(), transcripts=Transcripts(tmp_path, Decoder(), objective, steps=100))
    for number in (0, 1):
        watched.advantages(step(q=[RIGHT, RIGHT, WRONG, LOST]))
        watched.write({"step": number, "reward": 0.5})
    assert [record["step"] for record in written(tmp_path)] == [0]
    page = render_report(tmp_path).read_text().partition("Transcripts <small>")[2]
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    for text in ("what is the capital?", "advantage <b", "GRPO <b>−", "score <b>1.00</b>", "perplexity <b>1.65</b>", "invalid action"):
        assert text in page, text


@pytest.mark.parametrize(
    ("prompt", "asked"), [("do.\nQuestion: who?\nassistant\n", "who?"), (" who? ", "who?"), ("Question:\nwho?<end>", "who?<end>")]
)
def test_question(prompt: str, asked: str) -> None:
    assert question(prompt) == asked
