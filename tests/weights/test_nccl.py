"""The GPU transport: real engine, real NCCL, two devices (one NCCL rank a device)."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raysys.buckets import Bucket, Layout, Plan
from raysys.config.parts import Deadlines, Rollout, Weights
from raysys.config.runs import NewModel
from raysys.errors import WeightSyncError
from raysys.rollout.spec import RolloutSpec
from raysys.rollout.worker import RolloutWorker
from raysys.weights.nccl import NcclReceiver, NcclSender
from raysys.weights.push import Pusher

PLAN = Plan.of([Layout.of({"a": ((2,), "float32", 8)}), Layout.of({"b": ((3,), "float32", 12)})])


@pytest.mark.gpu
def test_weights_reach_an_engine_on_another_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch
    from transformers import AutoModelForCausalLM

    from raysys.models.scratch import new_causal

    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a device for each rank, and there is one")
    folder = str(new_causal(NewModel(), tmp_path, seed=0))
    spec = RolloutSpec(folder, "gpu", "bfloat16", max_model_len=64, config=Rollout(gpu_memory_utilization=0.2), receiver=NcclReceiver)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda:1")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = list(range(10, 34))

    async def push() -> np.ndarray:
        worker = RolloutWorker(spec)
        await worker.start()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        torch.cuda.set_device(1)
        opened = asyncio.create_task(asyncio.to_thread(NcclSender, "127.0.0.1", port, 2))
        await worker._receiver.join(worker._engine, "127.0.0.1", port, 1, 2)
        sender, state = await opened, model.state_dict()
        plan = Plan.of([Layout.of({name: (tensor.shape, "bfloat16", tensor.nbytes) for name, tensor in state.items()})])
        await worker.begin_update(plan)
        sending = asyncio.create_task(asyncio.to_thread(sender.send, state.items()))
        await worker.update(Bucket(plan.mark, 0, ""))
        await sending
        await worker.finish_update(1)
        found = await worker.probe(ids)
        await worker.close()
        return found

    with torch.no_grad():
        wanted = model(torch.tensor([ids], device="cuda:1")).logits[0, :-1].float().log_softmax(-1)
    wanted = wanted.gather(-1, torch.tensor(ids[1:], device="cuda:1")[:, None])[:, 0].cpu().numpy()
    assert np.abs(asyncio.run(push()) - wanted).max() < 0.25


def test_a_header_that_was_not_announced_is_refused_and_nothing_is_asked_of_the_engine():
    receiver = NcclReceiver()
    with pytest.raises(WeightSyncError, match=f"bucket 1 is one of plan {PLAN.mark}, announced was none"):
        asyncio.run(receiver.update(None, Bucket(PLAN.mark, 1, "")))
    receiver._mark, receiver._layouts = PLAN.mark, PLAN.layouts()
    engine: Any = SimpleNamespace(collective_rpc=None)
    with pytest.raises(WeightSyncError, match="cannot be read on the host"):
        asyncio.run(receiver.differing(engine, Bucket(PLAN.mark, 1, "")))


def _put(value: Any) -> Any:
    import ray  # not at module level: Ray reads its authentication mode when it is imported

    return ray.put(value)


class Twin:
    """Trainer and worker of a broadcast without a network: what one sends, all receive, in the order of the calls."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.weight = 0.0

    def bucket_plan(self, max_bytes: int):
        return PLAN

    def meeting_point(self):
        return "127.0.0.1", 7

    def open_sender(self, sender: Any, *group: Any):
        self.log.append(("open", sender, *group))
        return _put(None)

    def send_bucket(self, index: int):
        self.log.append(("send", index))
        return [_put(f"digest-{index}-{self.weight}"), _put("")]

    def probe_logprobs(self, ids: Any):
        return np.zeros(len(ids) - 1, np.float32)


class Listener:
    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def join(self, *group: Any) -> None:
        self.log.append(("join", *group))

    def begin_update(self, plan: Any) -> None:
        self.log.append(("begin", plan.mark))

    def update(self, header: Any) -> None:
        self.log.append(("update", header))

    def finish_update(self, version: int) -> list[str]:
        return ["", ""]

    def limits(self) -> dict[str, int]:
        return {"vocabulary": 50, "length": 10}

    def probe(self, ids: Any) -> np.ndarray:
        return np.zeros(len(ids) - 1, np.float32)

    def seen(self) -> list[tuple[Any, ...]]:
        return self.log


@dataclass(eq=False)
class One:
    name: str
    handle: Any
    state: str = "ready"


class Room:
    """A pool whose workers never change."""

    def __init__(self, handles: list[Any]):
        self.workers = [One(f"worker {place}", handle) for place, handle in enumerate(handles)]

    def await_worker(self) -> None:
        raise AssertionError("somebody is always there")

    def pushed(self, version: int, members: Any) -> None:
        assert members == self.workers

    def lose(self, member: Any, cause: str) -> None:
        raise AssertionError(cause)


def test_a_broadcast_meets_once_tells_before_it_sends_and_marks_what_left(ray_head: Any):
    import ray

    ray.init(address=ray_head.gcs, log_to_driver=False)
    try:
        trainer, workers = Twin(), [ray.remote(Listener).options(num_cpus=0).remote() for _ in range(2)]
        pusher = Pusher(trainer, Room(workers), Weights(backend="nccl"), Deadlines(push=30), engine_ranks=2)
        first, again = pusher.push(1), pusher.push(2)
        trainer.weight = 1.0
        moved = pusher.push(3)
        assert first.fingerprint == again.fingerprint != moved.fingerprint and first.parity_gap == 0
        assert trainer.log[0] == ("open", NcclSender, "127.0.0.1", 7, 5)
        assert trainer.log[1:] == [("send", 0), ("send", 1)] * 3
        heard = ray.get([worker.seen.remote() for worker in workers])
        assert [log[1] for log in heard] == [("join", "127.0.0.1", 7, 1, 5), ("join", "127.0.0.1", 7, 3, 5)]
        assert [entry for entry in heard[0] if entry[0] == "update"] == [("update", Bucket(PLAN.mark, index, "")) for index in (0, 1)] * 3
    finally:
        ray.shutdown()


def test_a_group_is_left_on_both_sides_before_another_is_joined() -> None:
    from raysys.training.worker import TrainerWorker
    from raysys.weights.engine_backend import WeightExtension

    log: list[tuple[Any, ...]] = []

    class Sender:
        def __init__(self, *group: Any):
            self._group = group
            log.append(("open", *group))

        def close(self) -> None:
            log.append(("close", *self._group))

    spec: Any = None
    worker = TrainerWorker(spec, 0, 1)
    worker.open_sender(Sender, "here", 1, 2)
    worker.open_sender(Sender, "here", 2, 3)
    assert log == [("open", "here", 1, 2), ("close", "here", 1, 2), ("open", "here", 2, 3)]
    log.clear()

    async def note(*what: Any) -> None:
        log.append(what)

    engine: Any = SimpleNamespace(
        collective_rpc=note, init_weight_transfer_engine=lambda request: note("join", request.init_info["rank_offset"])
    )
    asyncio.run(NcclReceiver().join(engine, "here", 1, 3, 5))
    assert log == [("raysys_leave",), ("join", 3)]
    backend = SimpleNamespace(shutdown=lambda: log.append(("shutdown",)))
    WeightExtension.raysys_leave(SimpleNamespace(weight_transfer_engine=backend))
    assert log[-1] == ("shutdown",)
