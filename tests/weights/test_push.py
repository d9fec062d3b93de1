"""Pushes to one real engine: what arrives is computed with, what does not is found and named."""

from __future__ import annotations

import os
import signal
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from raysys.batch import Batch
from raysys.buckets import UNDER_WAY, Layout, Placed
from raysys.config.parts import Weights
from raysys.errors import InfrastructureError, WeightSyncError
from raysys.rollout.results import Result, attach
from raysys.rollout.spec import Sampling
from raysys.runtime import get
from raysys.weights.push import PROBE, Pusher, probe_ids
from tests.weights.trainer import DEADLINES, Place, flipped, replanned, stale

TIED = False

pytestmark = [pytest.mark.slow]

ROW = Batch.from_columns(prompt_id=["p"], sample=[0], domain=[""], prompt_ids=[[40, 50, 60]])
SAMPLING = Sampling(max_tokens=8, seed=0)


def engine_gap(place: Place) -> float:
    """Largest difference between engine and trainer on a sequence that no push ever probed."""
    ids = [5, 90, 17, 33, 64, 8, 71, 22, 45]
    found = get(place.pool.workers[0].handle.probe.remote(ids), timeout=60, actor="worker", operation="probe", knob="")
    return float(abs(found - place.trainer.probe_logprobs(ids)).max())


