"""The pool and the source over real Ray actors with an engine that is not one."""

from __future__ import annotations

import asyncio
import os
import time

import numpy as np
import pytest
import ray

from raysys.batch import Batch, Ragged
from raysys.config.parts import Deadlines, Rollout
from raysys.errors import DeadlineError, InfrastructureError, PlacementError, WeightSyncError
from raysys.rollout.pool import RolloutPool
from raysys.rollout.source import OnPolicySource
from raysys.rollout.spec import RolloutSpec, Sampling


class Echo:
    """A worker whose response is the prompt backwards; a prompt that begins with 99 to 96 kills, stops, or breaks it."""

    def __init__(self, spec: RolloutSpec, rank: int):
        self.rank = rank

    async def start(self) -> dict:
        return {"vllm": "none", "pid": os.getpid()}

    async def generate(self, prompts: Batch, sampling: Sampling) -> Batch:
        rows = prompts.ragged("prompt_ids").rows()
        first = {int(row[0]) for row in rows}
        if 99 in first:
            os._exit(1)
        if 98 in first:
            await asyncio.sleep(60)
        if 97 in first:
            raise WeightSyncError("half an update", "push again")
        if 96 in first:
            raise RuntimeError("boom")
        seeds = [sampling.seed_of(prompt, int(sample)) for prompt, sample in zip(prompts.strings("prompt_id"), prompts.numbers("sample"))]
        return prompts.with_columns(
            response_ids=Ragged.of([row[::-1] for row in rows], np.int32),
            rollout_logprobs=Ragged.of([[seed % 97] * len(row) for seed, row in zip(seeds, rows)], np.float32),
            stop_reason=["stop"] * len(rows),
        )

    async def close(self) -> None:
        return None


@pytest.fixture(scope="module", autouse=True)
def cluster(ray_head):
    ray.init(address=ray_head.gcs, log_to_driver=False)
    yield
    ray.shutdown()


def pool(workers: int, **deadlines: float) -> RolloutPool:
    config = Rollout(workers=workers)
    spec = RolloutSpec(model="m", device="cpu", dtype="float32", max_model_len=32, config=config)
    return RolloutPool(config, spec, Deadlines(**{"placement": 60.0, "start": 120.0, "generate": 60.0} | deadlines), worker=Echo)


def prompts(firsts: list[int]) -> Batch:
    rng = np.random.default_rng(0)
    rows = [[first, *rng.integers(3, 90, rng.integers(0, 9))] for first in firsts]
    return Batch.from_columns(
        prompt_id=[f"p{row}" for row in range(len(rows))],
        sample=[0] * len(rows),
        domain=[""] * len(rows),
        prompt_ids=Ragged.of(rows, np.int32),
    )


def test_rows_come_back_in_order_whatever_the_number_of_workers():
    rows, sampling = prompts(list(range(3, 14))), Sampling(max_tokens=4, seed=0)
    found = []
    for workers in (1, 2, 3):
        with pool(workers) as group:
            group.start()
            found.append(group.generate(rows, sampling))
            assert len({fact["pid"] for fact in group.facts}) == workers
    assert found[0].ids == rows.ids
    assert [row.tolist() for row in found[0].ragged("response_ids").rows()] == [
        row[::-1].tolist() for row in rows.ragged("prompt_ids").rows()
    ]
    assert found[1].table.equals(found[0].table) and found[2].table.equals(found[0].table)


def test_what_goes_wrong_is_said_at_once():
    sampling = Sampling(max_tokens=4, seed=0)
    with pool(2, generate=2.0) as group:
        group.start()
        with pytest.raises(WeightSyncError, match="half an update"):
            group.generate(prompts([97]), sampling)
        with pytest.raises(InfrastructureError, match="boom"):
            group.generate(prompts([96]), sampling)
        with pytest.raises(DeadlineError, match=r"'generate' within 2 s \(raise deadlines.generate"):
            group.generate(prompts([98, 5]), sampling)
    with pool(2) as group:  # one dies while the other would still take a minute
        group.start()
        began = time.monotonic()
        with pytest.raises(InfrastructureError, match="died during 'generate'"):
            group.generate(prompts([99, 98]), sampling)
        assert time.monotonic() - began < 20
        assert not isinstance(group.workers, tuple) and len(group.workers) == 2
    assert group.workers == []


def test_no_room_is_a_placement_error():
    with pool(64, placement=1.0) as group, pytest.raises(PlacementError, match=r"no place for rollout: asked for .* 64 bundles"):
        group.start()


def test_the_source_gives_whole_groups_and_keeps_the_cursor():
    class Numbers:
        def __init__(self) -> None:
            self.at = 0

        def take(self, n: int) -> Batch:
            self.at += n
            return prompts(list(range(self.at - n + 3, self.at + 3)))

        def state(self) -> dict:
            return {"at": self.at}

        def restore(self, state: dict) -> None:
            self.at = state["at"]

    with pool(2) as group:
        group.start()
        source = OnPolicySource(Numbers(), group, samples=3, sampling=Sampling(max_tokens=4, seed=0))
        batch = source.take(2, max_age=0)
        assert batch.strings("prompt_id") == ["p0"] * 3 + ["p1"] * 3 and batch.numbers("sample").tolist() == [0, 1, 2] * 2
        state = source.state()
        later = source.take(2, max_age=0)
        source.restore(state)
        assert source.take(2, max_age=0).table.equals(later.table)
        with pytest.raises(ValueError, match="max_age"):
            source.take(2, max_age=1)
