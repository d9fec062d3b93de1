"""The search agent with real vLLM, DeepSpeed, Ray and a search service over HTTP that is killed in the middle of the run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raysys.data.questions import Passage, write_corpus
from raysys.head import Head
from tests.e2e.test_gopd import SMALL, Workplace

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
TAGS = ["\n", "\n\n", "<think>", "</think>", "<search>", "</search>", "<information>", "</information>", "<answer>", "</answer>"]
BATCH, SAMPLES, STEPS, AWAY_SECONDS = 6, 3, 8, 10.0
SHOWN = "\n\n<information>Doc 1(Title: {}) {}</information>\n\n<think>"
TURNS = [
    {"generated": "a</think><search>Lyon</search>", "observation": SHOWN.format("Lyon", "In France.")},
    {"generated": "b</think><search>Seine</search>", "observation": SHOWN.format("Seine", "In Paris.")},
    {"generated": "c</think><answer>Paris</answer>", "observation": ""},
]


class Service:
    """`python -m raysys.retrieval` on a port of its own."""

    def __init__(self, corpus: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._corpus, self.process = corpus, None

    def start(self) -> None:
        command = [sys.executable, "-m", "raysys.retrieval", "--corpus", str(self._corpus), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "serving" in line:
                return
        raise AssertionError(f"the service ended with {self.process.wait()}")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def place(ray_head: Head, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With `warm`: a model that knows one episode by heart, two searches and the right answer."""
    place = Workplace(tmp_path_factory.mktemp("agent"), ray_head)
    rows = [{"id": f"q{row}", "prompt": f"City {row % 7}?", "answer": '["Paris"]'} for row in range(64)]
    learnt = [{**row, "opening": "<think>", "turns": TURNS} for row in rows]
    for name, lines in (("questions", rows), ("transcripts", learnt)):
        (place.folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_corpus(place.folder / "corpus.jsonl", [Passage("1", "Lyon", "In France."), Passage("2", "Seine", "In Paris.")])
    place.run(
        "sft",
        "warm",
        {
            "new_model": SMALL | {"tied": True, "context": 256, "tokens": TAGS},
            "data": {"path": str(place.folder / "transcripts.jsonl")},
            "steps": 60,
            "batch": 16,
            "max_prompt_tokens": 16,
            "max_response_tokens": 200,
            "learning_rate": 1e-2,
            "trainer": {"zero_stage": 0, "warmup_steps": 5, "betas": [0.9, 0.95]},
        },
    )
    return place


def config(place: Workplace, **more: Any) -> dict[str, Any]:
    return {
        "student": str(place.folder / "warm" / "export"),
        "data": {"path": str(place.folder / "questions.jsonl")},
        "steps": STEPS,
        "batch": BATCH,
        "samples": SAMPLES,
        "generations": 4,
        "turn_tokens": 30,
        "max_prompt_tokens": 16,
        "max_response_tokens": 200,
        "learning_rate": 1e-4,
        "trainer": {"zero_stage": 0},
        "rollout": {"prefix_caching": True},
    } | more


def test_a_search_service_that_is_killed_costs_time_and_nothing_else(place: Workplace) -> None:
    service = Service(place.folder / "corpus.jsonl")
    service.start()
    try:
        run = place.start("search_agent", "killed", config(place, search={"url": f"http://127.0.0.1:{service.port}", "topk": 1}))
        place.await_lines(run, "killed", 2)
        service.kill()
        began = time.monotonic()
        time.sleep(AWAY_SECONDS)
        done = len(place.metrics("killed"))
        assert done < STEPS, "a step under way when the service died may end, no other"
        service.start()
        assert run.wait(timeout=300) == 0, (place.folder / "killed.log").read_text()[-3000:]
        assert time.monotonic() - began > AWAY_SECONDS
    finally:
        service.kill()
    steps = place.metrics("killed")
    ids = [one for line in (place.folder / "killed" / "ledger" / "steps.jsonl").read_text().splitlines() for one in json.loads(line)["ids"]]
    assert len(steps) == STEPS and len(ids) == len(set(ids)) == STEPS * BATCH * SAMPLES
    assert not (place.folder / "killed" / "ledger" / "dead_letters.jsonl").exists()
    for step in steps:
        assert step["reward"] > 0.8 and step["searches"] > 1.5 and step["invalid_action"] < 0.2, "no episode was cut short by the outage"
    assert 0 < steps[0]["loss_tokens"] < 1 and {"high_ppl", "exact_match", "positive_mass_after", "entropy"} <= steps[0].keys()


@pytest.mark.long
def test_without_a_service_the_run_searches_by_itself(place: Workplace) -> None:
    """An actor of the run, which is killed on the way, and an evaluation before and after."""
    held_out = {"rows": 8, "data": {"path": str(place.folder / "questions.jsonl")}}
    search = {"corpus": str(place.folder / "corpus.jsonl"), "topk": 1}
    run = place.start("search_agent", "own", config(place, search=search, evaluation=held_out, advantage="grpo"))
    place.await_lines(run, "own", 2)
    (victim,) = place.processes("ray::LocalSearch")
    victim.kill()
    assert run.wait(timeout=300) == 0, (place.folder / "own.log").read_text()[-3000:]
    assert len(place.metrics("own")) == STEPS and all(step["reward"] > 0.8 for step in place.metrics("own"))
    found = [json.loads(line) for line in (place.folder / "own" / "evaluation.jsonl").read_text().splitlines()]
    assert [one["label"] for one in found] == ["before", "after"]
    assert found[0]["measures"]["f1"] > 0.9 and found[0]["measures"]["searches"] == 2 and found[0]["mean"] == found[0]["measures"]["f1"]
