"""Seconds of a push from GPU to GPU, to one engine and to many: the many should take about as long as the one.

Real engines, a real trainer, the real `Pusher`; digests and the parity probe as in a run, the probe not in the seconds.
nccl: one trainer rank and engines on the other GPUs. ipc: a trainer rank and an engine on each GPU.
"""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

DEFAULTS: dict[str, Any] = {
    "backend": "nccl",
    "engines": None,  # as many as there are GPUs for
    "model": {"hidden_size": 2048, "layers": 16, "heads": 16, "kv_heads": 16, "head_dim": 128, "ffn_size": 6144, "initializer_range": 0.02},
    "bucket_mib": 256,
    "repeats": 5,
}
TARGET = 1.3


def run(backend: str, engines: int | None, model: dict[str, Any], bucket_mib: int, repeats: int) -> dict[str, Any]:
    """Medians of `repeats` warm pushes to one engine and to `engines`, and their ratio. Raises SystemExit without enough GPUs."""
    import torch

    trainers, have = int(backend == "nccl"), torch.cuda.device_count()
    needed = (engines or 2) + trainers
    if have < needed:
        raise SystemExit(f"weight-push-gpu with backend={backend} needs {needed} GPUs, this machine has {have}")
    from tests.bench.private_ray import private_ray

    with private_ray(), tempfile.TemporaryDirectory() as folder:
        from raysys.config.runs import NewModel
        from raysys.models.scratch import new_causal

        made = str(new_causal(NewModel(**model), folder, seed=0))
        pushed = [_pushed(made, backend, count, bucket_mib, repeats) for count in (1, engines or have - trainers)]
    return {"pushed": pushed, "ratio": pushed[1]["push_s"] / pushed[0]["push_s"], "targets": {"ratio": TARGET}}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    return [["engines", "push_s"], *([row["engines"], row["push_s"]] for row in figures["pushed"]), ["ratio", figures["ratio"]]]


def _pushed(folder: str, backend: Any, engines: int, bucket_mib: int, repeats: int, device: str = "gpu") -> dict[str, Any]:
    from raysys.colocate import SHARE, lodger
    from raysys.config.parts import Deadlines, Rollout, Trainer, Weights
    from raysys.rollout.members import Member
    from raysys.rollout.pool import RolloutPool
    from raysys.rollout.spec import RolloutSpec
    from raysys.training.group import TrainerGroup
    from raysys.training.objectives import GopdObjective
    from raysys.weights.ipc import IpcReceiver
    from raysys.weights.nccl import NcclReceiver
    from raysys.weights.push import Pusher
    from raysys.weights.receive import SharedMemoryReceiver

    together, dtype = backend == "ipc", "bfloat16" if device == "gpu" else "float32"
    deadlines, rollout = Deadlines(placement=120, start=600, push=300), Rollout(workers=engines, gpu_memory_utilization=0.3)
    receiver: Any = {"nccl": NcclReceiver, "ipc": IpcReceiver}.get(backend, SharedMemoryReceiver)
    spec = RolloutSpec(folder, device, dtype, max_model_len=64, config=rollout, receiver=receiver)
    ranks, share = Trainer(ranks=engines if together else 1), SHARE if together else 1.0
    with TrainerGroup(ranks, folder, GopdObjective(), 1e-5, 1, 0, 1.0, device, dtype, deadlines, share=share) as trainer:
        trainer.start()
        with RolloutPool(rollout, spec, deadlines, member=lodger(trainer) if together else Member) as pool:
            pool.start()
            pusher = Pusher(trainer, pool, Weights(backend=backend, bucket_mib=bucket_mib), deadlines)
            laps = [pusher.push(version).seconds["transfer"] for version in range(1, repeats + 2)]
    return {"engines": engines, "push_s": statistics.median(laps[1:]), "laps": laps}  # the first push also meets and makes its buffers
