"""The pool and the source over real Ray actors with an engine that is not one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque

import numpy as np
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from raysys.batch import Batch, Ragged
from raysys.config.parts import Deadlines, Rollout
from raysys.errors import DataError, DeadlineError, InfrastructureError, PlacementError
from raysys.rollout.members import Member
from raysys.rollout.pool import RolloutPool
from raysys.rollout.results import Result
from raysys.rollout.serving import Response, Serving
from raysys.rollout.source import OnPolicySource
from raysys.rollout.spec import RolloutSpec, Sampling
from tests.processes import gone


class Echo(Serving):
    """A worker whose response is the prompt backwards; a prompt that begins with 99 to 95 kills, stops, or breaks it."""

    def __init__(self, spec: RolloutSpec, rank: int):
        super().__init__(spec.config.max_sequences)
        self.rank = rank

    async def start(self) -> dict:
        return {"vllm": "none", "pid": os.getpid(), "vocabulary": 1000}

    async def respond(self, ids: np.ndarray, sampling: Sampling, seed: int) -> Response:
        first = int(ids[0])
        if first == 99:
            os._exit(1)
        if first == 98:
            await asyncio.sleep(60)
        if first == 97:
            raise DataError("this row is no good")
        if first == 96:
            raise RuntimeError("boom")
        if first == 95:
            return Response([5000], [0.0], [0, 0], "stop")
        return Response(ids[::-1].tolist(), [-float(seed % 97)] * len(ids), [0, 0], "stop")

    async def close(self) -> None:
        return None


@pytest.fixture(scope="module", autouse=True)
def cluster(ray_head):
    ray.init(address=ray_head.gcs, log_to_driver=False)
    yield
    ray.shutdown()


def pool(workers: int | str, retries: int = 2, release_after: float | None = None, worker: type = Echo, **deadlines: float) -> RolloutPool:
    config = Rollout(workers=workers, retries=retries, release_after=release_after)
    spec = RolloutSpec(model="m", device="cpu", dtype="float32", max_model_len=32, config=config)
    return RolloutPool(config, spec, Deadlines(**{"placement": 60.0, "start": 120.0, "generate": 60.0} | deadlines), worker=worker)


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
    rows, sampling = prompts(list(range(3, 14))), Sampling(max_tokens=16, seed=0)
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


SAMPLING = Sampling(max_tokens=16, seed=0)


def test_a_row_that_cannot_be_sampled_is_named_with_its_causes_and_the_others_go_on():
    with pool(2, retries=1, generate=5.0) as group:
        group.start()
        with pytest.raises(DataError, match=r"sample p0/0 could not be drawn: this row is no good \("):
            group.generate(prompts([97, 5]), SAMPLING)
        with pytest.raises(InfrastructureError, match="p1/0 could not be drawn: RuntimeError: boom; then RuntimeError: boom"):
            group.generate(prompts([5, 96]), SAMPLING)
        with pytest.raises(InfrastructureError, match=r"no answer from rollout worker \d in 5 s \(deadlines.generate\); then no answer"):
            group.generate(prompts([98, 5]), SAMPLING)
        assert group.lost == 0 and group.counts() == {"redispatched": 2, "duplicates": 0, "lost_workers": 0}
        with pytest.raises(InfrastructureError, match="token ids from 5000 to 5000, the vocabulary has 1000"):
            group.generate(prompts([95]), SAMPLING)
        assert group.lost == 2, "a worker that answers nonsense is not believed again"
        group.wait(lambda: bool(group.workers), "start", limit=60)  # five seconds are too few for a process to start
        assert len(group.generate(prompts([5, 6, 7]), SAMPLING)) == 3


def test_a_prompt_that_kills_its_worker_is_given_up_and_the_others_are_not_lost():
    with pool(2) as group:
        group.start()
        inbox: deque[Result] = deque()
        tickets = group.submit(prompts([99, *range(3, 40)]), SAMPLING, inbox)
        group.wait(lambda: len(inbox) == len(tickets), "generate")
        dead = [result for result in inbox if result.rows is None]
        assert [result.ticket for result in dead] == tickets[:1] and len(dead[0].causes) == 3
        assert all("died during 'generate'" in cause for cause in dead[0].causes)
        assert sorted(result.ticket for result in inbox) == tickets and group.lost == 3


class Late(Echo):
    """The first of them dies while it starts."""

    async def start(self) -> dict:
        if self.rank == 0:
            os._exit(1)
        return await super().start()


class Never(Echo):
    async def start(self) -> dict:
        os._exit(1)


def test_a_worker_that_dies_while_the_run_starts_is_replaced_and_if_all_do_the_run_ends():
    with pool(1, worker=Late) as group:
        group.start()
        assert len(group.generate(prompts([5, 6]), SAMPLING)) == 2 and group.lost == 1
    with (
        pool(1, worker=Never) as group,
        pytest.raises(InfrastructureError, match=r"4 rollout workers were lost with no sample in between, .*died during 'start'"),
    ):
        group.start()


def test_workers_that_die_with_no_sample_in_between_end_the_run():
    with pool(1, retries=9) as group:
        group.start()
        with pytest.raises(InfrastructureError, match="4 rollout workers were lost with no sample in between, the first: rollout worker 0"):
            group.generate(prompts([99]), SAMPLING)


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_worker_that_dies_or_falls_silent_is_replaced(signal_):
    with pool(2, heartbeat=5.0, generate=120.0) as group:
        group.start()
        pids = [fact["pid"] for fact in group.facts]
        os.kill(pids[0], signal_)
        began = time.monotonic()
        for _ in range(4):
            assert len(group.generate(prompts(list(range(3, 60))), SAMPLING)) == 57
        group.wait(lambda: len(group.workers) == 2, "start")
        assert group.lost == 1 and time.monotonic() - began < 90
        until = time.monotonic() + 30
        while not gone(pids[0]) and time.monotonic() < until:
            time.sleep(0.1)
        assert gone(pids[0]), "what is given up must not go on holding its place"


def test_the_pool_grows_into_the_room_there_is_and_gives_it_back():
    with pool("1..3", release_after=1.0) as group:
        group.start()
        assert len(group.workers) == 1
        inbox: deque[Result] = deque()
        tickets = group.submit(prompts([98] * 200), SAMPLING, inbox)
        group.wait(lambda: len(group.workers) == 3, "start")
        group.cancel(tickets)
        group.wait(lambda: len(group.workers) == 1, "shrink")
        assert len(group.generate(prompts([5, 6, 7]), SAMPLING)) == 3 and not inbox


def test_a_worker_that_has_a_little_to_do_now_and_then_is_kept():
    with pool("1..2", release_after=5.0) as group:
        group.start()
        tickets = group.submit(prompts([98] * 200), SAMPLING, deque())
        group.wait(lambda: len([worker for worker in group.workers if worker.state == "ready"]) == 2, "start")
        group.cancel(tickets)
        names = {worker.name for worker in group.workers}
        for _ in range(8):  # a moment's work, and longer than `release_after` in all
            assert len(group.generate(prompts(list(range(3, 20))), SAMPLING)) == 17
            time.sleep(1.0)
        assert {worker.name for worker in group.workers} == names


class Odd(Echo):
    """The second worker of a pool runs another vLLM; the third another model."""

    async def start(self) -> dict:
        facts = await super().start()
        return facts | {"vllm": "0.33" if self.rank == 1 else "0.32", "revision": "b" if self.rank == 2 else "a"}


def test_a_worker_with_another_vllm_or_model_is_refused_with_both_versions():
    config = Rollout(workers=2)
    spec = RolloutSpec(model="m", device="cpu", dtype="float32", max_model_len=32, config=config)
    with (
        RolloutPool(config, spec, Deadlines(placement=60, start=120), worker=Odd) as group,
        pytest.raises(InfrastructureError, match=r"rollout worker \d runs vLLM 0.3\d, the others 0.3\d \(install the same on all nodes\)"),
    ):
        group.start()
    config = Rollout(workers="1..3", restarts=1)
    with RolloutPool(config, spec, Deadlines(placement=60, start=120), worker=Odd) as group:
        group.start()
        assert len(group.generate(prompts([5, 6]), SAMPLING)) == 2
        with pytest.raises(
            InfrastructureError,
            match=r"2 rollout workers were lost .* first: rollout worker [12]: it runs (vLLM 0.33|a model of revision b)",
        ):
            group.wait(lambda: False, "grow")


def test_no_room_is_a_placement_error():
    told = r"no place for rollout: asked for .* \d\d bundles \(\d+ workers have theirs\), waited 1 s"
    with pool(64, placement=1.0) as group, pytest.raises(PlacementError, match=told):
        group.start()


def test_a_place_that_is_there_is_seen_every_time():
    config = Rollout()
    member = Member(0, RolloutSpec(model="m", device="cpu", dtype="float32", max_model_len=32, config=config), Echo, 0.0)
    until = time.monotonic() + 30
    while not member.placed(now := time.monotonic()) and now < until:
        time.sleep(0.1)
    assert all(member.placed(now + second) for second in range(1, 50)), "each look must find it, however slow the cluster answers"
    member.kill()


def test_an_autoscaler_that_never_delivers_is_one_warning_and_the_run_goes_on(caplog):
    rest = int(ray.cluster_resources()["CPU"]) - 1
    others = placement_group([{"CPU": 1.0}] * rest)
    try:
        assert others.wait(30)
        until = time.monotonic() + 30
        while ray.available_resources().get("CPU", 0) < 1 and time.monotonic() < until:  # the last pool's processes are on their way out
            time.sleep(0.1)
        with pool("1..4", placement=4.0) as group:
            group.start()
            assert len(group.generate(prompts([5, 6, 7]), SAMPLING)) == 3  # from here on it wants four
            with contextlib.suppress(DeadlineError):
                group.wait(lambda: False, "grow", limit=6.0)
            assert len(group.generate(prompts([5, 6, 7]), SAMPLING)) == 3 and len(group.workers) == 1
    finally:
        remove_placement_group(others)
    (told,) = [record.getMessage() for record in caplog.records if "no place" in record.getMessage()]
    assert "still no place for rollout: asked for {'CPU': 3.0} as 3 bundles (1 workers have theirs), waited 4 s" in told
    assert "cluster has {'CPU': 16.0}, free {}" in told, "without the names of placement groups"
    assert "raise deadlines.placement. The run goes on" in told


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
        source = OnPolicySource(Numbers(), group, samples=3, sampling=Sampling(max_tokens=16, seed=0))
        batch = source.take(2, max_age=0)
        assert batch.strings("prompt_id") == ["p0"] * 3 + ["p1"] * 3 and batch.numbers("sample").tolist() == [0, 1, 2] * 2
        state = source.state()
        later = source.take(2, max_age=0)
        source.restore(state)
        assert source.take(2, max_age=0).table.equals(later.table)
