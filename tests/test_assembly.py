"""How rooms start side by side, and what an evaluation asks."""

from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysys import assembly
from raysys.assembly import held_out, start_all
from raysys.config.agents import SearchAgentConfig
from raysys.config.parts import Deadlines
from raysys.config.runs import EvaluateConfig, EvaluationPart, NewModel
from raysys.errors import InfrastructureError
from raysys.training.schedule import learning_rate


def test_the_first_failure_is_told_at_once_whatever_the_others_do() -> None:
    hold = threading.Event()

    def late() -> None:
        hold.wait(30)
        raise RuntimeError("an echo")

    def fails() -> None:
        time.sleep(0.05)
        raise InfrastructureError("scorer 0 died")

    began = time.monotonic()
    with pytest.raises(InfrastructureError, match="scorer 0 died"):
        start_all(trainer=late, scorer=fails)
    assert time.monotonic() - began < 10
    hold.set()


def test_all_have_started_when_it_returns() -> None:
    started: list[str] = []
    start_all(a=lambda: started.append("a"), b=lambda: (time.sleep(0.05), started.append("b")))
    assert sorted(started) == ["a", "b"]


def test_an_evaluation_asks_each_row_once_however_many_are_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from raysys.models.scratch import new_causal

    new_causal(NewModel(hidden_size=32, layers=1, heads=1, kv_heads=1, ffn_size=32, context=64), tmp_path, 0)
    add = {"task": "chain_sum", "params": {"min_terms": 2, "max_terms": 2}, "style": "scratchpad"}
    config = SimpleNamespace(seed=0, max_prompt_tokens=32, max_response_tokens=32, deadlines=Deadlines())

    def asked(rows: int, size: int | None) -> list[str]:
        part = EvaluationPart.parse({"rows": rows, "samples": 2, "data": {"source": {"domains": {"add": add}, "size": size}}})
        return held_out(part, str(tmp_path), config).strings("prompt_id")

    assert asked(3, 3) == asked(3, None) == [f"add:{row}@0" for row in (0, 0, 1, 1, 2, 2)]
    caplog.set_level(logging.INFO)
    assert asked(7, 3) == asked(3, None)
    assert [record.message for record in caplog.records if "evaluation.rows" in record.message] == [
        "evaluation.data has 3 rows, 7 were asked for (evaluation.rows): each is asked once"
    ]


def test_an_evaluation_samples_and_shows_as_its_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    evaluation = {"data": {"path": "p"}, "samples": 4, "temperature": 0.6, "top_p": 0.95}
    config = EvaluateConfig.parse({"models": {"a": "m"}, "evaluation": evaluation, "examples": 20})
    pool: Any = SimpleNamespace(generate=lambda rows, sampling: asked.update(sampling=sampling))
    monkeypatch.setattr(assembly, "held_out", lambda *_: None)
    monkeypatch.setattr(assembly, "Decoder", lambda folder: SimpleNamespace(texts=None))
    monkeypatch.setattr(assembly, "Evaluator", lambda **settings: asked.update(settings))
    session: Any = SimpleNamespace(folder=tmp_path)
    assembly.open_evaluator(config, session, pool, None, "tokenizer", before=None)
    asked["generate"](None)
    assert (asked["sampling"].temperature, asked["sampling"].top_p, asked["examples"]) == (0.6, 0.95, 20)


def test_a_learning_rate_may_end_behind_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(assembly, "TrainerGroup", lambda part, **settings: given.update(settings))
    paper = Path(__file__).parents[1] / "jobs" / "configs" / "search_agent" / "paper.yaml"

    def rates(*overrides: str) -> list[float]:
        config = SearchAgentConfig.load(paper, overrides)
        assembly.open_trainer(config, "s", None, assembly.Hardware("cpu", "float32"), tmp_path)  # type: ignore[arg-type]
        return [learning_rate(5e-7, step, given["steps"], config.trainer.schedule, 0) for step in range(config.steps)]

    assert rates() == pytest.approx([5e-7 * 0.5 * (1 + math.cos(math.pi * step / 410)) for step in range(205)])
    assert rates("trainer.schedule_steps=null")[-1] < 1e-10 < 2.5e-7 < rates()[-1]
