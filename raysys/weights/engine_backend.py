"""The engine's half of the shared-memory push. vLLM imports this module in its worker process, as `worker_extension_cls`.

Importing it registers a weight-transfer backend with vLLM's factory: chunks arrive as the name of a memory-mapped file
and a layout, never as pickled tensors.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from raysys.weights.digest import digest

BACKEND = "raysys_shared_memory"


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """One bucket: where its bytes are and what lies at which offset."""

    path: str
    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    offsets: list[int]
    digests: list[str]


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads buckets in checkpoint format through vLLM's layerwise reload, and keeps a digest of each tensor as it came."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate
    digests: dict[str, str]

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        return None

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.digests = {}
        forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        with mapped(update_info.path) as data:
            tensors = list(views(data, update_info))
            arrived = {name: digest(tensor.reshape(-1).view(torch.uint8).numpy()) for name, tensor in tensors}
            self.digests |= arrived
            if list(arrived.values()) != update_info.digests:
                return  # the receiver compares and says which: an exception would reach it as a line of text
            # The layerwise loader may keep tensors until a layer is whole, beyond the life of this mapping.
            model: Any = self.model
            model.load_weights((name, tensor.to(self.device, copy=True)) for name, tensor in tensors)
            del tensors

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        return None


@contextmanager
def mapped(path: str) -> Iterator[Tensor]:
    """The bytes of a file as a uint8 tensor, without a copy; unmapped when the last view of it goes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # read-only memory: nobody writes through it
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
    yield tensor


def views(data: Tensor, layout: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a bucket's bytes, in place."""
    for name, shape, dtype, offset in zip(layout.names, layout.shapes, layout.dtypes, layout.offsets, strict=True):
        kind = getattr(torch, dtype)
        size = int(torch.Size(shape).numel()) * kind.itemsize
        yield name, data[offset : offset + size].view(kind).view(tuple(shape))


def forget_packed_experts(model: torch.nn.Module) -> None:
    """On CPU a fused expert layer keeps the kernel that packed its first weights; without this a reload is silently ignored."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class WeightExtension:
    """Methods that vLLM's worker gains; called through `collective_rpc`."""

    def raysys_digests(self: Any) -> dict[str, str]:
        """Digest of each tensor of this update, as it arrived."""
        return dict(self.weight_transfer_engine.digests)

    def raysys_forget_packed_experts(self: Any) -> None:
        """See `forget_packed_experts`; for backends of vLLM's own, which do not know of it."""
        forget_packed_experts(self.weight_transfer_engine.model)

    def raysys_dtypes(self: Any) -> dict[str, str]:
        """torch dtype by name of what the model holds; fused and packed tensors go by names of their own."""
        model = self.weight_transfer_engine.model
        return {name: str(parameter.dtype).removeprefix("torch.") for name, parameter in model.named_parameters()}

    def raysys_differing(self: Any, layout: dict[str, Any]) -> list[str]:
        """Names whose copy in the engine is readable under the same name and shape, and is not equal."""
        own = dict(self.weight_transfer_engine.model.named_parameters())
        info = SharedMemoryUpdate(**layout)
        with mapped(info.path) as data:
            return [name for name, tensor in views(data, info) if _readable(own.get(name), tensor.shape) and not _equal(own[name], tensor)]


def _readable(parameter: Tensor | None, shape: Sequence[int]) -> bool:
    return parameter is not None and tuple(parameter.shape) == tuple(shape)


def _equal(parameter: Tensor, tensor: Tensor) -> bool:
    return torch.equal(parameter.detach().cpu().to(tensor.dtype), tensor)


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)
