"""Answers become columns of the record, if they can be answers at all. No Ray."""

from __future__ import annotations

import re
from collections import deque
from typing import Any

import numpy as np
import pytest

from raysys.batch import Batch, Ragged
from raysys.config.parts import Deadlines, Rollout
from raysys.rollout.pool import RolloutPool
from raysys.rollout.results import Result, absurd
from raysys.rollout.source import OnPolicySource
from raysys.rollout.spec import Harvest, RolloutSpec, Sampling


def answers(ids: list[list[int]], spans: list[list[int]] | None = None, logprob: float = -1.0) -> Batch:
    return Batch.from_columns(
        response_ids=Ragged.of(ids, np.int32),
        rollout_logprobs=Ragged.of([[logprob] * len(row) for row in ids], np.float32),
        version_spans=Ragged.of(spans or [[0, 0]] * len(ids), np.int32),
        stop_reason=["stop"] * len(ids),
    )


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (answers([[5, 6], [7]]), ""),
        (answers([[5, 6, 7], [7]], [[0, 3, 1, 4], [0, 4]]), ""),
        (answers([[5]]), "2 prompts with 1 responses"),
        (answers([[5, -1], [7]]), "token ids from -1 to 7"),
        (answers([[5, 50], [7]]), "token ids from 5 to 50, the vocabulary has 50"),
        (answers([[5], [7]], logprob=float("nan")), "not finite"),
        (answers([[5], [7]], logprob=0.5), "above 0"),
        (answers([[5], [1, 2, 3, 4]]), "with 4 tokens, asked for were 3 at most"),
        (answers([[5], []]), "with no token"),
        (answers([[5], [7]], [[0, 0], []]), r"version spans \[\] of 1 tokens"),
        (answers([[5], [7]], [[0, 0], [0]]), r"version spans \[0\]"),
        (answers([[5, 6], [7]], [[1, 0], [0, 0]]), r"version spans \[1, 0\] of 2"),
        (answers([[5, 6], [7]], [[0, 0, 2, 1], [0, 0]]), r"version spans \[0, 0, 2, 1\] of 2"),
        (answers([[5, 6], [7]], [[0, 0, 0, 1], [0, 0]]), r"version spans \[0, 0, 0, 1\]"),
        (answers([[5], [7]], [[0, 5], [0, 0]]), "weights 5, of which there are none newer than 4"),
    ],
)
def test_what_can_be_no_answer_is_told(rows: Batch, told: str) -> None:
    found = absurd(rows, [None, 3], vocabulary=50, newest=4)
    assert found == "" if not told else re.search(told, found), found


def test_an_episode_may_end_before_anything_is_said() -> None:
    rows = answers([[5], []]).with_columns(runs=Ragged.of([[0], []], np.int32), episode=["", ""])
    assert absurd(rows, [3, 3], vocabulary=50, newest=0) == ""


def test_answers_to_what_nobody_asked_and_second_answers_are_told() -> None:
    config = Rollout()
    pool = RolloutPool(config, RolloutSpec("m", "cpu", "float32", 32, config), Deadlines())
    prompts = Batch.from_columns(prompt_id=["a", "b"], sample=[0, 0], prompt_ids=Ragged.of([[1], [2]], np.int32))
    tickets = pool.submit(prompts, Sampling(max_tokens=3, seed=0), deque())
    member: Any = type("Member", (), {"facts": {"vocabulary": 50}})
    for given, told in ((tickets, ""), ([*tickets[:1]] * 2, "one prompt twice"), ([tickets[0], 99], r"nobody asked \(ticket 99\)")):
        found = pool._wrong(member, Harvest(tickets=tuple(given), rows=answers([[5], [7]])))
        assert found == "" if not told else re.search(told, found), found
    assert "asked for were 3 at most" in pool._wrong(member, Harvest(tickets=tuple(tickets), rows=answers([[5], [7] * 4])))


def test_what_ended_together_is_copied_once_a_step_and_not_once_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    count, whole = 64, answers([[row] for row in range(64)])
    prompts = Batch.from_columns(
        prompt_id=[f"p{row}@0" for row in range(count)], sample=[0] * count, prompt_ids=Ragged.of([[1]] * count, np.int32)
    )

    class Pool:
        """Everything is finished at once."""

        version = 0

        def submit(self, rows: Batch, sampling: Sampling, inbox: deque[Result], wave: int = 0) -> list[int]:
            inbox += [Result(ticket, whole, ticket) for ticket in range(len(rows))]
            return list(range(len(rows)))

        def wait(self, done: Any, operation: str) -> None:
            assert done()

    stream: Any = type("Prompts", (), {"take": lambda self, n: prompts, "state": lambda self: {}})()
    copied: list[int] = []
    concat = Batch.concat
    monkeypatch.setattr(Batch, "concat", lambda batches: copied.append(sum(map(len, batches))) or concat(batches))
    for finish in (lambda source: source.take(count, 0), lambda source: source.backlog()):
        copied.clear()
        source = OnPolicySource(stream, Pool(), 1, Sampling(max_tokens=3, seed=0))  # type: ignore[arg-type]
        source._ask(0, count)
        batch = finish(source)
        assert [row.tolist() for row in batch.ragged("response_ids").rows()] == [[row] for row in range(count)]
        assert sum(copied) <= 4 * count
