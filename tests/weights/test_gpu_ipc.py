"""A push inside a GPU: real CUDA handles, a real engine that sleeps and wakes, and the time of many engines against one's."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from raysys.config.parts import Rollout
from raysys.config.runs import NewModel
from raysys.rollout.spec import RolloutSpec
from raysys.rollout.worker import RolloutWorker
from raysys.weights.ipc import IpcReceiver, IpcSender

IDS = [5, 90, 17, 33, 64, 8, 71, 22, 45]


class Local:
    """A trainer in this process: a transformers model on the first GPU, in buckets as a rank makes them."""

    def __init__(self, folder: str):
        import torch
        from torch.distributed import HashStore  # type: ignore[attr-defined]
        from transformers import AutoModelForCausalLM

        from raysys.training.weights import Packer

        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda:0")
        self.packer = Packer(SimpleNamespace(module=self.model, zero_optimization_stage=lambda: 0), 100_000)
        self.sender = IpcSender()

    def move(self) -> None:
        import torch

        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))

    def gap(self, found: np.ndarray) -> float:
        """Of the engine's log-probs of `IDS`, from a forward pass of the model."""
        import torch

        ids = torch.tensor([IDS], device="cuda:0")
        with torch.no_grad():
            wanted = self.model(ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return float(np.abs(found - wanted.cpu().numpy()).max())

    async def push(self, worker: RolloutWorker, version: int) -> None:
        await worker.begin_update(self.packer.plan)
        for index in range(len(self.packer.plan.layouts())):
            offer = self.packer.offer(index, self.sender)
            assert offer is not None and offer.digest
            await worker.update(offer)
        await worker.finish_update(version)
        self.sender.free()


@pytest.mark.gpu
def test_an_engine_sleeps_wakes_and_takes_its_weights_inside_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from raysys.models.scratch import new_causal

    folder, share = str(new_causal(NewModel(), tmp_path, seed=0)), 0.3
    config = Rollout(gpu_memory_utilization=share)
    spec = RolloutSpec(folder, "gpu", "bfloat16", max_model_len=64, config=config, receiver=IpcReceiver, sleeps=True)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # the engine in a process of its own: CUDA opens no handle of the same one
    trainer = Local(folder)

    async def story() -> None:
        worker = RolloutWorker(spec)
        await worker.start()
        try:
            trainer.move()
            assert trainer.gap(await worker.probe(IDS)) > 0.5
            for version in (1, 2):
                held = torch.cuda.memory_allocated()
                await trainer.push(worker, version)
                assert torch.cuda.memory_allocated() == held, "what was offered is not freed"
                assert trainer.gap(await worker.probe(IDS)) < 0.25
                (awake, whole), _ = torch.cuda.mem_get_info(), await worker.sleep()
                asleep = torch.cuda.mem_get_info()[0]
                assert asleep - awake > 0.5 * share * whole, f"asleep it gave {asleep - awake} of {share * whole:.0f} bytes back"
                trainer.move()
                await worker.wake()
                assert asleep - torch.cuda.mem_get_info()[0] > 0.5 * share * whole
        finally:
            await worker.close()

    try:
        asyncio.run(story())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("backend", "needed"), [("nccl", 3), ("ipc", 2)])
def test_n_engines_get_a_push_in_about_the_time_of_one(backend: str, needed: int, tmp_path: Path):
    import torch

    if torch.cuda.device_count() < needed:
        pytest.skip(f"two engines and their trainer need {needed} GPUs with {backend}")
    command = [sys.executable, "-m", "tests.bench", "weight-push-gpu", "--json", str(tmp_path / "out.json"), f"backend={backend}"]
    subprocess.run(command, cwd=Path(__file__).resolve().parents[2], check=True)
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert figures["ratio"] <= figures["targets"]["ratio"], figures


def test_without_gpus_the_bench_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch):
    import torch

    from tests.bench import weight_push_gpu

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for backend, needed in (("nccl", 3), ("ipc", 2)):
        with pytest.raises(SystemExit) as told:
            weight_push_gpu.run(**weight_push_gpu.DEFAULTS | {"backend": backend})
        assert str(told.value) == f"weight-push-gpu with backend={backend} needs {needed} GPUs, this machine has 0"
