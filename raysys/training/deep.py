"""What every DeepSpeed rank does alike: join the others, configure ZeRO, step without letting a bad gradient through. For actors only."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, Protocol

import deepspeed
import torch

from raysys.config.parallel import REDUCE_BUCKET


class Rank(Protocol):
    """A DeepSpeed rank as checkpoints see it."""

    engine: Any
    model: Any
    rank: int
    world: int
    device: torch.device
    stage: int
    """An `effective_stage`."""
    names: dict[str, Any]
    """Parameters, in the order in which the optimiser numbers them where no experts are split."""
    step_index: int
    updates: int

    @property
    def layout(self) -> dict[str, Any]: ...
    def idle_step(self) -> None: ...


def join(device: str, threads: int, seed: int) -> tuple[int, int, torch.device]:
    """Rank, number of ranks and device of this process, which has joined the others.

    RANK, WORLD_SIZE and the rendezvous are in the environment. A process group that is there already is taken as it is.

    Args:
        device: "cpu" or "gpu".
        threads: CPU threads of torch.
        seed: of torch's random numbers.
    """
    gpu = device == "gpu"
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if not gpu:  # to look at the table tries every operator's compiler, which on a GPU takes its time and complains
        # Plain gloo serves; the shared-memory operator would be compiled for a minute first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", verbose=False)
    here = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), here


def settings(stage: int, dtype: str, clip: float, parameters: int, offload: bool = False) -> dict[str, Any]:
    """DeepSpeed's config.

    Args:
        stage: an `effective_stage`.
        dtype: "float32" or "bfloat16".
        clip: largest norm of the global gradient.
        parameters: of the model.
        offload: optimiser states in host memory.
    """
    bucket = min(parameters, REDUCE_BUCKET)  # DeepSpeed allocates whole buckets, also for a model that fits in a corner of one
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": min(parameters, 50_000_000),
        "stage3_param_persistence_threshold": min(100_000, parameters // 1000),
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    half = {
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    return (half if dtype == "bfloat16" else {}) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip if stage else 0.0,  # stage 0: see `update`
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": None,
    }


def update(engine: Any, stage: int, clip: float, clipped: Callable[[float], float] | None = None) -> tuple[float, bool]:
    """The optimiser step on the gradients that are there, unless one of them is not finite.

    Args:
        clip: largest norm of the global gradient.
        clipped: clips at stage 0 and gives the norm before; None: torch's own, of the parameters that this rank has.

    Returns:
        The gradient norm before clipping, and whether the step was taken; if not, parameters are as before.
    """
    if stage == 0:
        # Here DeepSpeed would clip without looking: NaN gradients would reach the weights.
        norm = clipped(clip) if clipped else float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), clip))
        applied = math.isfinite(norm)
        if applied:
            engine.step()
        return norm, applied
    engine.step()
    return float(engine.get_global_grad_norm()), not engine.optimizer.overflow