def test_a_push_makes_the_engine_compute_with_the_new_weights(place: Place):
    before = place.pool.generate(ROW, SAMPLING)
    pusher, marks = place.pusher(), set()
    for version in (1, 2, 3):
        place.trainer.move(version)
        assert engine_gap(place) > 0.05
        result = pusher.push(version)
        assert result.version == version and result.parity_gap < 1e-4 and engine_gap(place) < 1e-4
        marks.add(result.fingerprint)
    assert len(marks) == 3 and pusher.push(4).fingerprint == result.fingerprint
    after = place.pool.generate(ROW, SAMPLING)
    assert after.ragged("version_spans")[0].tolist() == [0, 4] and before.ragged("version_spans")[0].tolist() == [0, 0]
    assert not after.table.column("rollout_logprobs").equals(before.table.column("rollout_logprobs"))
    files = list(Path("/dev/shm").glob(f"raysys-push-{place.pool.workers[0].facts['pid']}-*"))
    assert len(files) == min(UNDER_WAY, len(pusher._layouts)), "the receiver's own, written again by each push"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": ((65,), "float32")}, r"model.norm.weight has shape \[65\], the engine's model has \[64\]"),
        ({"model.norm.weight": ((64,), "bfloat16")}, "model.norm.weight is bfloat16, the engine computes in float32"),
        ({"model.layers.7.x": ((64,), "float32")}, r"model.layers.7.x has shape \[64\], the engine's model has no such tensor"),
        ({"model.norm.weight": None}, "model.norm.weight of the engine's model is not among"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_nothing_changes(place: Place, change, message):
    place.pusher().push(5)
    pusher = place.pusher()
    pusher._plan = replanned(pusher._plan, change)
    with pytest.raises(WeightSyncError, match=message):
        pusher.push(6)
    assert engine_gap(place) < 1e-4
    assert place.pool.generate(ROW, SAMPLING).ragged("version_spans")[0].tolist() == [0, 5]


def test_a_changed_byte_is_found_by_name_and_the_worker_waits_for_a_whole_push(place: Place):
    name = "model.layers.1.mlp.up_proj.weight"
    place.trainer.move(7)
    place.trainer.lie = flipped(name)
    with pytest.raises(WeightSyncError, match=f"{name} arrived with other bytes"):
        place.pusher().push(7)
    place.trainer.lie = None
    with pytest.raises(InfrastructureError, match=r"does not generate: bucket \d+ \(from model.* on\) arrived with other bytes"):
        place.pool.generate(ROW, SAMPLING)
    assert place.pusher().push(8).parity_gap < 1e-4
    assert place.pool.generate(ROW, SAMPLING).ragged("version_spans")[0].tolist() == [0, 8]


def test_a_bucket_that_cannot_be_read_is_our_error_and_the_next_push_cures_it(place: Place):
    place.trainer.lie = lambda bucket, _: Placed(bucket.plan, bucket.index, bucket.digest, "/dev/shm/raysys-push-nowhere")
    with pytest.raises(WeightSyncError, match=r"could not load bucket 0 \(from .* on\): .*No such file.*see .*rollout-0.log"):
        place.pusher().push(9)
    place.trainer.lie = lambda bucket, _: replace(bucket, data=bucket.data[:100])
    with pytest.raises(WeightSyncError, match=r"bucket 0 \(from .* on\) came with 100 bytes, announced were \d+"):
        place.pusher().push(9)
    place.trainer.lie = None
    assert place.pusher().push(10).parity_gap < 1e-4 and engine_gap(place) < 1e-4


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_parity_finds_what_digests_cannot(place: Place, name: str):
    """An intact tensor of the wrong moment; one that the engine can show, and one that it keeps fused and packed."""
    old = place.trainer.model.state_dict()[name].clone()
    place.trainer.move(11)
    place.trainer.lie = stale(name, old)
    pusher = place.pusher()
    original, asked = place.trainer.lie, place.trainer.asked

    def honest_afterwards(bucket, layout):
        return original(bucket, layout) if place.trainer.asked - asked <= len(pusher._layouts) else bucket

    place.trainer.lie = honest_afterwards
    said = f"the first tensor that differs in the engine is {name}" if "norm" in name else "every tensor that can be read back is equal"
    with pytest.raises(WeightSyncError, match=said):
        pusher.push(11)
    with pytest.raises(InfrastructureError, match="does not generate: trainer and rollout worker 0 differ"):
        place.pool.generate(ROW, SAMPLING)
    place.trainer.lie = None
    assert place.pusher().push(12).parity_gap < 1e-4


@pytest.mark.parametrize(
    ("dtype", "far", "told"),
    [("bfloat16", 2.0, ""), ("bfloat16", 20.0, "differ by 0.625 nats in the mean"), ("float32", 2.0, "differ by 2 nats")],
)
def test_bfloat16_is_judged_by_the_mean_gap(dtype: str, far: float, told: str):
    """One unlikely token in 32 that is far off is rounding there; all of it in the record."""
    theirs = np.zeros(PROBE)
    theirs[5] = far
    member = Path("rollout worker 0")  # anything that has a name and can be a key
    audience = SimpleNamespace(call=lambda *_: {}, settle=lambda *_: {member: theirs}, ask=lambda *_: {})
    pusher = object.__new__(Pusher)
    pusher._probe, pusher._trainer = [1], SimpleNamespace(probe_logprobs=lambda ids: np.zeros(PROBE))  # type: ignore[assignment]
    pusher._config = Weights()
    pusher._layouts = [Layout.of({"w": ((2,), dtype, 4)})]
    pusher._first_difference = lambda *_: ""  # type: ignore[method-assign]
    if not told:
        assert pusher._parity(audience, 1) == far  # type: ignore[arg-type]
        return
    with pytest.raises(WeightSyncError, match=told):
        pusher._parity(audience, 1)  # type: ignore[arg-type]


def test_the_tolerance_can_be_set_and_the_probe_fits(place: Place):
    place.trainer.move(13)
    with pytest.raises(WeightSyncError, match="allowed: 1e-12"):
        place.pusher(parity_tolerance=1e-12).push(13)
    assert Pusher(place.trainer, place.pool, place.pusher()._config, DEADLINES, probe_ids=[9, 8, 7]).push(14).parity_gap < 1e-4
    ids = probe_ids(98, 100)
    assert len(ids) == PROBE and min(ids) >= 3 and max(ids) < 98 and len(set(ids)) > 20
    assert len(probe_ids(98, 7)) == 7 and set(probe_ids(2, 8)) <= {0, 1}


def crowd(rows: int) -> Batch:
    return Batch.from_columns(
        prompt_id=[f"p{row}" for row in range(rows)],
        sample=[0] * rows,
        domain=[""] * rows,
        prompt_ids=[[40 + row % 9, 50, 60] for row in range(rows)],
    )


def await_all(place: Place, inbox: deque[Result], count: int) -> None:
    place.pool.wait(lambda: len(inbox) == count, "generate")


def test_a_push_does_not_wait_for_samples_under_way_and_each_token_is_of_the_weights_that_its_span_says(place: Place):
    """Frozen, swapped, resumed, the KV cache computed again: every log-prob is the one of its token's version, given all before it."""
    rows, sampling = crowd(100), Sampling(max_tokens=36, seed=1)
    for attempt in range(5):
        first = 20 + 2 * attempt
        place.trainer.move(first)
        place.pusher().push(first)
        before = place.trainer.copy()
        inbox: deque[Result] = deque()
        tickets = place.pool.submit(rows, sampling, inbox)
        place.pool.wait(lambda: len(inbox) > 0, "generate")  # noqa: B023  called at once
        place.trainer.move(first + 1)
        place.pusher().push(first + 1)
        unfinished = len(tickets) - len(inbox)
        await_all(place, inbox, len(tickets))
        done = attach(rows, sorted(inbox, key=lambda result: result.ticket))
        spans = [span.tolist() for span in done.ragged("version_spans").rows()]
        mixed = [row for row, span in enumerate(spans) if len(span) == 4]
        if mixed and unfinished:
            break
    assert mixed and unfinished, "the push came before or after all samples, never among them"
    for row in range(len(rows)):
        prompt, ids, got = (done.ragged(name)[row] for name in ("prompt_ids", "response_ids", "rollout_logprobs"))
        of = {first: before.logprobs(prompt, ids), first + 1: place.trainer.logprobs(prompt, ids)}
        starts, versions = spans[row][::2], spans[row][1::2]
        assert starts[0] == 0 and versions == sorted(versions) and set(versions) <= set(of)
        for start, end, version in zip(starts, [*starts[1:], len(ids)], versions, strict=True):
            np.testing.assert_allclose(got[start:end], of[version][start:end], rtol=0, atol=1e-4)


def kill_engine(place: Place) -> None:
    actor = psutil.Process(place.pool.workers[0].facts["pid"])
    for child in actor.children(recursive=True):
        if child.memory_info().rss > 100 << 20:
            os.kill(child.pid, signal.SIGKILL)


@pytest.mark.long
def test_a_killed_engine_is_replaced_and_the_new_one_gets_the_weights_before_any_prompt(place: Place):
    pusher = place.pusher()
    pusher.push(50)
    place.pool.admit = pusher.catch_up
    kill_engine(place)
    place.trainer.move(51)
    assert pusher.push(51).parity_gap < 1e-4 and place.pool.lost == 1
    assert place.pool.generate(ROW, SAMPLING).ragged("version_spans")[0].tolist() == [0, 51]
    assert engine_gap(place) < 1e-4
