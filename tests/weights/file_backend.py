"""The engine's half of a push over CUDA IPC where there is no GPU: a file stands for the trainer's memory. vLLM's worker imports this."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from raysys.weights import engine_backend
from raysys.weights.engine_backend import mapped


def opened(handle: Any, device: Any) -> Tensor:
    assert device.type == "cpu" and type(handle.memory) is bytes, (device, handle)
    data = mapped(handle.memory.decode())
    assert len(data) == handle.size
    return data


engine_backend.opened = opened
Extension = engine_backend.WeightExtension
