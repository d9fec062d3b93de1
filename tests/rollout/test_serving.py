"""A worker's inbox without an engine: what is aborted and comes again, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from raysys.batch import Batch, Ragged
from raysys.config.parts import Rollout
from raysys.rollout import serving
from raysys.rollout.serving import Response, Serving
from raysys.rollout.spec import RolloutSpec, Sampling
from raysys.rollout.worker import RolloutWorker

SAMPLING = Sampling(max_tokens=4, seed=0)


class Slow(Serving):
    """The first sample hangs, and takes its time to be cancelled; all others are there at once."""

    def __init__(self) -> None:
        super().__init__(seats=4)
        self.calls = 0

    async def respond(self, ids: np.ndarray, sampling: Sampling, seed: int) -> Response:
        self.calls += 1
        if self.calls > 1:
            return Response([int(ids[0])], [0.0], [0, 0], "stop")
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
        raise AssertionError("it is cancelled before")


def rows(*first: int) -> Batch:
    return Batch.from_columns(
        prompt_id=[f"p{one}" for one in first], sample=[0] * len(first), prompt_ids=Ragged.of([[one] for one in first], np.int32)
    )


def test_a_ticket_that_comes_again_while_its_aborted_task_ends_is_answered_and_forgotten() -> None:
    async def story() -> None:
        worker = Slow()
        await worker.submit(rows(7), [0], SAMPLING, 0)
        await asyncio.sleep(0.01)
        await worker.abort([0])
        await worker.submit(rows(7), [0], SAMPLING, 0)
        harvest = await asyncio.wait_for(worker.collect(wait=5.0), 2.0)
        assert harvest.tickets == (0,) and not harvest.failures
        await asyncio.sleep(0.1)
        assert not worker._tasks and worker._empty.is_set()

    asyncio.run(story())


def test_samples_that_cannot_be_put_together_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        worker = Slow()
        worker.calls = 1
        await worker.submit(rows(7, 8), [0, 1], SAMPLING, 0)
        with monkeypatch.context() as patch:
            patch.setattr(serving, "_columns", lambda responses: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await worker.collect(wait=5.0)
        harvest = await asyncio.wait_for(worker.collect(wait=60.0), 2.0)
        assert sorted(harvest.tickets) == [0, 1] and harvest.rows is not None and len(harvest.rows) == 2

    asyncio.run(story())


def test_what_is_aborted_before_it_began_leaves_nothing_behind() -> None:
    async def story() -> None:
        worker = Slow()
        await worker.submit(rows(7), [0], SAMPLING, 0)
        await worker.abort([0])
        await asyncio.sleep(0.1)
        assert worker.calls == 0 and not worker._tasks

    asyncio.run(story())


def test_prompts_wait_while_weights_come_and_are_refused_only_by_one_whose_update_failed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    worker = RolloutWorker(RolloutSpec(str(tmp_path), "cpu", "float32", 16, Rollout()))
    assert worker.refusal(0) == "" and "holds weights 0, asked for 1" in worker.refusal(1)
    worker._quarantined = "an update was begun and not finished"
    assert worker.refusal(0) == ""
    worker._quarantined = "tensor w arrived with other bytes than it left with"
    assert "does not generate: tensor w" in worker.refusal(0)
