"""A frozen model that does not fit beside what else its GPU holds: its weights stay in host memory and come a layer at a time. For actors.

DeepSpeed's ZeRO stage 3 with parameter offload, one rank by itself: scorers need not be in step with one another, and one that dies is
replaced alone. With N scorers on a node the host holds N copies.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import torch

from raysys.models.causal import load_causal

PREFETCH = 50_000_000
"""Parameters that are fetched ahead of the layer at work."""
STAYS = 100_000
"""Parameters of a tensor up to which it stays on the GPU: norms and biases."""


def load_offloaded(folder: str, dtype: str, device: str, vocabulary: int | None = None) -> Any:
    """As `raysys.models.causal.load_causal`, frozen; called like it.

    Raises:
        ConfigError: as there.
    """
    os.environ["DS_ACCELERATOR"] = device  # before its import, which takes a GPU where it sees one
    import deepspeed

    if not torch.distributed.is_initialized():
        _alone(device)
    model = load_causal(folder, dtype, "cpu", vocabulary=vocabulary)
    size = sum(parameter.numel() for parameter in model.parameters())
    zero = {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": device == "cuda"},
        "stage3_prefetch_bucket_size": min(size, PREFETCH),
        "stage3_param_persistence_threshold": min(STAYS, size // 1000),
        "stage3_max_live_parameters": max(size // 10, 4 * PREFETCH),
    }
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": None}
    if dtype in ("bfloat16", "float16"):
        config["bf16" if dtype == "bfloat16" else "fp16"] = {"enabled": True}
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()
    return engine


def _alone(device: str) -> None:
    """DeepSpeed wants a process group, be it of one."""
    import deepspeed

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(here)
    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # plain gloo serves; that operator would be compiled for a minute
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)
