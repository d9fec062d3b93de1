"""The GPU transport: real engine, real NCCL, two devices (one NCCL rank a device)."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysys.batch import Bucket
from raysys.config.parts import Deadlines, Rollout, Weights
from raysys.config.runs import NewModel
from raysys.errors import ConfigError, WeightSyncError
from raysys.rollout.spec import RolloutSpec
from raysys.rollout.worker import RolloutWorker
from raysys.weights.nccl import NcclReceiver, NcclSender
from raysys.weights.push import Pusher


def header(model: Any) -> Bucket:
    state = model.state_dict()
    return Bucket(
        names=tuple(state),
        shapes=tuple(tuple(tensor.shape) for tensor in state.values()),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for tensor in state.values()),
        offsets=(0,) * len(state),
        digests=("",) * len(state),
        data=np.zeros(0, np.uint8),
    )


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
        sender, bucket = await opened, header(model)
        await worker.begin_update({name: (shape, dtype) for name, shape, dtype in zip(bucket.names, bucket.shapes, bucket.dtypes)})
        sending = asyncio.create_task(asyncio.to_thread(sender.send, model.state_dict().items()))
        await worker.update(bucket)
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
    receiver._announced = {"a": ((2,), "float32")}
    bucket = Bucket(("b",), ((2,),), ("float32",), (0,), ("",), np.zeros(0, np.uint8))
    with pytest.raises(WeightSyncError, match=r"tensor b came as \[2\] float32, announced was None"):
        asyncio.run(receiver.update(None, bucket))
    with pytest.raises(WeightSyncError, match="cannot be compared on the host"):
        asyncio.run(receiver.differing(None, bucket))


def test_asking_for_what_no_trainer_offers_is_a_config_error():
    with pytest.raises(ConfigError, match=r"weights.backend=nccl"):
        Pusher(trainer=None, workers=[], config=Weights(backend="nccl"), deadlines=Deadlines())  # type: ignore[arg-type]
