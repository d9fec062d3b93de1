"""Receiver and the engine's half of it around a model that only keeps what it is given. No Ray, no engine."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from raysys.buckets import Layout, Packed, Plan, digest
from raysys.config.parts import Deadlines, Weights
from raysys.errors import BucketError, WeightSyncError
from raysys.weights.push import Pusher
from raysys.weights.receive import SharedMemoryReceiver, shapes_of

LAYOUTS = [Layout.of({f"w{at}{i}": ((at + i,), "float32", 4 * (at + i)) for i in range(1, 5)}) for at in range(5)]
PLAN = Plan.of(LAYOUTS)

pytestmark = [pytest.mark.slow]  # it imports vLLM


class Engine:
    """What a receiver asks of vLLM, with the real backend behind it."""

    model_config = SimpleNamespace(dtype="torch.float32")

    def __init__(self) -> None:
        from raysys.weights.engine_backend import SharedMemoryEngine, WeightExtension

        self.backend: Any = object.__new__(SharedMemoryEngine)
        self.backend.device, self.backend.model = torch.device("cpu"), self
        self.worker: Any = WeightExtension()
        self.worker.weight_transfer_engine = self.backend
        self.loaded: dict[str, torch.Tensor] = {}
        self.asked: list[str] = []

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.loaded |= tensors

    async def start_weight_update(self) -> None:
        self.backend.wrong = {}

    async def update_weights(self, request: Any) -> None:
        self.backend.update_weights(request.update_info)
        await asyncio.sleep(0)

    async def finish_weight_update(self, weight_version: str = "") -> None:
        return None

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.asked.append(method)
        return [getattr(self.worker, method)(*args)]


@pytest.fixture
def receiver() -> Iterator[SharedMemoryReceiver]:
    made = SharedMemoryReceiver()
    made._dtype = "float32"
    yield made
    made.close()


def packed(index: int, seed: int, plan: Plan = PLAN) -> Packed:
    layout = plan.layouts()[index]
    data = np.random.default_rng([seed, index]).integers(0, 100, layout.nbytes, np.uint8)
    return Packed(plan.mark, index, digest(data), data)


def flipped(bucket: Packed, name: str) -> Packed:
    layout, data = LAYOUTS[bucket.index], bucket.data.copy()
    data[layout.offsets[layout.names.index(name)]] ^= 1
    return replace(bucket, data=data)


async def push(receiver: SharedMemoryReceiver, engine: Engine, buckets: list[Packed], plan: Plan = PLAN) -> list[str]:
    await receiver.check(engine, plan)
    await receiver.begin(engine, plan)
    for at in range(0, len(buckets), 2):
        await asyncio.gather(*(receiver.update(engine, bucket) for bucket in buckets[at : at + 2]))
    return await receiver.finish(engine, 1)


def test_what_leaves_is_loaded_and_a_plan_is_said_once(receiver: SharedMemoryReceiver) -> None:
    engine = Engine()
    for seed in range(3):
        buckets = [packed(index, seed) for index in range(5)]
        assert asyncio.run(push(receiver, engine, buckets)) == [bucket.digest for bucket in buckets]
        for bucket, layout in zip(buckets, LAYOUTS, strict=True):
            for name, want in zip(layout.names, layout.tensors(torch.from_numpy(bucket.data)), strict=True):
                assert torch.equal(engine.loaded[name], want)
    assert engine.asked.count("raysys_expect") == 1
    other = Plan.of([Layout.of({"x": ((2, 3), "float32", 24)})])
    asyncio.run(push(receiver, engine, [packed(0, 9, other)], other))
    assert engine.asked.count("raysys_expect") == 2 and engine.loaded["x"].shape == (2, 3)
    with pytest.raises(WeightSyncError, match=f"bucket 0 is one of plan {PLAN.mark}, announced was {other.mark}"):
        asyncio.run(receiver.update(engine, packed(0, 0)))


def test_a_changed_byte_is_traced_to_its_tensor_and_its_bucket_is_not_loaded(receiver: SharedMemoryReceiver) -> None:
    """Also when the bucket after it, which is right, comes before the receiver has asked."""
    engine, buckets = Engine(), [packed(index, 3) for index in range(5)]
    buckets[2] = flipped(buckets[2], "w23")
    with pytest.raises(BucketError, match=r"bucket 2 \(from w21 on\) arrived with other bytes than left") as told:
        asyncio.run(push(receiver, engine, buckets))
    assert set(LAYOUTS[1].names) < set(engine.loaded) and not set(LAYOUTS[2].names) & set(engine.loaded)
    error = pickle.loads(pickle.dumps(told.value))
    trainer: Any = SimpleNamespace(
        bucket_plan=lambda max_bytes: PLAN, tensor_digests=lambda index: LAYOUTS[index].digests(packed(index, 3).data)
    )
    pusher = Pusher(trainer, SimpleNamespace(), Weights(), Deadlines())  # type: ignore[arg-type]
    assert pusher._first_wrong(error) == "tensor w23 arrived with other bytes than it left with"
    right = BucketError(error.where, 2, LAYOUTS[2].digests(packed(2, 3).data))
    assert pusher._first_wrong(right).startswith(
        "bucket 2 (from w21 on) arrived with other bytes than left, and each of its tensors as it is"
    )


def test_only_files_that_an_index_names_are_the_models(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002", "model-00002-of-00002", "adapter_model"):
        save_file({f"w.{name}": torch.zeros(2, 3)}, tmp_path / f"{name}.safetensors")
    assert len(shapes_of(str(tmp_path)) or ()) == 3
    weights = {f"w.model-0000{part}-of-00002": f"model-0000{part}-of-00002.safetensors" for part in (1, 2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert shapes_of(str(tmp_path)) == dict.fromkeys(weights, (2, 3))


def test_half_a_push_is_refused_by_the_first_tensor_that_never_came(receiver: SharedMemoryReceiver) -> None:
    with pytest.raises(WeightSyncError, match="8 announced tensors never came, the first is w31"):
        asyncio.run(push(receiver, Engine(), [packed(index, 0) for index in range(3)]))
