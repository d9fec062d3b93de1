"""A search agent's data as files, of a world and of question sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysys.config.agents import QuestionsConfig
from raysys.config.parts import Data
from raysys.data.preflight import preflight
from raysys.data.prepare import write_questions
from raysys.errors import ConfigError, DataError
from raysys.search_agent import accepted, finder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_world_becomes_files_that_jobs_read(tmp_path: Path) -> None:
    world = {"documents": 400, "questions": 300, "style": "short", "kinds": ["capital", "currency"]}
    config = QuestionsConfig.parse({"world": world, "instruction": "", "messages": False, "transcripts": 50, "topk": 2}, "test")
    counts = write_questions(config, tmp_path, lambda corpus: finder(corpus, 2))
    assert counts["train.jsonl"] == 240 and counts["test.jsonl"] == 60 and counts["corpus.jsonl"] == 400
    assert 25 < counts["transcripts.jsonl"] <= 50, "left out are only those whose documents a search does not find"
    train, test, learnt = (rows(tmp_path / f"{name}.jsonl") for name in ("train", "test", "transcripts"))
    assert not {row["id"] for row in train} & {row["id"] for row in test}
    assert {row["id"].partition("#")[0] for row in learnt} <= {row["id"] for row in train}, "nothing of test is taught"
    assert all(isinstance(row["prompt"], str) and accepted(row["answer"], "") for row in train)
    found = preflight(Data(path=str(tmp_path / "transcripts.jsonl")), None, max_prompt_tokens=80, max_response_tokens=900, supervised=True)
    assert found.bad == 0 and found.seen == len(learnt)
    search = finder(tmp_path / "corpus.jsonl", 2)
    for turn in learnt[0]["turns"][:-1]:
        query = turn["generated"].partition("<search>")[2].removesuffix("</search>")
        for one in search(query):
            assert f"(Title: {one.title}) {one.body}" in turn["observation"]


def hotpot(number: int) -> dict:
    context = [[f"Title {number}", ["One. ", "Two."]], ["Shared", ["All know."]]]
    return {"_id": f"h{number}", "question": f"Who {number}?", "answer": "me", "context": context, "supporting_facts": [["Shared", 0]]}


def test_question_sets_become_files_and_their_contexts_the_corpus(tmp_path: Path) -> None:
    for name, numbers in (("a", (1, 2)), ("b", (3,)), ("c", (4,))):
        (tmp_path / f"{name}.json").write_text(json.dumps([hotpot(number) for number in numbers]))
    files = {"train": [str(tmp_path / "a.json"), str(tmp_path / "b.json")], "test": [str(tmp_path / "c.json")]}
    (tmp_path / "out").mkdir()
    counts = write_questions(QuestionsConfig.parse({"files": files}, "test"), tmp_path / "out", lambda corpus: finder(corpus, 2))
    assert counts == {"corpus.jsonl": 5, "train.jsonl": 3, "test.jsonl": 1}
    assert rows(tmp_path / "out" / "train.jsonl")[0]["prompt"][0]["content"].endswith("Question: Who 1?\n")
    files["train"].append(files["train"][0])
    with pytest.raises(DataError, match="the question id 'h1' is used twice"):
        write_questions(QuestionsConfig.parse({"files": files}, "test"), tmp_path / "out", lambda corpus: finder(corpus, 2))
    assert len(rows(tmp_path / "out" / "train.jsonl")) == 3, "what was there stays"


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({}, "give world .* or files"),
        ({"world": {}, "files": {"train": [], "test": []}}, "give world .* or files"),
        ({"files": {"train": ["x"], "test": ["y"]}, "transcripts": 3}, "transcripts are made of a generated world only"),
    ],
)
def test_what_cannot_go_together_is_said(values: dict, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        QuestionsConfig.parse(values, "test")
